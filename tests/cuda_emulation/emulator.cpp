// Blocks one after the other, their threads as fibers that change places at barriers, shuffles and
// votes. A warp runs on to the next barrier before another has its turn: what needs a barrier and
// has none goes wrong. SDKERNELS_EMULATION_ORDER says in which order warps and lanes take turns:
// forward (default), reverse or shuffled.
#include <cuda_runtime.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 * 1024;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::kDone;
  dim3 thread;
  unsigned mask = 0, from_lane = 0;  // while in a warp's exchange or vote
  uint64_t bits = 0, result = 0;
  bool votes = false;
};

class Scheduler {
 public:
  Scheduler() {
    const char* variable = std::getenv("SDKERNELS_EMULATION_ORDER");
    order_ = variable ? variable : "forward";
    if (order_ != "forward" && order_ != "reverse" && order_ != "shuffled")
      throw std::invalid_argument("SDKERNELS_EMULATION_ORDER: got " + order_);
  }

  void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y != 1 || grid.z != 1)
      throw std::runtime_error("emulation: a grid or block that is not modelled");
    const std::lock_guard<std::mutex> lock(mutex_);
    gridDim = grid;
    blockDim = block;
    body_ = &thread;
    grow(threads);
    for (const unsigned number : permuted(grid.x)) {
      blockIdx = dim3(number, 0, 0);
      run_block(threads);
    }
  }

  Fiber& current() { return *fibers_[current_]; }
  unsigned lane() const { return current_ % kWarp; }

  // Gives way until another fiber or the scheduler makes this one ready again.
  void wait(State state) {
    current().state = state;
    switch_to_scheduler(current());
  }

  void trap() {
    trapped_ = true;
    current().state = State::kDone;
    switch_to_scheduler(current());
    std::abort();  // never resumed
  }

 private:
  std::vector<unsigned> permuted(unsigned count) {
    std::vector<unsigned> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0u);
    if (order_ == "reverse") std::reverse(numbers.begin(), numbers.end());
    if (order_ == "shuffled") std::shuffle(numbers.begin(), numbers.end(), random_);
    return numbers;
  }

  void grow(unsigned threads) {
    while (fibers_.size() < threads) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fibers_.back()->stack == MAP_FAILED) throw std::bad_alloc();
    }
  }

  void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.state = State::kReady;
      fiber.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      prepare(fiber.context, fiber.stack);
    }
    trapped_ = false;
    for (bool progress = true; progress;) {
      progress = false;
      for (const unsigned warp : permuted((threads + kWarp - 1) / kWarp))
        progress |= run_warp(warp * kWarp, std::min(threads - warp * kWarp, kWarp));
      if (!progress) progress = release_barrier(threads);
    }
    for (unsigned i = 0; i < threads; ++i)
      if (fibers_[i]->state != State::kDone)
        throw std::runtime_error("emulation: threads wait for others that never come");
  }

  // As far as it gets by itself; false if that is nowhere.
  bool run_warp(unsigned first, unsigned lanes) {
    bool ran = false;
    for (bool progress = true; progress; ran |= progress) {
      progress = false;
      for (const unsigned lane : permuted(lanes)) {
        if (fibers_[first + lane]->state != State::kReady) continue;
        progress = true;
        switch_to(first + lane);
        if (trapped_) throw std::runtime_error("emulation: the kernel trapped");
      }
      progress |= release_warp(first, lanes);
    }
    return ran;
  }

  static void prepare(ucontext_t& context, void* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
  }

  // Lanes whose whole mask has arrived exchange their values.
  bool release_warp(unsigned first, unsigned lanes) {
    bool released = false;
    for (unsigned i = 0; i < lanes; ++i) {
      Fiber& fiber = *fibers_[first + i];
      if (fiber.state != State::kInWarp) continue;
      unsigned arrived = 0, votes = 0;
      for (unsigned other = 0; other < lanes; ++other) {
        const Fiber& its = *fibers_[first + other];
        if (its.state != State::kInWarp || its.mask != fiber.mask) continue;
        arrived |= 1u << other;
        votes |= (its.bits & 1 ? 1u : 0u) << other;
      }
      if (!(fiber.mask >> i & 1)) throw std::runtime_error("emulation: a lane outside its mask");
      if (arrived != fiber.mask) continue;
      for (unsigned other = 0; other < lanes; ++other) {
        Fiber& its = *fibers_[first + other];
        if (!(arrived >> other & 1)) continue;
        if (its.votes != fiber.votes) throw std::runtime_error("emulation: a vote meets a shuffle");
        if (its.votes) {
          its.result = votes;
        } else {
          if (its.from_lane >= lanes || !(arrived >> its.from_lane & 1))
            throw std::runtime_error("emulation: a shuffle from a lane outside of its mask");
          its.result = fibers_[first + its.from_lane]->bits;
        }
      }
      for (unsigned other = 0; other < lanes; ++other)
        if (arrived >> other & 1) fibers_[first + other]->state = State::kReady;
      released = true;
    }
    return released;
  }

  bool release_barrier(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i)
      if (fibers_[i]->state != State::kAtBarrier) return false;
    for (unsigned i = 0; i < threads; ++i) fibers_[i]->state = State::kReady;
    return true;
  }

  void switch_to(unsigned i) {
    current_ = i;
    Fiber& fiber = *fibers_[i];
    threadIdx = fiber.thread;
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStack);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  void switch_to_scheduler(Fiber& fiber) {
    const bool done = fiber.state == State::kDone;
    __sanitizer_start_switch_fiber(done ? nullptr : &fiber.fake_stack, scheduler_stack_,
                                   scheduler_stack_size_);
    swapcontext(&fiber.context, &scheduler_);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack_, &scheduler_stack_size_);
  }

  static void enter();

  std::string order_;
  std::mt19937 random_{0};
  std::mutex mutex_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  unsigned current_ = 0;
  bool trapped_ = false;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
};

Scheduler& scheduler() {
  static Scheduler one;
  return one;
}

void Scheduler::enter() {
  Scheduler& self = scheduler();
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_stack_size_);
  (*self.body_)();
  self.current().state = State::kDone;
  self.switch_to_scheduler(self.current());
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  // A GPU that the build does not cover; a trap of a kernel before this one.
  if (std::getenv("SDKERNELS_EMULATION_NO_KERNEL_IMAGE")) return cudaErrorNoKernelImageForDevice;
  if (std::getenv("SDKERNELS_EMULATION_EARLIER_TRAP")) return cudaErrorLaunchFailure;
  scheduler().run(config, thread);
  return cudaSuccess;
}

void barrier() { scheduler().wait(State::kAtBarrier); }

uint64_t exchange(unsigned mask, uint64_t bits, unsigned from_lane) {
  Fiber& self = scheduler().current();
  self.mask = mask;
  self.bits = bits;
  self.from_lane = from_lane;
  self.votes = false;
  scheduler().wait(State::kInWarp);
  return self.result;
}

unsigned ballot(unsigned mask, bool vote) {
  Fiber& self = scheduler().current();
  self.mask = mask;
  self.bits = vote;
  self.votes = true;
  scheduler().wait(State::kInWarp);
  return static_cast<unsigned>(self.result);
}

void trap() {
  scheduler().trap();
  std::abort();
}

unsigned lane() { return scheduler().lane(); }

}  // namespace emulation
