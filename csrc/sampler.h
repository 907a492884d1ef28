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

// The rows of several layers in one host tensor [layers, 2, batch] (slot, then index), and the
// number of kept rows of each layer.
std::tuple<at::Tensor, std::vector<int64_t>> sample_plan(
    int64_t batch, const std::vector<Draw>& draws, const std::optional<at::Generator>& generator,
    bool pin_memory);

}  // namespace sdkernels
