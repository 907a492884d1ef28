// What the norm kernels share: how a line is spread over threads, and sums over those.
#pragma once

#include "launch.cuh"
#include "sum_partials.cuh"

namespace sdkernels::cuda {

// Elements of a line that one thread holds in registers, at most. In a block that makes lines of
// 8192 elements; half of that where a vector's arithmetic takes less than 16 bytes (narrower
// vectors take more of the other registers), and in double.
template <class A, int W>
constexpr int kHeld = 32 / (W * sizeof(A) < 16 ? 2 : 1) / (sizeof(A) == 8 ? 4 : 1);

// Threads (x, y): x for each line, y lines in a block. x is a power of two up to a warp, or whole
// warps.
inline dim3 line_threads(int64_t line_vectors, int vectors_held) {
  if (line_vectors <= kWarp * vectors_held) {
    const int x = power_of_two(line_vectors, kWarp);
    return dim3(x, kThreads / x);
  }
  return dim3(static_cast<unsigned>(ceil_div(ceil_div(line_vectors, vectors_held), kWarp) * kWarp));
}

// Sums over the threads of a line. Successive sums alternate between two buffers, so that one
// barrier each is enough: whoever writes a buffer again has passed the barrier of the sum between.
template <class A>
class LineSum {
 public:
  __device__ __forceinline__ explicit LineSum(A* shared) : shared_(shared) {}

  __device__ __forceinline__ A operator()(A value) {
    const int threads = blockDim.x;
    const int thread = threadIdx.y * threads + threadIdx.x;
    value = sum_of_group(value, threads < kWarp ? threads : kWarp, thread);
    if (threads <= kWarp) return value;
    if (thread % kWarp == 0) shared_[thread / kWarp] = value;
    __syncthreads();
    value = 0;
    for (int warp = 0; warp < threads / kWarp; ++warp) value += shared_[warp];
    shared_ += even_ ? kWarp : -kWarp;
    even_ = !even_;
    return value;
  }

 private:
  A* shared_;  // [2, kWarp]
  bool even_ = true;
};

// f(n, element) for the vectors of `width` elements of a line that this thread owns: vector n
// stands at `element`, and there are kItems of them at most.
template <int kItems, int kWidth, class F>
__device__ __forceinline__ void for_items(int64_t len, F f) {
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    const int element = (n * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kWidth;
    if (element < len) f(n, element);
  }
}

// The same without a limit, for lines that do not fit into registers.
template <int kWidth, class F>
__device__ __forceinline__ void for_line(int64_t len, F f) {
#pragma unroll 2
  for (int64_t element = static_cast<int64_t>(threadIdx.x) * kWidth; element < len;
       element += static_cast<int64_t>(blockDim.x) * kWidth)
    f(element);
}

constexpr int kLongThreads = 512;  // for lines that do not fit into registers

}  // namespace sdkernels::cuda
