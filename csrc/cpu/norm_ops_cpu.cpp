// compact_norm (LayerNorm and RMSNorm of the kept rows) and its backward on the CPU.
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include "../norm_ops.h"
#include "cpu_ops.h"

namespace sdkernels::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const void* data_of(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

// From this many bytes on the kept rows, which nothing reads before the backward, are written past
// the caches: their lines need not be fetched first, and what the branch reads next stays.
constexpr size_t kBytesPastCaches = 1 << 20;

bool goes_past_caches(const Tensor& kept, int64_t len) {
  const int64_t line = len * kept.element_size();
  return kept.nbytes() >= kBytesPastCaches && line % kCacheBlock == 0 &&
         reinterpret_cast<uintptr_t>(kept.const_data_ptr()) % kCacheBlock == 0;
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
  const int64_t len = line_length(normalized_shape);
  const auto stat_sizes = x.sizes().slice(0, x.dim() - normalized_shape.size()).vec();
  const int64_t lines = c10::multiply_integers(stat_sizes.begin() + 1, stat_sizes.end());
  const auto acc_options = x.options().dtype(acc);
  Tensor kept = keep_rows ? at::empty(sizes, x.options()) : at::empty({0}, x.options());
  Tensor mean = at::empty({rms ? 0 : index.size(0) * lines}, acc_options);
  Tensor rstd = at::empty({index.size(0) * lines}, acc_options);
  if (normed.numel() == 0) return {kept, mean.zero_(), rstd.zero_()};

  const Tensor lines_of_x = in_lines(x, normalized_shape.size());
  const auto gamma = in_type(weight, acc);
  const auto beta = in_type(bias, acc);
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
  p.kept_past_caches = keep_rows && goes_past_caches(kept, len);
  parallel_for(0, rstd.numel(), at::divup(kSumGrain, len),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {kept, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compact_norm(const Tensor& x, const Tensor& index,
                                                        at::IntArrayRef normalized_shape,
                                                        const OptionalTensor& weight,
                                                        const OptionalTensor& bias, double eps,
                                                        bool rms, at::ScalarType dtype,
                                                        bool keep_rows) {
  check_compact_norm(x, index, normalized_shape, weight, bias, dtype);
  check_index_values(index, x.size(0));
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
  check_index_values(index, x.size(0));
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
  check_row_values(index, slot);
  const int64_t len = line_length(normalized_shape);
  const auto acc = acc_type(kept.scalar_type());
  auto sizes = kept.sizes().vec();
  sizes[0] = slot.size(0);
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
  const auto gamma = in_type(weight, acc);
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
    parallel_for(0, all_lines, at::divup(kSumGrain, len),
                 [&](int64_t begin, int64_t end) { kernel(p, begin, end, nullptr, nullptr); });
    return {d_x, zeros(false), zeros(false)};
  }
  // One array of partial sums: the weight's, then the bias's.
  const ChunkedSum sum(2 * len, all_lines, len, acc);
  const int64_t bias_offset = len * static_cast<int64_t>(c10::elementSize(acc));
  parallel_for(0, sum.chunks(), sum.grain(at::divup(kSumGrain, len)),
               [&](int64_t begin, int64_t end) {
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
  m.impl("compact_norm_into", compact_norm_into);
  m.impl("compact_norm_backward", compact_norm_backward);
}

}  // namespace sdkernels::cpu
