// What every backend of the row ops shares: the checks of their arguments and the geometry of a
// row.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <optional>

#include "stride.h"

namespace sdkernels {

// ---- checks -------------------------------------------------------------------------------------

inline void check_rows_tensor(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() >= 1, name,
                    ": expected a tensor with a batch dimension, got 0 dimensions");
}

inline bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

inline void check_floating(const at::Tensor& x, const char* name) {
  TORCH_CHECK_TYPE(is_supported(x.scalar_type()), name,
                   ": expected float16, bfloat16, float32 or float64, got ", x.scalar_type());
}

inline void check_same_device(const at::Tensor& x, const char* name, const at::Device& device,
                              const char* reference) {
  TORCH_CHECK_VALUE(x.device() == device, name, ": expected the device of ", reference, ", ",
                    device, ", got ", x.device());
}

inline void check_index_tensor(const at::Tensor& index, const char* name,
                               const at::Device& device) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, name, ": expected int64, got ",
                   index.scalar_type());
  TORCH_CHECK_VALUE(index.dim() == 1 && index.is_contiguous(), name,
                    ": expected a contiguous tensor of one dimension, got shape ", index.sizes());
  check_same_device(index, name, device, "x");
}

// The kept rows against a batch: types, sizes and device; the values are looked at by
// check_row_values.
inline void check_kept_rows(const at::Tensor& x, const at::Tensor& index, const at::Tensor& slot) {
  check_index_tensor(index, "rows.index", x.device());
  check_index_tensor(slot, "rows.slot", x.device());
  TORCH_CHECK_VALUE(slot.size(0) == x.size(0), "rows: made for a batch of ", slot.size(0),
                    " rows, but dimension 0 of the tensor is ", x.size(0));
  TORCH_CHECK_VALUE(index.size(0) <= slot.size(0), "rows.index: ", index.size(0),
                    " kept rows of a batch of ", slot.size(0));
}

// Bytes that hold a bit for every element of one row.
inline int64_t bytes_of_bits(const at::Tensor& x) {
  return (c10::multiply_integers(x.sizes().slice(1)) + 7) / 8;
}

// `out` must hold the kept rows of something shaped like `residual`.
inline void check_out(const at::Tensor& residual, const at::Tensor& out, const at::Tensor& index) {
  check_floating(residual, "residual");
  check_floating(out, "out");
  check_same_device(out, "out", residual.device(), "residual");
  const bool same_row = out.dim() == residual.dim() && out.dim() >= 1 &&
                        out.sizes().slice(1) == residual.sizes().slice(1);
  TORCH_CHECK_VALUE(
      same_row && out.size(0) == index.size(0), "out: expected ", index.size(0),
      " kept rows of residual's shape ", residual.sizes(), ", got ", out.sizes(),
      " (the branch must return one row for each kept row, in order, of the residual's shape)");
}

// `out` takes the place of the kept rows of `residual`.
inline void check_scatter_rows(const at::Tensor& residual, const at::Tensor& out,
                               const at::Tensor& index, const at::Tensor& slot) {
  check_rows_tensor(residual, "residual");
  check_kept_rows(residual, index, slot);
  check_out(residual, out, index);
  TORCH_CHECK_TYPE(out.scalar_type() == residual.scalar_type(), "out: expected residual's dtype, ",
                   residual.scalar_type(), ", got ", out.scalar_type());
}

// A tensor of the caller's that is written to: all of it, in order of its dimensions.
inline void check_written(const at::Tensor& y, const char* name, at::IntArrayRef sizes,
                          const at::Device& device) {
  check_same_device(y, name, device, "x");
  TORCH_CHECK_VALUE(y.sizes() == sizes && y.is_contiguous(), name,
                    ": expected a contiguous tensor of shape ", sizes, ", got ", y.sizes());
}

// layer_scale must broadcast against one row without enlarging it.
inline void check_layer_scale(const at::Tensor& layer_scale, at::IntArrayRef row,
                              const at::Device& device) {
  check_floating(layer_scale, "layer_scale");
  check_same_device(layer_scale, "layer_scale", device, "residual");
  const at::IntArrayRef sizes = layer_scale.sizes();
  bool fits = sizes.size() <= row.size();
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    const int64_t size = sizes[sizes.size() - 1 - i];
    fits = size == 1 || size == row[row.size() - 1 - i];
  }
  TORCH_CHECK_VALUE(fits, "layer_scale: shape ", sizes,
                    " does not broadcast against one row of shape ", row);
}

// One weight for each kept row.
inline void check_row_weight(const at::Tensor& row_weight, const at::Tensor& index) {
  check_floating(row_weight, "rows.weight");
  check_same_device(row_weight, "rows.weight", index.device(), "rows.index");
  TORCH_CHECK_VALUE(row_weight.dim() == 1 && row_weight.size(0) == index.size(0),
                    "rows.weight: expected shape [", index.size(0),
                    "], one weight a kept row, got ", row_weight.sizes());
}

inline void check_scatter_add(const at::Tensor& residual, const at::Tensor& out,
                              const at::Tensor& index, const at::Tensor& slot,
                              const std::optional<at::Tensor>& layer_scale,
                              const std::optional<at::Tensor>& row_weight) {
  check_rows_tensor(residual, "residual");
  check_kept_rows(residual, index, slot);
  check_out(residual, out, index);
  if (layer_scale) check_layer_scale(*layer_scale, residual.sizes().slice(1), residual.device());
  if (row_weight) check_row_weight(*row_weight, index);
}

// A mask over the batch, and how many rows it keeps where the caller knows that.
inline void check_mask(const at::Tensor& mask, std::optional<int64_t> k) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "mask: expected a bool tensor, got ",
                   mask.scalar_type());
  TORCH_CHECK_VALUE(mask.dim() == 1, "mask: expected shape [batch], got ", mask.sizes());
  TORCH_CHECK_VALUE(!k || (*k >= 0 && *k <= mask.size(0)),
                    "k: expected the number of true entries of mask, from 0 to ", mask.size(0),
                    ", got ", *k);
}

inline void check_scatter_add_backward(const at::Tensor& grad, const std::optional<at::Tensor>& out,
                                       const at::Tensor& index,
                                       const std::optional<at::Tensor>& layer_scale,
                                       const std::optional<at::Tensor>& row_weight,
                                       at::ScalarType dtype, std::array<bool, 2> wanted) {
  check_rows_tensor(grad, "grad");
  check_floating(grad, "grad");
  check_index_tensor(index, "rows.index", grad.device());
  TORCH_CHECK_TYPE(is_supported(dtype), "dtype: expected a floating point type, got ", dtype);
  if (layer_scale) check_layer_scale(*layer_scale, grad.sizes().slice(1), grad.device());
  if (row_weight) check_row_weight(*row_weight, index);
  TORCH_CHECK_VALUE((layer_scale || !wanted[0]) && (row_weight || !wanted[1]),
                    "wanted: the gradient of something that was not given");
  TORCH_CHECK_VALUE(out.has_value() == (wanted[0] || wanted[1]),
                    "out: expected where a gradient of layer_scale or row_weight is wanted, and "
                    "there only");
  if (!out) return;
  check_out(grad, *out, index);
  TORCH_CHECK_TYPE(out->scalar_type() == dtype, "out: expected ", dtype, ", got ",
                   out->scalar_type());
}

// `positive` holds a bit for every element of `grad`, counted in a format that grad can have.
inline void check_scatter_add_relu_backward(const at::Tensor& grad, const at::Tensor& positive,
                                            const at::Tensor& index, const at::Tensor& slot,
                                            const std::optional<at::Tensor>& layer_scale,
                                            const std::optional<at::Tensor>& row_weight,
                                            at::ScalarType dtype, at::MemoryFormat format) {
  check_rows_tensor(grad, "grad");
  check_floating(grad, "grad");
  check_kept_rows(grad, index, slot);
  TORCH_CHECK_TYPE(is_supported(dtype), "dtype: expected a floating point type, got ", dtype);
  if (layer_scale) check_layer_scale(*layer_scale, grad.sizes().slice(1), grad.device());
  if (row_weight) check_row_weight(*row_weight, index);
  check_same_device(positive, "positive", grad.device(), "grad");
  TORCH_CHECK_TYPE(positive.scalar_type() == at::kByte, "positive: expected uint8, got ",
                   positive.scalar_type());
  const int64_t bytes = bytes_of_bits(grad);
  TORCH_CHECK_VALUE(positive.dim() == 2 && positive.size(0) == grad.size(0) &&
                        positive.size(1) == bytes && positive.is_contiguous(),
                    "positive: expected a contiguous tensor of shape [", grad.size(0), ", ", bytes,
                    "], one bit an element of grad, got shape ", positive.sizes());
  const bool fits = format == at::MemoryFormat::Contiguous ||
                    (format == at::MemoryFormat::ChannelsLast && grad.dim() == 4) ||
                    (format == at::MemoryFormat::ChannelsLast3d && grad.dim() == 5);
  TORCH_CHECK_VALUE(fits, "memory_format: ", format, " is none of a tensor of shape ",
                    grad.sizes());
}

inline void check_norm(const at::Tensor& x, at::IntArrayRef normalized_shape,
                       const std::optional<at::Tensor>& weight,
                       const std::optional<at::Tensor>& bias) {
  check_rows_tensor(x, "x");
  check_floating(x, "x");
  const size_t n = normalized_shape.size();
  const bool fits = n >= 1 && static_cast<int64_t>(n) < x.dim() &&
                    x.sizes().slice(x.dim() - n) == normalized_shape;
  TORCH_CHECK_VALUE(fits, "norm: normalizes over ", normalized_shape,
                    ", which are not the last dimensions of one row of x, shape ", x.sizes());
  for (const auto& [parameter, name] : {std::pair{&weight, "norm.weight"}, {&bias, "norm.bias"}}) {
    if (!parameter->has_value() || !(*parameter)->defined()) continue;
    check_floating(**parameter, name);
    check_same_device(**parameter, name, x.device(), "x");
    TORCH_CHECK_VALUE((*parameter)->sizes() == normalized_shape, name, ": expected shape ",
                      normalized_shape, ", got ", (*parameter)->sizes());
  }
}

// ---- geometry -----------------------------------------------------------------------------------

// Arithmetic is in float32, and in float64 where the data are.
inline at::ScalarType acc_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// The dtype of residual + layer_scale * out.
inline at::ScalarType scatter_add_dtype(const at::Tensor& residual, const at::Tensor& out,
                                        const std::optional<at::Tensor>& layer_scale) {
  const auto dtype = c10::promoteTypes(residual.scalar_type(), out.scalar_type());
  // As for any operand, one without dimensions is left out.
  if (!layer_scale || layer_scale->dim() == 0) return dtype;
  return c10::promoteTypes(dtype, layer_scale->scalar_type());
}

// A batch like `x` with `rows` rows: the order of x's strides is kept (channels_last stays so).
inline at::Tensor empty_rows(const at::Tensor& x, int64_t rows, at::ScalarType dtype) {
  const auto options = x.options().dtype(dtype);
  c10::SmallVector<int64_t, 6> sizes(x.sizes());
  sizes[0] = rows;
  if (x.is_contiguous()) return at::empty(sizes, options);
  if (rows == x.size(0)) return at::empty_like(x, options);
  if (rows < x.size(0)) return at::empty_like(x.narrow(0, 0, rows), options);
  // PyTorch's rule for the order of dimensions, asked without allocating anything.
  const at::Tensor like = at::empty_strided(sizes, x.strides(), options.device(at::kMeta));
  return at::empty_strided(sizes, at::empty_like(like).strides(), options);
}

// Rows in the order that those of `x` have, with which they share a geometry then.
inline at::Tensor in_order_of(const at::Tensor& x, const at::Tensor& rows) {
  return empty_rows(x, rows.size(0), rows.scalar_type()).copy_(rows);
}

// The format that x has; contiguous where it has none, of which a dense copy is made.
inline at::MemoryFormat row_format(const at::Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  for (const auto format : {at::MemoryFormat::ChannelsLast, at::MemoryFormat::ChannelsLast3d})
    if (x.is_contiguous(format)) return format;
  return at::MemoryFormat::Contiguous;
}

// Room for a bit for every element of y's rows.
inline at::Tensor empty_bits(const at::Tensor& y) {
  return at::empty({y.size(0), bytes_of_bits(y)}, y.options().dtype(at::kByte));
}

// How several tensors with the same row shape are walked together: `lines` runs of `len` elements,
// contiguous in each of them; strides[t] belongs to tensors[t], in elements.
struct RowGeometry {
  int64_t lines = 1, len = 1;
  c10::SmallVector<Stride, 4> strides;
  int64_t layer_scale_line = 0, layer_scale_element = 0;
};

// The strides of layer_scale when it is broadcast against a row of `row`'s dimensions.
inline c10::SmallVector<int64_t, 6> broadcast_strides(const at::Tensor& layer_scale,
                                                      at::IntArrayRef row) {
  c10::SmallVector<int64_t, 6> strides(row.size(), 0);
  for (int64_t d = 1; d <= layer_scale.dim(); ++d)
    if (layer_scale.size(-d) != 1) strides[row.size() - d] = layer_scale.stride(-d);
  return strides;
}

// Merges the dimensions of a row, in the memory order of the first tensor, into lines of contiguous
// elements. Empty when some tensor does not allow two levels: the caller then makes dense copies.
inline std::optional<RowGeometry> row_geometry(c10::ArrayRef<const at::Tensor*> tensors,
                                               const at::Tensor* layer_scale = nullptr) {
  const at::Tensor& first = *tensors[0];
  const int64_t dims = first.dim() - 1;
  const size_t n = tensors.size();
  RowGeometry geometry;
  geometry.strides.resize(n);
  for (size_t t = 0; t < n; ++t) geometry.strides[t].row = tensors[t]->stride(0);

  c10::SmallVector<int64_t, 6> scale_strides;
  if (layer_scale) scale_strides = broadcast_strides(*layer_scale, first.sizes().slice(1));

  c10::SmallVector<int64_t, 6> order;  // dimensions with more than one index, innermost first
  for (int64_t d = dims; d >= 1; --d)
    if (first.size(d) != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return first.stride(a) < first.stride(b); });

  const auto stride = [&](size_t t, int64_t d) {
    return t < n ? tensors[t]->stride(d) : scale_strides[d - 1];
  };
  const size_t all = n + (layer_scale ? 1 : 0);
  struct Level {
    int64_t inner,
        size;  // its innermost dimension, and the elements of all that were merged into it
  };
  c10::SmallVector<Level, 6> levels;
  for (const int64_t d : order) {
    bool merges = !levels.empty();
    for (size_t t = 0; merges && t < all; ++t)
      merges = stride(t, d) == stride(t, levels.back().inner) * levels.back().size;
    if (merges)
      levels.back().size *= first.size(d);
    else
      levels.push_back({d, first.size(d)});
  }
  if (levels.empty()) return geometry;
  const auto contiguous = [&](const Level& level) {
    for (size_t t = 0; t < n; ++t)
      if (stride(t, level.inner) != 1) return false;
    return !layer_scale || stride(n, level.inner) == 0 || stride(n, level.inner) == 1;
  };
  const Level* elements = contiguous(levels[0]) ? &levels[0] : nullptr;
  // Walking strided elements one by one is slower than a dense copy of them.
  constexpr int64_t kMostStrided = 16;
  if (!elements && levels[0].size > kMostStrided) return std::nullopt;
  if (levels.size() > (elements ? 2u : 1u)) return std::nullopt;
  const Level* runs = !elements ? &levels[0] : levels.size() == 2 ? &levels[1] : nullptr;
  if (elements) {
    geometry.len = elements->size;
    if (layer_scale) geometry.layer_scale_element = stride(n, elements->inner);
  }
  if (runs) {
    geometry.lines = runs->size;
    for (size_t t = 0; t < n; ++t) geometry.strides[t].line = stride(t, runs->inner);
    if (layer_scale) geometry.layer_scale_line = stride(n, runs->inner);
  }
  return geometry;
}

// The layer scale written out for one row of y.
inline at::Tensor layer_scale_of_row(const at::Tensor& layer_scale, const at::Tensor& y,
                                     at::ScalarType type) {
  const at::Tensor row = y.select(0, 0);
  return at::empty_like(row, row.options().dtype(type)).copy_(layer_scale.expand(row.sizes()));
}

// The layer scale in the type that the kernels read it in, and the geometry that it shares with
// `tensors`. A shape that two levels cannot express (say [C, 1, W]) is written out for one whole
// row, as is one that is constant along lines shorter than `least_line`, or along lines without a
// whole number of vectors of `width` elements where the row has one.
struct ScaledGeometry {
  std::optional<RowGeometry> rows;
  std::optional<at::Tensor> layer_scale;
};

inline ScaledGeometry scaled_geometry(c10::ArrayRef<const at::Tensor*> tensors,
                                      const std::optional<at::Tensor>& layer_scale,
                                      at::ScalarType type, int64_t least_line = 0,
                                      int64_t width = 1) {
  if (!layer_scale) return {row_geometry(tensors), {}};
  at::Tensor gamma = layer_scale->to(type).contiguous();
  const auto rows = row_geometry(tensors, &gamma);
  const auto has_vectors = [&] {
    return rows->len % width == 0 || rows->lines * rows->len % width != 0 ||
           row_geometry(tensors)->lines > 1;
  };
  if (rows &&
      (rows->lines == 1 || rows->layer_scale_element || (rows->len >= least_line && has_vectors())))
    return {rows, gamma};
  gamma = layer_scale_of_row(gamma, *tensors[0], type);
  return {row_geometry(tensors, &gamma), gamma};
}

// row_weight in the type of the arithmetic.
inline std::optional<at::Tensor> weight_of_rows(const std::optional<at::Tensor>& row_weight,
                                                at::ScalarType acc) {
  return row_weight ? std::optional(row_weight->to(acc).contiguous()) : row_weight;
}

}  // namespace sdkernels
