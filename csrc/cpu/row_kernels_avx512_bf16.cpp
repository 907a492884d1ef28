// The kernels compiled for AVX-512 and its conversion to bf16; chosen at run time
// (row_kernels_baseline.cpp).
#include "row_kernels.h"

#if defined(SDKERNELS_KNOWS_AVX512_BF16)

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns of its own intrinsics
#endif
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

// Headers stand above this line: their inline functions must stay baseline code.
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define SDKERNELS_AVX512
#define SDKERNELS_AVX512_BF16
#define SDKERNELS_ISA avx512_bf16
#define SDKERNELS_ISA_NAME "avx512_bf16"
#include "row_kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
