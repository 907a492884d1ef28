// CUDA as far as the kernels use it, on the CPU: each thread of a block is a fiber, so that
// barriers and shuffles are real. What is not declared here is not modelled, and does not compile.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after the other, so a block's shared memory can be static. It keeps what the block
// before left there, as on a GPU.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Of the fiber that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct Stream*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction,
  cudaErrorUnsupportedPtxVersion,
  cudaErrorIllegalAddress,
  cudaErrorAssert,
  cudaErrorLaunchFailure,
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrComputeCapabilityMajor ? 12 : 1, cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

namespace emulation {

// Runs `thread` for every thread of every block. Throws what a kernel's trap, a barrier that not
// all threads reach and a shuffle with lanes that do not take part are on a GPU: an error.
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

void barrier();
// Waits for the lanes of `mask`, each of which names another, and returns the bits of that one's
// value.
uint64_t exchange(unsigned mask, uint64_t bits, unsigned from_lane);
unsigned ballot(unsigned mask, bool vote);
[[noreturn]] void trap();
unsigned lane();

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulation::run(*config, [&] { kernel(arguments...); });
}

inline void __syncthreads() { emulation::barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::exchange(mask, bits, emulation::lane() ^ static_cast<unsigned>(lane_mask));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned __ballot_sync(unsigned mask, bool vote) { return emulation::ballot(mask, vote); }
[[noreturn]] inline void __trap() { emulation::trap(); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

template <class T>
void __stwb(T* p, T value) {
  *p = value;
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
