// Sixteen lanes of a type, held in as many registers as this instruction set needs: one source for
// every instruction set, and the same lane order (so the same sums) on each of them. Included by
// row_kernels_impl.h inside the namespace of one instruction set. SDKERNELS_AVX2, SDKERNELS_AVX512
// and, beside that, SDKERNELS_AVX512_BF16 say what the file that includes it is compiled for (the
// compiler's own macros do not follow a target pragma).
//
// A vector type of the compilers is never wider than a register here: gcc takes wider ones apart
// through memory. Intrinsics stand where neither compiler finds the instruction: conversions
// between lanes of 16 and 32 bits, and masks. std::experimental::simd is not in clang's library,
// and neither it, xsimd nor PyTorch's vectors have all of the 16-bit types and a lane count that
// does not follow the instruction set; what would be left of this file is most of it.

constexpr int64_t kLanes = 16;
#if defined(SDKERNELS_AVX512)
constexpr int64_t kRegisterBytes = 64;
#elif defined(SDKERNELS_AVX2)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif

#define SDKERNELS_INLINE static inline __attribute__((always_inline))
#define SDKERNELS_INLINE_LAMBDA __attribute__((always_inline))

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

// N lanes: one register, or two halves.
template <class T, int64_t N, bool fits = N * sizeof(T) <= kRegisterBytes>
struct Lanes {
  Lanes<T, N / 2> low, high;
};
template <class T, int64_t N>
struct Lanes<T, N, true> {
  typedef T Register __attribute__((vector_size(N * sizeof(T))));
  Register value;
};
template <class V>
constexpr bool kIsRegister = false;
template <class T, int64_t N>
constexpr bool kIsRegister<Lanes<T, N, true>> = true;

template <class T>
using Vec = Lanes<Acc<T>, kLanes>;
using Floats = Lanes<float, kLanes>;
// What has as many bits as a T: masks (all bits of a lane, or none) and rounding are in these.
template <class T>
using Word = std::conditional_t<sizeof(T) == 2, uint16_t,
                                std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// f of every register of the vectors x, which are cut alike.
template <class Result, class F, class... V>
SDKERNELS_INLINE Result map(F f, const V&... x) {
  if constexpr (kIsRegister<Result>) {
    return {(typename Result::Register)f(x.value...)};
  } else {
    return {map<decltype(Result::low)>(f, x.low...), map<decltype(Result::high)>(f, x.high...)};
  }
}

template <class T, int64_t N = kLanes>
SDKERNELS_INLINE Lanes<T, N> splat(T x) {
  using V = Lanes<T, N>;
  if constexpr (kIsRegister<V>) {
    return {x - typename V::Register{}};  // x + 0 would make -0 positive
  } else {
    const auto half = splat<T, N / 2>(x);
    return {half, half};
  }
}

#define SDKERNELS_OPERATOR(op)                                                                    \
  template <class T, int64_t N>                                                                   \
  SDKERNELS_INLINE Lanes<T, N> operator op(const Lanes<T, N>& a, const Lanes<T, N>& b) {          \
    return map<Lanes<T, N>>([](auto x, auto y) SDKERNELS_INLINE_LAMBDA { return x op y; }, a, b); \
  }                                                                                               \
  template <class T, int64_t N>                                                                   \
  SDKERNELS_INLINE Lanes<T, N> operator op(const Lanes<T, N>& a, T b) {                           \
    return a op splat<T, N>(b);                                                                   \
  }                                                                                               \
  template <class T, int64_t N>                                                                   \
  SDKERNELS_INLINE Lanes<T, N> operator op(T a, const Lanes<T, N>& b) {                           \
    return splat<T, N>(a) op b;                                                                   \
  }
SDKERNELS_OPERATOR(+)
SDKERNELS_OPERATOR(-)
SDKERNELS_OPERATOR(*)
SDKERNELS_OPERATOR(&)
SDKERNELS_OPERATOR(|)
#undef SDKERNELS_OPERATOR
template <class T, int64_t N>
SDKERNELS_INLINE Lanes<T, N>& operator+=(Lanes<T, N>& a, const Lanes<T, N>& b) {
  return a = a + b;
}
template <class T, int64_t N>
SDKERNELS_INLINE Lanes<T, N> operator<<(const Lanes<T, N>& a, int bits) {
  return map<Lanes<T, N>>([=](auto x) SDKERNELS_INLINE_LAMBDA { return x << bits; }, a);
}
template <class T, int64_t N>
SDKERNELS_INLINE Lanes<T, N> operator>>(const Lanes<T, N>& a, int bits) {
  return map<Lanes<T, N>>([=](auto x) SDKERNELS_INLINE_LAMBDA { return x >> bits; }, a);
}

template <class To, class T, int64_t N>
SDKERNELS_INLINE Lanes<To, N * int64_t(sizeof(T)) / int64_t(sizeof(To))> bits_as(
    const Lanes<T, N>& a) {
  using Result = Lanes<To, N * int64_t(sizeof(T)) / int64_t(sizeof(To))>;
  if constexpr (kIsRegister<Lanes<T, N>>) {
    return {(typename Result::Register)a.value};
  } else {
    return {bits_as<To>(a.low), bits_as<To>(a.high)};
  }
}
// mask ? yes : no, in every lane.
template <int64_t N>
SDKERNELS_INLINE Lanes<uint32_t, N> select(const Lanes<uint32_t, N>& mask,
                                           const Lanes<uint32_t, N>& yes,
                                           const Lanes<uint32_t, N>& no) {
  return map<Lanes<uint32_t, N>>(
      [](auto m, auto a, auto b) SDKERNELS_INLINE_LAMBDA { return m ? a : b; }, mask, yes, no);
}
// a < b and a == b of numbers below 2^31, as masks: SSE2 compares signed numbers only.
template <int64_t N>
SDKERNELS_INLINE Lanes<uint32_t, N> less(const Lanes<uint32_t, N>& a, uint32_t b) {
  return map<Lanes<uint32_t, N>>([](auto x, auto y) SDKERNELS_INLINE_LAMBDA { return x < y; },
                                 bits_as<int32_t>(a), splat<int32_t, N>(b));
}
template <int64_t N>
SDKERNELS_INLINE Lanes<uint32_t, N> equal(const Lanes<uint32_t, N>& a, uint32_t b) {
  return map<Lanes<uint32_t, N>>([](auto x, auto y) SDKERNELS_INLINE_LAMBDA { return x == y; }, a,
                                 splat<uint32_t, N>(b));
}
template <int64_t N>
SDKERNELS_INLINE Lanes<uint32_t, N> not_nan(const Lanes<float, N>& v) {
  return map<Lanes<uint32_t, N>>([](auto x) SDKERNELS_INLINE_LAMBDA { return x == x; }, v);
}

// ---- memory -------------------------------------------------------------------------------------

template <class T, int64_t N>
SDKERNELS_INLINE Lanes<T, N> load_lanes(const void* p) {
  Lanes<T, N> v;
  if constexpr (kIsRegister<Lanes<T, N>>) {
    __builtin_memcpy(&v.value, p, sizeof(v.value));
  } else {
    v.low = load_lanes<T, N / 2>(p);
    v.high = load_lanes<T, N / 2>(static_cast<const T*>(p) + N / 2);
  }
  return v;
}
template <class T, int64_t N>
SDKERNELS_INLINE void store_lanes(void* p, const Lanes<T, N>& v) {
  if constexpr (kIsRegister<Lanes<T, N>>) {
    __builtin_memcpy(p, &v.value, sizeof(v.value));
  } else {
    store_lanes(p, v.low);
    store_lanes(static_cast<T*>(p) + N / 2, v.high);
  }
}

// Numbers of 16 bits as the upper halves of 32, and lanes of 32 bits that hold no more than 16.
template <int64_t N = kLanes>
SDKERNELS_INLINE Lanes<uint32_t, N> upper_halves(const uint16_t* p) {
  using V = Lanes<uint32_t, N>;
  if constexpr (!kIsRegister<V>) {
    return {upper_halves<N / 2>(p), upper_halves<N / 2>(p + N / 2)};
  } else {
#if defined(SDKERNELS_AVX512)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {(typename V::Register)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)};
#elif defined(SDKERNELS_AVX2)
    // One shuffle of bytes, of all eight in both 128-bit lanes: widening, then shifting, keeps the
    // two ports busy that packing needs.
    const __m256i bytes =
        _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i twice = _mm256_broadcastsi128_si256(halves);
    return {(typename V::Register)_mm256_shuffle_epi8(twice, bytes)};
#elif defined(__SSE2__)
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {(typename V::Register)_mm_unpacklo_epi16(_mm_setzero_si128(), halves)};
#else
    const auto halves = load_lanes<uint16_t, N>(p).value;
    return V{__builtin_convertvector(halves, typename V::Register)} << 16;
#endif
  }
}
template <int64_t N>
SDKERNELS_INLINE Lanes<uint16_t, N> narrow(const Lanes<uint32_t, N>& v) {
  using Result = Lanes<uint16_t, N>;
#if defined(SDKERNELS_AVX512)
  return {(typename Result::Register)_mm512_cvtepi32_epi16((__m512i)v.value)};
#else
  if constexpr (!kIsRegister<Result>) {
    return {narrow(v.low), narrow(v.high)};
  } else {
#if defined(SDKERNELS_AVX2)
    // The pack takes 64 bits of its two sources in turn.
    const __m256i packed = _mm256_packus_epi32((__m256i)v.low.value, (__m256i)v.high.value);
    return {(typename Result::Register)_mm256_permute4x64_epi64(packed, 0xd8)};
#elif defined(__SSE2__)
    // SSE2 has the pack with signed saturation only.
    const auto low = bits_as<int32_t>(v.low << 16) >> 16,
               high = bits_as<int32_t>(v.high << 16) >> 16;
    return {(typename Result::Register)_mm_packs_epi32((__m128i)low.value, (__m128i)high.value)};
#else
    Result result;
    for (int64_t lane = 0; lane < N / 2; ++lane) {
      result.value[lane] = v.low.value[lane];
      result.value[lane + N / 2] = v.high.value[lane];
    }
    return result;
#endif
  }
#endif
}

// ---- numbers ------------------------------------------------------------------------------------

SDKERNELS_INLINE Floats load(const float* p) { return load_lanes<float, kLanes>(p); }
SDKERNELS_INLINE Vec<double> load(const double* p) { return load_lanes<double, kLanes>(p); }
SDKERNELS_INLINE Floats load(const bf16* p) { return bits_as<float>(upper_halves(&p->bits)); }
#if defined(SDKERNELS_AVX512)
SDKERNELS_INLINE Floats load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
#elif defined(SDKERNELS_AVX2)
SDKERNELS_INLINE Floats load(const f16* p) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(p);
  return {{_mm256_cvtph_ps(_mm_loadu_si128(halves))},
          {_mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
}
#else
SDKERNELS_INLINE Floats load(const f16* p) {
  const auto h = upper_halves(&p->bits);
  const auto magnitude = (h & 0x7fff0000u) >> 3;
  const auto exponent = magnitude & 0x0f800000u;
  const auto rebiased = magnitude + ((127u - 15) << 23);
  const auto infinite = rebiased + ((128u - 16) << 23);  // inf and nan keep an exponent of all ones
  const auto offset = splat(113u << 23);                 // a subnormal: 2^-14 * (1 + m) - 2^-14
  const auto subnormal =
      bits_as<uint32_t>(bits_as<float>(magnitude + offset) - bits_as<float>(offset));
  auto v = select(equal(exponent, 0), subnormal, rebiased);
  v = select(equal(exponent, 0x0f800000), infinite, v);
  // A NaN becomes quiet, as the instructions of the other sets make it.
  v = select(not_nan(bits_as<float>(v)), v, v | 0x00400000u);
  return bits_as<float>(v | (h & 0x80000000u));
}
#endif

// Numbers of float whose upper halves are v rounded to bf16: to nearest, ties to even. 0x7fff more,
// and one where the bit above is set. A NaN is cut off: what comes out of arithmetic is quiet, by a
// bit that stays.
template <int64_t N>
SDKERNELS_INLINE Lanes<uint32_t, N> rounded_to_bf16(const Lanes<float, N>& v) {
  const auto u = bits_as<uint32_t>(v);
  const auto more = ((u >> 16) & 1u) + 0x7fffu;
#if defined(SDKERNELS_AVX512)
  const __mmask16 numbers = _mm512_cmp_ps_mask(v.value, v.value, _CMP_ORD_Q);
  const __m512i bits = (__m512i)u.value;
  return {(typename Lanes<uint32_t, N>::Register)_mm512_mask_add_epi32(bits, numbers, bits,
                                                                       (__m512i)more.value)};
#else
  return u + (more & not_nan(v));
#endif
}

#if defined(SDKERNELS_AVX2)
SDKERNELS_INLINE bool any_nan(__m256 a, __m256 b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q));
}
// The same of sixteen floats at once, of which none is NaN, given as their upper and their lower
// halves: one more where those are more than half, or half and the last bit is odd, so that 0x7fff
// more overflows. In 16 bits this is a mean with 0x7ffe (which adds 1 itself).
SDKERNELS_INLINE __m256i rounded_halves(__m256i upper, __m256i lower) {
  const __m256i last = _mm256_and_si256(upper, _mm256_set1_epi16(1));
  const __m256i mean = _mm256_avg_epu16(_mm256_or_si256(lower, last), _mm256_set1_epi16(0x7ffe));
  return _mm256_add_epi16(upper, _mm256_srli_epi16(mean, 15));
}
#endif

// The bits that numbers of the arithmetic have when they are stored as T.
template <class T>
SDKERNELS_INLINE Lanes<Word<T>, kLanes> words_of(const Vec<T>& v) {
  if constexpr (std::is_same_v<T, bf16>) {
#if defined(SDKERNELS_AVX512_BF16)
    // It cuts a NaN off as we do, but takes a subnormal number for zero.
    constexpr int kSubnormal = 0x20;
    if (!_mm512_fpclass_ps_mask(v.value, kSubnormal))
      return {(typename Lanes<uint16_t, kLanes>::Register)_mm512_cvtneps_pbh(v.value)};
#elif defined(SDKERNELS_AVX2)
    if (!any_nan(v.low.value, v.high.value)) {
      const __m256i halves =  // of four floats, in both 128-bit lanes: the lower ones first
          _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                           0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
      const __m256i a = _mm256_shuffle_epi8((__m256i)v.low.value, halves);
      const __m256i b = _mm256_shuffle_epi8((__m256i)v.high.value, halves);
      const __m256i words =
          rounded_halves(_mm256_unpackhi_epi64(a, b), _mm256_unpacklo_epi64(a, b));
      return {(typename Lanes<uint16_t, kLanes>::Register)_mm256_permute4x64_epi64(words, 0xd8)};
    }
#endif
    return narrow(rounded_to_bf16(v) >> 16);
  } else if constexpr (std::is_same_v<T, f16>) {
#if defined(SDKERNELS_AVX512)
    return {(typename Lanes<uint16_t, kLanes>::Register)_mm512_cvtps_ph(v.value,
                                                                        _MM_FROUND_TO_NEAREST_INT)};
#elif defined(SDKERNELS_AVX2)
    const __m128i low = _mm256_cvtps_ph(v.low.value, _MM_FROUND_TO_NEAREST_INT);
    const __m128i high = _mm256_cvtps_ph(v.high.value, _MM_FROUND_TO_NEAREST_INT);
    return {(typename Lanes<uint16_t, kLanes>::Register)_mm256_set_m128i(high, low)};
#else
    const auto bits = bits_as<uint32_t>(v);
    const auto u = bits & 0x7fffffffu;
    // 0.5, whose last bit counts in float what a half's last subnormal bit does: the sum is rounded
    // where a subnormal half ends.
    const auto offset = splat(((127u - 15) + (23 - 10) + 1) << 23);
    const auto subnormal = bits_as<uint32_t>(bits_as<float>(u) + bits_as<float>(offset)) - offset;
    const auto normal = (u - ((127u - 15) << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
    auto h = select(less(u, 113 << 23), subnormal, normal);
    h = select(less(u, (127 + 16) << 23), h, splat(0x7c00u));  // overflow and infinity
    // A NaN keeps what fits of its payload and is quiet, as the instructions of the other sets do.
    h = select(not_nan(v), h, ((u >> 13) & 0x7fffu) | 0x0200u);
    return narrow(h | ((bits >> 16) & 0x8000u));
#endif
  } else {
    return bits_as<Word<T>>(v);
  }
}
template <class T>
SDKERNELS_INLINE void store(T* p, const Vec<T>& v) {
  store_lanes(p, words_of<T>(v));
}

// The last n < kLanes elements of a line: nothing beyond them is touched, missing lanes read as
// zero. Pieces of constant size, as a call of memcpy takes longer than all of this.
template <class T>
SDKERNELS_INLINE void copy_few(T* to, const T* from, int64_t n) {
  static_assert(kLanes == 16);
  const auto piece = [&](int64_t size) SDKERNELS_INLINE_LAMBDA {
    if (!(n & size)) return;
    __builtin_memcpy(to, from, size * sizeof(T));
    to += size;
    from += size;
  };
  piece(8);
  piece(4);
  piece(2);
  piece(1);
}
template <class T>
SDKERNELS_INLINE Vec<T> load(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  copy_few(lanes, p, n);
  return load(lanes);
}
template <class T>
SDKERNELS_INLINE Lanes<Word<T>, kLanes> load_words(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  copy_few(lanes, p, n);
  return load_lanes<Word<T>, kLanes>(lanes);
}
template <class T>
SDKERNELS_INLINE void store_words(T* p, const Lanes<Word<T>, kLanes>& words, int64_t n) {
  T lanes[kLanes];
  store_lanes(lanes, words);
  copy_few(p, lanes, n);
}

// f(offset, number of elements) over a line; the number is kLanes but for the last call. A constant
// there lets the compiler drop the partial loads from the loop.
using Whole = std::integral_constant<int64_t, kLanes>;
template <class F>
SDKERNELS_INLINE void for_vectors(int64_t len, F f) {
  int64_t i = 0;
  for (; i + kLanes <= len; i += kLanes) f(i, Whole{});
  if (i < len) f(i, len - i);
}
template <class T>
SDKERNELS_INLINE Vec<T> load(const T* p, Whole) {
  return load(p);
}
template <class T>
SDKERNELS_INLINE Lanes<Word<T>, kLanes> load_words(const T* p, Whole) {
  return load_lanes<Word<T>, kLanes>(p);
}
template <class T>
SDKERNELS_INLINE void store_words(T* p, const Lanes<Word<T>, kLanes>& words, Whole) {
  store_lanes(p, words);
}
template <class T, class Count>
SDKERNELS_INLINE void store(T* p, const Vec<T>& v, Count n) {
  store_words(p, words_of<T>(v), n);
}

// ---- pairs of bf16 ------------------------------------------------------------------------------

// A register of bf16, read as words of 32 bits: their upper halves are the odd elements, floats
// but for what stands below, and the lower halves, shifted up, the even ones. So no lane moves,
// neither here nor when they are stored.
struct Pairs {
  constexpr operator int64_t() const { return kRegisterBytes / sizeof(bf16); }
};
using WordsOfPairs = Lanes<uint16_t, Pairs{}>;
struct FloatsOfPairs {
  Lanes<float, Pairs{} / 2> even, odd;
};
SDKERNELS_INLINE FloatsOfPairs operator+(const FloatsOfPairs& a, const FloatsOfPairs& b) {
  return {a.even + b.even, a.odd + b.odd};
}
SDKERNELS_INLINE FloatsOfPairs operator*(float a, const FloatsOfPairs& b) {
  return {a * b.even, a * b.odd};
}

SDKERNELS_INLINE WordsOfPairs load_words(const bf16* p, Pairs n) {
  return load_lanes<uint16_t, n>(p);
}
SDKERNELS_INLINE void store_words(bf16* p, const WordsOfPairs& words, Pairs) {
  store_lanes(p, words);
}
SDKERNELS_INLINE FloatsOfPairs floats_of(const WordsOfPairs& halves) {
  const auto words = bits_as<uint32_t>(halves);
  return {bits_as<float>(words << 16), bits_as<float>(words & 0xffff0000u)};
}
SDKERNELS_INLINE FloatsOfPairs load(const bf16* p, Pairs n) { return floats_of(load_words(p, n)); }

// Even and odd elements are rounded at once, in 16 bits as rounded_halves does. NaN would become
// infinite. (AVX512_BF16 is no faster here: what it rounds comes out in natural order.)
template <class T>
SDKERNELS_INLINE WordsOfPairs words_of(const FloatsOfPairs& v) {
  static_assert(std::is_same_v<T, bf16>);
#if defined(SDKERNELS_AVX512)
  if (!_mm512_cmp_ps_mask(v.even.value, v.odd.value, _CMP_UNORD_Q)) {
    const __m512i even = (__m512i)v.even.value, odd = (__m512i)v.odd.value;
    const __mmask32 odds = 0xaaaaaaaa;
    const __m512i upper = _mm512_mask_mov_epi16(_mm512_srli_epi32(even, 16), odds, odd);
    const __m512i lower = _mm512_mask_mov_epi16(even, odds, _mm512_slli_epi32(odd, 16));
    const __m512i last = _mm512_and_si512(upper, _mm512_set1_epi16(1));
    const __m512i mean = _mm512_avg_epu16(_mm512_or_si512(lower, last), _mm512_set1_epi16(0x7ffe));
    return {(WordsOfPairs::Register)_mm512_add_epi16(upper, _mm512_srli_epi16(mean, 15))};
  }
#elif defined(SDKERNELS_AVX2)
  if (!any_nan(v.even.value, v.odd.value)) {
    const __m256i even = (__m256i)v.even.value, odd = (__m256i)v.odd.value;
    return {(WordsOfPairs::Register)rounded_halves(
        _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa),
        _mm256_blend_epi16(_mm256_slli_epi32(odd, 16), even, 0x55))};
  }
#endif
  const auto odd = rounded_to_bf16(v.odd) & 0xffff0000u;
  return bits_as<uint16_t>(odd | (rounded_to_bf16(v.even) >> 16));
}
SDKERNELS_INLINE void store(bf16* p, const FloatsOfPairs& v, Pairs n) {
  store_words(p, words_of<bf16>(v), n);
}

// for_vectors where every element stands for itself: those of bf16 alone go by pairs. Not beside
// floats, which it takes as many shuffles to bring into that order as pairs save.
template <class... T, class F>
SDKERNELS_INLINE void for_elements(int64_t len, F f) {
  int64_t i = 0;
  if constexpr ((std::is_same_v<T, bf16> && ...))
    for (; i + Pairs{} <= len; i += Pairs{}) f(i, Pairs{});
  for_vectors(len - i, [&](int64_t c, auto n) SDKERNELS_INLINE_LAMBDA { f(i + c, n); });
}

// What a loop reads and writes a little later, brought to the second cache. Processors foresee
// neither the next page nor all lines that stores wait for: of tensors in no cache, most ops take 5
// to 20 % less time so. Zen 4 bears neither reads foreseen farther ahead nor lines to be written in
// the first cache: an addition in place took 1.4 times as long. Past the end of a tensor it is
// harmless.
constexpr int64_t kReadAhead = 512, kWriteAhead = 1024;  // bytes
constexpr int kSecondCache = 2;                          // a locality of __builtin_prefetch
SDKERNELS_INLINE const void* ahead(const void* p, int64_t bytes) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes);
}
SDKERNELS_INLINE void read_soon(const void* p) {
  __builtin_prefetch(ahead(p, kReadAhead), 0, kSecondCache);
}
SDKERNELS_INLINE void written_soon(const void* p) {
  __builtin_prefetch(ahead(p, kWriteAhead), 1, kSecondCache);
}

// A copy of bytes. Not memcpy: from some KiB on it is a string instruction, which processors with
// Zen cores execute ten times slower where the two pointers lie alike within their pages.
SDKERNELS_INLINE void copy_bytes(char* to, const char* from, int64_t bytes) {
  using Block = Lanes<uint32_t, kLanes>;
  constexpr int64_t kBlock = sizeof(Block);
  int64_t i = 0;
  for (; i + kBlock <= bytes; i += kBlock) {
    read_soon(from + i);
    written_soon(to + i);
    store_lanes(to + i, load_lanes<uint32_t, kLanes>(from + i));
  }
  for (; i + 8 <= bytes; i += 8) __builtin_memcpy(to + i, from + i, 8);
  for (; i < bytes; ++i) to[i] = from[i];
}

// A copy that no cache needs to make room for: of whole blocks, to a multiple of their size. What
// is written comes to memory by finish_past_caches() at the latest.
template <class T>
SDKERNELS_INLINE void copy_past_caches(T* to, const T* from, int64_t len) {
#if defined(__SSE2__)
  constexpr int64_t kStep = kRegisterBytes / sizeof(T);
  for (int64_t i = 0; i < len; i += kStep) {
#if defined(SDKERNELS_AVX512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(SDKERNELS_AVX2)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  }
#else
  copy_bytes(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), len * sizeof(T));
#endif
}
SDKERNELS_INLINE void finish_past_caches() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- masks --------------------------------------------------------------------------------------

// What a ReLU lets pass of stored numbers: positive ones, and NaN.
template <class T, int64_t N>
SDKERNELS_INLINE Lanes<Word<T>, N> passes(const Lanes<Word<T>, N>& words) {
  using Result = Lanes<Word<T>, N>;
  if constexpr (sizeof(T) > 2) {
    return map<Result>([](auto x) SDKERNELS_INLINE_LAMBDA { return ~(x <= 0); }, bits_as<T>(words));
  } else {
    // As integers: what lies above the negative infinity, but zero. -0 is the least of all.
    constexpr int16_t kNegativeInfinity = std::is_same_v<T, bf16> ? -0x80 : -0x400;
    return map<Result>([](auto x)
                           SDKERNELS_INLINE_LAMBDA { return (x > kNegativeInfinity) & (x != 0); },
                       bits_as<int16_t>(words));
  }
}
template <class T, int64_t N>
SDKERNELS_INLINE Lanes<T, N> masked(const Lanes<T, N>& v, const Lanes<Word<T>, N>& mask) {
  return bits_as<T>(bits_as<Word<T>>(v) & mask);
}
// A bit for each lane of a mask; and such a mask of bits.
template <class W, int64_t N>
SDKERNELS_INLINE uint32_t bits_of(const Lanes<W, N>& mask) {
  if constexpr (!kIsRegister<Lanes<W, N>>) {
    return bits_of(mask.low) | bits_of(mask.high) << (N / 2);
  } else {
#if defined(SDKERNELS_AVX512)
    if constexpr (sizeof(mask) == 32) return _mm256_movepi16_mask((__m256i)mask.value);
    if constexpr (sizeof(mask) == 64 && sizeof(W) == 2)
      return _mm512_movepi16_mask((__m512i)mask.value);
    if constexpr (sizeof(W) == 4) return _mm512_movepi32_mask((__m512i)mask.value);
    if constexpr (sizeof(W) == 8) return _mm512_movepi64_mask((__m512i)mask.value);
#elif defined(SDKERNELS_AVX2)
    if constexpr (sizeof(W) == 2) {
      const __m256i words = (__m256i)mask.value;
      return _mm_movemask_epi8(
          _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
    if constexpr (sizeof(W) == 4) return _mm256_movemask_ps((__m256)mask.value);
    if constexpr (sizeof(W) == 8) return _mm256_movemask_pd((__m256d)mask.value);
#elif defined(__SSE2__)
    if constexpr (sizeof(W) == 2)
      return _mm_movemask_epi8(_mm_packs_epi16((__m128i)mask.value, _mm_setzero_si128()));
    if constexpr (sizeof(W) == 4) return _mm_movemask_ps((__m128)mask.value);
    if constexpr (sizeof(W) == 8) return _mm_movemask_pd((__m128d)mask.value);
#else
    uint32_t bits = 0;
    for (int64_t lane = 0; lane < N; ++lane) bits |= uint32_t(mask.value[lane] & 1) << lane;
    return bits;
#endif
  }
}
template <class W, int64_t N = kLanes, int64_t first = 0>
SDKERNELS_INLINE Lanes<W, N> mask_of(uint32_t bits) {
  using V = Lanes<W, N>;
  if constexpr (kIsRegister<V>) {
    static_assert(kLanes == 16);
    constexpr W kBits[kLanes] = {1 << 0,  1 << 1,  1 << 2,  1 << 3, 1 << 4,  1 << 5,
                                 1 << 6,  1 << 7,  1 << 8,  1 << 9, 1 << 10, 1 << 11,
                                 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    const auto bit = load_lanes<W, N>(kBits + first).value;
    return {(typename V::Register)((splat<W, N>(W(bits)).value & bit) == bit)};
  } else {
    return {mask_of<W, N / 2, first>(bits), mask_of<W, N / 2, first + N / 2>(bits)};
  }
}

SDKERNELS_INLINE WordsOfPairs mask_of_pairs(uint32_t bits) {
#if defined(SDKERNELS_AVX512)
  return {(WordsOfPairs::Register)_mm512_movm_epi16(bits)};
#else
  return mask_of<uint16_t, Pairs{}>(bits);
#endif
}

// Zero in the lanes that a line of n more elements does not have: what was computed there from
// zeros need not be zero (0 - mean), nor finite.
template <class V>
SDKERNELS_INLINE V zero_missing(const V& v, Whole) {
  return v;
}
template <class V>
SDKERNELS_INLINE V zero_missing(const V& v, Pairs) {
  return v;
}
template <class T>
SDKERNELS_INLINE Lanes<T, kLanes> zero_missing(const Lanes<T, kLanes>& v, int64_t n) {
  return masked(v, mask_of<Word<T>>((1u << n) - 1));
}

// ---- sums ---------------------------------------------------------------------------------------

// One order of addition for every instruction set: a tree over the lanes, upper half onto lower.
template <class T, int64_t N>
SDKERNELS_INLINE T sum(const Lanes<T, N>& v) {
  if constexpr (!kIsRegister<Lanes<T, N>>) {
    return sum(v.low + v.high);
  } else if constexpr (N == 2) {
    return v.value[0] + v.value[1];
  } else if constexpr (N == 4) {
    return (v.value[0] + v.value[2]) + (v.value[1] + v.value[3]);
  } else {
    Lanes<T, N / 2, true> low, high;
    __builtin_memcpy(&low.value, &v.value, sizeof(low.value));
    __builtin_memcpy(&high.value, reinterpret_cast<const char*>(&v.value) + sizeof(low.value),
                     sizeof(high.value));
    return sum(low + high);
  }
}
