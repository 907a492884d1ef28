// A stand-in for the CUDA runtime, for objects as nvcc makes them: their kernels are looked up by
// name (Python translates and loads what is launched) and run here and now.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "machine.h"

namespace {

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}

const ptx::Kernel* (*resolve)(const char* name) = nullptr;

}  // namespace

extern "C" {

void ptx_resolver(const ptx::Kernel* (*function)(const char*)) { resolve = function; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** values) {
  if (std::getenv("SDKERNELS_EMULATION_NO_KERNEL_IMAGE")) return cudaErrorNoKernelImageForDevice;
  if (std::getenv("SDKERNELS_EMULATION_EARLIER_TRAP")) return cudaErrorLaunchFailure;
  const auto found = names().find(host);
  if (found == names().end()) throw std::runtime_error("ptx: a kernel that was not registered");
  const ptx::Kernel* const kernel = resolve(found->second.c_str());
  if (!kernel) throw std::runtime_error("ptx: cannot translate " + found->second);
  if (config->numAttrs) throw std::runtime_error("ptx: a launch attribute that is not modelled");
  alignas(16) uint8_t parameters[4096] = {};
  for (uint32_t i = 0; i < kernel->parameter_count; ++i)
    memcpy(parameters + kernel->parameters[i].offset, values[i], kernel->parameters[i].bytes);
  const dim3 grid = config->gridDim, block = config->blockDim;
  const ptx::Launch launch{{grid.x, grid.y, grid.z},
                           {block.x, block.y, block.z},
                           static_cast<uint32_t>(config->dynamicSmemBytes),
                           0,
                           parameters};
  if (const char* const error = ptx_launch(kernel, &launch))
    throw std::runtime_error("ptx: " + std::string(error) + " in " + found->second);
  return cudaSuccess;
}

// What <<<>>> calls, which no launcher uses.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  throw std::runtime_error("ptx: a launch that is not modelled");
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  throw std::runtime_error("ptx: a launch that is not modelled");
}

const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrComputeCapabilityMajor ? 12 : 1, cudaSuccess;
}
}
