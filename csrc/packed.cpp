// Several crops as one tensor of tokens, without a pass of its own. open_packed compacts (and
// normalizes) every crop straight into its part of one tensor, close_packed adds the parts of the
// branch's output to the crops; their backwards write the parts of one gradient. With grad mode on
// (double backward) they are built from differentiable pieces.
#include "packed.h"

#include <ATen/MemoryOverlap.h>

#include "autograd_functions.h"
#include "row_ops.h"

namespace sdkernels {
namespace {

using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Of each crop's part: k, the dimensions of its tokens, the channels.
using Shapes = std::vector<std::vector<int64_t>>;

Shapes shapes_of(TensorList xs, TensorList index) {
  Shapes shapes;
  shapes.reserve(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    shapes.push_back(xs[i].sizes().vec());
    shapes.back()[0] = index[i].size(0);
  }
  return shapes;
}

int64_t tokens_of(c10::ArrayRef<int64_t> shape) {
  return c10::multiply_integers(shape.slice(0, shape.size() - 1));
}

int64_t tokens_of(const Shapes& shapes) {
  int64_t tokens = 0;
  for (const auto& shape : shapes) tokens += tokens_of(shape);
  return tokens;
}

// Each crop's part of [T, C].
variable_list parts_of(const Tensor& values, const Shapes& shapes) {
  variable_list parts;
  parts.reserve(shapes.size());
  int64_t first = 0;
  for (const auto& shape : shapes) {
    const int64_t count = tokens_of(shape);
    parts.push_back(values.narrow(0, first, count).view(shape));
    first += count;
  }
  return parts;
}

// [T, C] of what `like` is, zero where no crop's part is.
Tensor empty_tokens(const Tensor& like, const Shapes& shapes, int64_t padding,
                    at::ScalarType dtype) {
  const int64_t tokens = tokens_of(shapes);
  Tensor values = like.new_empty({tokens + padding, shapes[0].back()}, dtype);
  if (padding > 0) values.narrow(0, tokens, padding).zero_();
  return values;
}

void add_to(Tensor& sum, Tensor part) { sum = sum.defined() ? sum + part : std::move(part); }

struct Rows {
  TensorList index, slot;
};

struct Norm {
  double eps;
  bool rms;
};

// [T, C]; and of each crop what the norm's backward needs, if `saved`.
Tensor opened(TensorList xs, TensorList index, const Shapes& shapes,
              const std::optional<Norm>& norm, const OptionalTensor& weight,
              const OptionalTensor& bias, at::ScalarType dtype, int64_t padding,
              std::vector<variable_list>* saved) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Tensor values = empty_tokens(xs[0], shapes, padding, dtype);
  const variable_list parts = parts_of(values, shapes);
  for (size_t i = 0; i < xs.size(); ++i) {
    if (!norm) {
      compact_into_op(parts[i], xs[i], index[i]);
      continue;
    }
    auto [kept, mean, rstd] =
        compact_norm_into_op(parts[i], xs[i], index[i], xs[i].sizes().slice(xs[i].dim() - 1),
                             weight, bias, norm->eps, norm->rms, saved != nullptr);
    if (saved) saved->push_back({std::move(kept), std::move(mean), std::move(rstd)});
  }
  return values;
}

struct OpenPacked : torch::autograd::Function<OpenPacked> {
  // The packed tensor, the crops' kept rows where they are normalized, the streams.
  static variable_list forward(AutogradContext* ctx, TensorList xs, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Rows& rows,
                               const std::optional<Norm>& norm, at::ScalarType dtype,
                               int64_t padding, const std::vector<Stream>& streams) {
    ctx->set_materialize_grads(false);
    const Shapes shapes = shapes_of(xs, rows.index);
    std::vector<variable_list> of_norm;
    variable_list outputs{
        opened(xs, rows.index, shapes, norm, weight, bias, dtype, padding, &of_norm)};
    variable_list saved{weight.value_or(Tensor())};
    saved.insert(saved.end(), rows.index.begin(), rows.index.end());
    saved.insert(saved.end(), rows.slot.begin(), rows.slot.end());
    for (const auto& kept_mean_rstd : of_norm) {
      saved.insert(saved.end(), kept_mean_rstd.begin(), kept_mean_rstd.end());
      // An output (which no caller sees), so that a double backward finds its way to x.
      outputs.push_back(kept_mean_rstd[0]);
    }
    variable_list written;
    c10::List<int64_t> kinds;
    for (size_t i = 0; i < xs.size(); ++i) {
      kinds.push_back(static_cast<int64_t>(streams[i]));
      if (streams[i] == Stream::kInplace) written.push_back(xs[i]);
      if (streams[i] != Stream::kNone)
        outputs.push_back(streams[i] == Stream::kInplace ? xs[i] : alias_of(xs[i]));
    }
    if (!written.empty()) ctx->mark_dirty(written);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["shapes"] = shapes;
    ctx->saved_data["streams"] = kinds;
    ctx->saved_data["has_norm"] = norm.has_value();
    ctx->saved_data["eps"] = norm ? norm->eps : 0.0;
    ctx->saved_data["rms"] = norm && norm->rms;
    ctx->saved_data["bias"] = bias ? static_cast<int64_t>(bias->scalar_type()) : -1;
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto shapes = ctx->saved_data["shapes"].to<Shapes>();
    const auto streams = ctx->saved_data["streams"].toIntVector();
    const size_t crops = shapes.size();
    const bool has_norm = ctx->saved_data["has_norm"].toBool();
    const bool rms = ctx->saved_data["rms"].toBool();
    const int64_t bias_type = ctx->saved_data["bias"].toInt();
    const Tensor& weight = saved[0];
    // Inputs that are not there have no edge: needs_input_grad counts on.
    size_t edge = crops;
    const bool needs_weight = weight.defined() && ctx->needs_input_grad(edge++);
    const bool needs_bias = bias_type >= 0 && ctx->needs_input_grad(edge);
    const bool fused = !at::GradMode::is_enabled();

    variable_list d_parts(crops), result(crops + 7);
    if (grads[0].defined()) d_parts = parts_of(grads[0].contiguous(), shapes);
    size_t next_stream = has_norm ? 1 + crops : 1;
    for (size_t i = 0; i < crops; ++i) {
      const Tensor &index = saved[1 + i], &slot = saved[1 + crops + i];
      const bool passed = static_cast<Stream>(streams[i]) != Stream::kNone;
      const Tensor d_stream = passed ? std::move(grads[next_stream++]) : Tensor();
      Tensor d_kept = has_norm ? grads[1 + i] : d_parts[i];  // of a norm, in a double backward only
      if (has_norm && d_parts[i].defined()) {
        const Tensor* of_norm = &saved[1 + 2 * crops + 3 * i];
        const Tensor& kept = of_norm[0];
        const at::IntArrayRef width = kept.sizes().slice(kept.dim() - 1);
        if (fused && !d_kept.defined()) {
          const std::array<bool, 3> wanted{ctx->needs_input_grad(i), needs_weight, needs_bias};
          auto [d_x, d_weight, d_bias] =
              compact_norm_backward_op(optional(d_stream), d_parts[i], kept, of_norm[1], of_norm[2],
                                       index, slot, width, optional(weight), rms, wanted);
          if (wanted[0]) result[i] = std::move(d_x);
          if (wanted[1]) add_to(result[crops], std::move(d_weight));
          if (wanted[2]) add_to(result[crops + 1], std::move(d_bias));
          continue;
        }
        const auto bias =
            bias_type < 0 ? std::nullopt : std::optional(static_cast<at::ScalarType>(bias_type));
        auto [through, d_weight, d_bias] = gradients_of_norm(
            kept, d_parts[i], width, weight, bias, ctx->saved_data["eps"].toDouble(), rms);
        add_to(d_kept, std::move(through));
        if (d_weight.defined()) add_to(result[crops], std::move(d_weight));
        if (d_bias.defined()) add_to(result[crops + 1], std::move(d_bias));
      }
      result[i] = merge_gradients(d_kept, d_stream, index, slot, /*owned=*/false);
    }
    return result;
  }
};

struct ClosePacked : torch::autograd::Function<ClosePacked> {
  // `weights`: of the crops that have some.
  static variable_list forward(AutogradContext* ctx, TensorList streams, const Tensor& out,
                               const OptionalTensor& layer_scale, TensorList weights,
                               const Rows& rows, const std::vector<double>& scales,
                               const std::vector<bool>& weighted, bool inplace) {
    ctx->set_materialize_grads(false);
    const Shapes shapes = shapes_of(streams, rows.index);
    variable_list ys;
    ys.reserve(streams.size());
    bool needs_out = requires_grad(layer_scale);
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      const variable_list parts = parts_of(out, shapes);
      auto weight = weights.begin();
      for (size_t i = 0; i < streams.size(); ++i) {
        const Tensor &index = rows.index[i], &slot = rows.slot[i];
        const OptionalTensor row_weight = weighted[i] ? OptionalTensor(*weight++) : std::nullopt;
        needs_out |= requires_grad(row_weight);
        if (inplace) {
          scatter_add_op_(streams[i], parts[i], index, slot, layer_scale, row_weight, scales[i]);
          ys.push_back(streams[i]);
        } else {
          ys.push_back(scatter_add_op(streams[i], parts[i], index, slot, layer_scale, row_weight,
                                      scales[i]));
        }
      }
    }
    if (inplace) ctx->mark_dirty(ys);
    variable_list saved{needs_out ? out : Tensor(), layer_scale.value_or(Tensor())};
    saved.insert(saved.end(), rows.index.begin(), rows.index.end());
    saved.insert(saved.end(), rows.slot.begin(), rows.slot.end());
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["shapes"] = shapes;
    ctx->saved_data["scales"] = scales;
    ctx->saved_data["weighted"] = weighted;
    ctx->saved_data["padding"] = out.size(0) - tokens_of(shapes);
    ctx->saved_data["dtype"] = static_cast<int64_t>(out.scalar_type());
    return ys;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto shapes = ctx->saved_data["shapes"].to<Shapes>();
    const auto scales = ctx->saved_data["scales"].toDoubleVector();
    const auto weighted = ctx->saved_data["weighted"].toBoolList();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    const size_t crops = shapes.size(), weighted_crops = saved.size() - 2 - 2 * crops;
    const Tensor &out = saved[0], &layer_scale = saved[1];
    const bool wants_out = ctx->needs_input_grad(crops);
    size_t edge = crops + 1;
    const bool wants_scale = layer_scale.defined() && ctx->needs_input_grad(edge++);
    bool wants_any = wants_out || wants_scale;
    for (size_t w = 0; w < weighted_crops; ++w) wants_any |= ctx->needs_input_grad(edge + w);

    // The gradients of the streams, out, layer_scale and the weights; none of rows, scales,
    // weighted and inplace.
    variable_list result(crops + 2 + weighted_crops + 4);
    std::copy(grads.begin(), grads.end(), result.begin());
    const auto given =
        std::find_if(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); });
    if (!wants_any || given == grads.end()) return result;
    const bool fused = !at::GradMode::is_enabled();
    const int64_t padding = ctx->saved_data["padding"].toInt();
    Tensor d_out;
    variable_list d_parts, outs(crops), pieces;
    if (fused) {
      d_out = empty_tokens(*given, shapes, padding, dtype);
      d_parts = parts_of(d_out, shapes);
    }
    if (out.defined()) outs = parts_of(out, shapes);
    for (size_t i = 0, w = 0; i < crops; ++i) {
      const bool has_weight = weighted[i];
      const std::array<bool, 2> wanted{wants_scale, has_weight && ctx->needs_input_grad(edge + w)};
      const Tensor& index = saved[2 + i];
      const Tensor row_weight = has_weight ? saved[2 + 2 * crops + w] : Tensor();
      Tensor& d_row_weight = result[crops + 2 + w];
      w += has_weight;
      if (!grads[i].defined()) {
        if (fused)
          d_parts[i].zero_();
        else
          pieces.push_back(given->new_zeros(shapes[i], dtype));
        continue;
      }
      Tensor d_scale, d_weight;
      if (fused) {
        std::tie(d_scale, d_weight) = scatter_add_backward_into_op(
            d_parts[i], grads[i], wanted[0] || wanted[1] ? optional(outs[i]) : std::nullopt, index,
            optional(layer_scale), optional(row_weight), scales[i], wanted);
      } else {
        Tensor piece;
        std::tie(piece, d_scale, d_weight) =
            gradients_of_kept(compact_rows(grads[i], index, saved[2 + crops + i]), outs[i],
                              layer_scale, row_weight, scales[i], dtype, wanted);
        pieces.push_back(std::move(piece));
      }
      if (wanted[0]) add_to(result[crops + 1], std::move(d_scale));
      if (wanted[1]) d_row_weight = std::move(d_weight);
    }
    if (!fused) {
      for (Tensor& piece : pieces) piece = piece.reshape({-1, shapes[0].back()});
      if (padding > 0) pieces.push_back(given->new_zeros({padding, shapes[0].back()}, dtype));
      d_out = at::cat(pieces);
    }
    if (wants_out) result[crops] = std::move(d_out);
    return result;
  }
};

}  // namespace

std::tuple<Tensor, variable_list> open_packed(const variable_list& xs, const variable_list& index,
                                              const variable_list& slot, bool normalizes,
                                              const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps, bool rms,
                                              at::ScalarType dtype, int64_t padding,
                                              const std::vector<bool>& with_stream, bool inplace) {
  refuse_functorch();
  bool needs_grad = requires_grad(weight) || requires_grad(bias);
  std::vector<Stream> streams;
  for (size_t i = 0; i < xs.size(); ++i) {
    check_rows_tensor(xs[i], "x");
    if (normalizes) check_norm(xs[i], xs[i].sizes().slice(xs[i].dim() - 1), weight, bias);
    check_kept_rows(xs[i], index[i], slot[i]);
    needs_grad |= xs[i].requires_grad();
    streams.push_back(stream_of(xs[i], with_stream[i], inplace));
  }
  const auto norm = normalizes ? std::optional(Norm{eps, rms}) : std::nullopt;
  if (!needs_grad || !at::GradMode::is_enabled())
    return {opened(xs, index, shapes_of(xs, index), norm, weight, bias, dtype, padding, nullptr),
            xs};
  variable_list outputs = OpenPacked::apply(TensorList(xs), weight, bias, Rows{index, slot}, norm,
                                            dtype, padding, streams);
  size_t next = normalizes ? 1 + xs.size() : 1;
  variable_list passed;
  for (size_t i = 0; i < xs.size(); ++i)
    passed.push_back(streams[i] == Stream::kNone ? xs[i] : std::move(outputs[next++]));
  return {std::move(outputs[0]), std::move(passed)};
}

variable_list close_packed(const variable_list& streams, const Tensor& out,
                           const variable_list& index, const variable_list& slot,
                           const std::vector<double>& scales, const OptionalTensor& layer_scale,
                           const std::vector<OptionalTensor>& weights, bool inplace) {
  refuse_functorch();
  const Tensor dense = out.contiguous();
  Shapes shapes = shapes_of(streams, index);
  for (auto& shape : shapes) shape.back() = out.size(1);
  variable_list given;
  std::vector<bool> weighted;
  {
    at::NoGradGuard no_grad;
    const variable_list parts = parts_of(dense, shapes);
    for (size_t i = 0; i < streams.size(); ++i) {
      check_scatter_add(streams[i], parts[i], index[i], slot[i], layer_scale, weights[i]);
      weighted.push_back(weights[i].has_value());
      if (weights[i]) given.push_back(*weights[i]);
    }
  }
  for (size_t i = 0; inplace && i < streams.size(); ++i) {
    at::assert_no_overlap(streams[i], dense);
    if (layer_scale) at::assert_no_overlap(streams[i], *layer_scale);
    for (const Tensor& weight : given) at::assert_no_overlap(streams[i], weight);
  }
  variable_list ys = ClosePacked::apply(TensorList(streams), dense, layer_scale, TensorList(given),
                                        Rows{index, slot}, scales, weighted, inplace);
  // Without grad mode the results are aliases; the caller gets its own tensors back all the same.
  return inplace ? streams : ys;
}

}  // namespace sdkernels
