// compact_norm (LayerNorm and RMSNorm of the kept rows) and its backward on the CPU.
#include <torch/library.h>

#include "cpu_ops.h"

namespace sdkernels::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

OptionalTensor in_acc(const OptionalTensor& parameter, at::ScalarType acc) {
  return parameter ? OptionalTensor(parameter->to(acc).contiguous()) : parameter;
}

const void* data_of(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

// Lines of a norm are the normalized dimensions; whatever stands between them and the batch counts
// lines. Empty when x is not laid out like that.
std::optional<Stride> line_stride(const Tensor& x, int64_t normalized_dims) {
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
Tensor in_lines(const Tensor& x, int64_t normalized_dims) {
  return line_stride(x, normalized_dims) ? x : x.clone(at::MemoryFormat::Contiguous);
}

// normed, kept (empty unless keep_rows), mean (empty for RMSNorm), rstd.
std::tuple<Tensor, Tensor, Tensor, Tensor> compact_norm(const Tensor& x, const Tensor& index,
                                                        at::IntArrayRef normalized_shape,
                                                        const OptionalTensor& weight,
                                                        const OptionalTensor& bias, double eps,
                                                        bool rms, at::ScalarType dtype,
                                                        bool keep_rows) {
  check_norm(x, normalized_shape, weight, bias);
  check_index_tensor(index, "rows.index", x.device());
  check_index_values(index, x.size(0));
  const auto acc = acc_type(x.scalar_type());
  TORCH_CHECK_TYPE(is_supported(dtype) && acc_type(dtype) == acc, "dtype: cannot write ", dtype,
                   " from x of ", x.scalar_type());
  auto sizes = x.sizes().vec();
  sizes[0] = index.size(0);
  const int64_t len = c10::multiply_integers(normalized_shape);
  const auto stat_sizes = x.sizes().slice(0, x.dim() - normalized_shape.size()).vec();
  const int64_t lines = c10::multiply_integers(stat_sizes.begin() + 1, stat_sizes.end());
  const auto acc_options = x.options().dtype(acc);
  Tensor normed = at::empty(sizes, x.options().dtype(dtype));
  Tensor kept = keep_rows ? at::empty(sizes, x.options()) : at::empty({0}, x.options());
  Tensor mean = at::empty({rms ? 0 : index.size(0) * lines}, acc_options);
  Tensor rstd = at::empty({index.size(0) * lines}, acc_options);
  if (normed.numel() == 0) return {normed, kept, mean.zero_(), rstd.zero_()};

  const Tensor lines_of_x = in_lines(x, normalized_shape.size());
  const auto gamma = in_acc(weight, acc);
  const auto beta = in_acc(bias, acc);
  const auto kernel = kernels().compact_norm(dtype_of(x), dtype_of(normed));
  TORCH_INTERNAL_ASSERT(kernel);
  CompactNorm p{};
  p.normed = normed.mutable_data_ptr();
  p.kept = keep_rows ? kept.mutable_data_ptr() : nullptr;
  p.mean = rms ? nullptr : mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  p.x = lines_of_x.const_data_ptr();
  p.weight = data_of(gamma);
  p.bias = data_of(beta);
  p.index = index.const_data_ptr<int64_t>();
  p.eps = eps;
  p.lines = lines;
  p.len = len;
  p.x_stride = *line_stride(lines_of_x, normalized_shape.size());
  at::parallel_for(0, rstd.numel(), at::divup(kGrain, len),
                   [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {normed, kept, mean, rstd};
}

// d_x, d_weight, d_bias; an empty tensor for each that `wanted` leaves out.
std::tuple<Tensor, Tensor, Tensor> compact_norm_backward(
    const OptionalTensor& d_stream, const Tensor& d_normed, const Tensor& kept, const Tensor& mean,
    const Tensor& rstd, const Tensor& index, const Tensor& slot, at::IntArrayRef normalized_shape,
    const OptionalTensor& weight, bool rms, std::array<bool, 3> wanted) {
  check_norm(kept, normalized_shape, weight, {});
  check_index_tensor(index, "rows.index", kept.device());
  check_index_tensor(slot, "rows.slot", kept.device());
  check_row_values(index, slot);
  const int64_t len = c10::multiply_integers(normalized_shape);
  const int64_t kept_lines = len > 0 ? kept.numel() / len : 0;
  const auto acc = acc_type(kept.scalar_type());
  TORCH_CHECK_VALUE(kept.size(0) == index.size(0), "kept: expected ", index.size(0), " rows, got ",
                    kept.size(0));
  TORCH_CHECK_VALUE(d_normed.sizes() == kept.sizes(), "d_normed: expected shape ", kept.sizes(),
                    ", got ", d_normed.sizes());
  TORCH_CHECK_TYPE(is_supported(d_normed.scalar_type()) && acc_type(d_normed.scalar_type()) == acc,
                   "d_normed: got ", d_normed.scalar_type(), " beside kept of ",
                   kept.scalar_type());
  TORCH_CHECK_VALUE(
      len == 0 || (rstd.numel() == kept_lines && rstd.is_contiguous() && rstd.scalar_type() == acc),
      "rstd: expected ", kept_lines, " values of ", acc);
  TORCH_CHECK_VALUE(
      len == 0 || rms ||
          (mean.numel() == kept_lines && mean.is_contiguous() && mean.scalar_type() == acc),
      "mean: expected ", kept_lines, " values of ", acc);
  auto sizes = kept.sizes().vec();
  sizes[0] = slot.size(0);
  if (d_stream)
    TORCH_CHECK_VALUE(d_stream->sizes() == at::IntArrayRef(sizes) &&
                          d_stream->scalar_type() == kept.scalar_type(),
                      "d_stream: expected shape ", sizes, " and ", kept.scalar_type(), ", got ",
                      d_stream->sizes(), " and ", d_stream->scalar_type());
  // The sums stay in the type of the arithmetic: autograd rounds them to the parameters' own.
  const auto acc_options = kept.options().dtype(acc);
  Tensor d_x = wanted[0] ? at::empty(sizes, kept.options()) : at::empty({0}, kept.options());
  const int64_t lines = c10::multiply_integers(
      sizes.begin() + 1, sizes.end() - static_cast<int64_t>(normalized_shape.size()));
  const auto zeros = [&](bool is_wanted) {
    return is_wanted ? at::zeros(normalized_shape, acc_options) : at::empty({0}, acc_options);
  };
  const int64_t all_lines = slot.size(0) * lines;
  if (all_lines * len == 0) return {d_x, zeros(wanted[1]), zeros(wanted[2])};

  OptionalTensor stream;
  if (d_stream) stream = in_lines(*d_stream, normalized_shape.size());
  const Tensor dense_d_normed = d_normed.contiguous();
  const Tensor dense_kept = kept.contiguous();
  const auto gamma = in_acc(weight, acc);
  const auto kernel = kernels().compact_norm_backward(dtype_of(kept), dtype_of(d_normed));
  TORCH_INTERNAL_ASSERT(kernel);
  CompactNormBackward p{};
  p.d_x = wanted[0] ? d_x.mutable_data_ptr() : nullptr;
  p.d_stream = data_of(stream);
  p.d_normed = dense_d_normed.const_data_ptr();
  p.kept = dense_kept.const_data_ptr();
  p.mean = rms ? nullptr : mean.const_data_ptr();
  p.rstd = rstd.const_data_ptr();
  p.weight = data_of(gamma);
  p.slot = slot.const_data_ptr<int64_t>();
  p.lines = lines;
  p.len = len;
  p.d_x_stride = {lines * len, len};
  if (stream) p.d_stream_stride = *line_stride(*stream, normalized_shape.size());
  if (!wanted[1] && !wanted[2]) {
    at::parallel_for(0, all_lines, at::divup(kGrain, len),
                     [&](int64_t begin, int64_t end) { kernel(p, begin, end, nullptr, nullptr); });
    return {d_x, zeros(false), zeros(false)};
  }
  // One array of partial sums: the weight's, then the bias's.
  const ChunkedSum sum(2 * len, all_lines, len, acc);
  const int64_t bias_offset = len * static_cast<int64_t>(c10::elementSize(acc));
  at::parallel_for(0, sum.chunks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      char* partial = static_cast<char*>(sum.partial(chunk));
      kernel(p, sum.begin(chunk), sum.end(chunk), wanted[1] ? partial : nullptr,
             wanted[2] ? partial + bias_offset : nullptr);
    }
  });
  return {d_x, wanted[1] ? sum.total(0, normalized_shape) : zeros(false),
          wanted[2] ? sum.total(len, normalized_shape) : zeros(false)};
}

}  // namespace

TORCH_LIBRARY_IMPL(sdkernels, CPU, m) {
  m.impl("compact_norm", compact_norm);
  m.impl("compact_norm_backward", compact_norm_backward);
}

}  // namespace sdkernels::cpu
