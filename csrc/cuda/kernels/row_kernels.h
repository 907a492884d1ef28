// The CUDA kernels' launchers: raw pointers, sizes and a stream, no PyTorch header.
//
// A row (one sample) is walked as `lines` runs of `len` contiguous elements (stride.h). Sizes and
// strides are in elements and 64 bits wide. Each launcher chooses vector width, block and grid from
// the arguments alone, never from the device, so that the same inputs give the same bits
// everywhere. None of them synchronises; scratch memory comes from the caller's allocator. Calls
// that would write no row do not come here; sums over no row do (compact_norm_backward).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

#include "../../stride.h"

namespace sdkernels::cuda {

enum class Dtype : int8_t { f32, bf16, f16, f64 };

// Arithmetic is float, and double where the data are double: the types marked "acc" below. Of the
// parameters of 16-bit data, those marked "acc or narrow" may be in the type that is named instead.

// Memory for partial sums, alive until everything on the stream that uses it was launched.
using Allocate = std::function<void*(int64_t bytes)>;

// How CopyRows goes through its map: y[r] = x[map[r]]; the same, and zeros where map[r] is -1; the
// same, and base[r] there; y[map[r]] = x[r].
enum class Through : int8_t { gather, gather_or_zero, gather_or_base, scatter };

// Rows copied through a map. Strides and len in bytes. Reads and writes `rows` rows (gather_or_zero
// reads those that have a source only).
struct CopyRows {
  void* y;
  const void* x;
  const void* base;  // with gather_or_base
  const int64_t* map;
  int64_t rows, mapped;  // length of map; rows of the tensor that it counts in
  int64_t lines, len;
  Stride y_stride, x_stride, base_stride;
};

// y = residual, and y[kept] += scale * row_weight * layer_scale * out. Exactly one of slot and
// index is set: with slot, all B rows are written (reads B + k, writes B); with index, only the k
// kept rows are (in place, y == residual; reads 2k, writes k).
struct ScatterAdd {
  void* y;
  const void* residual;
  const void* out;
  const void* layer_scale;  // acc or narrow (residual's type), or null
  const void* row_weight;   // acc [k], or null
  const int64_t* slot;
  const int64_t* index;
  int64_t batch, kept;
  double scale;
  int64_t lines, len;
  Stride y_stride, residual_stride, out_stride;
  int64_t layer_scale_line, layer_scale_element;  // strides of layer_scale; the second is 0 or 1
  bool layer_scale_narrow;
};

// d_out = scale * row_weight * layer_scale * grad[kept]; reads k, writes k. With `out` also, in the
// same pass (k more reads),
//   d_layer_scale = scale * sum of row_weight * grad[kept] * out   over what it is broadcast to,
//   d_row_weight  = scale * sum of layer_scale * grad[kept] * out  over each row.
struct ScatterAddBackward {
  void* d_out;
  void* d_layer_scale;  // acc [layer_scale_size], or null
  void* d_row_weight;   // acc [k], or null
  const void* grad;
  const void* out;          // null when neither sum is wanted
  const void* layer_scale;  // acc or narrow (grad's type), or null
  const void* row_weight;   // acc [k], or null
  const int64_t* index;
  int64_t batch, kept;
  double scale;
  int64_t lines, len;
  Stride d_out_stride, grad_stride, out_stride;
  int64_t layer_scale_line, layer_scale_element;
  int64_t layer_scale_size;
  bool layer_scale_narrow;
};

// y = relu(residual), with scale * row_weight * layer_scale * out added to the kept rows before,
// and a bit for every element of y, set where the ReLU passes its gradient: element e of a row has
// bit e % 8 of byte e / 8, and bits behind the last element are zero. A row is one line. Reads B +
// k, writes B and the bits.
struct ScatterAddRelu {
  void* y;            // contiguous
  uint8_t* positive;  // [batch, ceil(len / 8)]
  const void* residual;
  const void* out;
  const void* layer_scale;  // acc [len], or null
  const void* row_weight;   // acc [k], or null
  const int64_t* slot;
  int64_t batch, kept;
  double scale;
  int64_t len;
  int64_t residual_row, out_row;  // strides
};

// d_residual = grad where `positive` has a bit, zero elsewhere, and d_out = scale * row_weight *
// layer_scale * d_residual[kept] beside it. A row is one line, and all tensors are contiguous.
// Reads B and the bits, writes B + k.
struct ScatterAddReluBackward {
  void* d_residual;
  void* d_out;  // null where it is not wanted
  const void* grad;
  const uint8_t* positive;
  const void* layer_scale;  // acc [len], or null
  const void* row_weight;   // acc [k], or null
  const int64_t* slot;
  int64_t batch, kept;
  double scale;
  int64_t len;
};

// normed = norm(x[kept]) over each line, and the kept rows of x beside it where `copy` is set.
// Reads k, writes k (2k with the copy). normed and copy are contiguous; mean is null for RMSNorm.
struct CompactNorm {
  void* normed;
  void* copy;
  void* mean;  // acc [k * lines]
  void* rstd;  // acc [k * lines]
  const void* x;
  const void* weight;  // acc or narrow (x's type) [len], or null
  const void* bias;    // likewise
  const int64_t* index;
  int64_t batch, kept;
  double eps;
  int64_t lines, len;
  Stride x_stride;
  bool parameters_narrow;
};

// d_x = d_stream, and d_x[kept] += the norm's gradient; d_weight = sum of d_normed * x_hat, d_bias
// = sum of d_normed, over all lines. d_stream is null where nothing but the branch used x.
// Everything but d_stream is contiguous. Reads B + 2k, writes B, in one pass for len up to 8192;
// beyond, and for double beyond 4096, the sums take another one that reads 2k.
struct CompactNormBackward {
  void* d_x;       // null: only the sums
  void* d_weight;  // acc [len], or null
  void* d_bias;    // acc [len], or null
  const void* d_stream;
  const void* d_normed;
  const void* x;       // the kept rows
  const void* mean;    // acc, or null for RMSNorm
  const void* rstd;    // acc
  const void* weight;  // acc or narrow (x's type), or null
  const int64_t* slot;
  int64_t batch, kept;
  int64_t lines, len;
  double inverse_len;  // 1 / len: a division in double takes registers that the kernel needs
  Stride d_stream_stride;
  bool weight_narrow;
};

// index: the positions of the true entries, ascending; slot: the inverse map, -1 where false.
// `kept` entries of index are written at most. count receives the number of true entries; where it
// is null that number has to be `kept`.
struct CompactMask {
  int64_t* index;
  int64_t* slot;
  int64_t* count;
  const bool* mask;
  int64_t batch, kept, mask_stride;
};

// Dtypes go together as instantiated() says; the caller converts what does not. A value of index,
// slot or map outside its range traps.
cudaError_t launch_copy_rows(const CopyRows&, Through, cudaStream_t);
cudaError_t launch_scatter_add(const ScatterAdd&, Dtype y, Dtype residual, Dtype out, cudaStream_t);
cudaError_t launch_scatter_add_backward(const ScatterAddBackward&, Dtype grad, Dtype out,
                                        const Allocate&, cudaStream_t);
cudaError_t launch_scatter_add_relu(const ScatterAddRelu&, Dtype y, Dtype residual, Dtype out,
                                    cudaStream_t);
cudaError_t launch_scatter_add_relu_backward(const ScatterAddReluBackward&, Dtype grad, Dtype out,
                                             cudaStream_t);
cudaError_t launch_compact_norm(const CompactNorm&, Dtype x, Dtype normed, cudaStream_t);
cudaError_t launch_compact_norm_backward(const CompactNormBackward&, Dtype x, Dtype normed,
                                         const Allocate&, cudaStream_t);
cudaError_t launch_compact_mask(const CompactMask&, cudaStream_t);

// Two tensors of one kernel: of one type, or float32 beside a 16-bit type.
constexpr bool instantiated(Dtype a, Dtype b) {
  if (a == b) return true;
  return (a == Dtype::f32 && b != Dtype::f64) || (b == Dtype::f32 && a != Dtype::f64);
}

}  // namespace sdkernels::cuda
