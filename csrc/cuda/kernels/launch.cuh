// How work is cut into blocks, and how kernels are started.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "vec.cuh"

// Kernels loop over what a grid of this many blocks leaves over. The emulation sets it low.
#ifndef SDKERNELS_MOST_BLOCKS
#define SDKERNELS_MOST_BLOCKS 0x7fffffff
#endif

namespace sdkernels::cuda {

// A block, at most, but for the long lines of norms. The least number of blocks in every
// __launch_bounds__ keeps ptxas from spilling registers for the sake of more: loads in flight come
// from unrolling here.
constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Blocks that keep every multiprocessor of a large GPU busy. A constant, not a question to the
// device: sums are cut by it, and their bits must not change from one GPU to another.
constexpr int64_t kEnoughBlocks = 512;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two that is at least `value`, but no more than `most` (a power of two).
inline int power_of_two(int64_t value, int most) {
  int power = 1;
  while (power < most && power < value) power *= 2;
  return power;
}

// Division by a number that the kernel's threads share, as a multiplication: the compiler's 64-bit
// division is a call of a hundred instructions.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : divisor_(divisor) {
    while (uint64_t{1} << shift_ < static_cast<uint64_t>(divisor)) ++shift_;
    // Rounded up by less than divisor <= 2^shift in units of 1 / divisor, the multiplier makes
    // i * multiplier / 2^(63 + shift) too large by less than 1 / divisor for i < 2^63: the quotient
    // stays the same.
    const auto power = static_cast<unsigned __int128>(1) << (63 + shift_);
    multiplier_ = static_cast<uint64_t>((power + divisor - 1) / divisor);
  }

  __host__ __device__ int64_t value() const { return divisor_; }

  __device__ __forceinline__ int64_t quotient(int64_t i) const {
    return static_cast<int64_t>(__umul64hi(2 * static_cast<uint64_t>(i), multiplier_) >> shift_);
  }

 private:
  int64_t divisor_ = 1;
  uint64_t multiplier_ = uint64_t{1} << 63;
  int shift_ = 0;
};

// A tensor as far as the width of its vectors goes; strides that are never walked count as 0.
struct Operand {
  const void* data;
  int64_t row, line;  // strides in elements
  int size;           // of an element
};

// Whether all operands allow vectors of `width` elements.
inline bool fits(int width, int64_t len, std::initializer_list<Operand> operands) {
  if (len % width != 0) return false;
  for (const Operand& t : operands) {
    if (!t.data) continue;
    const int64_t bytes = alignment(width * t.size);
    if (reinterpret_cast<uintptr_t>(t.data) % bytes || t.row * t.size % bytes ||
        t.line * t.size % bytes)
      return false;
  }
  return true;
}

template <class T>
Operand operand(const void* data, const Stride& stride, int64_t lines) {
  return {data, stride.row, lines > 1 ? stride.line : 0, static_cast<int>(sizeof(T))};
}

// Blocks of (x, y) threads: y rows next to each other, and of each row a chunk of x * unroll
// vectors. x is a power of two, `least_x` or more: so many neighbouring threads share a row. A
// block is made of whole warps.
struct RowTiles {
  int64_t rows, vectors, blocks;
  Divisor chunks;    // block -> group of rows
  Divisor per_line;  // vector of a row -> its line
  int x, y;

  RowTiles(int64_t rows_, int64_t lines, int64_t line_vectors, int unroll, int least_x = 1)
      : rows(rows_), vectors(lines * line_vectors), per_line(line_vectors) {
    x = std::max(least_x, power_of_two(ceil_div(vectors, unroll), kThreads));
    y = kThreads / x;
    const auto count = [&] { return ceil_div(rows, y) * ceil_div(vectors, x * unroll); };
    // Little work: smaller blocks, for more of them.
    while (count() < kEnoughBlocks && x * y > 2 * kWarp) (y > 1 ? y : x) /= 2;
    blocks = count();
    chunks = Divisor(ceil_div(vectors, x * unroll));
  }
};

// A parameter, of the type A of the arithmetic or, where it is narrow, of T.
template <class T, class A>
Operand parameter(const void* data, bool narrow, int64_t line = 0) {
  return {data, 0, line, static_cast<int>(narrow ? sizeof(T) : sizeof(A))};
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, SDKERNELS_MOST_BLOCKS)));
  config.blockDim = threads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Calls f with a null pointer of each dtype's type, for pairs that are instantiated().
template <class F>
cudaError_t with_dtypes(Dtype a, Dtype b, F f) {
  const auto half = [&](auto* h) {
    float* const single = nullptr;
    if (a == b) return f(h, h);
    return a == Dtype::f32 ? f(single, h) : f(h, single);
  };
  if (!instantiated(a, b)) return cudaErrorInvalidValue;
  if (a == Dtype::bf16 || b == Dtype::bf16) return half(static_cast<bf16*>(nullptr));
  if (a == Dtype::f16 || b == Dtype::f16) return half(static_cast<f16*>(nullptr));
  if (a == Dtype::f64) return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  return f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
}

}  // namespace sdkernels::cuda
