// The CUDA ops' own glue, registered for the CPU: it then runs on CPU tensors, with the emulated
// kernels below it. All of it in one file, because PyTorch's headers take most of the time.
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include "../../csrc/cuda/cuda_ops.h"
#include "../../csrc/norm_ops.h"

#include "../../csrc/cuda/cuda_ops.cpp"
#define CUDA CPU
#include "../../csrc/cuda/norm_ops_cuda.cpp"
#include "../../csrc/cuda/row_ops_cuda.cpp"
