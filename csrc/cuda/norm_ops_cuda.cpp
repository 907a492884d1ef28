// compact_norm (LayerNorm and RMSNorm of the kept rows) and its backward on CUDA.
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include "../norm_ops.h"
#include "cuda_ops.h"

namespace sdkernels::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The type that the kernels read parameters in: that of 16-bit data where all of them have it,
// which saves a kernel for each to widen it.
at::ScalarType parameter_type(at::ScalarType data,
                              std::initializer_list<const OptionalTensor*> parameters) {
  for (const OptionalTensor* parameter : parameters)
    if (*parameter && (*parameter)->scalar_type() != data) return acc_type(data);
  return data;
}

// Writes normed; kept (empty unless keep_rows), mean (empty for RMSNorm), rstd.
std::tuple<Tensor, Tensor, Tensor> norm_into(const Tensor& normed, const Tensor& x,
                                             const Tensor& index, at::IntArrayRef normalized_shape,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& bias, double eps, bool rms,
                                             bool keep_rows) {
  const auto acc = acc_type(x.scalar_type());
  auto sizes = x.sizes().vec();
  sizes[0] = index.size(0);
  const auto dims = static_cast<int64_t>(normalized_shape.size());
  const int64_t lines = c10::multiply_integers(sizes.begin() + 1, sizes.end() - dims);
  const auto acc_options = x.options().dtype(acc);
  // Written in float32 and rounded afterwards where no kernel writes the dtype itself.
  const Tensor y = instantiated(dtype_of(x), dtype_of(normed))
                       ? normed
                       : at::empty(sizes, x.options().dtype(at::kFloat));
  Tensor kept = keep_rows ? at::empty(sizes, x.options()) : at::empty({0}, x.options());
  Tensor mean = at::empty({rms ? 0 : index.size(0) * lines}, acc_options);
  Tensor rstd = at::empty({index.size(0) * lines}, acc_options);
  if (normed.numel() == 0) return {kept, mean.zero_(), rstd.zero_()};

  const Tensor lines_of_x = in_lines(x, dims);
  const auto type = parameter_type(x.scalar_type(), {&weight, &bias});
  const auto gamma = in_type(weight, type);
  const auto beta = in_type(bias, type);
  CompactNorm p{};
  p.parameters_narrow = type != acc;
  p.normed = y.mutable_data_ptr();
  p.copy = keep_rows ? kept.mutable_data_ptr() : nullptr;
  p.mean = rms ? nullptr : mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  p.x = lines_of_x.const_data_ptr();
  p.weight = data_of(gamma);
  p.bias = data_of(beta);
  p.index = index.const_data_ptr<int64_t>();
  p.batch = x.size(0);
  p.kept = index.size(0);
  p.eps = eps;
  p.lines = lines;
  p.len = line_length(normalized_shape);
  p.x_stride = *line_stride(lines_of_x, dims);
  const OnDevice device(x);
  check_launch(launch_compact_norm(p, dtype_of(x), dtype_of(y), device.stream()), "compact_norm");
  if (!y.is_same(normed)) normed.copy_(y);
  return {kept, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compact_norm(const Tensor& x, const Tensor& index,
                                                        at::IntArrayRef normalized_shape,
                                                        const OptionalTensor& weight,
                                                        const OptionalTensor& bias, double eps,
                                                        bool rms, at::ScalarType dtype,
                                                        bool keep_rows) {
  check_compact_norm(x, index, normalized_shape, weight, bias, dtype);
  auto sizes = x.sizes().vec();
  sizes[0] = index.size(0);
  Tensor normed = at::empty(sizes, x.options().dtype(dtype));
  auto [kept, mean, rstd] =
      norm_into(normed, x, index, normalized_shape, weight, bias, eps, rms, keep_rows);
  return {normed, kept, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> compact_norm_into(Tensor normed, const Tensor& x,
                                                     const Tensor& index,
                                                     at::IntArrayRef normalized_shape,
                                                     const OptionalTensor& weight,
                                                     const OptionalTensor& bias, double eps,
                                                     bool rms, bool keep_rows) {
  check_compact_norm(x, index, normalized_shape, weight, bias, normed.scalar_type());
  auto sizes = x.sizes().vec();
  sizes[0] = index.size(0);
  check_written(normed, "normed", sizes, x.device());
  at::assert_no_overlap(normed, x);
  return norm_into(normed, x, index, normalized_shape, weight, bias, eps, rms, keep_rows);
}

// d_x, d_weight, d_bias; an empty tensor for each that `wanted` leaves out.
std::tuple<Tensor, Tensor, Tensor> compact_norm_backward(
    const OptionalTensor& d_stream, const Tensor& d_normed, const Tensor& kept, const Tensor& mean,
    const Tensor& rstd, const Tensor& index, const Tensor& slot, at::IntArrayRef normalized_shape,
    const OptionalTensor& weight, bool rms, std::array<bool, 3> wanted) {
  check_compact_norm_backward(d_stream, d_normed, kept, mean, rstd, index, slot, normalized_shape,
                              weight, rms);
  const int64_t len = line_length(normalized_shape);
  const auto acc = acc_type(kept.scalar_type());
  const auto dims = static_cast<int64_t>(normalized_shape.size());
  auto sizes = kept.sizes().vec();
  sizes[0] = slot.size(0);
  const int64_t lines = c10::multiply_integers(sizes.begin() + 1, sizes.end() - dims);
  // The sums stay in the type of the arithmetic: autograd rounds them to the parameters' own.
  const auto acc_options = kept.options().dtype(acc);
  const auto sum = [&](bool is_wanted) {
    return is_wanted ? at::empty(normalized_shape, acc_options) : at::empty({0}, acc_options);
  };
  Tensor d_x = wanted[0] ? at::empty(sizes, kept.options()) : at::empty({0}, kept.options());
  Tensor d_weight = sum(wanted[1]), d_bias = sum(wanted[2]);
  if (slot.size(0) * lines * len == 0) return {d_x, d_weight.zero_(), d_bias.zero_()};

  OptionalTensor stream;
  if (d_stream) stream = in_lines(*d_stream, dims);
  const Tensor dense_d_normed = beside(d_normed, kept.scalar_type()).contiguous();
  const Tensor dense_kept = kept.contiguous();
  const auto type = parameter_type(kept.scalar_type(), {&weight});
  const auto gamma = in_type(weight, type);
  CompactNormBackward p{};
  p.weight_narrow = type != acc;
  p.d_x = wanted[0] ? d_x.mutable_data_ptr() : nullptr;
  p.d_weight = wanted[1] ? d_weight.mutable_data_ptr() : nullptr;
  p.d_bias = wanted[2] ? d_bias.mutable_data_ptr() : nullptr;
  p.d_stream = data_of(stream);
  p.d_normed = dense_d_normed.const_data_ptr();
  p.x = dense_kept.const_data_ptr();
  p.mean = rms ? nullptr : mean.const_data_ptr();
  p.rstd = rstd.const_data_ptr();
  p.weight = data_of(gamma);
  p.slot = slot.const_data_ptr<int64_t>();
  p.batch = slot.size(0);
  p.kept = index.size(0);
  p.lines = lines;
  p.len = len;
  p.inverse_len = 1.0 / static_cast<double>(len);
  if (stream) p.d_stream_stride = *line_stride(*stream, dims);
  OnDevice device(kept);
  check_launch(launch_compact_norm_backward(p, dtype_of(kept), dtype_of(dense_d_normed),
                                            device.allocate(), device.stream()),
               "compact_norm_backward");
  return {d_x, d_weight, d_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(sdkernels, CUDA, m) {
  m.impl("compact_norm", compact_norm);
  m.impl("compact_norm_into", compact_norm_into);
  m.impl("compact_norm_backward", compact_norm_backward);
}

}  // namespace sdkernels::cuda
