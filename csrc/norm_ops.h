// What every backend of compact_norm shares: the checks of its arguments and the geometry of a
// line.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>

#include "row_ops.h"

namespace sdkernels {

inline int64_t line_length(at::IntArrayRef normalized_shape) {
  return c10::multiply_integers(normalized_shape);
}

inline void check_compact_norm(const at::Tensor& x, const at::Tensor& index,
                               at::IntArrayRef normalized_shape,
                               const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias, at::ScalarType dtype) {
  check_norm(x, normalized_shape, weight, bias);
  check_index_tensor(index, "rows.index", x.device());
  TORCH_CHECK_TYPE(is_supported(dtype) && acc_type(dtype) == acc_type(x.scalar_type()),
                   "dtype: cannot write ", dtype, " from x of ", x.scalar_type());
}

inline void check_compact_norm_backward(const std::optional<at::Tensor>& d_stream,
                                        const at::Tensor& d_normed, const at::Tensor& kept,
                                        const at::Tensor& mean, const at::Tensor& rstd,
                                        const at::Tensor& index, const at::Tensor& slot,
                                        at::IntArrayRef normalized_shape,
                                        const std::optional<at::Tensor>& weight, bool rms) {
  check_norm(kept, normalized_shape, weight, {});
  check_index_tensor(index, "rows.index", kept.device());
  check_index_tensor(slot, "rows.slot", kept.device());
  for (const auto& [tensor, name] :
       {std::pair{&d_normed, "d_normed"}, {&mean, "mean"}, {&rstd, "rstd"}})
    check_same_device(*tensor, name, kept.device(), "kept");
  const int64_t len = line_length(normalized_shape);
  const int64_t kept_lines = len > 0 ? kept.numel() / len : 0;
  const auto acc = acc_type(kept.scalar_type());
  TORCH_CHECK_VALUE(kept.size(0) == index.size(0), "kept: expected ", index.size(0), " rows, got ",
                    kept.size(0));
  TORCH_CHECK_VALUE(d_normed.sizes() == kept.sizes(), "d_normed: expected shape ", kept.sizes(),
                    ", got ", d_normed.sizes());
  TORCH_CHECK_TYPE(is_supported(d_normed.scalar_type()) && acc_type(d_normed.scalar_type()) == acc,
                   "d_normed: got ", d_normed.scalar_type(), " beside kept of ",
                   kept.scalar_type());
  const auto fits = [&](const at::Tensor& statistic) {
    return len == 0 || (statistic.numel() == kept_lines && statistic.is_contiguous() &&
                        statistic.scalar_type() == acc);
  };
  TORCH_CHECK_VALUE(fits(rstd), "rstd: expected ", kept_lines, " values of ", acc);
  TORCH_CHECK_VALUE(rms || fits(mean), "mean: expected ", kept_lines, " values of ", acc);
  if (!d_stream) return;
  auto sizes = kept.sizes().vec();
  sizes[0] = slot.size(0);
  check_same_device(*d_stream, "d_stream", kept.device(), "kept");
  TORCH_CHECK_VALUE(
      d_stream->sizes() == at::IntArrayRef(sizes) && d_stream->scalar_type() == kept.scalar_type(),
      "d_stream: expected shape ", at::IntArrayRef(sizes), " and ", kept.scalar_type(), ", got ",
      d_stream->sizes(), " and ", d_stream->scalar_type());
}

// A parameter in the type that the kernels read it in.
inline std::optional<at::Tensor> in_type(const std::optional<at::Tensor>& parameter,
                                         at::ScalarType type) {
  return parameter ? std::optional(parameter->to(type).contiguous()) : parameter;
}

// Lines of a norm are the normalized dimensions; whatever stands between them and the batch counts
// lines. Empty when x is not laid out like that.
inline std::optional<Stride> line_stride(const at::Tensor& x, int64_t normalized_dims) {
  const int64_t dims = x.dim() - normalized_dims;
  const auto merged = [&](int64_t begin, int64_t end) -> std::optional<int64_t> {
    // The stride of the innermost dimension in [begin, end), if the others merge into it.
    int64_t innermost = 0, next = -1;
    for (int64_t d = end - 1; d >= begin; --d) {
      if (x.size(d) == 1) continue;
      if (next >= 0 && x.stride(d) != next) return std::nullopt;
      if (next < 0) innermost = x.stride(d);
      next = x.stride(d) * x.size(d);
    }
    return innermost;
  };
  const auto element = merged(dims, x.dim());
  const bool has_elements = c10::multiply_integers(x.sizes().slice(dims)) > 1;
  const auto line = merged(1, dims);
  if (!element || !line || (*element != 1 && has_elements)) return std::nullopt;
  return Stride{x.stride(0), *line};
}

// x, or a copy of it that has lines.
inline at::Tensor in_lines(const at::Tensor& x, int64_t normalized_dims) {
  return line_stride(x, normalized_dims) ? x : x.clone(at::MemoryFormat::Contiguous);
}

}  // namespace sdkernels
