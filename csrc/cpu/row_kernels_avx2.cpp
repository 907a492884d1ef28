// The kernels compiled for AVX2; chosen at run time (row_kernels_baseline.cpp).
#if defined(__x86_64__)

#include "row_kernels.h"

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

// Headers stand above this line: their inline functions must stay baseline code.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define SDKERNELS_AVX2
#define SDKERNELS_ISA avx2
#define SDKERNELS_ISA_NAME "avx2"
#include "row_kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
