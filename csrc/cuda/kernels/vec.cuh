// Element types, the type of their arithmetic, and vectors of elements that are loaded and stored
// with as few instructions as their alignment allows (16 bytes each at most).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "row_kernels.h"

namespace sdkernels::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int alignment(int bytes) { return bytes < 16 ? bytes : 16; }

template <class T, int N>
struct alignas(alignment(N* static_cast<int>(sizeof(T)))) Vec {
  T v[N];
};

// Elements in a vector that takes 16 bytes in the tensor with the widest of these types. In more
// than that, a warp would ask for every sector twice, half of it at a time.
template <class... T>
constexpr int kWidest = 16 / static_cast<int>(std::max({sizeof(T)...}));

// Written out as words of CUDA's own vector types, stored by __stwb (a plain store): of anything
// else the compiler may make accesses of four bytes each.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<1> {
  using type = uint8_t;
};

template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* p) {
  using Word = typename WordOf<alignof(Vec<T, N>)>::type;
  constexpr int kWords = sizeof(Vec<T, N>) / sizeof(Word);
  Word words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word*>(p)[i];
  Vec<T, N> value;
  memcpy(&value, words, sizeof(value));
  return value;
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const Vec<T, N>& value) {
  using Word = typename WordOf<alignof(Vec<T, N>)>::type;
  constexpr int kWords = sizeof(Vec<T, N>) / sizeof(Word);
  Word words[kWords];
  memcpy(words, &value, sizeof(value));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    Word* const word = reinterpret_cast<Word*>(p) + i;
    if constexpr (sizeof(Word) > 4)
      __stwb(word, words[i]);
    else
      *word = words[i];
  }
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

template <class T, int N>
__device__ __forceinline__ Vec<Acc<T>, N> widen(const Vec<T, N>& packed) {
  Vec<Acc<T>, N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values.v[i] = widen(packed.v[i]);
  return values;
}

// One rounding, to nearest even. Two at a time where the hardware converts pairs.
template <class T, class A, int N>
__device__ __forceinline__ Vec<T, N> narrow(const Vec<A, N>& values) {
  Vec<T, N> packed;
  if constexpr (std::is_same_v<T, A>) {
    packed = values;
  } else if constexpr (std::is_same_v<T, bf16>) {
#pragma unroll
    for (int i = 0; i + 1 < N; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values.v[i], values.v[i + 1]);
      packed.v[i] = pair.x;
      packed.v[i + 1] = pair.y;
    }
    if constexpr (N % 2) packed.v[N - 1] = __float2bfloat16_rn(values.v[N - 1]);
  } else {
    static_assert(std::is_same_v<T, f16>);
#pragma unroll
    for (int i = 0; i + 1 < N; i += 2) {
      const __half2 pair = __floats2half2_rn(values.v[i], values.v[i + 1]);
      packed.v[i] = pair.x;
      packed.v[i + 1] = pair.y;
    }
    if constexpr (N % 2) packed.v[N - 1] = __float2half_rn(values.v[N - 1]);
  }
  return packed;
}

// Elements of a parameter, which is of the type A of the arithmetic or, where it is `narrow`, of
// the data's type T.
template <class T, class A>
__device__ __forceinline__ A load_parameter(const void* data, bool narrow, int64_t at) {
  if constexpr (!std::is_same_v<T, A>) {
    if (narrow) return widen(static_cast<const T*>(data)[at]);
  }
  return static_cast<const A*>(data)[at];
}
// A constant `offset` costs no register if it is added last.
template <int N, class T, class A>
__device__ __forceinline__ Vec<A, N> load_parameters(const void* data, bool narrow, int64_t first,
                                                     int offset = 0) {
  if constexpr (!std::is_same_v<T, A>) {
    if (narrow) return widen(load<N>(static_cast<const T*>(data) + first + offset));
  }
  return load<N>(static_cast<const A*>(data) + first + offset);
}

template <class T, int N>
__device__ __forceinline__ Vec<T, N> filled(T value) {
  Vec<T, N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values.v[i] = value;
  return values;
}

// To shared memory, as the vector of this thread. Written one by one, the elements of a warp would
// meet in a few banks.
template <class A, int N>
__device__ __forceinline__ void share(A* shared, int thread, const Vec<A, N>& value) {
  using Word = typename WordOf<alignof(Vec<A, N>)>::type;
  constexpr int kWords = sizeof(Vec<A, N>) / sizeof(Word);
  Word words[kWords];
  memcpy(words, &value, sizeof(value));
#pragma unroll
  for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(shared)[thread * kWords + i] = words[i];
}

template <class T>
__device__ __forceinline__ T* at(T* data, const Stride& stride, int64_t row, int64_t line) {
  return data + row * stride.row + line * stride.line;
}

// What PyTorch's own index kernels do about a row number that does not exist.
__device__ __forceinline__ int64_t checked(int64_t row, int64_t lowest, int64_t end) {
  if (row < lowest || row >= end) __trap();
  return row;
}

}  // namespace sdkernels::cuda
