// What the CUDA ops share: dtypes, the device and stream they run on, and what a failed launch
// says.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "kernels/row_kernels.h"

namespace sdkernels::cuda {

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Dtype::f64;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      return Dtype::f32;
  }
}

inline Dtype dtype_of(const at::Tensor& x) { return dtype_of(x.scalar_type()); }

inline const void* data_of(const std::optional<at::Tensor>& x) {
  return x ? x->const_data_ptr() : nullptr;
}

// x in float32 where no kernel takes its type beside `other` (bfloat16 beside float16): exact.
inline at::Tensor beside(const at::Tensor& x, at::ScalarType other) {
  return instantiated(dtype_of(x), dtype_of(other)) ? x : x.to(at::kFloat);
}

// Raises if a kernel of sdkernels::`op` could not be started.
void check_launch(cudaError_t error, const char* op);

// Makes the device of `x` current, for as long as it lives, and knows its current stream. Scratch
// memory comes from PyTorch's allocator on that stream, which is what makes it safe to give back
// before the kernels have run, and to use under graph capture.
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& x)
      : guard_(x.device()),
        stream_(c10::cuda::getCurrentCUDAStream(x.device().index()).stream()),
        options_(x.options().dtype(at::kByte)) {}

  cudaStream_t stream() const { return stream_; }

  Allocate allocate() {
    return [this](int64_t bytes) {
      scratch_.push_back(at::empty({bytes}, options_));
      return scratch_.back().mutable_data_ptr();
    };
  }

 private:
  c10::cuda::OptionalCUDAGuard guard_;
  cudaStream_t stream_;
  at::TensorOptions options_;
  std::vector<at::Tensor> scratch_;
};

}  // namespace sdkernels::cuda
