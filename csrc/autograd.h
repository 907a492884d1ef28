// The differentiable entry points, which module.cpp hands to Python.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace sdkernels {

// The kept rows of x, and x; with_stream, x passed through the same node: add the branch's output
// to that (in place, if `inplace`; with a ReLU, if `relu`), so that both gradients of x meet in one
// pass.
std::tuple<at::Tensor, at::Tensor> compact(const at::Tensor& x, const at::Tensor& index,
                                           const at::Tensor& slot, bool with_stream, bool inplace,
                                           bool relu);

// The same with the norm of the kept rows, written in `dtype`.
std::tuple<at::Tensor, at::Tensor> compact_norm(const at::Tensor& x, const at::Tensor& index,
                                                const at::Tensor& slot,
                                                at::IntArrayRef normalized_shape,
                                                const std::optional<at::Tensor>& weight,
                                                const std::optional<at::Tensor>& bias, double eps,
                                                bool rms, at::ScalarType dtype, bool with_stream,
                                                bool inplace);

// residual, with scale * row_weight * layer_scale * out added to the kept rows; the ReLU of that,
// if `relu`.
at::Tensor scatter_add(const at::Tensor& residual, const at::Tensor& out, const at::Tensor& index,
                       const at::Tensor& slot, const std::optional<at::Tensor>& layer_scale,
                       const std::optional<at::Tensor>& row_weight, double scale, bool inplace,
                       bool relu);

// The kept rows of x; x; and whether that was passed through the same node (a view that is to be
// written in place cannot be). `scatter` must then be told, and be all that uses it: the node takes
// the gradients of the kept rows and leaves out what the stream's has there.
std::tuple<at::Tensor, at::Tensor, bool> open_rows(const at::Tensor& x, const at::Tensor& index,
                                                   const at::Tensor& slot, bool inplace);

// residual, with out in place of its kept rows. `opened`: residual comes from open_rows, which said
// so.
at::Tensor scatter(const at::Tensor& residual, const at::Tensor& out, const at::Tensor& index,
                   const at::Tensor& slot, bool opened, bool inplace);

// Raises what PyTorch raises where x must not be written in place.
void check_inplace(const at::Tensor& x);
void check_inplace(const at::Tensor& x, bool any_requires_grad);

}  // namespace sdkernels
