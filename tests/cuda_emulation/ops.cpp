// The CUDA ops' own glue, registered for the CPU: it then runs on CPU tensors, with the emulated
// kernels below it.
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include "../../csrc/cuda/cuda_ops.h"
#include "../../csrc/norm_ops.h"

#define CUDA CPU
#include "../../csrc/cuda/norm_ops_cuda.cpp"
#include "../../csrc/cuda/row_ops_cuda.cpp"
