// What the autograd functions of autograd.cpp and packed.cpp share.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "dispatch.h"

namespace sdkernels {

// What a compacting node returns beside the kept rows. In place it is x itself, whose history the
// node takes over. Otherwise an alias: it shares x's memory and version counter and is no view in
// autograd's eyes, because PyTorch refuses in-place writes to views that come out of a function
// with several outputs.
enum class Stream { kNone, kAlias, kInplace };

// In place, x itself passes through the node, unless it needs no gradient or is a view, whose
// history only an operation with one result may take over: the stream is then x as it stands.
Stream stream_of(const Tensor& x, bool with_stream, bool inplace);
Tensor alias_of(const Tensor& x);

void refuse_functorch();

inline OptionalTensor optional(const Tensor& x) {
  return x.defined() ? OptionalTensor(x) : std::nullopt;
}
inline bool requires_grad(const OptionalTensor& x) { return x && x->requires_grad(); }

// For backwards: nodes of their own in a double backward only.
Tensor compact_rows(const Tensor& x, const Tensor& index, const Tensor& slot);

// The gradient of x from those of its kept rows and of x passed through, either of which may be
// missing. The second may be written to if `owned`.
Tensor merge_gradients(const Tensor& d_kept, const Tensor& d_stream, const Tensor& index,
                       const Tensor& slot, bool owned);

// What scatter_add_rows_backward gives for the kept rows of a gradient, differentiable.
std::tuple<Tensor, Tensor, Tensor> gradients_of_kept(const Tensor& kept, const Tensor& out,
                                                     const Tensor& layer_scale,
                                                     const Tensor& row_weight, double scale,
                                                     at::ScalarType dtype,
                                                     std::array<bool, 2> wanted);

// The gradients of a norm of the kept rows, its weight and its bias (of `bias_type`, or none),
// differentiable.
std::tuple<Tensor, Tensor, Tensor> gradients_of_norm(const Tensor& kept, const Tensor& d_normed,
                                                     at::IntArrayRef shape, const Tensor& weight,
                                                     std::optional<at::ScalarType> bias_type,
                                                     double eps, bool rms);

}  // namespace sdkernels
