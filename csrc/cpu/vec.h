// Sixteen lanes of float or double, in the vector extensions that gcc and clang share: one source
// for every instruction set, and the same lane order (so the same sums) on each of them. Included
// by row_kernels_impl.h inside the namespace of one instruction set. SDKERNELS_AVX2 and
// SDKERNELS_AVX512 say what the file that includes it is compiled for (the compiler's own macros do
// not follow a target pragma); intrinsics stand only where the compiler does not find the
// instruction itself.

constexpr int64_t kLanes = 16;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Doubles = double __attribute__((vector_size(kLanes * sizeof(double))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using Halves = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

template <class T>
struct VecOf {
  using type = Floats;
};
template <>
struct VecOf<double> {
  using type = Doubles;
};
template <class T>
using Vec = typename VecOf<T>::type;

#define SDKERNELS_INLINE static inline __attribute__((always_inline))

template <class To, class From>
SDKERNELS_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

SDKERNELS_INLINE Ints select(Ints mask, Ints yes, Ints no) { return (mask & yes) | (~mask & no); }

SDKERNELS_INLINE Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
SDKERNELS_INLINE Doubles load(const double* p) {
  Doubles v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
SDKERNELS_INLINE Ints load_halves(const void* p) {
#if defined(SDKERNELS_AVX512)
  return bits_as<Ints>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#else
  Halves v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Ints);
#endif
}
SDKERNELS_INLINE Floats load(const bf16* p) { return bits_as<Floats>(load_halves(p) << 16); }
SDKERNELS_INLINE Floats load(const f16* p) {
#if defined(SDKERNELS_AVX512)
  return bits_as<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(SDKERNELS_AVX2)
  const __m128i* halves = reinterpret_cast<const __m128i*>(p);
  const __m256 parts[2] = {_mm256_cvtph_ps(_mm_loadu_si128(halves)),
                           _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  return bits_as<Floats>(parts);
#else
  const Ints h = load_halves(p);
  const Ints magnitude = (h & 0x7fff) << 13;
  const Ints exponent = magnitude & 0x0f800000;
  const Ints rebiased = magnitude + ((127 - 15) << 23);
  const Ints infinite = rebiased + ((128 - 16) << 23);  // inf and nan keep an exponent of all ones
  const Ints offset = Ints{} + (113 << 23);             // a subnormal: 2^-14 * (1 + m) - 2^-14
  const Ints subnormal =
      bits_as<Ints>(bits_as<Floats>(magnitude + offset) - bits_as<Floats>(offset));
  Ints v = select(exponent == 0, subnormal, rebiased);
  v = select(exponent == 0x0f800000, infinite, v);
  return bits_as<Floats>(v | ((h & 0x8000) << 16));
#endif
}

SDKERNELS_INLINE void store(float* p, const Floats& v) { __builtin_memcpy(p, &v, sizeof(v)); }
SDKERNELS_INLINE void store(double* p, const Doubles& v) { __builtin_memcpy(p, &v, sizeof(v)); }
SDKERNELS_INLINE void store_halves(void* p, Ints v) {
#if defined(SDKERNELS_AVX512)
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits_as<__m512i>(v)));
#else
  const Halves h = __builtin_convertvector(v, Halves);
  __builtin_memcpy(p, &h, sizeof(h));
#endif
}
SDKERNELS_INLINE void store(bf16* p, Floats v) {
  const Ints u = bits_as<Ints>(v);
  // The shift is arithmetic; only the low 16 bits of its result are stored.
  const Ints rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Ints nan = (u & 0x7fffffff) > 0x7f800000;
  store_halves(p, select(nan, (u >> 16) | 0x40, rounded));
}
SDKERNELS_INLINE void store(f16* p, Floats v) {
#if defined(SDKERNELS_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(SDKERNELS_AVX2)
  __m256 parts[2];
  __builtin_memcpy(parts, &v, sizeof(v));
  __m128i* halves = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(halves, _mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT));
#else
  const Ints bits = bits_as<Ints>(v);
  const Ints u = bits & 0x7fffffff;
  const Ints offset = Ints{} + (((127 - 15) + (23 - 10) + 1) << 23);
  // Adding 2^-1 * ulp-aligned offset lets the float adder round a result that is subnormal in half.
  const Ints subnormal = bits_as<Ints>(bits_as<Floats>(u) + bits_as<Floats>(offset)) - offset;
  const Ints normal = (u - ((127 - 15) << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
  Ints h = select(u < (113 << 23), subnormal, normal);
  h = select(u >= ((127 + 16) << 23), Ints{} + 0x7c00, h);  // overflow and infinity
  h = select(u > 0x7f800000, Ints{} + 0x7e00, h);           // nan
  store_halves(p, h | ((bits >> 16) & 0x8000));
#endif
}

// The last n < kLanes elements of a line: nothing beyond them is touched, missing lanes read as
// zero.
template <class T>
SDKERNELS_INLINE Vec<T> load(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
SDKERNELS_INLINE void store(T* p, const Vec<T>& v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

// A bit for each lane, of a mask that is -1 or 0 in every lane; and such a mask of bits.
SDKERNELS_INLINE uint16_t bits_of(Ints mask) {
#if defined(SDKERNELS_AVX512)
  return _mm512_movepi32_mask(bits_as<__m512i>(mask));
#elif defined(SDKERNELS_AVX2)
  __m256 parts[2];
  __builtin_memcpy(parts, &mask, sizeof(mask));
  return _mm256_movemask_ps(parts[0]) | _mm256_movemask_ps(parts[1]) << 8;
#else
  uint16_t bits = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) bits |= (mask[lane] & 1) << lane;
  return bits;
#endif
}
template <class T>
struct WordsOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T>  // an integer
using Words = typename WordsOf<T>::type;
template <class T>
SDKERNELS_INLINE Words<T> mask_of(uint16_t bits) {
  const Words<T> kBit = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                         1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  return bits_as<Words<T>>(((Words<T>{} + T(bits)) & kBit) != 0);
}

// What a ReLU lets pass: positive numbers, and NaN.
SDKERNELS_INLINE Ints passes(const Floats& v) { return ~(v <= 0); }
SDKERNELS_INLINE Ints passes(const Doubles& v) { return __builtin_convertvector(~(v <= 0), Ints); }
SDKERNELS_INLINE Floats masked(const Floats& v, Ints mask) {
  return bits_as<Floats>(bits_as<Ints>(v) & mask);
}
SDKERNELS_INLINE Doubles masked(const Doubles& v, Ints mask) {
  using Longs = Words<int64_t>;
  return bits_as<Doubles>(bits_as<Longs>(v) & __builtin_convertvector(mask, Longs));
}

// One order of addition for every instruction set: a tree over the lanes.
template <class A, class V>
SDKERNELS_INLINE A sum(const V& v) {
  A lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// f(offset, number of elements) over a line; the number is kLanes but for the last call. A constant
// there lets the compiler drop the partial loads from the loop.
template <class F>
SDKERNELS_INLINE void for_vectors(int64_t len, F f) {
  int64_t i = 0;
  for (; i + kLanes <= len; i += kLanes) f(i, std::integral_constant<int64_t, kLanes>{});
  if (i < len) f(i, len - i);
}
template <class T>
SDKERNELS_INLINE Vec<T> load(const T* p, std::integral_constant<int64_t, kLanes>) {
  return load(p);
}
template <class T>
SDKERNELS_INLINE void store(T* p, const Vec<T>& v, std::integral_constant<int64_t, kLanes>) {
  store(p, v);
}
