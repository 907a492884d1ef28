// The second stage of a sum: partial sums of one kernel added up by another, in an order that
// depends on their number alone. And the sum over a group of threads.
#pragma once

#include "launch.cuh"

namespace sdkernels::cuda {

// The sum over `size` (a power of two, at most a warp) neighbouring threads, in each of them.
template <class A>
__device__ __forceinline__ A sum_of_group(A value, int size, int thread) {
  const unsigned all = size == kWarp ? ~0u : (1u << size) - 1;
  const unsigned group = all << (thread % kWarp / size * size);
  for (int offset = size / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(group, value, offset);
  return value;
}

// totals[i] = sum over p of partials[p][i]; entry i of the second half goes to `second`, if set.
template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    sum_partials(const A* partials, int64_t count, int64_t entries, A* first, A* second,
                 int64_t second_from) {
  __shared__ A shared[kThreads];
  for (int64_t tile = blockIdx.x; tile * blockDim.x < entries; tile += gridDim.x) {
    const int64_t entry = tile * blockDim.x + threadIdx.x;
    A total = 0;
    if (entry < entries) {
#pragma unroll 4
      for (int64_t p = threadIdx.y; p < count; p += blockDim.y)
        total += partials[p * entries + entry];
    }
    shared[threadIdx.y * blockDim.x + threadIdx.x] = total;
    __syncthreads();
    for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
      if (threadIdx.y < half)
        shared[threadIdx.y * blockDim.x + threadIdx.x] +=
            shared[(threadIdx.y + half) * blockDim.x + threadIdx.x];
      __syncthreads();
    }
    if (threadIdx.y == 0 && entry < entries)
      (entry < second_from ? first[entry] : second[entry - second_from]) = shared[threadIdx.x];
    __syncthreads();
  }
}

// Partial sums [count, entries], and where their total goes. A single partial sum is the total.
template <class A>
struct SumPartials {
  A* partials = nullptr;
  int64_t count = 0, entries = 0, second_from = 0;
  A *first = nullptr, *second = nullptr;

  SumPartials() = default;
  SumPartials(const Allocate& allocate, int64_t count_, int64_t entries_, void* total)
      : count(count_), entries(entries_), second_from(entries_), first(static_cast<A*>(total)) {
    partials = count == 1 ? first : static_cast<A*>(allocate(count * entries * sizeof(A)));
  }

  cudaError_t launch_total(cudaStream_t stream) const {
    if (partials == first) return cudaSuccess;  // or there is nothing to add up
    const int x = power_of_two(entries, kWarp);
    const int y = std::min(kThreads / x, power_of_two(count, kThreads));
    return launch(sum_partials<A>, ceil_div(entries, x), dim3(x, y), stream, partials, count,
                  entries, first, second, second_from);
  }
};

}  // namespace sdkernels::cuda
