// The kernels themselves, compiled by each row_kernels_*.cpp with SDKERNELS_ISA naming its
// namespace. Everything has internal linkage: the linker must not merge code of different
// instruction sets.

#ifndef SDKERNELS_ISA
#error "define SDKERNELS_ISA before including this file"
#endif

namespace sdkernels::cpu::SDKERNELS_ISA {
namespace {

#include "vec.h"

template <class T>
SDKERNELS_INLINE T* at(T* data, Stride stride, int64_t row, int64_t line) {
  return data + row * stride.row + line * stride.line;
}

// f(row, line, first, count) for the pieces of lines that make up elements [begin, end).
template <class F>
SDKERNELS_INLINE void for_segments(int64_t lines, int64_t len, int64_t begin, int64_t end, F f) {
  int64_t first = begin % len;
  int64_t line = begin / len % lines;
  int64_t row = begin / len / lines;
  while (begin < end) {
    const int64_t count = len - first < end - begin ? len - first : end - begin;
    f(row, line, first, count);
    begin += count;
    first = 0;
    if (++line == lines) {
      line = 0;
      ++row;
    }
  }
}

// The plain copy of a dropped row: bits unchanged where the types agree, else exact (widening).
template <class Y, class X>
SDKERNELS_INLINE void copy(Y* y, const X* x, int64_t len) {
  if constexpr (std::is_same_v<Y, X>) {
    copy_bytes(reinterpret_cast<char*>(y), reinterpret_cast<const char*>(x), len * sizeof(Y));
  } else {
    for_vectors(len, [&](int64_t i, auto n) { store(y + i, load(x + i, n), n); });
  }
}

void copy_rows(const CopyRows& p, int64_t begin, int64_t end) {
  for_segments(p.lines, p.bytes, begin, end,
               [&](int64_t row, int64_t line, int64_t first, int64_t count) {
                 const int64_t mapped = p.map[row];
                 const int64_t source = p.scatters ? row : mapped;
                 char* y = at(p.y, p.y_stride, p.scatters ? mapped : row, line) + first;
                 if (source >= 0)
                   copy_bytes(y, at(p.x, p.x_stride, source, line) + first, count);
                 else if (p.base)
                   copy_bytes(y, at(p.base, p.base_stride, row, line) + first, count);
                 else
                   __builtin_memset(y, 0, count);
               });
}

template <class Y, class R, class O>
void scatter_add(const ScatterAdd& p, int64_t begin, int64_t end) {
  using A = Acc<Y>;
  const A scale = static_cast<A>(p.scale);
  const A* layer_scale = static_cast<const A*>(p.layer_scale);
  const A* row_weight = static_cast<const A*>(p.row_weight);
  for_segments(
      p.lines, p.len, begin, end, [&](int64_t i, int64_t line, int64_t first, int64_t count) {
        const int64_t row = p.index ? p.index[i] : i;
        const int64_t slot = p.index ? i : p.slot[i];
        Y* y = at(static_cast<Y*>(p.y), p.y_stride, row, line) + first;
        const R* residual =
            at(static_cast<const R*>(p.residual), p.residual_stride, row, line) + first;
        if (slot < 0) {
          copy(y, residual, count);
          return;
        }
        const O* out = at(static_cast<const O*>(p.out), p.out_stride, slot, line) + first;
        const A row_scale = row_weight ? scale * row_weight[slot] : scale;
        const auto add = [&](int64_t c, const auto& factor, auto n) SDKERNELS_INLINE_LAMBDA {
          read_soon(residual + c);
          read_soon(out + c);
          written_soon(y + c);
          store(y + c, load(residual + c, n) + factor * load(out + c, n), n);
        };
        if (layer_scale && p.layer_scale_element) {
          const A* gamma = layer_scale + line * p.layer_scale_line + first;
          for_vectors(count, [&](int64_t c, auto n) { add(c, row_scale * load(gamma + c, n), n); });
        } else {
          const A factor =
              layer_scale ? row_scale * layer_scale[line * p.layer_scale_line] : row_scale;
          for_elements<Y, R, O>(count, [&](int64_t c, auto n) { add(c, factor, n); });
        }
      });
}

// f(row, first, count) for the pieces of rows that belong to words [begin, end).
template <class F>
SDKERNELS_INLINE void for_words(int64_t len, int64_t begin, int64_t end, F f) {
  const int64_t words = (len + kBitsOfWord - 1) / kBitsOfWord;
  int64_t first = begin % words * kBitsOfWord;
  for (int64_t row = begin / words; row * words < end; ++row, first = 0) {
    const int64_t last = (end - row * words) * kBitsOfWord;
    f(row, first, (last < len ? last : len) - first);
  }
}

// The bits of the elements from `first` on.
template <class Bits>
SDKERNELS_INLINE Bits* bits_at(Bits* positive, int64_t len, int64_t row, int64_t first) {
  return positive + row * ((len + 7) / 8) + first / 8;
}

template <class Y, class R, class O>
void scatter_add_relu(const ScatterAddRelu& p, int64_t begin, int64_t end) {
  static_assert(kLanes == kBitsOfWord);
  using A = Acc<Y>;
  const A* layer_scale = static_cast<const A*>(p.layer_scale);
  const A* row_weight = static_cast<const A*>(p.row_weight);
  for_words(p.len, begin, end, [&](int64_t row, int64_t first, int64_t count) {
    const int64_t slot = p.slot[row];
    Y* y = static_cast<Y*>(p.y) + row * p.len + first;
    uint8_t* positive = bits_at(p.positive, p.len, row, first);
    const R* residual = static_cast<const R*>(p.residual) + row * p.residual_row + first;
    const auto finish = [&](int64_t c, const auto& words, auto n) SDKERNELS_INLINE_LAMBDA {
      read_soon(residual + c);
      written_soon(y + c);
      // Of what is stored: a positive sum may be rounded to zero.
      const auto mask = zero_missing(passes<Y>(words), n);
      store_words(y + c, words & mask, n);
      const uint32_t bits = bits_of(mask);
      __builtin_memcpy(positive + c / 8, &bits, n > 16 ? 4 : n > 8 ? 2 : 1);
    };
    if (slot < 0) {
      for_elements<Y, R>(count, [&](int64_t c, auto n) {
        if constexpr (std::is_same_v<Y, R>)
          finish(c, load_words(residual + c, n), n);  // NaN payloads included
        else
          finish(c, words_of<Y>(load(residual + c, n)), n);
      });
      return;
    }
    const O* out = static_cast<const O*>(p.out) + slot * p.out_row + first;
    const A scale = static_cast<A>(p.scale) * (row_weight ? row_weight[slot] : A(1));
    const auto add = [&](int64_t c, const auto& factor, auto n) SDKERNELS_INLINE_LAMBDA {
      read_soon(out + c);
      finish(c, words_of<Y>(load(residual + c, n) + factor * load(out + c, n)), n);
    };
    if (layer_scale)
      for_vectors(count,
                  [&](int64_t c, auto n) { add(c, scale * load(layer_scale + first + c, n), n); });
    else
      for_elements<Y, R, O>(count, [&](int64_t c, auto n) { add(c, scale, n); });
  });
}

template <class G, class O>
void scatter_add_relu_backward(const ScatterAddReluBackward& p, int64_t begin, int64_t end) {
  using A = Acc<G>;
  const A* layer_scale = static_cast<const A*>(p.layer_scale);
  const A* row_weight = static_cast<const A*>(p.row_weight);
  for_words(p.len, begin, end, [&](int64_t row, int64_t first, int64_t count) {
    const G* grad = static_cast<const G*>(p.grad) + row * p.len + first;
    G* d_residual = static_cast<G*>(p.d_residual) + row * p.len + first;
    const uint8_t* positive = bits_at(p.positive, p.len, row, first);
    // A copy of what passes, bit by bit; gives it as numbers too.
    const auto pass = [&](int64_t c, auto n) SDKERNELS_INLINE_LAMBDA {
      read_soon(grad + c);
      written_soon(d_residual + c);
      uint32_t bits = 0;
      __builtin_memcpy(&bits, positive + c / 8, n > 16 ? 4 : n > 8 ? 2 : 1);
      if constexpr (std::is_same_v<decltype(n), Pairs>) {
        const auto passed = load_words(grad + c, n) & mask_of_pairs(bits);
        store_words(d_residual + c, passed, n);
        return floats_of(passed);
      } else {
        store_words(d_residual + c, load_words(grad + c, n) & mask_of<Word<G>>(bits), n);
        return masked(load(grad + c, n), mask_of<Word<A>>(bits));
      }
    };
    const int64_t slot = p.d_out ? p.slot[row] : -1;
    if (slot < 0) {
      for_elements<G>(count, [&](int64_t c, auto n) { pass(c, n); });
      return;
    }
    O* d_out = static_cast<O*>(p.d_out) + slot * p.len + first;
    const A scale = static_cast<A>(p.scale) * (row_weight ? row_weight[slot] : A(1));
    const auto finish = [&](int64_t c, const auto& d, auto n) SDKERNELS_INLINE_LAMBDA {
      written_soon(d_out + c);
      store(d_out + c, d, n);
    };
    if (layer_scale)
      for_vectors(count, [&](int64_t c, auto n) {
        finish(c, scale * pass(c, n) * load(layer_scale + first + c, n), n);
      });
    else
      for_elements<G, O>(count, [&](int64_t c, auto n) { finish(c, scale * pass(c, n), n); });
  });
}

// The sum of layer_scale * grad * out over elements that have a layer scale each, one for all of
// them (stride 0), or none (null). Lanes are emptied into a double before float loses digits.
template <class G, class O, class A>
SDKERNELS_INLINE double sum_products(const G* grad, const O* out, const A* layer_scale,
                                     int64_t layer_scale_element, int64_t count) {
  constexpr int64_t kBlock = 128 * kLanes;
  const A* gamma = layer_scale_element ? layer_scale : nullptr;
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t left = count - first;
    Vec<A> sums = {};
    for_vectors(left < kBlock ? left : kBlock, [&](int64_t c, auto n) {
      Vec<A> product = load(grad + first + c, n) * load(out + first + c, n);
      if (gamma) product = product * load(gamma + first + c, n);
      sums += product;
    });
    total += sum(sums);
  }
  return layer_scale && !gamma ? total * *layer_scale : total;
}

template <class G, class O>
void scatter_add_backward(const ScatterAddBackward& p, int64_t begin, int64_t end,
                          void* layer_scale_sum, double* row_weight_sum) {
  using A = Acc<G>;
  const A* layer_scale = static_cast<const A*>(p.layer_scale);
  const A* row_weight = static_cast<const A*>(p.row_weight);
  const int64_t first_row = begin / p.len / p.lines;
  for_segments(
      p.lines, p.len, begin, end, [&](int64_t j, int64_t line, int64_t first, int64_t count) {
        const G* grad = at(static_cast<const G*>(p.grad), p.grad_stride, p.index[j], line) + first;
        O* d_out = at(static_cast<O*>(p.d_out), p.d_out_stride, j, line) + first;
        const O* out =
            p.out ? at(static_cast<const O*>(p.out), p.out_stride, j, line) + first : nullptr;
        const int64_t offset = line * p.layer_scale_line + first * p.layer_scale_element;
        const A scale = static_cast<A>(p.scale) * (row_weight ? row_weight[j] : A(1));
        A* total = layer_scale_sum ? static_cast<A*>(layer_scale_sum) + offset : nullptr;
        if (row_weight_sum)
          row_weight_sum[j - first_row] +=
              sum_products(grad, out, layer_scale ? layer_scale + offset : nullptr,
                           p.layer_scale_element, count);
        if (!layer_scale) {
          for_elements<G, O>(count, [&](int64_t c, auto n) {
            read_soon(grad + c);
            written_soon(d_out + c);
            store(d_out + c, scale * load(grad + c, n), n);
          });
        } else if (!p.layer_scale_element) {
          const A gamma = layer_scale[offset];
          Vec<A> sums = {};
          for_vectors(count, [&](int64_t c, auto n) {
            const Vec<A> g = load(grad + c, n);
            read_soon(grad + c);
            if (total) read_soon(out + c);
            written_soon(d_out + c);
            // Not yet scaled: a missing lane is zero, and an infinite row weight would make it NaN.
            if (total) sums += g * load(out + c, n);
            store(d_out + c, gamma * (scale * g), n);
          });
          if (total) *total += scale * sum(sums);
        } else {
          // One line after the other, though the sums are read and written for each: several at
          // once are streams that no processor foresees.
          for_vectors(count, [&](int64_t c, auto n) {
            const auto scaled = scale * load(grad + c, n);
            read_soon(grad + c);
            written_soon(d_out + c);
            if (total) {
              read_soon(out + c);
              store(total + c, load(total + c, n) + scaled * load(out + c, n), n);
            }
            store(d_out + c, load(layer_scale + offset + c, n) * scaled, n);
          });
        }
      });
}

// Lines of a norm that are worked on together, at most: the sums of one line would wait for their
// own last additions, and those of several overlap.
constexpr int64_t kLinesAtOnce = 4;

// So many of `bytes` in all: they have to stay in the first cache between two stages.
template <class X>
SDKERNELS_INLINE int64_t lines_at_once(int64_t len, int64_t bytes) {
  int64_t lines = kLinesAtOnce;
  while (lines > 1 && lines * len * static_cast<int64_t>(sizeof(X)) > bytes) lines /= 2;
  return lines;
}

// f(row, line, number of lines) for the lines [begin, end) of [rows, lines], at most `most` at once
// and all of one row.
template <class F>
SDKERNELS_INLINE void for_lines(int64_t lines, int64_t begin, int64_t end, int64_t most, F f) {
  int64_t row = begin / lines, line = begin % lines;
  while (begin < end) {
    int64_t count = lines - line < end - begin ? lines - line : end - begin;
    if (count > most) count = most;
    f(row, line, count);
    begin += count;
    line += count;
    if (line == lines) {
      line = 0;
      ++row;
    }
  }
}

// The sum of f(x) over a line. Four independent sums, so that additions overlap.
template <class T, class F>
SDKERNELS_INLINE Acc<T> sum_line(const T* x, int64_t len, F f) {
  Vec<T> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= len; i += 4 * kLanes) {
    sums[0] += f(load(x + i));
    sums[1] += f(load(x + i + kLanes));
    sums[2] += f(load(x + i + 2 * kLanes));
    sums[3] += f(load(x + i + 3 * kLanes));
  }
  for (; i + kLanes <= len; i += kLanes) sums[0] += f(load(x + i));
  if (i < len) sums[1] += zero_missing(f(load(x + i, len - i)), len - i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class X, class N>
void compact_norm(const CompactNorm& p, int64_t begin, int64_t end) {
  using A = Acc<X>;
  const A* weight = static_cast<const A*>(p.weight);
  const A* bias = static_cast<const A*>(p.bias);
  const A len = static_cast<A>(p.len);
  const int64_t most = lines_at_once<X>(p.len, 4096);
  for_lines(p.lines, begin, end, most, [&](int64_t j, int64_t line, int64_t count) {
    const X* x = at(static_cast<const X*>(p.x), p.x_stride, p.index[j], line);
    const int64_t first = j * p.lines + line;
    A mean[kLinesAtOnce] = {}, rstd[kLinesAtOnce];
    if (p.mean) {
      for (int64_t u = 0; u < count; ++u)
        mean[u] = sum_line(x + u * p.x_stride.line, p.len, [](const Vec<A>& v) { return v; }) / len;
      __builtin_memcpy(static_cast<A*>(p.mean) + first, mean, count * sizeof(A));
    }
    for (int64_t u = 0; u < count; ++u) {
      const A center = mean[u];
      const auto square = [=](const Vec<A>& v)
                              SDKERNELS_INLINE_LAMBDA { return (v - center) * (v - center); };
      const A variance = sum_line(x + u * p.x_stride.line, p.len, square) / len;
      rstd[u] = 1 / std::sqrt(variance + static_cast<A>(p.eps));
    }
    __builtin_memcpy(static_cast<A*>(p.rstd) + first, rstd, count * sizeof(A));
    for (int64_t u = 0; u < count; ++u) {
      const X* from = x + u * p.x_stride.line;
      N* normed = static_cast<N*>(p.normed) + (first + u) * p.len;
      const A center = mean[u], factor = rstd[u];
      const X* next = from + count * p.x_stride.line;
      for_vectors(p.len, [&](int64_t c, auto n) SDKERNELS_INLINE_LAMBDA {
        __builtin_prefetch(next + c, 0, kSecondCache);
        written_soon(normed + c);
        Vec<A> v = (load(from + c, n) - center) * factor;
        if (weight) v = v * load(weight + c, n);
        if (bias) v += load(bias + c, n);
        store(normed + c, v, n);
      });
      if (!p.kept) continue;
      X* kept = static_cast<X*>(p.kept) + (first + u) * p.len;
      if (p.kept_past_caches)
        copy_past_caches(kept, from, p.len);
      else
        copy(kept, from, p.len);
    }
  });
  if (p.kept_past_caches) finish_past_caches();
}

// The backward of `count` lines that follow each other in one kept row.
template <class X, class N>
struct KeptLines {
  const N* d_normed;
  const X* x;
  X* d_x;             // null where it is not wanted
  const X* d_stream;  // or null
  int64_t d_x_line, d_stream_line;
  const Acc<X>* mean;  // or null
  const Acc<X>* rstd;
};

// d_x of each line, and their part of the sums: read and written once for `count` lines. Both null,
// or one of them, where they are not wanted.
template <int64_t count, class X, class N, class A>
SDKERNELS_INLINE void norm_backward_lines(const KeptLines<X, N>& p, int64_t len, const A* weight,
                                          A* d_weight, A* d_bias) {
  A mean[count], rstd[count], mean_d[count] = {}, mean_d_x_hat[count] = {};
  for (int64_t u = 0; u < count; ++u) {
    const N* d_normed = p.d_normed + u * len;
    const X* x = p.x + u * len;
    const A center = mean[u] = p.mean ? p.mean[u] : 0;
    const A factor = rstd[u] = p.rstd[u];
    if (!p.d_x) continue;
    Vec<A> sums = {}, sums_x_hat = {};
    for_vectors(len, [&](int64_t c, auto n) SDKERNELS_INLINE_LAMBDA {
      Vec<A> d_x_hat = load(d_normed + c, n);
      if (weight) d_x_hat = d_x_hat * load(weight + c, n);
      read_soon(d_normed + c);
      read_soon(x + c);
      sums += d_x_hat;
      sums_x_hat += d_x_hat * zero_missing((load(x + c, n) - center) * factor, n);
    });
    mean_d[u] = p.mean ? sum(sums) / static_cast<A>(len) : 0;
    mean_d_x_hat[u] = sum(sums_x_hat) / static_cast<A>(len);
  }
  for_vectors(len, [&](int64_t c, auto n) SDKERNELS_INLINE_LAMBDA {
    Vec<A> gamma, total_weight, total_bias;
    if (weight) gamma = load(weight + c, n);
    if (d_weight) total_weight = load(d_weight + c, n);
    if (d_bias) total_bias = load(d_bias + c, n);
    for (int64_t u = 0; u < count; ++u) {
      Vec<A> d = load(p.d_normed + u * len + c, n);
      const Vec<A> x_hat = (load(p.x + u * len + c, n) - mean[u]) * rstd[u];
      if (d_weight) total_weight += d * x_hat;
      if (d_bias) total_bias += d;
      if (!p.d_x) continue;
      if (weight) d = d * gamma;
      Vec<A> v = (d - mean_d[u] - x_hat * mean_d_x_hat[u]) * rstd[u];
      if (p.d_stream) {
        read_soon(p.d_stream + u * p.d_stream_line + c);
        v += load(p.d_stream + u * p.d_stream_line + c, n);
      }
      written_soon(p.d_x + u * p.d_x_line + c);
      store(p.d_x + u * p.d_x_line + c, v, n);
    }
    if (d_weight) store(d_weight + c, total_weight, n);
    if (d_bias) store(d_bias + c, total_bias, n);
  });
}

template <class X, class N>
void compact_norm_backward(const CompactNormBackward& p, int64_t begin, int64_t end,
                           void* weight_sum, void* bias_sum) {
  using A = Acc<X>;
  const A* weight = static_cast<const A*>(p.weight);
  A* d_weight = static_cast<A*>(weight_sum);
  A* d_bias = static_cast<A*>(bias_sum);
  // Short lines only: several long ones are streams that no processor foresees.
  const int64_t most = lines_at_once<X>(p.len, 1024);
  for_lines(p.lines, begin, end, most, [&](int64_t row, int64_t line, int64_t count) {
    const int64_t slot = p.slot[row];
    X* d_x = p.d_x ? at(static_cast<X*>(p.d_x), p.d_x_stride, row, line) : nullptr;
    const X* d_stream =
        p.d_stream ? at(static_cast<const X*>(p.d_stream), p.d_stream_stride, row, line) : nullptr;
    if (slot < 0) {
      for (int64_t u = 0; d_x && u < count; ++u) {
        X* to = d_x + u * p.d_x_stride.line;
        if (d_stream)
          copy(to, d_stream + u * p.d_stream_stride.line, p.len);
        else
          __builtin_memset(to, 0, p.len * sizeof(X));
      }
      return;
    }
    const int64_t first = slot * p.lines + line;
    KeptLines<X, N> lines{static_cast<const N*>(p.d_normed) + first * p.len,
                          static_cast<const X*>(p.kept) + first * p.len,
                          d_x,
                          d_stream,
                          p.d_x_stride.line,
                          p.d_stream_stride.line,
                          p.mean ? static_cast<const A*>(p.mean) + first : nullptr,
                          static_cast<const A*>(p.rstd) + first};
    static_assert(kLinesAtOnce == 4);
    if (count == 4) {
      norm_backward_lines<4>(lines, p.len, weight, d_weight, d_bias);
      return;
    }
    if (count == 2) {
      norm_backward_lines<2>(lines, p.len, weight, d_weight, d_bias);
      return;
    }
    for (int64_t u = 0; u < count; ++u) {
      norm_backward_lines<1>(lines, p.len, weight, d_weight, d_bias);
      lines.d_normed += p.len;
      lines.x += p.len;
      if (d_x) lines.d_x += p.d_x_stride.line;
      if (d_stream) lines.d_stream += p.d_stream_stride.line;
      if (p.mean) ++lines.mean;
      ++lines.rstd;
    }
  });
}

// Calls f with a null pointer of each dtype's type; all 16-bit and float combinations are
// instantiated, double goes with double only (the callers widen).
template <class F>
auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::bf16:
      return f(static_cast<bf16*>(nullptr));
    case Dtype::f16:
      return f(static_cast<f16*>(nullptr));
    case Dtype::f32:
      break;
    case Dtype::f64:
      break;
  }
  return f(static_cast<float*>(nullptr));
}

ScatterAddKernel find_scatter_add(Dtype y, Dtype residual, Dtype out) {
  if (y == Dtype::f64 || residual == Dtype::f64 || out == Dtype::f64)
    return y == residual && y == out ? scatter_add<double, double, double> : nullptr;
  // y is residual's type (in place, or the wider of the two), or float (out of place).
  return with_dtype(residual, [&](auto* r) {
    return with_dtype(out, [&](auto* o) -> ScatterAddKernel {
      using R = std::remove_pointer_t<decltype(r)>;
      using O = std::remove_pointer_t<decltype(o)>;
      if (y == residual) return scatter_add<R, R, O>;
      return y == Dtype::f32 ? scatter_add<float, R, O> : nullptr;
    });
  });
}

ScatterAddReluKernel find_scatter_add_relu(Dtype y, Dtype residual, Dtype out) {
  if (y == Dtype::f64 || residual == Dtype::f64 || out == Dtype::f64)
    return y == residual && y == out ? scatter_add_relu<double, double, double> : nullptr;
  return with_dtype(residual, [&](auto* r) {
    return with_dtype(out, [&](auto* o) -> ScatterAddReluKernel {
      using R = std::remove_pointer_t<decltype(r)>;
      using O = std::remove_pointer_t<decltype(o)>;
      if (y == residual) return scatter_add_relu<R, R, O>;
      return y == Dtype::f32 ? scatter_add_relu<float, R, O> : nullptr;
    });
  });
}

ScatterAddReluBackwardKernel find_scatter_add_relu_backward(Dtype grad, Dtype out) {
  if (grad == Dtype::f64 || out == Dtype::f64)
    return grad == out ? scatter_add_relu_backward<double, double> : nullptr;
  return with_dtype(grad, [&](auto* g) {
    return with_dtype(out, [&](auto* o) -> ScatterAddReluBackwardKernel {
      return scatter_add_relu_backward<std::remove_pointer_t<decltype(g)>,
                                       std::remove_pointer_t<decltype(o)>>;
    });
  });
}

ScatterAddBackwardKernel find_scatter_add_backward(Dtype grad, Dtype out) {
  if (grad == Dtype::f64 || out == Dtype::f64)
    return grad == out ? scatter_add_backward<double, double> : nullptr;
  return with_dtype(grad, [&](auto* g) {
    return with_dtype(out, [&](auto* o) -> ScatterAddBackwardKernel {
      return scatter_add_backward<std::remove_pointer_t<decltype(g)>,
                                  std::remove_pointer_t<decltype(o)>>;
    });
  });
}

CompactNormKernel find_compact_norm(Dtype x, Dtype normed) {
  if (x == Dtype::f64 || normed == Dtype::f64)
    return x == normed ? compact_norm<double, double> : nullptr;
  return with_dtype(x, [&](auto* a) {
    return with_dtype(normed, [&](auto* b) -> CompactNormKernel {
      return compact_norm<std::remove_pointer_t<decltype(a)>, std::remove_pointer_t<decltype(b)>>;
    });
  });
}

CompactNormBackwardKernel find_compact_norm_backward(Dtype x, Dtype normed) {
  if (x == Dtype::f64 || normed == Dtype::f64)
    return x == normed ? compact_norm_backward<double, double> : nullptr;
  return with_dtype(x, [&](auto* a) {
    return with_dtype(normed, [&](auto* b) -> CompactNormBackwardKernel {
      return compact_norm_backward<std::remove_pointer_t<decltype(a)>,
                                   std::remove_pointer_t<decltype(b)>>;
    });
  });
}

}  // namespace

extern const Kernels table;
const Kernels table = {SDKERNELS_ISA_NAME,    copy_rows,
                       find_scatter_add,      find_scatter_add_backward,
                       find_scatter_add_relu, find_scatter_add_relu_backward,
                       find_compact_norm,     find_compact_norm_backward};

}  // namespace sdkernels::cpu::SDKERNELS_ISA
