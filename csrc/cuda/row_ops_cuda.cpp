// compact_rows, expand_rows, scatter_rows, scatter_add_rows, the same with a ReLU behind it, their
// backward, and compact_mask on CUDA.
#include "../row_ops.h"

#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include "cuda_ops.h"

namespace sdkernels::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A layer scale that is constant along shorter lines than this ([C, 1, 1] of a small image) is
// written out for a row: the kernels then have longer lines.
constexpr int64_t kLeastLine = 32;

// Elements of the kernels' widest vectors.
int64_t widest(std::initializer_list<const Tensor*> tensors) {
  int64_t size = 1;
  for (const Tensor* tensor : tensors) size = std::max<int64_t>(size, tensor->element_size());
  return 16 / size;
}

// The type that the kernels read a layer scale in: that of 16-bit data where it has it, which saves
// a kernel to widen it.
at::ScalarType layer_scale_type(const OptionalTensor& layer_scale, at::ScalarType data,
                                at::ScalarType acc) {
  return layer_scale && layer_scale->scalar_type() == data ? data : acc;
}

// y from x, and base, through map; all of them are of one dtype.
void map_rows(const Tensor& y, const Tensor& x, const Tensor& map, Through through, const char* op,
              const Tensor* base = nullptr) {
  const auto geometry = base ? row_geometry({&y, &x, base}) : row_geometry({&y, &x});
  if (!geometry) {
    // x walks its rows in an order that y cannot follow in two levels.
    if (through == Through::scatter) {
      y.index_copy_(0, map, x);
      return;
    }
    if (!base && map.size(0) <= x.size(0)) {  // no row is left out
      y.copy_(x.index_select(0, map));
      return;
    }
    const Tensor ordered = in_order_of(y, x);
    if (ordered.strides() != x.strides()) {
      map_rows(y, ordered, map, through, op, base);
      return;
    }
    const Tensor dense = at::empty(y.sizes(), y.options());
    const Tensor dense_base = base ? base->contiguous() : Tensor();
    map_rows(dense, x.contiguous(), map, through, op, base ? &dense_base : nullptr);
    y.copy_(dense);
    return;
  }
  const int64_t size = y.element_size();
  const auto in_bytes = [&](const Stride& s) { return Stride{s.row * size, s.line * size}; };
  CopyRows p{};
  p.y = y.mutable_data_ptr();
  p.x = x.const_data_ptr();
  p.map = map.const_data_ptr<int64_t>();
  p.rows = map.size(0);
  p.mapped = through == Through::scatter ? y.size(0) : x.size(0);
  p.lines = geometry->lines;
  p.len = geometry->len * size;
  p.y_stride = in_bytes(geometry->strides[0]);
  p.x_stride = in_bytes(geometry->strides[1]);
  if (base) {
    p.base = base->const_data_ptr();
    p.base_stride = in_bytes(geometry->strides[2]);
  }
  const OnDevice device(y);
  check_launch(launch_copy_rows(p, through, device.stream()), op);
}

Tensor compact_rows(const Tensor& x, const Tensor& index) {
  check_rows_tensor(x, "x");
  check_index_tensor(index, "rows.index", x.device());
  Tensor kept = empty_rows(x, index.size(0), x.scalar_type());
  if (kept.numel() > 0) map_rows(kept, x, index, Through::gather, "compact_rows");
  return kept;
}

void compact_rows_into(Tensor kept, const Tensor& x, const Tensor& index) {
  check_rows_tensor(x, "x");
  check_index_tensor(index, "rows.index", x.device());
  auto sizes = x.sizes().vec();
  sizes[0] = index.size(0);
  check_written(kept, "kept", sizes, x.device());
  TORCH_CHECK_TYPE(kept.scalar_type() == x.scalar_type(), "kept: expected ", x.scalar_type(),
                   ", got ", kept.scalar_type());
  at::assert_no_overlap(kept, x);
  if (kept.numel() > 0) map_rows(kept, x, index, Through::gather, "compact_rows_into");
}

Tensor expand_rows(const Tensor& kept, const Tensor& index, const Tensor& slot) {
  check_rows_tensor(kept, "kept");
  check_index_tensor(index, "rows.index", kept.device());
  check_index_tensor(slot, "rows.slot", kept.device());
  TORCH_CHECK_VALUE(kept.size(0) == index.size(0), "kept: expected ", index.size(0), " rows, got ",
                    kept.size(0));
  Tensor x = empty_rows(kept, slot.size(0), kept.scalar_type());
  if (kept.numel() == 0) return x.zero_();
  map_rows(x, kept, slot, Through::gather_or_zero, "expand_rows");
  return x;
}

Tensor scatter_rows(const Tensor& residual, const Tensor& out, const Tensor& index,
                    const Tensor& slot) {
  check_scatter_rows(residual, out, index, slot);
  Tensor y = empty_rows(residual, residual.size(0), residual.scalar_type());
  if (out.numel() == 0) return y.copy_(residual);
  map_rows(y, out, slot, Through::gather_or_base, "scatter_rows", &residual);
  return y;
}

void scatter_rows_(Tensor residual, const Tensor& out, const Tensor& index, const Tensor& slot) {
  check_scatter_rows(residual, out, index, slot);
  at::assert_no_internal_overlap(residual);
  at::assert_no_overlap(residual, out);
  if (out.numel() > 0) map_rows(residual, out, index, Through::scatter, "scatter_rows_");
}

void scatter_add_into(const Tensor& y, const Tensor& residual, const Tensor& out,
                      const Tensor& index, const Tensor& slot, const OptionalTensor& layer_scale,
                      const OptionalTensor& row_weight, double scale, bool inplace) {
  const auto is_double = [](const Tensor& x) { return x.scalar_type() == at::kDouble; };
  const auto acc = is_double(y) || is_double(residual) || is_double(out) ? at::kDouble : at::kFloat;
  if (acc == at::kDouble && !(is_double(y) && is_double(residual) && is_double(out))) {
    // In the kernels double goes with double only: this is rare, and widening is exact.
    if (inplace) {
      const Tensor kept = residual.index_select(0, index).to(acc);
      const Tensor rows = at::arange(index.size(0), index.options());
      scatter_add_into(kept, kept, out.to(acc), rows, rows, layer_scale, row_weight, scale, true);
      y.index_copy_(0, index, kept.to(y.scalar_type()));
    } else {
      scatter_add_into(y, residual.to(acc), out.to(acc), index, slot, layer_scale, row_weight,
                       scale, false);
    }
    return;
  }
  // The strides of a tensor without elements mean nothing.
  const Tensor rows_of_out = beside(out.numel() > 0 ? out : residual, residual.scalar_type());
  const auto type = layer_scale_type(layer_scale, residual.scalar_type(), acc);
  const auto [geometry, gamma] = scaled_geometry({&y, &residual, &rows_of_out}, layer_scale, type,
                                                 kLeastLine, widest({&y, &residual, &rows_of_out}));
  if (!geometry) {
    const Tensor ordered = in_order_of(y, out);
    if (out.numel() > 0 && ordered.strides() != out.strides()) {
      scatter_add_into(y, residual, ordered, index, slot, layer_scale, row_weight, scale, inplace);
      return;
    }
    const Tensor dense = at::empty(y.sizes(), y.options());
    scatter_add_into(dense, residual.contiguous(), out.contiguous(), index, slot, layer_scale,
                     row_weight, scale, false);
    y.copy_(dense);
    return;
  }
  const auto weight = weight_of_rows(row_weight, acc);
  ScatterAdd p{};
  p.y = y.mutable_data_ptr();
  p.residual = residual.const_data_ptr();
  p.out = rows_of_out.const_data_ptr();
  p.layer_scale = data_of(gamma);
  p.row_weight = data_of(weight);
  p.slot = inplace ? nullptr : slot.const_data_ptr<int64_t>();
  p.index = inplace ? index.const_data_ptr<int64_t>() : nullptr;
  p.batch = slot.size(0);
  p.kept = index.size(0);
  p.scale = scale;
  p.lines = geometry->lines;
  p.len = geometry->len;
  p.y_stride = geometry->strides[0];
  p.residual_stride = geometry->strides[1];
  p.out_stride = geometry->strides[2];
  p.layer_scale_line = geometry->layer_scale_line;
  p.layer_scale_element = geometry->layer_scale_element;
  p.layer_scale_narrow = type != acc;
  const OnDevice device(y);
  check_launch(launch_scatter_add(p, dtype_of(y), dtype_of(residual), dtype_of(rows_of_out),
                                  device.stream()),
               "scatter_add_rows");
}

Tensor scatter_add_rows(const Tensor& residual, const Tensor& out, const Tensor& index,
                        const Tensor& slot, const OptionalTensor& layer_scale,
                        const OptionalTensor& row_weight, double scale) {
  check_scatter_add(residual, out, index, slot, layer_scale, row_weight);
  Tensor y = empty_rows(residual, residual.size(0), scatter_add_dtype(residual, out, layer_scale));
  if (y.numel() > 0)
    scatter_add_into(y, residual, out, index, slot, layer_scale, row_weight, scale,
                     /*inplace=*/false);
  return y;
}

void scatter_add_rows_(Tensor residual, const Tensor& out, const Tensor& index, const Tensor& slot,
                       const OptionalTensor& layer_scale, const OptionalTensor& row_weight,
                       double scale) {
  check_scatter_add(residual, out, index, slot, layer_scale, row_weight);
  at::assert_no_internal_overlap(residual);
  at::assert_no_overlap(residual, out);
  if (layer_scale) at::assert_no_overlap(residual, *layer_scale);
  if (row_weight) at::assert_no_overlap(residual, *row_weight);
  if (out.numel() > 0)
    scatter_add_into(residual, residual, out, index, slot, layer_scale, row_weight, scale,
                     /*inplace=*/true);
}

// wanted: the gradients of layer_scale and row_weight; an empty tensor takes the place of one that
// is not.
std::tuple<Tensor, Tensor> gradients_into(const Tensor& d_out, const Tensor& grad,
                                          const OptionalTensor& out, const Tensor& index,
                                          const OptionalTensor& layer_scale,
                                          const OptionalTensor& row_weight, double scale,
                                          std::array<bool, 2> wanted) {
  const auto dtype = d_out.scalar_type();
  const auto acc =
      grad.scalar_type() == at::kDouble || dtype == at::kDouble ? at::kDouble : at::kFloat;
  // What no kernel takes: double beside another type, and bfloat16 beside float16.
  if (!instantiated(dtype_of(grad), dtype_of(dtype))) {
    const OptionalTensor wide_out = out ? OptionalTensor(out->to(acc)) : out;
    const Tensor wide = at::empty_like(d_out, d_out.options().dtype(acc));
    auto sums =
        gradients_into(wide, grad.to(acc), wide_out, index, layer_scale, row_weight, scale, wanted);
    d_out.copy_(wide);
    return sums;
  }

  const auto [wants_layer_scale, wants_row_weight] = wanted;
  const int64_t k = index.size(0);
  const auto none = [&] { return at::empty({0}, grad.options()); };
  if (d_out.numel() == 0)
    return {wants_layer_scale ? at::zeros_like(*layer_scale) : none(),
            wants_row_weight ? at::zeros_like(*row_weight) : none()};

  c10::SmallVector<const Tensor*, 3> tensors{&d_out, &grad};
  if (out) tensors.push_back(&*out);
  const auto type = layer_scale_type(layer_scale, grad.scalar_type(), acc);
  const auto [geometry, gamma] =
      scaled_geometry(tensors, layer_scale, type, kLeastLine, widest({&d_out, &grad}));
  if (!geometry) {
    const Tensor ordered = empty_rows(grad, k, d_out.scalar_type());
    const OptionalTensor ordered_out = out ? OptionalTensor(in_order_of(grad, *out)) : out;
    if (ordered.strides() != d_out.strides() || (out && ordered_out->strides() != out->strides())) {
      auto sums =
          gradients_into(ordered, grad, ordered_out, index, layer_scale, row_weight, scale, wanted);
      d_out.copy_(ordered);
      return sums;
    }
    const OptionalTensor dense_out = out ? OptionalTensor(out->contiguous()) : out;
    const Tensor dense = at::empty(d_out.sizes(), d_out.options());
    auto sums = gradients_into(dense, grad.contiguous(), dense_out, index, layer_scale, row_weight,
                               scale, wanted);
    d_out.copy_(dense);
    return sums;
  }
  const auto weight = weight_of_rows(row_weight, acc);
  const auto sums = grad.options().dtype(acc);
  const Tensor layer_scale_sum = wants_layer_scale ? at::empty({gamma->numel()}, sums) : none();
  const Tensor row_weight_sum = wants_row_weight ? at::empty({k}, sums) : none();
  ScatterAddBackward p{};
  p.d_out = d_out.mutable_data_ptr();
  p.d_layer_scale = wants_layer_scale ? layer_scale_sum.mutable_data_ptr() : nullptr;
  p.d_row_weight = wants_row_weight ? row_weight_sum.mutable_data_ptr() : nullptr;
  p.grad = grad.const_data_ptr();
  p.out = data_of(out);
  p.layer_scale = data_of(gamma);
  p.row_weight = data_of(weight);
  p.index = index.const_data_ptr<int64_t>();
  p.batch = grad.size(0);
  p.kept = k;
  p.scale = scale;
  p.lines = geometry->lines;
  p.len = geometry->len;
  p.d_out_stride = geometry->strides[0];
  p.grad_stride = geometry->strides[1];
  if (out) p.out_stride = geometry->strides[2];
  p.layer_scale_line = geometry->layer_scale_line;
  p.layer_scale_element = geometry->layer_scale_element;
  p.layer_scale_size = gamma ? gamma->numel() : 0;
  p.layer_scale_narrow = type != acc;
  OnDevice device(grad);
  check_launch(launch_scatter_add_backward(p, dtype_of(grad), dtype_of(dtype), device.allocate(),
                                           device.stream()),
               "scatter_add_rows_backward");
  Tensor d_layer_scale = layer_scale_sum;
  if (wants_layer_scale) {
    // A layer scale that was written out for a whole row is summed back to its own shape, and the
    // result has the strides of layer_scale itself.
    Tensor total = layer_scale_sum.as_strided(gamma->sizes(), gamma->strides());
    if (gamma->sizes() != layer_scale->sizes()) total = total.sum_to_size(layer_scale->sizes());
    d_layer_scale = total.scalar_type() == layer_scale->scalar_type() &&
                            total.strides() == at::empty_like(*layer_scale).strides()
                        ? total
                        : at::empty_like(*layer_scale).copy_(total);
  }
  return {d_layer_scale,
          wants_row_weight ? row_weight_sum.to(row_weight->scalar_type()) : row_weight_sum};
}

std::tuple<Tensor, Tensor, Tensor> scatter_add_rows_backward(
    const Tensor& grad, const OptionalTensor& out, const Tensor& index,
    const OptionalTensor& layer_scale, const OptionalTensor& row_weight, double scale,
    at::ScalarType dtype, std::array<bool, 2> wanted) {
  check_scatter_add_backward(grad, out, index, layer_scale, row_weight, dtype, wanted);
  Tensor d_out = empty_rows(out ? *out : grad, index.size(0), dtype);
  auto [d_layer_scale, d_row_weight] =
      gradients_into(d_out, grad, out, index, layer_scale, row_weight, scale, wanted);
  return {d_out, d_layer_scale, d_row_weight};
}

std::tuple<Tensor, Tensor> scatter_add_rows_backward_into(
    Tensor d_out, const Tensor& grad, const OptionalTensor& out, const Tensor& index,
    const OptionalTensor& layer_scale, const OptionalTensor& row_weight, double scale,
    std::array<bool, 2> wanted) {
  check_scatter_add_backward(grad, out, index, layer_scale, row_weight, d_out.scalar_type(),
                             wanted);
  auto sizes = grad.sizes().vec();
  sizes[0] = index.size(0);
  check_written(d_out, "d_out", sizes, grad.device());
  at::assert_no_overlap(d_out, grad);
  if (out) at::assert_no_overlap(d_out, *out);
  return gradients_into(d_out, grad, out, index, layer_scale, row_weight, scale, wanted);
}

void scatter_add_relu_into(const Tensor& y, const Tensor& positive, const Tensor& residual,
                           const Tensor& out, const Tensor& index, const Tensor& slot,
                           const OptionalTensor& layer_scale, const OptionalTensor& row_weight,
                           double scale) {
  const auto acc = acc_type(y.scalar_type());
  if (acc == at::kDouble && (residual.scalar_type() != acc || out.scalar_type() != acc)) {
    scatter_add_relu_into(y, positive, residual.to(acc), out.to(acc), index, slot, layer_scale,
                          row_weight, scale);
    return;
  }
  const auto format = row_format(y);
  if (!y.is_contiguous(format)) {
    const Tensor dense = at::empty(y.sizes(), y.options());
    scatter_add_relu_into(dense, positive, residual, out, index, slot, layer_scale, row_weight,
                          scale);
    y.copy_(dense);
    return;
  }
  // The strides of a tensor without elements mean nothing.
  const Tensor rows_of_out = beside(out.numel() > 0 ? out : residual, residual.scalar_type());
  const auto geometry = row_geometry({&y, &residual, &rows_of_out});
  if (!geometry || geometry->lines > 1) {
    scatter_add_relu_into(y, positive, residual.contiguous(format), out.contiguous(format), index,
                          slot, layer_scale, row_weight, scale);
    return;
  }
  OptionalTensor gamma;
  if (layer_scale) gamma = layer_scale_of_row(*layer_scale, y, acc);
  const auto weight = weight_of_rows(row_weight, acc);
  ScatterAddRelu p{};
  p.y = y.mutable_data_ptr();
  p.positive = positive.mutable_data_ptr<uint8_t>();
  p.residual = residual.const_data_ptr();
  p.out = rows_of_out.const_data_ptr();
  p.layer_scale = data_of(gamma);
  p.row_weight = data_of(weight);
  p.slot = slot.const_data_ptr<int64_t>();
  p.batch = slot.size(0);
  p.kept = index.size(0);
  p.scale = scale;
  p.len = geometry->len;
  p.residual_row = geometry->strides[1].row;
  p.out_row = geometry->strides[2].row;
  const OnDevice device(y);
  check_launch(launch_scatter_add_relu(p, dtype_of(y), dtype_of(residual), dtype_of(rows_of_out),
                                       device.stream()),
               "scatter_add_relu_rows");
}

std::tuple<Tensor, Tensor> scatter_add_relu_rows(const Tensor& residual, const Tensor& out,
                                                 const Tensor& index, const Tensor& slot,
                                                 const OptionalTensor& layer_scale,
                                                 const OptionalTensor& row_weight, double scale) {
  check_scatter_add(residual, out, index, slot, layer_scale, row_weight);
  Tensor y = empty_rows(residual, residual.size(0), scatter_add_dtype(residual, out, layer_scale));
  Tensor positive = empty_bits(y);
  if (y.numel() > 0)
    scatter_add_relu_into(y, positive, residual, out, index, slot, layer_scale, row_weight, scale);
  return {y, positive};
}

// wants_out: whether d_out is wanted; an empty tensor takes its place where it is not.
std::tuple<Tensor, Tensor> scatter_add_relu_rows_backward(
    const Tensor& grad, const Tensor& positive, const Tensor& index, const Tensor& slot,
    const OptionalTensor& layer_scale, const OptionalTensor& row_weight, double scale,
    at::ScalarType dtype, at::MemoryFormat format, bool wants_out) {
  check_scatter_add_relu_backward(grad, positive, index, slot, layer_scale, row_weight, dtype,
                                  format);
  const auto acc =
      grad.scalar_type() == at::kDouble || dtype == at::kDouble ? at::kDouble : at::kFloat;
  // What no kernel takes: double beside another type, and bfloat16 beside float16.
  if (wants_out && !instantiated(dtype_of(grad), dtype_of(dtype))) {
    auto [d_residual, d_out] = scatter_add_relu_rows_backward(
        grad.to(acc), positive, index, slot, layer_scale, row_weight, scale, acc, format, true);
    return {d_residual.to(grad.scalar_type()), d_out.to(dtype)};
  }
  Tensor d_residual = at::empty(grad.sizes(), grad.options().memory_format(format));
  Tensor d_out = wants_out ? empty_rows(d_residual, index.size(0), dtype)
                           : at::empty({0}, grad.options().dtype(dtype));
  if (grad.numel() == 0) return {d_residual, d_out};
  const Tensor dense = grad.contiguous(format);
  OptionalTensor gamma, weight;
  if (wants_out) {
    if (layer_scale) gamma = layer_scale_of_row(*layer_scale, d_residual, acc);
    weight = weight_of_rows(row_weight, acc);
  }
  ScatterAddReluBackward p{};
  p.d_residual = d_residual.mutable_data_ptr();
  p.d_out = wants_out ? d_out.mutable_data_ptr() : nullptr;
  p.grad = dense.const_data_ptr();
  p.positive = positive.const_data_ptr<uint8_t>();
  p.layer_scale = data_of(gamma);
  p.row_weight = data_of(weight);
  p.slot = slot.const_data_ptr<int64_t>();
  p.batch = slot.size(0);
  p.kept = index.size(0);
  p.scale = scale;
  p.len = grad.numel() / grad.size(0);
  const OnDevice device(grad);
  check_launch(launch_scatter_add_relu_backward(
                   p, dtype_of(grad), dtype_of(wants_out ? d_out : grad), device.stream()),
               "scatter_add_relu_rows_backward");
  return {d_residual, d_out};
}

std::tuple<Tensor, Tensor> compact_mask(const Tensor& mask, std::optional<int64_t> k) {
  check_mask(mask, k);
  const auto options = mask.options().dtype(at::kLong);
  const int64_t batch = mask.size(0);
  Tensor index = at::empty({k.value_or(batch)}, options);
  Tensor slot = at::empty({batch}, options);
  const Tensor count = at::empty({k ? 0 : 1}, options);
  CompactMask p{};
  p.index = index.mutable_data_ptr<int64_t>();
  p.slot = slot.mutable_data_ptr<int64_t>();
  p.count = k ? nullptr : count.mutable_data_ptr<int64_t>();
  p.mask = mask.const_data_ptr<bool>();
  p.batch = batch;
  p.kept = index.size(0);
  p.mask_stride = mask.stride(0);
  const OnDevice device(mask);
  check_launch(launch_compact_mask(p, device.stream()), "compact_mask");
  if (!k) index = index.narrow(0, 0, count.item<int64_t>());  // waits for the device
  return {index, slot};
}

}  // namespace

TORCH_LIBRARY_IMPL(sdkernels, CUDA, m) {
  m.impl("compact_rows", compact_rows);
  m.impl("compact_rows_into", compact_rows_into);
  m.impl("expand_rows", expand_rows);
  m.impl("scatter_rows", scatter_rows);
  m.impl("scatter_rows_", scatter_rows_);
  m.impl("scatter_add_rows", scatter_add_rows);
  m.impl("scatter_add_rows_", scatter_add_rows_);
  m.impl("scatter_add_rows_backward", scatter_add_rows_backward);
  m.impl("scatter_add_rows_backward_into", scatter_add_rows_backward_into);
  m.impl("scatter_add_relu_rows", scatter_add_relu_rows);
  m.impl("scatter_add_relu_rows_backward", scatter_add_relu_rows_backward);
  m.impl("compact_mask", compact_mask);
}

}  // namespace sdkernels::cuda
