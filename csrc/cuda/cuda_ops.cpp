#include "cuda_ops.h"

#include <cuda_runtime_api.h>

namespace sdkernels::cuda {

void check_launch(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what is reported here shall not be reported again
  // A trap of an earlier kernel that nobody has waited for: from then on every call reports it.
  TORCH_CHECK(error != cudaErrorLaunchFailure && error != cudaErrorAssert &&
                  error != cudaErrorIllegalAddress,
              "CUDA error: ", cudaGetErrorString(error), ", met by sdkernels::", op,
              "; it may be of any kernel before it (CUDA_LAUNCH_BLOCKING=1 shows which)");
  const bool not_built_for_it = error == cudaErrorNoKernelImageForDevice ||
                                error == cudaErrorInvalidDeviceFunction ||
                                error == cudaErrorUnsupportedPtxVersion;
  TORCH_CHECK(not_built_for_it, "sdkernels::", op,
              ": the kernel could not be started: ", cudaGetErrorString(error));
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  TORCH_CHECK(false, "sdkernels::", op, ": sdkernels was built for the CUDA architectures ",
              SDKERNELS_CUDA_ARCH_LIST, ", which do not cover device ", device, " (", major, ".",
              minor, "); set TORCH_CUDA_ARCH_LIST=", major, ".", minor,
              " and rebuild with: pip install --no-build-isolation --force-reinstall --no-deps "
              "--no-cache-dir, on the source of sdkernels");
}

}  // namespace sdkernels::cuda
