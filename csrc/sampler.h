// Which rows are kept: drawn on the host, so that a seed gives the same rows on every device.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/Generator.h>

#include <optional>
#include <tuple>
#include <vector>

namespace sdkernels {

// One layer's draw. Bernoulli: each row is kept with probability `keep`; with `whole_batch` one
// draw decides for all rows. Otherwise exactly `count` rows, every subset of that size equally
// likely.
struct Draw {
  double keep = 1;
  int64_t count = -1;  // negative: Bernoulli
  bool whole_batch = false;
};

// index [k] and slot [batch], int64, on `device`; one copy from the host, no synchronisation.
std::tuple<at::Tensor, at::Tensor> sample_rows(int64_t batch, const Draw& draw,
                                               const std::optional<at::Generator>& generator,
                                               const std::optional<at::Device>& device);

// Names one step's stream of random numbers; rank below 2^32.
struct StepKey {
  uint64_t seed = 0;
  uint64_t step = 0;
  uint64_t rank = 0;
};

// The rows of several layers in one host tensor [layers, 2, total] (slot, then index, those of
// batch after batch), and the number of kept rows of each draw; draws[layer * batches + batch].
// The numbers come from `step` where it is given, otherwise from the generator.
std::tuple<at::Tensor, std::vector<int64_t>> sample_plan(
    const std::vector<int64_t>& batches, const std::vector<Draw>& draws,
    const std::optional<at::Generator>& generator, const std::optional<StepKey>& step,
    bool pin_memory);

}  // namespace sdkernels
