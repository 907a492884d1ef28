// What the norm kernels share: how a line is spread over threads, and sums over those.
#pragma once

#include "launch.cuh"
#include "sum_partials.cuh"

namespace sdkernels::cuda {

// Lines of up to this many elements are held in the registers of a block's threads.
constexpr int kLongestHeld = 8192;

// Elements of a line that one thread holds, at most: 64 or 128 bytes of them in the type of the
// arithmetic. Vectors whose arithmetic takes less than 16 bytes need more of the other registers,
// and doubles two each: half as many elements then, in blocks of twice as many threads.
template <class A, int W>
constexpr int kHeld = W * sizeof(A) < 16 || sizeof(A) == 8 ? 16 : 32;
template <class A, int W>
constexpr int kLineThreads = kLongestHeld / kHeld<A, W>;

// Threads (x, y): x for each line, y lines in a block. x is a power of two up to a warp, or whole
// warps. Where `lines` make few blocks, they are smaller, for more of them.
inline dim3 line_threads(int64_t line_vectors, int vectors_held, int64_t lines,
                         int64_t enough_blocks) {
  if (line_vectors <= kWarp * vectors_held) {
    const int x = power_of_two(line_vectors, kWarp);
    int y = kThreads / x;
    while (ceil_div(lines, y) < enough_blocks && x * y > 2 * kWarp) y /= 2;
    return dim3(x, y);
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

// The vectors of `kWidth` elements of a line that each thread owns, kItems of them at most. Those
// of a warp lie next to each other, so that a constant is between one item of a thread and the
// next: their addresses take the registers of the first.
template <int kItems, int kWidth>
class LineItems {
 public:
  __device__ __forceinline__ explicit LineItems(int64_t len)
      : len_(static_cast<int>(len)),
        count_((len_ / kWidth + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x)) {}

  // Items of a thread, at most.
  __device__ __forceinline__ int count() const { return count_; }

  // Where the items of a thread begin.
  __device__ __forceinline__ int first(int thread) const {
    return (thread / kWarp * kWarp * count_ + thread % kWarp) * kWidth;
  }

  // Where item n begins, from the thread's first one.
  static __device__ __forceinline__ constexpr int offset(int n) { return n * kWarp * kWidth; }

  // f(n, offset(n)) for the items of this thread.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    const int end = min(len_ - first(threadIdx.x), offset(count_));
#pragma unroll
    for (int n = 0; n < kItems; ++n)
      if (offset(n) < end) f(n, offset(n));
  }

 private:
  int len_, count_;
};

// f(element) for this thread's vectors of a line that does not fit into registers.
template <int kWidth, class F>
__device__ __forceinline__ void for_line(int64_t len, F f) {
#pragma unroll 2
  for (int64_t element = static_cast<int64_t>(threadIdx.x) * kWidth; element < len;
       element += static_cast<int64_t>(blockDim.x) * kWidth)
    f(element);
}

constexpr int kLongThreads = 512;  // for lines that do not fit into registers

}  // namespace sdkernels::cuda
