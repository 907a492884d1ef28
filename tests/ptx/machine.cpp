// Runs translated kernels: blocks one after the other, their threads as fibers that change places
// at barriers, shuffles and votes. A warp runs on to the next barrier before another has its turn.
// Everything that is undefined on a GPU and can be seen here is a fault: an error of the launch.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

// AddressSanitizer's, where it is loaded before Python.
extern "C" __attribute__((weak)) void* __asan_region_is_poisoned(void* begin, size_t size);

// Saves the registers that a function has to keep, and goes on where `to` saved its own.
extern "C" void ptx_switch(void** from, void* to);
asm(R"(
.text
.type ptx_switch, @function
ptx_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ptx_switch, .-ptx_switch
)");

namespace ptx {
namespace {

constexpr uint32_t kWarp = 32;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kMostShared = 227 * 1024;
constexpr size_t kDefaultShared = 48 * 1024;

enum class State { kReady, kAtBarrier, kInWarp, kDone };
enum class Exchange { kShuffle, kVote, kBarrier };

struct Fiber : Thread {
  void* stack = nullptr;
  void* context = nullptr;
  State state = State::kDone;
  int line = 0;  // where it waits
  Exchange exchange{};
  uint32_t mask = 0, bits = 0, from_lane = 0, result = 0;
};

// Who last wrote and read a byte of shared memory, and in which stretch between two barriers.
struct Byte {
  uint64_t written = 0, read = 0;  // stretches
  uint64_t written_in_warp = 0, read_in_warp = 0;
  uint32_t writer = 0, readers[2] = {};
};

struct WarpAccess {
  uint32_t size;
  bool stores;
  std::vector<uint64_t> addresses;
};

class Machine {
 public:
  Order order = Order::kForward;
  bool counting = false;
  uint64_t launches = 0;
  Counts counts;
  std::map<uint64_t, uint64_t> streams;  // begin: end

  const char* launch(const Kernel& kernel, const Launch& launch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    message_.clear();
    const Dim grid = launch.grid, block = launch.block;
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > kernel.most_threads || block.z > 64 ||
        (kernel.threads_fixed && threads != kernel.most_threads))
      return fail("a block of " + std::to_string(threads) + " threads, which the kernel forbids");
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
      return fail("a grid that no GPU takes");
    const size_t shared_bytes = kernel.shared_bytes + launch.dynamic_shared;
    if (shared_bytes > (launch.large_shared ? kMostShared : kDefaultShared))
      return fail("more shared memory than a block has");
    kernel_ = &kernel;
    threads_ = static_cast<uint32_t>(threads);
    shared_.resize(shared_bytes);
    bytes_.resize(shared_bytes);
    grow(threads_);
    for (uint32_t i = 0; i < threads_; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.number = i;
      fiber.tid = {i % block.x, i / block.x % block.y, i / block.x / block.y};
      fiber.ntid = block;
      fiber.nctaid = grid;
      fiber.parameters = launch.parameters;
      fiber.shared = shared_.data();
    }
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (const uint32_t number : permuted(static_cast<uint32_t>(blocks))) {
      const Dim place{number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
      for (uint32_t i = 0; i < threads_; ++i) fibers_[i]->ctaid = place;
      std::fill(shared_.begin(), shared_.end(), uint8_t{0xff});  // NaN, and a large index
      run_block();
      if (!message_.empty()) return message_.c_str();
      if (counting) count_block();
    }
    ++launches;
    if (counting) {
      if (!counts.launches++) {
        counts.first_blocks = blocks;
        counts.first_threads = threads_;
        counts.first_shared = shared_bytes;
      }
      counts.blocks += blocks;
      counts.threads += blocks * threads_;
    }
    return nullptr;
  }

  Fiber& current() { return *fibers_[current_]; }

  void wait(State state, int line) {
    Fiber& fiber = current();
    fiber.state = state;
    fiber.line = line;
    ptx_switch(&fiber.context, scheduler_);
  }

  [[noreturn]] void fault(int line, const std::string& what) {
    const Fiber& f = current();
    char place[160];
    std::snprintf(place, sizeof(place), " (line %d of the PTX, block %u %u %u, thread %u %u %u)",
                  line, f.ctaid.x, f.ctaid.y, f.ctaid.z, f.tid.x, f.tid.y, f.tid.z);
    fail(what + place);
    wait(State::kDone, line);
    __builtin_trap();  // nobody comes back
  }

  void check_global(int line, uint64_t address, uint32_t size, bool stores) {
    const char* const kind = stores ? "a store" : "a load";
    if (address % size)
      fault(line,
            std::string(kind) + " of " + std::to_string(size) + " bytes at a misaligned address");
    if (address < 4096 || (__asan_region_is_poisoned &&
                           __asan_region_is_poisoned(reinterpret_cast<void*>(address), size)))
      fault(line,
            std::string(kind) + " of " + std::to_string(size) + " bytes outside of any tensor");
    if (counting) note(global_, line, address, size, stores);
  }

  void check_shared(int line, uint32_t address, uint32_t size, const void* stored) {
    const bool stores = stored != nullptr;
    if (address % size) fault(line, "a misaligned access to shared memory");
    if (uint64_t{address} + size > shared_.size())
      fault(line, "an access outside of shared memory");
    if (counting) note(shared_accesses_, line, address, size, stores);
    const uint32_t own = current_, warp = own / kWarp;
    // Ordered by a barrier of the block or, within a warp, of the warp.
    const auto together = [&](uint64_t stretch, uint32_t other, uint64_t in_warp) {
      return stretch == stretch_ && other != own &&
             (other / kWarp != warp || in_warp == warp_stretch_[warp]);
    };
    for (uint32_t i = address; i < address + size; ++i) {
      Byte& byte = bytes_[i];
      const bool after_write = together(byte.written, byte.writer, byte.written_in_warp);
      if (!stores) {
        if (after_write) fault(line, "a race: reads shared memory that another thread wrote");
        if (byte.read != stretch_) byte.readers[0] = byte.readers[1] = own;
        if (byte.readers[0] != own) byte.readers[1] = own;
        byte.read = stretch_;
        byte.read_in_warp = warp_stretch_[warp];
        continue;
      }
      // Threads that hold copies of one value may all write it.
      if (after_write && shared_[i] != static_cast<const uint8_t*>(stored)[i - address])
        fault(line, "a race: writes shared memory that another thread wrote");
      for (const uint32_t reader : byte.readers)
        if (together(byte.read, reader, byte.read_in_warp))
          fault(line, "a race: writes shared memory that another thread read");
      byte.written = stretch_;
      byte.writer = own;
      byte.written_in_warp = warp_stretch_[warp];
    }
  }

 private:
  const char* fail(const std::string& what) {
    if (message_.empty()) message_ = what;
    return message_.c_str();
  }

  std::vector<uint32_t> permuted(uint32_t count) {
    std::vector<uint32_t> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0u);
    if (order == Order::kReverse) std::reverse(numbers.begin(), numbers.end());
    if (order == Order::kShuffled) std::shuffle(numbers.begin(), numbers.end(), random_);
    return numbers;
  }

  void grow(uint32_t threads) {
    while (fibers_.size() < threads) {
      fibers_.push_back(std::make_unique<Fiber>());
      void* const stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      fibers_.back()->stack = stack;
    }
    warp_stretch_.resize((fibers_.size() + kWarp - 1) / kWarp);
  }

  void run_block() {
    ++stretch_;
    for (uint32_t i = 0; i < threads_; ++i) prepare(*fibers_[i]);
    const auto done = [&] { return count(State::kDone) == threads_; };
    while (!done() && message_.empty()) {
      bool progress = false;
      for (const uint32_t warp : permuted((threads_ + kWarp - 1) / kWarp))
        progress |= run_warp(warp * kWarp, std::min(threads_ - warp * kWarp, kWarp));
      if (!progress) release_barrier();
    }
  }

  uint32_t count(State state) const {
    return static_cast<uint32_t>(
        std::count_if(fibers_.begin(), fibers_.begin() + threads_,
                      [&](const auto& fiber) { return fiber->state == state; }));
  }

  // As far as it gets by itself; false if that is nowhere.
  bool run_warp(uint32_t first, uint32_t lanes) {
    bool ran = false;
    for (bool progress = true; progress; ran |= progress) {
      progress = false;
      for (const uint32_t lane : permuted(lanes)) {
        if (fibers_[first + lane]->state != State::kReady) continue;
        progress = true;
        current_ = first + lane;
        ptx_switch(&scheduler_, current().context);
        if (!message_.empty()) return true;
      }
      progress |= release_warp(first, lanes);
    }
    return ran;
  }

  static void prepare(Fiber& fiber) {
    fiber.state = State::kReady;
    auto* const top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kStack);
    top[-2] = reinterpret_cast<void*>(enter);  // what ptx_switch returns to, with the stack aligned
    fiber.context = top - 8;                   // below it, six registers
  }

  static void enter();

  // Lanes whose whole mask has arrived exchange their values.
  bool release_warp(uint32_t first, uint32_t lanes) {
    bool released = false;
    for (uint32_t i = 0; i < lanes && message_.empty(); ++i) {
      Fiber& fiber = *fibers_[first + i];
      if (fiber.state != State::kInWarp) continue;
      uint32_t arrived = 0, votes = 0;
      for (uint32_t other = 0; other < lanes; ++other) {
        const Fiber& its = *fibers_[first + other];
        if (its.state != State::kInWarp || its.mask != fiber.mask || its.line != fiber.line)
          continue;
        arrived |= 1u << other;
        votes |= (its.bits & 1) << other;
      }
      if (!(fiber.mask >> i & 1)) return fail_at(fiber, "a lane outside of its own mask"), true;
      if (arrived != fiber.mask) continue;
      for (uint32_t other = 0; other < lanes; ++other) {
        Fiber& its = *fibers_[first + other];
        if (!(arrived >> other & 1)) continue;
        if (its.exchange == Exchange::kVote) its.result = votes;
        if (its.exchange != Exchange::kShuffle) continue;
        if (!(arrived >> its.from_lane & 1))
          return fail_at(its, "a shuffle from a lane outside of its mask"), true;
        its.result = fibers_[first + its.from_lane]->bits;
      }
      if (fiber.exchange == Exchange::kBarrier) ++warp_stretch_[first / kWarp];
      for (uint32_t other = 0; other < lanes; ++other)
        if (arrived >> other & 1) fibers_[first + other]->state = State::kReady;
      released = true;
    }
    return released;
  }

  void fail_at(const Fiber& fiber, const std::string& what) {
    current_ = fiber.number;
    fail(what + " (line " + std::to_string(fiber.line) + " of the PTX)");
  }

  // Nobody can go on: all are at a barrier, those of a warp at the same one, or never will be.
  void release_barrier() {
    for (uint32_t i = 0; i < threads_; ++i) {
      const Fiber& fiber = *fibers_[i];
      const Fiber& first = *fibers_[i / kWarp * kWarp];
      if (fiber.state == State::kInWarp)
        return fail_at(fiber, "lanes wait for others of their mask that never come");
      if (fiber.state != State::kAtBarrier || fiber.line != first.line)
        for (uint32_t j = 0; j < threads_; ++j)
          if (fibers_[j]->state == State::kAtBarrier)
            return fail_at(*fibers_[j], "a barrier in divergent code: not all threads come to it");
    }
    ++stretch_;
    for (uint32_t i = 0; i < threads_; ++i) fibers_[i]->state = State::kReady;
  }

  // ---- counting
  // ---------------------------------------------------------------------------------- The accesses
  // that the lanes of a warp make with one instruction, the n-th time each, count as one of the
  // warp.

  using Log = std::vector<std::vector<std::pair<int, WarpAccess>>>;  // thread: line, its access

  void note(Log& log, int line, uint64_t address, uint32_t size, bool stores) {
    if (log.size() <= current_) log.resize(current_ + 1);
    log[current_].push_back({line, {size, stores, {address}}});
  }

  template <class F>
  void for_warp_accesses(Log& log, F f) {
    for (size_t first = 0; first < log.size(); first += kWarp) {
      std::map<std::pair<int, int>, WarpAccess> together;  // line and time
      for (size_t i = first; i < std::min(first + kWarp, log.size()); ++i) {
        std::map<int, int> times;
        for (const auto& [line, access] : log[i]) {
          auto& all = together[{line, times[line]++}];
          all.size = access.size;
          all.stores = access.stores;
          all.addresses.push_back(access.addresses[0]);
        }
        log[i].clear();
      }
      for (const auto& [key, access] : together) f(access);
    }
  }

  void count_block() {
    for_warp_accesses(global_, [&](const WarpAccess& access) {
      std::set<uint64_t> touched;
      for (const uint64_t address : access.addresses)
        for (uint64_t at = address / 32; at <= (address + access.size - 1) / 32; ++at)
          touched.insert(at);
      (access.stores ? counts.stores : counts.loads) += 1;
      for (const uint64_t address : access.addresses) {
        Sector& sector = sectors[address / 32];
        (access.stores ? sector.stored_bytes : sector.loaded_bytes) += access.size;
      }
      for (const uint64_t at : touched) {
        Sector& sector = sectors[at];
        (access.stores ? sector.stores : sector.loads) += 1;
      }
    });
    for_warp_accesses(shared_accesses_, [&](const WarpAccess& access) {
      // 16 bytes a lane are served for eight lanes at a time, 8 bytes for sixteen.
      const size_t lanes = std::min<size_t>(32, 128 / access.size);
      for (size_t from = 0; from < access.addresses.size(); from += lanes) {
        std::map<uint64_t, std::set<uint64_t>> words;  // of each bank
        const size_t end = std::min(from + lanes, access.addresses.size());
        for (size_t i = from; i < end; ++i)
          for (uint64_t at = access.addresses[i] / 4;
               at <= (access.addresses[i] + access.size - 1) / 4; ++at)
            words[at % 32].insert(at);
        size_t most = 1;
        for (const auto& [bank, its] : words) most = std::max(most, its.size());
        counts.bank_conflicts += most - 1;
        counts.shared_accesses += 1;
      }
    });
  }

 public:
  std::unordered_map<uint64_t, Sector> sectors;

 private:
  std::mutex mutex_;
  std::mt19937 random_{0};
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<uint8_t> shared_;
  std::vector<Byte> bytes_;
  std::vector<uint64_t> warp_stretch_;
  uint64_t stretch_ = 0;
  uint32_t current_ = 0, threads_ = 0;
  const Kernel* kernel_ = nullptr;
  void* scheduler_ = nullptr;
  std::string message_;
  Log global_, shared_accesses_;
};

Machine& machine() {
  static Machine one;
  return one;
}

void Machine::enter() {
  Machine& self = machine();
  self.kernel_->run(self.current());
  self.wait(State::kDone, 0);
}

Fiber& arrive(int line, Exchange exchange, uint32_t mask, uint32_t bits, uint32_t from_lane = 0) {
  Fiber& self = machine().current();
  self.exchange = exchange;
  self.mask = mask;
  self.bits = bits;
  self.from_lane = from_lane;
  machine().wait(State::kInWarp, line);
  return self;
}

}  // namespace

// c holds the last lane of a segment, and above it which bits of a lane name the segment.
Shuffled Thread::shuffle(int line, Shuffle form, uint32_t value, uint32_t b, uint32_t c,
                         uint32_t mask) {
  const uint32_t clamp = c & 31, segment = c >> 8 & 31, own = lane();
  const uint32_t most = (own & segment) | (clamp & ~segment), least = own & segment;
  b &= 31;
  const int from = form == Shuffle::up     ? static_cast<int>(own) - static_cast<int>(b)
                   : form == Shuffle::down ? static_cast<int>(own + b)
                   : form == Shuffle::bfly ? static_cast<int>(own ^ b)
                                           : static_cast<int>(least | (b & ~segment));
  const bool inside =
      form == Shuffle::up ? from >= static_cast<int>(most) : from <= static_cast<int>(most);
  const uint32_t lane_read = inside ? static_cast<uint32_t>(from) : own;
  return {arrive(line, Exchange::kShuffle, mask, value, lane_read).result, inside};
}

uint32_t Thread::ballot(int line, bool vote, uint32_t mask) {
  return arrive(line, Exchange::kVote, mask, vote).result;
}

void Thread::barrier(int line) { machine().wait(State::kAtBarrier, line); }

void Thread::warp_barrier(int line, uint32_t mask) { arrive(line, Exchange::kBarrier, mask, 0); }

void Thread::fault(int line, const char* what) { machine().fault(line, what); }

void Thread::check_global(int line, uint64_t address, uint32_t size, bool stores) {
  machine().check_global(line, address, size, stores);
}

void Thread::check_shared(int line, uint32_t address, uint32_t size, const void* stored) {
  machine().check_shared(line, address, size, stored);
}

void Thread::note_load(uint64_t address, uint32_t bytes, bool& in_flight) {
  Machine& self = machine();
  const auto after = self.streams.upper_bound(address);
  if (after == self.streams.begin() || std::prev(after)->second <= address) return;
  in_flight = true;
  self.counts.stream_bytes += bytes;
}

void Thread::note_wait() { ++machine().counts.waits; }

}  // namespace ptx

using ptx::machine;

extern "C" {

// What was wrong; null where nothing was.
const char* ptx_launch(const ptx::Kernel* kernel, const ptx::Launch* launch) {
  return machine().launch(*kernel, *launch);
}

uint64_t ptx_launches() { return machine().launches; }

void ptx_order(int order) { machine().order = static_cast<ptx::Order>(order); }

// Counts launches from now on, from zero; `streams` are pairs of begin and end.
void ptx_count(bool on, const uint64_t* streams, int pairs) {
  machine().counting = on;
  machine().counts = {};
  machine().sectors.clear();
  machine().streams.clear();
  for (int i = 0; i < pairs; ++i) machine().streams[streams[2 * i]] = streams[2 * i + 1];
}

const ptx::Counts* ptx_counts() { return &machine().counts; }

uint64_t ptx_sector_count() { return machine().sectors.size(); }

// Five numbers for each sector: its number, loads and stores of warps, bytes loaded and stored.
void ptx_sectors(uint64_t* numbers) {
  for (const auto& [at, sector] : machine().sectors) {
    for (const uint64_t number :
         {at, sector.loads, sector.stores, sector.loaded_bytes, sector.stored_bytes})
      *numbers++ = number;
  }
}
}
