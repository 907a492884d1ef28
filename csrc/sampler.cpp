#include "sampler.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/PhiloxRNGEngine.h>

#include <algorithm>
#include <mutex>
#include <numeric>

namespace sdkernels {
namespace {

// The numbers of one training step: Philox (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011) with the seed as key and (step, rank, 32 bits to count with) as counter, so
// that no two streams of a seed share a block of random bits.
class StepRandom {
 public:
  explicit StepRandom(const StepKey& key) : engine_(key.seed, key.step, key.rank << 32) {}

  uint64_t random64() {
    const uint64_t low = engine_();
    return uint64_t{engine_()} << 32 | low;
  }

 private:
  at::Philox4_32 engine_;
};

// A uniform integer in [0, bound), without bias: draws beyond the last whole multiple are thrown
// away.
template <class Random>
uint64_t uniform_below(Random& random, uint64_t bound) {
  const uint64_t rejected = (0 - bound) % bound;  // 2^64 mod bound
  uint64_t draw = random.random64();
  while (draw < rejected) draw = random.random64();
  return draw % bound;
}

// A uniform double from 53 random bits: u < keep then has probability keep exactly, because 1 - p
// is a multiple of 2^-53 for every p in [0, 1].
template <class Random>
bool survives(Random& random, double keep) {
  return static_cast<double>(random.random64() >> 11) * 0x1p-53 < keep;
}

// Writes slot [batch] and the first k entries of index, and returns k.
template <class Random>
int64_t draw_rows(int64_t batch, const Draw& draw, Random& random, int64_t* slot, int64_t* index) {
  int64_t k = 0;
  const auto decide = [&](int64_t row, bool kept) {
    slot[row] = kept ? k : -1;
    if (kept) index[k++] = row;
  };
  if (draw.count >= 0) {
    // Selection sampling (Knuth, TAOCP volume 2, algorithm 3.4.2 S): ascending, every subset
    // equally likely.
    for (int64_t row = 0; row < batch; ++row)
      decide(row, static_cast<int64_t>(uniform_below(random, batch - row)) < draw.count - k);
  } else if (draw.whole_batch) {
    const bool kept = survives(random, draw.keep);
    for (int64_t row = 0; row < batch; ++row) decide(row, kept);
  } else {
    for (int64_t row = 0; row < batch; ++row) decide(row, survives(random, draw.keep));
  }
  return k;
}

at::CPUGeneratorImpl* generator_of(const std::optional<at::Generator>& generator) {
  return at::get_generator_or_default<at::CPUGeneratorImpl>(generator,
                                                            at::detail::getDefaultCPUGenerator());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> sample_rows(int64_t batch, const Draw& draw,
                                               const std::optional<at::Generator>& generator,
                                               const std::optional<at::Device>& device) {
  std::vector<int64_t> rows(2 * batch);  // slot, then index
  auto* const source = generator_of(generator);
  int64_t k = 0;
  {
    const std::lock_guard<std::mutex> lock(source->mutex_);
    k = draw_rows(batch, draw, *source, rows.data(), rows.data() + batch);
  }
  if (!device || device->is_cpu()) {
    at::Tensor index = at::detail::empty_cpu({k}, at::kLong);
    at::Tensor slot = at::detail::empty_cpu({batch}, at::kLong);
    std::copy_n(rows.data() + batch, k, index.mutable_data_ptr<int64_t>());
    std::copy_n(rows.data(), batch, slot.mutable_data_ptr<int64_t>());
    return {index, slot};
  }
  // Pinned, the copy is asynchronous; the allocator keeps the memory until it is done.
  at::Tensor host = at::detail::empty_cpu({batch + k}, at::kLong, device->is_cuda());
  std::copy_n(rows.data(), batch + k, host.mutable_data_ptr<int64_t>());
  const at::Tensor sent = host.to(*device, /*non_blocking=*/true);
  return {sent.narrow(0, batch, k), sent.narrow(0, 0, batch)};
}

std::tuple<at::Tensor, std::vector<int64_t>> sample_plan(
    const std::vector<int64_t>& batches, const std::vector<Draw>& draws,
    const std::optional<at::Generator>& generator, const std::optional<StepKey>& step,
    bool pin_memory) {
  const int64_t total = std::accumulate(batches.begin(), batches.end(), int64_t{0});
  const auto crops = static_cast<int64_t>(batches.size());
  const auto layers = static_cast<int64_t>(draws.size()) / crops;
  const auto options = at::TensorOptions().dtype(at::kLong).pinned_memory(pin_memory);
  at::Tensor rows = at::zeros({layers, 2, total}, options);
  std::vector<int64_t> kept;
  kept.reserve(draws.size());
  const auto draw_all = [&](auto& random) {
    int64_t* slot = rows.mutable_data_ptr<int64_t>();
    for (int64_t layer = 0; layer < layers; ++layer, slot += total) {
      for (int64_t crop = 0; crop < crops; slot += batches[crop++]) {
        const Draw& draw = draws[layer * crops + crop];
        kept.push_back(draw_rows(batches[crop], draw, random, slot, slot + total));
      }
    }
  };
  if (step) {
    StepRandom random(*step);
    draw_all(random);
  } else {
    auto* const source = generator_of(generator);
    const std::lock_guard<std::mutex> lock(source->mutex_);
    draw_all(*source);
  }
  return {rows, kept};
}

}  // namespace sdkernels
