// What translated kernels are made of: registers as bits, PTX's instructions as functions of typed
// values, and the thread, through which they reach memory and other threads.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

struct bfloat16 {
  uint16_t bits;
};

template <size_t kBytes>
using Bits = std::conditional_t<
    kBytes == 8, uint64_t,
    std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>;

// The low bits of a register, as a value of T.
template <class T, class R>
inline T as(R bits) {
  if constexpr (std::is_same_v<T, bool>)
    return bits != 0;
  else
    return std::bit_cast<T>(static_cast<Bits<sizeof(T)>>(bits));
}

// A value as the bits of a register.
template <class R, class T>
inline R widened(T value) {
  static_assert(sizeof(R) >= sizeof(T) || std::is_same_v<R, bool>);
  if constexpr (std::is_integral_v<T>)
    return static_cast<R>(value);
  else
    return std::bit_cast<Bits<sizeof(T)>>(value);
}

template <class T>
constexpr bool is_float = std::is_floating_point_v<T>;

#define PTX_BINARY(name, expression) \
  template <class T>                 \
  inline T op_##name(T a, T b) {     \
    return expression;               \
  }
PTX_BINARY(add, a + b)
PTX_BINARY(sub, a - b)
PTX_BINARY(mul, a* b)
PTX_BINARY(div, a / b)
PTX_BINARY(rem, a % b)
PTX_BINARY(and, a& b)
PTX_BINARY(or, a | b)
PTX_BINARY(xor, a ^ b)
#undef PTX_BINARY

template <class T>
inline T op_min(T a, T b) {
  if constexpr (is_float<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <class T>
inline T op_max(T a, T b) {
  if constexpr (is_float<T>) return std::fmax(a, b);
  return a < b ? b : a;
}
template <class T>
inline T op_fma(T a, T b, T c) {
  return std::fma(a, b, c);
}
// f of the lower and of the upper halves of 64 bits, a float each.
template <class F, class... A>
inline uint64_t of_pairs(F f, A... pairs) {
  const auto half = [&](int shift) {
    return std::bit_cast<uint32_t>(
        f(std::bit_cast<float>(static_cast<uint32_t>(pairs >> shift))...));
  };
  return static_cast<uint64_t>(half(32)) << 32 | half(0);
}
template <class T>
inline T op_neg(T a) {
  return -a;
}
template <class T>
inline T op_abs(T a) {
  if constexpr (is_float<T>) return std::fabs(a);
  return a < 0 ? -a : a;
}
template <class T>
inline T op_not(T a) {
  if constexpr (std::is_same_v<T, bool>) return !a;
  return ~a;
}
template <class T>
inline T op_sqrt(T a) {
  return std::sqrt(a);
}
// With numbers below the least normal one as zeros.
inline float sqrt_ftz(float a) {
  return std::fabs(a) < std::numeric_limits<float>::min() ? std::copysign(0.0f, a) : std::sqrt(a);
}
template <class T>
inline T op_rcp(T a) {
  return 1 / a;
}
template <class T>
inline T op_rsqrt(T a) {
  return static_cast<T>(1 / std::sqrt(static_cast<double>(a)));
}
template <class T>
inline T op_selp(T a, T b, bool first) {
  return first ? a : b;
}
template <class T>
inline T op_shl(T a, uint32_t by) {
  return by >= sizeof(T) * 8 ? T(0) : T(a << by);
}
template <class T>
inline T op_shr(T a, uint32_t by) {
  const uint32_t most = sizeof(T) * 8 - 1;
  if (by > most) return std::is_signed_v<T> ? T(a >> most) : T(0);
  return a >> by;
}
template <class T>
inline uint32_t op_popc(T a) {
  return std::popcount(a);
}
template <class T>
inline uint32_t op_clz(T a) {
  return std::countl_zero(a);
}
// Of a signed type: extended by the highest bit of the field, or of the number where that ends.
template <class T>
inline T op_bfe(T a, uint32_t from, uint32_t length) {
  constexpr int kBits = sizeof(T) * 8;
  const int first = from & 255, count = length & 255;
  const int sign = std::min(first + count - 1, kBits - 1);
  const bool negative = std::is_signed_v<T> && count && (a >> sign & 1);
  T result = 0;
  for (int i = 0; i < kBits; ++i) {
    const bool inside = i < count && first + i < kBits;
    if (inside ? a >> (first + i) & 1 : negative) result |= std::make_unsigned_t<T>(1) << i;
  }
  return result;
}
template <class T>
inline T mul_lo(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<uint64_t>(U(a)) * U(b));
}
template <class T>
inline T mul_hi(T a, T b) {
  using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<W>(a) * b) >> (sizeof(T) * 8));
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = select >> (4 * i) & 15;
    uint8_t byte = static_cast<uint8_t>(bytes >> (8 * (nibble & 7)));
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= static_cast<uint32_t>(byte) << (8 * i);
  }
  return result;
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
inline uint32_t shf_l(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (32 - (by & 31)));
}

// A comparison is false for NaN, one that ends in u ("unordered") is true.
template <class T>
inline bool either_nan(T a, T b) {
  if constexpr (is_float<T>) return std::isnan(a) || std::isnan(b);
  return false;
}
#define PTX_COMPARE(name, operator)           \
  template <class T>                          \
  inline bool compare_##name(T a, T b) {      \
    return !either_nan(a, b) && a operator b; \
  }                                           \
  template <class T>                          \
  inline bool compare_##name##u(T a, T b) {   \
    return either_nan(a, b) || a operator b;  \
  }
PTX_COMPARE(eq, ==)
PTX_COMPARE(ne, !=)
PTX_COMPARE(lt, <)
PTX_COMPARE(le, <=)
PTX_COMPARE(gt, >)
PTX_COMPARE(ge, >=)
#undef PTX_COMPARE
template <class T>
inline bool compare_nan(T a, T b) {
  return either_nan(a, b);
}
template <class T>
inline bool compare_num(T a, T b) {
  return !either_nan(a, b);
}

// To nearest even between floating point types, towards zero and to the nearest limit to integers.
template <class To, class From>
inline To converted(From value) {
  if constexpr (std::is_same_v<From, bfloat16>) {
    return static_cast<To>(std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16));
  } else if constexpr (std::is_same_v<To, bfloat16>) {
    static_assert(std::is_same_v<From, float>);
    if (std::isnan(value)) return {0x7fff};
    const auto bits = std::bit_cast<uint32_t>(value);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (is_float<From> && std::is_integral_v<To>) {
    using Limits = std::numeric_limits<To>;
    if (std::isnan(value)) return 0;
    if (value <= static_cast<From>(Limits::min())) return Limits::min();
    if (value >= static_cast<From>(Limits::max())) return Limits::max();
    return static_cast<To>(value);
  } else {
    return static_cast<To>(value);
  }
}

// ---- threads ------------------------------------------------------------------------------------

struct Dim {
  uint32_t x, y, z;
};

enum class Shuffle : int { bfly, idx, down, up };

template <class T, int N>
struct Vector {
  T v[N];
};

struct Shuffled {
  uint32_t value;
  bool inside;
};

struct Thread {
  Dim tid, ntid, ctaid, nctaid;
  uint32_t number;  // in its block
  const uint8_t* parameters;
  uint8_t* shared;

  uint32_t lane() const { return number % 32; }

  // These give way to other threads. A fault never comes back.
  Shuffled shuffle(int line, Shuffle form, uint32_t value, uint32_t b, uint32_t c, uint32_t mask);
  uint32_t ballot(int line, bool vote, uint32_t mask);
  void barrier(int line);
  void warp_barrier(int line, uint32_t mask);
  [[noreturn]] void fault(int line, const char* what);

  // Checks and notes an access; `fault`s where it is wrong.
  void check_global(int line, uint64_t address, uint32_t size, bool stores);
  void check_shared(int line, uint32_t address, uint32_t size, const void* stored);  // or null

  template <class T, int N>
  Vector<T, N> parameter(uint64_t offset) const {
    Vector<T, N> value;
    std::memcpy(&value, parameters + offset, sizeof(value));
    return value;
  }
  template <class T, int N>
  Vector<T, N> load_global(int line, uint64_t address) {
    Vector<T, N> value;
    check_global(line, address, sizeof(value), false);
    std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof(value));
    return value;
  }
  template <class T, int N>
  void store_global(int line, uint64_t address, const Vector<T, N>& value) {
    check_global(line, address, sizeof(value), true);
    std::memcpy(reinterpret_cast<void*>(address), &value, sizeof(value));
  }
  template <class T, int N>
  Vector<T, N> load_shared(int line, uint64_t address) {
    Vector<T, N> value;
    check_shared(line, static_cast<uint32_t>(address), sizeof(value), nullptr);
    std::memcpy(&value, shared + static_cast<uint32_t>(address), sizeof(value));
    return value;
  }
  template <class T, int N>
  void store_shared(int line, uint64_t address, const Vector<T, N>& value) {
    check_shared(line, static_cast<uint32_t>(address), sizeof(value), &value);
    std::memcpy(shared + static_cast<uint32_t>(address), &value, sizeof(value));
  }
  // 8x8 matrices of 16-bit elements. Lane 8 m + r names row r of matrix m, and holds of each matrix
  // two neighbouring elements: of row lane / 4 the ones at 2 (lane % 4).
  uint32_t matrix_place(int line, uint64_t address, uint32_t m) {
    const auto row =
        shuffle(line, Shuffle::idx, static_cast<uint32_t>(address), 8 * m + lane() / 4, 31, ~0u);
    if (row.value % 16) fault(line, "a misaligned row of a matrix");
    return row.value + lane() % 4 * 4;
  }
  template <int N>
  Vector<uint32_t, N> load_matrix(int line, uint64_t address) {
    Vector<uint32_t, N> value;
    for (uint32_t m = 0; m < N; ++m)
      value.v[m] = load_shared<uint32_t, 1>(line, matrix_place(line, address, m)).v[0];
    return value;
  }
  // Transposed: of column lane / 4 the ones in rows 2 (lane % 4) and after.
  template <int N>
  Vector<uint32_t, N> load_transposed(int line, uint64_t address) {
    Vector<uint32_t, N> value{};
    for (uint32_t m = 0; m < N; ++m) {
      for (uint32_t i = 0; i < 2; ++i) {
        const auto row = shuffle(line, Shuffle::idx, static_cast<uint32_t>(address),
                                 8 * m + lane() % 4 * 2 + i, 31, ~0u);
        if (row.value % 16) fault(line, "a misaligned row of a matrix");
        const auto part = load_shared<uint16_t, 1>(line, row.value + lane() / 4 * 2);
        value.v[m] |= static_cast<uint32_t>(part.v[0]) << (16 * i);
      }
    }
    return value;
  }
  template <int N>
  void store_matrix(int line, uint64_t address, const Vector<uint32_t, N>& value) {
    for (uint32_t m = 0; m < N; ++m)
      store_shared<uint32_t, 1>(line, matrix_place(line, address, m), {{value.v[m]}});
  }

  // What a load brings is in flight until something is computed from it: stream loads that a thread
  // has issued, and how often it had to wait for some.
  void note_load(uint64_t address, uint32_t bytes, bool& in_flight);
  void note_wait();
};

#ifdef PTX_COUNT
#define COUNTED(loads)        \
  bool in_flight[loads] = {}; \
  (void)in_flight
#define LOADED(load, bytes, address) t.note_load(address, bytes, in_flight[load])
#define USED(load)                                \
  if (in_flight[load]) {                          \
    t.note_wait();                                \
    std::memset(in_flight, 0, sizeof(in_flight)); \
  }
#else
#define COUNTED(loads)
#define LOADED(load, bytes, address)
#define USED(load)
#endif

struct Parameter {
  uint32_t offset, bytes;
};

struct Kernel {
  void (*run)(Thread&);
  const Parameter* parameters;
  uint32_t parameter_count, shared_bytes, most_threads;
  int threads_fixed;  // whether blocks have exactly most_threads
};

}  // namespace ptx
