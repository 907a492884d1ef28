// The kernels compiled for AVX-512; chosen at run time (row_kernels_baseline.cpp).
#if defined(__x86_64__)

#include "row_kernels.h"

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

// Headers stand above this line: their inline functions must stay baseline code.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#define __F16C__ 1
#define __AVX512F__ 1
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define SDKERNELS_ISA avx512
#define SDKERNELS_ISA_NAME "avx512"
#include "row_kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
