// One program for each fault that the emulation has to notice: `faults NAME [ORDER]`. It prints
// what a kernel computed, or ends with an error.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels/launch.cuh"

using sdkernels::cuda::Divisor;
using sdkernels::cuda::Vec;

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

__global__ void write_beyond_shared(int* y) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x + 1] = 0;
  y[threadIdx.x] = shared[threadIdx.x];
}

__global__ void misaligned(int* y) {
  if (threadIdx.x == 0) *reinterpret_cast<Vec<int, 4>*>(y + 1) = Vec<int, 4>{};
}

__global__ void trap(int* y) {
  if (y[threadIdx.x] == 0) __trap();
}

__global__ void sum_by_shuffles(int* y) {
  int value = static_cast<int>(threadIdx.x);
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  y[threadIdx.x] = value;
}

__global__ void votes(int* y) { y[threadIdx.x] = __popc(__ballot_sync(~0u, threadIdx.x % 4 == 0)); }

// Quotients where a rounding of the multiplier would show: around multiples of the divisor.
__global__ void divide(int* y) {
  y[threadIdx.x] = 0;
  if (threadIdx.x != 0) return;
  const int64_t most = INT64_MAX;
  for (const int64_t divisor :
       {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{7}, int64_t{197}, int64_t{1} << 20,
        (int64_t{1} << 31) - 1, (int64_t{1} << 33) + 1, most / 2, most}) {
    const Divisor by(divisor);
    for (const int64_t around :
         {int64_t{0}, divisor, most / divisor / 2 * divisor, most / divisor * divisor, most}) {
      for (int64_t less = 0; less < 3 && less <= around; ++less)
        y[0] += by.quotient(around - less) != (around - less) / divisor;
    }
    for (int64_t i = 0; i < 1000; ++i) y[0] += by.quotient(i) != i / divisor;
  }
}

const std::map<std::string, void (*)(int*)> kKernels = {
    {"mirror", mirror<true>},
    {"missing_barrier", mirror<false>},
    {"rounds", rounds<true>},
    {"missing_barrier_between_rounds", rounds<false>},
    {"divergent_barrier", divergent_barrier},
    {"shuffle_of_half_a_warp", shuffle_of_half_a_warp},
    {"shuffle_beyond_mask", shuffle_beyond_mask},
    {"write_beyond", write_beyond},
    {"write_beyond_shared", write_beyond_shared},
    {"misaligned", misaligned},
    {"trap", trap},
    {"sum_by_shuffles", sum_by_shuffles},
    {"votes", votes},
    {"divide", divide},
};

}  // namespace

int main(int, char** arguments) {
  int* const y = new int[kThreads]();
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  try {
    cudaLaunchKernelEx(&config, kKernels.at(arguments[1]), y);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  for (int i = 0; i < kThreads; ++i) std::printf("%d ", y[i]);
  delete[] y;
}
