// Kernels that are sound, and kernels with one fault each that has to be noticed.
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>

namespace {

constexpr int kThreads = 64;

// Every thread reads what its mirror image wrote; a barrier belongs between the two.
template <bool kBarrier>
__global__ void mirror(int* y) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// Every round adds up what both warps wrote in it; a barrier belongs before the next round writes.
template <bool kBarrier>
__global__ void rounds(int* y) {
  __shared__ int shared[kThreads / 32];
  int total = 0;
#pragma unroll 1
  for (int round = 0; round < 2; ++round) {
    const int votes = __popc(__ballot_sync(~0u, round == 1));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = votes;
    __syncthreads();
    total += shared[0] + shared[1];
    if (kBarrier) __syncthreads();
  }
  y[threadIdx.x] = total;
}

__global__ void divergent_barrier(int* y) {
  if (threadIdx.x < 32) __syncthreads();
  y[threadIdx.x] = 0;
}

__global__ void shuffle_of_half_a_warp(int* y) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}

__global__ void shuffle_beyond_mask(int* y) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 16);
}

__global__ void write_beyond(int* y) { y[threadIdx.x + 1] = 0; }
__global__ void read_before(int* y) { y[threadIdx.x] = y[static_cast<int>(threadIdx.x) - 1]; }

__global__ void write_beyond_shared(int* y) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x + kThreads / 2] = 0;
  y[threadIdx.x] = shared[threadIdx.x + kThreads / 2];
}

// It shows as a value: memory that nobody wrote is not zero.
__global__ void uninitialized_shared(int* y) {
  __shared__ int shared[kThreads];
  if (threadIdx.x > 0) shared[threadIdx.x] = 0;
  __syncthreads();
  y[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void misaligned(int* y) {
  if (threadIdx.x == 0) *reinterpret_cast<int4*>(y + 1) = int4{};
}

__global__ void trap(int* y) {
  if (y[threadIdx.x] == 0) __trap();
}

__global__ void __launch_bounds__(kThreads / 2) few_threads(int* y) { y[threadIdx.x] = 0; }

__global__ void sum_by_shuffles(int* y) {
  int value = static_cast<int>(threadIdx.x);
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  y[threadIdx.x] = value;
}

__global__ void other_shuffles(int* y) {
  const int lane = static_cast<int>(threadIdx.x);
  const int up = __shfl_up_sync(~0u, lane, 3), down = __shfl_down_sync(~0u, lane, 5, 16);
  y[threadIdx.x] = up + 100 * down + 10000 * __shfl_sync(~0u, lane, 9, 8);
}

__global__ void votes(int* y) { y[threadIdx.x] = __popc(__ballot_sync(~0u, threadIdx.x % 4 == 0)); }

const std::map<std::string, void (*)(int*)> kKernels = {
    {"mirror", mirror<true>},
    {"missing_barrier", mirror<false>},
    {"rounds", rounds<true>},
    {"missing_barrier_between_rounds", rounds<false>},
    {"divergent_barrier", divergent_barrier},
    {"shuffle_of_half_a_warp", shuffle_of_half_a_warp},
    {"shuffle_beyond_mask", shuffle_beyond_mask},
    {"write_beyond", write_beyond},
    {"read_before", read_before},
    {"write_beyond_shared", write_beyond_shared},
    {"uninitialized_shared", uninitialized_shared},
    {"misaligned", misaligned},
    {"trap", trap},
    {"few_threads", few_threads},
    {"sum_by_shuffles", sum_by_shuffles},
    {"other_shuffles", other_shuffles},
    {"votes", votes},
};

}  // namespace

// What was wrong, or the numbers that came out.
extern "C" const char* run_fault(const char* name) {
  static std::string result;
  int* const y = new int[kThreads]();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kThreads);
  try {
    cudaLaunchKernelEx(&config, kKernels.at(name), y);
    result.clear();
    for (int i = 0; i < kThreads; ++i) result += std::to_string(y[i]) + ' ';
  } catch (const std::runtime_error& error) {
    result = error.what();
  }
  delete[] y;
  return result.c_str();
}
