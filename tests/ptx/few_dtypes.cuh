// Read before a kernel source: of the pairs of types that its launcher knows it then has float32
// alone, and beside bfloat16, so that nvcc has less to do.
#pragma once

#include "../../csrc/cuda/kernels/launch.cuh"

namespace sdkernels::cuda {

template <class F>
cudaError_t with_few_dtypes(Dtype a, Dtype b, F f) {
  float* const single = nullptr;
  if (a == Dtype::f32 && b == Dtype::f32) return f(single, single);
  if (a == Dtype::f32 && b == Dtype::bf16) return f(single, static_cast<bf16*>(nullptr));
  return cudaErrorInvalidValue;
}

}  // namespace sdkernels::cuda

#define with_dtypes with_few_dtypes
