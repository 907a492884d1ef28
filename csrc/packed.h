// The differentiable entry points of packed=True, which module.cpp hands to Python.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

namespace sdkernels {

// [T, C]: the kept rows of all crops [B, ..., C], normalized over C in `dtype` if `normalizes`,
// with `padding` zeros behind them; and the streams.
std::tuple<at::Tensor, std::vector<at::Tensor>> open_packed(
    const std::vector<at::Tensor>& xs, const std::vector<at::Tensor>& index,
    const std::vector<at::Tensor>& slot, bool normalizes, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps, bool rms, at::ScalarType dtype,
    int64_t padding, const std::vector<bool>& with_stream, bool inplace);

// The streams, with the parts of `out` [T, C] added to their kept rows.
std::vector<at::Tensor> close_packed(const std::vector<at::Tensor>& streams, const at::Tensor& out,
                                     const std::vector<at::Tensor>& index,
                                     const std::vector<at::Tensor>& slot,
                                     const std::vector<double>& scales,
                                     const std::optional<at::Tensor>& layer_scale,
                                     const std::vector<std::optional<at::Tensor>>& weights,
                                     bool inplace);

}  // namespace sdkernels
