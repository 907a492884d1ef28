// The autograd functions above the ops. One node owns the gradient of x: compacting returns the
// kept rows *and* x passed through (the stream), so that its backward receives both gradients and
// writes their sum in one pass. With grad mode on (double backward), each backward is built from
// differentiable pieces instead of the fused kernels.
#include "autograd.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "autograd_functions.h"
#include "row_ops.h"

namespace sdkernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// How the gradients of the kept rows and of the stream make that of x: their sum; their sum in the
// memory of the second; the first in place of the second's kept rows.
enum class Merge { kAdd, kAddOwned, kReplace };

// x as an output of the node that compacts it.
Tensor pass_through(AutogradContext* ctx, const Tensor& x, Stream stream) {
  if (stream != Stream::kInplace) return alias_of(x);
  ctx->mark_dirty({x});
  return x;
}

struct CompactRows : torch::autograd::Function<CompactRows> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& index,
                               const Tensor& slot, Stream stream, Merge merge) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({index, slot});
    ctx->saved_data["merge"] = static_cast<int64_t>(merge);
    Tensor kept = compact_op(x, index);
    if (stream == Stream::kNone) return {std::move(kept)};
    return {std::move(kept), pass_through(ctx, x, stream)};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads);
};

struct ExpandRows : torch::autograd::Function<ExpandRows> {
  static Tensor forward(AutogradContext* ctx, const Tensor& kept, const Tensor& index,
                        const Tensor& slot) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({index, slot});
    return expand_op(kept, index, slot);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return {{}, {}, {}};
    const auto saved = ctx->get_saved_variables();
    return {compact_rows(grads[0], saved[0], saved[1]), {}, {}};
  }
};

// The gradient that a ReLU passes, from the bits of its result; it is its own derivative.
struct PassRelu : torch::autograd::Function<PassRelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& positive,
                        const Tensor& index, const Tensor& slot, at::MemoryFormat format) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({positive, index, slot});
    ctx->saved_data["format"] = static_cast<int64_t>(format);
    return std::get<0>(scatter_add_relu_backward_op(grad, positive, index, slot, {}, {}, 1.0,
                                                    grad.scalar_type(), format, false));
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(5);
    const auto saved = ctx->get_saved_variables();
    const auto format = static_cast<at::MemoryFormat>(ctx->saved_data["format"].toInt());
    return {PassRelu::apply(grads[0], saved[0], saved[1], saved[2], format), {}, {}, {}, {}};
  }
};

enum class Sum { kPlain, kRelu, kInplace };

struct ScatterAddRows : torch::autograd::Function<ScatterAddRows> {
  static Tensor forward(AutogradContext* ctx, const Tensor& residual, const Tensor& out,
                        const OptionalTensor& layer_scale, const OptionalTensor& row_weight,
                        const Tensor& index, const Tensor& slot, double scale, Sum sum) {
    ctx->set_materialize_grads(false);
    Tensor y = residual, positive;
    if (sum == Sum::kPlain) {
      y = scatter_add_op(residual, out, index, slot, layer_scale, row_weight, scale);
    } else if (sum == Sum::kRelu) {
      std::tie(y, positive) =
          scatter_add_relu_op(residual, out, index, slot, layer_scale, row_weight, scale);
      ctx->saved_data["format"] = static_cast<int64_t>(row_format(y));
    } else {
      scatter_add_op_(residual, out, index, slot, layer_scale, row_weight, scale);
      ctx->mark_dirty({residual});
    }
    // Only the gradients of layer_scale and row_weight need the branch's output.
    const bool needs_out = (layer_scale && layer_scale->requires_grad()) ||
                           (row_weight && row_weight->requires_grad());
    ctx->save_for_backward({index, slot, layer_scale.value_or(Tensor()),
                            row_weight.value_or(Tensor()), needs_out ? out : Tensor(), positive});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dtype"] = static_cast<int64_t>(out.scalar_type());
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Tensor grad = grads[0];
    variable_list result(8);
    if (!grad.defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Tensor &index = saved[0], &slot = saved[1], &layer_scale = saved[2],
                 &row_weight = saved[3], &out = saved[4], &positive = saved[5];
    const double scale = ctx->saved_data["scale"].toDouble();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    const bool needs_out = ctx->needs_input_grad(1);
    // Inputs that are not there have no edge: needs_input_grad counts on.
    const bool has_layer_scale = layer_scale.defined();
    const std::array<bool, 2> wanted{
        has_layer_scale && ctx->needs_input_grad(2),
        row_weight.defined() && ctx->needs_input_grad(has_layer_scale ? 3 : 2)};
    const bool wants_sum = wanted[0] || wanted[1];
    if (positive.defined()) {
      const auto format = static_cast<at::MemoryFormat>(ctx->saved_data["format"].toInt());
      if (!at::GradMode::is_enabled() && !wants_sum) {
        std::tie(result[0], result[1]) =
            scatter_add_relu_backward_op(grad, positive, index, slot, optional(layer_scale),
                                         optional(row_weight), scale, dtype, format, needs_out);
        if (!needs_out) result[1] = Tensor();
        return result;
      }
      grad = PassRelu::apply(grad, positive, index, slot, format);
    }
    result[0] = grad;
    if (!needs_out && !wants_sum) return result;
    if (!at::GradMode::is_enabled()) {
      auto [d_out, d_layer_scale, d_row_weight] = scatter_add_backward_op(
          grad, wants_sum ? optional(out) : std::nullopt, index, optional(layer_scale),
          optional(row_weight), scale, dtype, wanted);
      result[1] = std::move(d_out);
      if (wanted[0]) result[2] = std::move(d_layer_scale);
      if (wanted[1]) result[3] = std::move(d_row_weight);
      return result;
    }
    std::tie(result[1], result[2], result[3]) = gradients_of_kept(
        compact_rows(grad, index, slot), out, layer_scale, row_weight, scale, dtype, wanted);
    return result;
  }
};

struct ScatterRows : torch::autograd::Function<ScatterRows> {
  static Tensor forward(AutogradContext* ctx, const Tensor& residual, const Tensor& out,
                        const Tensor& index, const Tensor& slot, bool opened, bool inplace) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({index, slot});
    ctx->saved_data["opened"] = opened;
    if (!inplace) return scatter_op(residual, out, index, slot);
    scatter_op_(residual, out, index, slot);
    ctx->mark_dirty({residual});
    return residual;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(6);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const auto saved = ctx->get_saved_variables();
    // Of an opened stream, whoever opened it leaves out the kept rows.
    if (ctx->needs_input_grad(0))
      result[0] = ctx->saved_data["opened"].toBool() ? grad : grad.index_fill(0, saved[0], 0);
    if (ctx->needs_input_grad(1)) result[1] = compact_rows(grad, saved[0], saved[1]);
    return result;
  }
};

// Whether a gradient may be written to: no one holds it but PyTorch's caller of this node (a hook
// of a node can get hold of it), and it is plain memory, no batch of gradients under vmap.
bool is_ours_alone(const Tensor& grad) {
  return grad.defined() && grad.use_count() <= 2 && !at::isTensorSubclassLike(grad) &&
         grad.is_non_overlapping_and_dense();
}

variable_list CompactRows::backward(AutogradContext* ctx, variable_list grads) {
  const auto saved = ctx->get_saved_variables();
  const Tensor d_stream = grads.size() > 1 ? std::move(grads[1]) : Tensor();
  const auto merge = static_cast<Merge>(ctx->saved_data["merge"].toInt());
  if (merge == Merge::kReplace && d_stream.defined()) {
    const Tensor &index = saved[0], &slot = saved[1], &d_kept = grads[0];
    if (!d_kept.defined()) return {d_stream.index_fill(0, index, 0), {}, {}, {}, {}};
    if (!at::GradMode::is_enabled())
      return {scatter_op(d_stream, d_kept, index, slot), {}, {}, {}, {}};
    return {ScatterRows::apply(d_stream, d_kept, index, slot, false, false), {}, {}, {}, {}};
  }
  // With a ReLU behind the sum, the backward of the scatter-add has made the stream's gradient.
  const bool owned = merge == Merge::kAddOwned && is_ours_alone(d_stream);
  return {merge_gradients(grads[0], d_stream, saved[0], saved[1], owned), {}, {}, {}, {}};
}

struct CompactNorm : torch::autograd::Function<CompactNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& index, const Tensor& slot,
                               at::IntArrayRef normalized_shape, double eps, bool rms,
                               at::ScalarType dtype, Stream stream, bool needs_grad) {
    ctx->set_materialize_grads(false);
    // The kept rows of x are saved, not x: memory follows k, and x may be overwritten in place.
    // They are an output (which no caller sees) so that a double backward finds its way from them
    // to x.
    auto [normed, kept, mean, rstd] = compact_norm_op(x, index, normalized_shape, weight, bias, eps,
                                                      rms, dtype, /*keep_rows=*/needs_grad);
    const bool with_stream = stream != Stream::kNone;
    if (!needs_grad) {
      if (!with_stream) return {normed};
      return {normed, pass_through(ctx, x, stream)};
    }
    ctx->save_for_backward({index, slot, weight.value_or(Tensor()), kept, mean, rstd});
    ctx->saved_data["normalized_shape"] = normalized_shape.vec();
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["rms"] = rms;
    ctx->saved_data["bias"] = bias ? static_cast<int64_t>(bias->scalar_type()) : -1;
    if (!with_stream) return {normed, kept};
    return {normed, pass_through(ctx, x, stream), kept};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &index = saved[0], &slot = saved[1], &weight = saved[2], &kept = saved[3];
    const auto shape = ctx->saved_data["normalized_shape"].toIntVector();
    const bool rms = ctx->saved_data["rms"].toBool();
    const int64_t bias_type = ctx->saved_data["bias"].toInt();
    const Tensor& d_normed = grads[0];
    const Tensor d_stream = grads.size() > 2 ? grads[1] : Tensor();
    Tensor d_kept = grads.back();  // defined in a double backward only
    variable_list result(11);

    if (!at::GradMode::is_enabled() && !d_kept.defined() && d_normed.defined()) {
      size_t edge = 1;
      const bool needs_weight = weight.defined() && ctx->needs_input_grad(edge++);
      const bool needs_bias = bias_type >= 0 && ctx->needs_input_grad(edge);
      const std::array<bool, 3> wanted{ctx->needs_input_grad(0), needs_weight, needs_bias};
      auto [d_x, d_weight, d_bias] =
          compact_norm_backward_op(optional(d_stream), d_normed, kept, saved[4], saved[5], index,
                                   slot, shape, optional(weight), rms, wanted);
      if (wanted[0]) result[0] = std::move(d_x);
      if (wanted[1]) result[1] = std::move(d_weight);
      if (wanted[2]) result[2] = std::move(d_bias);
      return result;
    }

    if (d_normed.defined()) {
      const auto bias =
          bias_type < 0 ? std::nullopt : std::optional(static_cast<at::ScalarType>(bias_type));
      auto [d_x, d_weight, d_bias] = gradients_of_norm(kept, d_normed, shape, weight, bias,
                                                       ctx->saved_data["eps"].toDouble(), rms);
      d_kept = d_kept.defined() ? d_kept + d_x : d_x;
      result[1] = std::move(d_weight);
      result[2] = std::move(d_bias);
    }
    result[0] = merge_gradients(d_kept, d_stream, index, slot, /*owned=*/false);
    return result;
  }
};

}  // namespace

void refuse_functorch() {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode),
      "sdkernels: torch.func transforms (grad, vjp, vmap, ...) cannot go through the compacted "
      "branch; use torch.autograd, or evaluation mode (training=False), where the op is plain "
      "PyTorch");
}

Stream stream_of(const Tensor& x, bool with_stream, bool inplace) {
  if (!with_stream) return Stream::kNone;
  if (!inplace) return Stream::kAlias;
  if (!at::GradMode::is_enabled() || !x.requires_grad() || x.is_view() || x.retains_grad())
    return Stream::kNone;
  return Stream::kInplace;
}

Tensor alias_of(const Tensor& x) {
  return Tensor(x.unsafeGetTensorImpl()->shallow_copy_and_detach(
      torch::autograd::impl::version_counter(x), /*allow_tensor_metadata_change=*/false));
}

Tensor compact_rows(const Tensor& x, const Tensor& index, const Tensor& slot) {
  if (!at::GradMode::is_enabled()) return compact_op(x, index);
  return CompactRows::apply(x, index, slot, Stream::kNone, Merge::kAdd)[0];
}

Tensor merge_gradients(const Tensor& d_kept, const Tensor& d_stream, const Tensor& index,
                       const Tensor& slot, bool owned) {
  if (!d_kept.defined()) return d_stream;
  const bool differentiable = at::GradMode::is_enabled();
  if (!d_stream.defined())
    return differentiable ? ExpandRows::apply(d_kept, index, slot) : expand_op(d_kept, index, slot);
  if (differentiable)
    return ScatterAddRows::apply(d_stream, d_kept, OptionalTensor(), OptionalTensor(), index, slot,
                                 1.0, Sum::kPlain);
  if (!owned) return scatter_add_op(d_stream, d_kept, index, slot, {}, {}, 1.0);
  scatter_add_op_(d_stream, d_kept, index, slot, {}, {}, 1.0);
  return d_stream;
}

std::tuple<Tensor, Tensor, Tensor> gradients_of_kept(const Tensor& kept, const Tensor& out,
                                                     const Tensor& layer_scale,
                                                     const Tensor& row_weight, double scale,
                                                     at::ScalarType dtype,
                                                     std::array<bool, 2> wanted) {
  const auto acc = c10::promoteTypes(acc_type(kept.scalar_type()), acc_type(dtype));
  Tensor scaled = kept.to(acc) * scale, d_layer_scale, d_row_weight;
  c10::SmallVector<int64_t, 6> column(scaled.dim(), 1);  // [k, 1, ...]
  column[0] = scaled.size(0);
  if (wanted[1]) {
    const Tensor product = scaled * out.to(acc);
    d_row_weight = (layer_scale.defined() ? product * layer_scale.to(acc) : product)
                       .sum_to_size(column)
                       .flatten()
                       .to(row_weight.scalar_type());
  }
  if (row_weight.defined()) scaled = scaled * row_weight.to(acc).view(column);
  if (wanted[0])
    d_layer_scale =
        (scaled * out.to(acc)).sum_to_size(layer_scale.sizes()).to(layer_scale.scalar_type());
  Tensor d_out = (layer_scale.defined() ? scaled * layer_scale.to(acc) : scaled).to(dtype);
  return {std::move(d_out), std::move(d_layer_scale), std::move(d_row_weight)};
}

std::tuple<Tensor, Tensor, Tensor> gradients_of_norm(const Tensor& kept, const Tensor& d_normed,
                                                     at::IntArrayRef shape, const Tensor& weight,
                                                     std::optional<at::ScalarType> bias_type,
                                                     double eps, bool rms) {
  const auto acc = acc_type(kept.scalar_type());
  c10::SmallVector<int64_t, 4> dims;
  for (int64_t d = -static_cast<int64_t>(shape.size()); d < 0; ++d) dims.push_back(d);
  const Tensor x = kept.to(acc), d = d_normed.to(acc);
  const Tensor centered = rms ? x : x - x.mean(dims, true);
  const Tensor rstd = (centered.pow(2).mean(dims, true) + eps).rsqrt();
  const Tensor x_hat = centered * rstd;
  const Tensor d_x_hat = weight.defined() ? d * weight.to(acc) : d;
  Tensor d_x = d_x_hat - x_hat * (d_x_hat * x_hat).mean(dims, true), d_weight, d_bias;
  if (!rms) d_x = d_x - d_x_hat.mean(dims, true);
  if (weight.defined()) d_weight = (d * x_hat).sum_to_size(shape).to(weight.scalar_type());
  if (bias_type) d_bias = d.sum_to_size(shape).to(*bias_type);
  return {(rstd * d_x).to(kept.scalar_type()), std::move(d_weight), std::move(d_bias)};
}

void check_inplace(const Tensor& x, bool any_requires_grad) {
  at::assert_no_internal_overlap(x);
  torch::autograd::check_inplace(x, at::GradMode::is_enabled() && any_requires_grad);
}

void check_inplace(const Tensor& x) { check_inplace(x, x.requires_grad()); }

std::tuple<Tensor, Tensor> compact(const Tensor& x, const Tensor& index, const Tensor& slot,
                                   bool with_stream, bool inplace, bool relu) {
  refuse_functorch();
  check_rows_tensor(x, "x");
  check_kept_rows(x, index, slot);
  const Stream stream = stream_of(x, with_stream, inplace);
  // In place, the ReLU is an operation of its own behind the sum.
  const Merge merge = relu && !inplace ? Merge::kAddOwned : Merge::kAdd;
  auto outputs = CompactRows::apply(x, index, slot, stream, merge);
  return {outputs[0], stream == Stream::kNone ? x : outputs[1]};
}

std::tuple<Tensor, Tensor, bool> open_rows(const Tensor& x, const Tensor& index, const Tensor& slot,
                                           bool inplace) {
  refuse_functorch();
  check_rows_tensor(x, "x");
  check_kept_rows(x, index, slot);
  const Stream stream = stream_of(x, /*with_stream=*/true, inplace);
  auto outputs = CompactRows::apply(x, index, slot, stream, Merge::kReplace);
  if (stream == Stream::kNone) return {outputs[0], x, false};
  return {outputs[0], outputs[1], true};
}

std::tuple<Tensor, Tensor> compact_norm(const Tensor& x, const Tensor& index, const Tensor& slot,
                                        at::IntArrayRef normalized_shape,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        double eps, bool rms, at::ScalarType dtype,
                                        bool with_stream, bool inplace) {
  refuse_functorch();
  check_norm(x, normalized_shape, weight, bias);
  check_kept_rows(x, index, slot);
  const bool needs_grad = at::GradMode::is_enabled() &&
                          (x.requires_grad() || requires_grad(weight) || requires_grad(bias));
  const Stream stream = stream_of(x, with_stream, inplace);
  auto outputs = CompactNorm::apply(x, weight, bias, index, slot, normalized_shape, eps, rms, dtype,
                                    stream, needs_grad);
  return {outputs[0], stream == Stream::kNone ? x : outputs[1]};
}

Tensor scatter_add(const Tensor& residual, const Tensor& out, const Tensor& index,
                   const Tensor& slot, const OptionalTensor& layer_scale,
                   const OptionalTensor& row_weight, double scale, bool inplace, bool relu) {
  refuse_functorch();
  check_scatter_add(residual, out, index, slot, layer_scale, row_weight);
  if (!inplace)
    return ScatterAddRows::apply(residual, out, layer_scale, row_weight, index, slot, scale,
                                 relu ? Sum::kRelu : Sum::kPlain);
  check_inplace(residual, residual.requires_grad() || out.requires_grad() ||
                              requires_grad(layer_scale) || requires_grad(row_weight));
  // Without grad mode the result is an alias; the caller gets its own tensor back all the same.
  ScatterAddRows::apply(residual, out, layer_scale, row_weight, index, slot, scale, Sum::kInplace);
  Tensor y = residual;
  return relu ? y.relu_() : y;
}

Tensor scatter(const Tensor& residual, const Tensor& out, const Tensor& index, const Tensor& slot,
               bool opened, bool inplace) {
  refuse_functorch();
  check_rows_tensor(residual, "residual");
  check_kept_rows(residual, index, slot);
  check_out(residual, out, index);
  const auto dtype = inplace ? residual.scalar_type()
                             : c10::promoteTypes(residual.scalar_type(), out.scalar_type());
  const Tensor rows = out.to(dtype);
  if (!inplace)
    return ScatterRows::apply(residual.to(dtype), rows, index, slot, opened, /*inplace=*/false);
  check_inplace(residual, residual.requires_grad() || out.requires_grad());
  ScatterRows::apply(residual, rows, index, slot, opened, /*inplace=*/true);
  return residual;
}

}  // namespace sdkernels
