// The CPU kernels: raw pointers and sizes, no PyTorch header.
//
// They are compiled once per instruction set (row_kernels_*.cpp); kernels() picks the widest one
// that this processor runs.
#pragma once

#include <cstdint>

#include "../stride.h"

// Older compilers do not know AVX512_BF16.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define SDKERNELS_KNOWS_AVX512_BF16
#endif

namespace sdkernels::cpu {

enum class Dtype : int8_t { f32, bf16, f16, f64 };

// Arithmetic is float, and double where the data are double: the types marked "acc" below.

// y[r] = x[map[r]]; where map[r] is negative, base[r], and a row of zeros without a base. With
// `scatters`, y[map[r]] = x[r] instead.
struct CopyRows {
  char* y;
  const char* x;
  const int64_t* map;
  int64_t lines, bytes;       // bytes of one line
  Stride y_stride, x_stride;  // in bytes
  const char* base;           // or null
  Stride base_stride;
  bool scatters;
};

// y = residual, and y[kept] += scale * row_weight * layer_scale * out.
// Exactly one of slot and index is set: with slot, all B rows are written (out of place); with
// index, only the k kept rows are (in place, y == residual).
struct ScatterAdd {
  void* y;
  const void* residual;
  const void* out;
  const void* layer_scale;  // acc, or null
  const void* row_weight;   // acc, one a kept row, or null
  const int64_t* slot;
  const int64_t* index;
  double scale;
  int64_t lines, len;
  Stride y_stride, residual_stride, out_stride;
  int64_t layer_scale_line, layer_scale_element;  // strides of layer_scale; the second is 0 or 1
};

// d_out = scale * row_weight * layer_scale * grad[kept]; layer_scale_sum += scale * row_weight *
// grad[kept] * out; row_weight_sum += layer_scale * grad[kept] * out.
struct ScatterAddBackward {
  void* d_out;
  const void* grad;
  const void* out;          // null when neither sum is wanted
  const void* layer_scale;  // acc, or null
  const void* row_weight;   // acc, or null
  const int64_t* index;
  double scale;
  int64_t lines, len;
  Stride d_out_stride, grad_stride, out_stride;
  int64_t layer_scale_line, layer_scale_element;
};

// y = relu(residual), with scale * row_weight * layer_scale * out added to the kept rows before;
// and a bit for every element of y, set where the ReLU passes its gradient. A row is one line.
struct ScatterAddRelu {
  void* y;            // contiguous
  uint8_t* positive;  // [rows, ceil(len / 8)]
  const void* residual;
  const void* out;
  const void* layer_scale;  // acc [len], or null
  const void* row_weight;   // acc, one a kept row, or null
  const int64_t* slot;
  double scale;
  int64_t len;
  int64_t residual_row, out_row;  // strides
};

// d_residual = grad where `positive` has a bit, zero elsewhere, and d_out = scale * row_weight *
// layer_scale * d_residual[kept] beside it. A row is one line, and all tensors are contiguous.
struct ScatterAddReluBackward {
  void* d_residual;
  void* d_out;  // null where it is not wanted
  const void* grad;
  const uint8_t* positive;
  const void* layer_scale;  // acc [len], or null
  const void* row_weight;   // acc, or null
  const int64_t* slot;
  double scale;
  int64_t len;
};

constexpr int64_t kCacheBlock = 64;  // bytes

// normed = norm(x[kept]) over each line, and the kept rows of x beside it when `kept` is set.
// mean is null for RMSNorm. normed and kept are contiguous.
struct CompactNorm {
  void* normed;
  void* kept;
  void* mean;  // acc
  void* rstd;  // acc
  const void* x;
  const void* weight;  // acc, or null
  const void* bias;    // acc, or null
  const int64_t* index;
  double eps;
  int64_t lines, len;
  Stride x_stride;
  bool kept_past_caches;  // where its lines are whole blocks of kCacheBlock bytes
};

// d_x = d_stream, and d_x[kept] += the norm's gradient; weight_sum += d_normed * x_hat, bias_sum +=
// d_normed. d_stream is null where nothing but the branch used x. With d_x null only the sums are
// computed.
struct CompactNormBackward {
  void* d_x;
  const void* d_stream;
  const void* d_normed;  // contiguous, as is kept
  const void* kept;
  const void* mean;    // acc, or null for RMSNorm
  const void* rstd;    // acc
  const void* weight;  // acc, or null
  const int64_t* slot;
  int64_t lines, len;
  Stride d_x_stride, d_stream_stride;
};

// Elements that two bytes of bits belong to: threads share no byte.
constexpr int64_t kBitsOfWord = 16;

// [begin, end) counts bytes of [rows, lines, bytes] in CopyRows, elements of [rows, lines, len] in
// ScatterAdd and ScatterAddBackward, words of [rows, ceil(len / kBitsOfWord)] where there are bits,
// and lines of [rows, lines] in the norms. The sums belong to the calling thread alone; they are
// arrays of acc, but row_weight_sum, of double, has one entry for each row that [begin, end)
// touches. One that is not wanted is null.
using CopyRowsKernel = void (*)(const CopyRows&, int64_t begin, int64_t end);
using ScatterAddKernel = void (*)(const ScatterAdd&, int64_t begin, int64_t end);
using ScatterAddBackwardKernel = void (*)(const ScatterAddBackward&, int64_t begin, int64_t end,
                                          void* layer_scale_sum, double* row_weight_sum);
using ScatterAddReluKernel = void (*)(const ScatterAddRelu&, int64_t begin, int64_t end);
using ScatterAddReluBackwardKernel = void (*)(const ScatterAddReluBackward&, int64_t begin,
                                              int64_t end);
using CompactNormKernel = void (*)(const CompactNorm&, int64_t begin, int64_t end);
using CompactNormBackwardKernel = void (*)(const CompactNormBackward&, int64_t begin, int64_t end,
                                           void* weight_sum, void* bias_sum);

// Look-ups by dtype; null for a combination that is not instantiated.
struct Kernels {
  const char* capability;
  CopyRowsKernel copy_rows;
  ScatterAddKernel (*scatter_add)(Dtype y, Dtype residual, Dtype out);
  ScatterAddBackwardKernel (*scatter_add_backward)(Dtype grad, Dtype out);
  ScatterAddReluKernel (*scatter_add_relu)(Dtype y, Dtype residual, Dtype out);
  ScatterAddReluBackwardKernel (*scatter_add_relu_backward)(Dtype grad, Dtype out);
  CompactNormKernel (*compact_norm)(Dtype x, Dtype normed);
  CompactNormBackwardKernel (*compact_norm_backward)(Dtype x, Dtype normed);
};

const Kernels& kernels();

}  // namespace sdkernels::cpu
