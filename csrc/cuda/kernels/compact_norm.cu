// LayerNorm and RMSNorm of the kept rows, forward.
#include "norm.cuh"

namespace sdkernels::cuda {
namespace {

// For the vector that begins at element first + offset.
template <class X, class N, int W>
__device__ __forceinline__ Vec<N, W> normalized(const CompactNorm& p, const Vec<X, W>& x,
                                                Acc<X> mean, Acc<X> rstd, int64_t first,
                                                int offset = 0) {
  auto values = widen(x);
  const auto load_own = [&](const void* data) {
    return load_parameters<W, X, Acc<X>>(data, p.parameters_narrow, first, offset);
  };
#pragma unroll
  for (int e = 0; e < W; ++e) values.v[e] = (values.v[e] - mean) * rstd;
  if (p.weight) {
    const auto weight = load_own(p.weight);
#pragma unroll
    for (int e = 0; e < W; ++e) values.v[e] *= weight.v[e];
  }
  if (p.bias) {
    const auto bias = load_own(p.bias);
#pragma unroll
    for (int e = 0; e < W; ++e) values.v[e] += bias.v[e];
  }
  return narrow<N>(values);
}

template <class A>
__device__ __forceinline__ void save(const CompactNorm& p, int64_t line, A mean, A rstd) {
  if (threadIdx.x != 0) return;
  if (p.mean) static_cast<A*>(p.mean)[line] = mean;
  static_cast<A*>(p.rstd)[line] = rstd;
}

// Two passes (mean, then squares around it) over a line in registers.
template <class X, class N, int W, int kItems>
__global__ void __launch_bounds__(kLineThreads<Acc<X>, W>, 2 * kThreads / kLineThreads<Acc<X>, W>)
    compact_norm(const CompactNorm p, const Divisor lines) {
  using A = Acc<X>;
  __shared__ A shared[2 * kWarp];
  LineSum<A> line_sum(shared);
  const LineItems<kItems, W> items(p.len);
  const int first = items.first(threadIdx.x);
  const int64_t all = p.kept * p.lines;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < all;
       i += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t j = lines.quotient(i);
    const int64_t row = checked(p.index[j], 0, p.batch);
    const X* const x = at(static_cast<const X*>(p.x), p.x_stride, row, i - j * p.lines);
    Vec<X, W> values[kItems];
    items.for_each([&](int n, int offset) { values[n] = load<W>(x + first + offset); });
    if (p.copy) {
      X* const copy = static_cast<X*>(p.copy) + i * p.len;
      items.for_each([&](int n, int offset) { store(copy + first + offset, values[n]); });
    }
    A mean = 0;
    if (p.mean) {
      A sum = 0;
      items.for_each([&](int n, int) {
        const auto wide = widen(values[n]);
#pragma unroll
        for (int e = 0; e < W; ++e) sum += wide.v[e];
      });
      mean = line_sum(sum) / static_cast<A>(p.len);
    }
    A squares = 0;
    items.for_each([&](int n, int) {
      const auto wide = widen(values[n]);
#pragma unroll
      for (int e = 0; e < W; ++e) squares += (wide.v[e] - mean) * (wide.v[e] - mean);
    });
    const A variance = line_sum(squares) / static_cast<A>(p.len);
    const A rstd = 1 / sqrt(variance + static_cast<A>(p.eps));
    save(p, i, mean, rstd);
    N* const normed = static_cast<N*>(p.normed) + i * p.len;
    items.for_each([&](int n, int offset) {
      store(normed + first + offset, normalized<X, N, W>(p, values[n], mean, rstd, first, offset));
    });
  }
}

// The same for a line of any length, one block each: its later passes find it in the cache.
template <class X, class N, int W>
__global__ void __launch_bounds__(kLongThreads, 1)
    compact_long_norm(const CompactNorm p, const Divisor lines) {
  using A = Acc<X>;
  __shared__ A shared[2 * kWarp];
  LineSum<A> line_sum(shared);
  const int64_t all = p.kept * p.lines;
  for (int64_t i = blockIdx.x; i < all; i += gridDim.x) {
    const int64_t j = lines.quotient(i);
    const int64_t row = checked(p.index[j], 0, p.batch);
    const X* const x = at(static_cast<const X*>(p.x), p.x_stride, row, i - j * p.lines);
    A mean = 0;
    if (p.mean) {
      A sum = 0;
      for_line<W>(p.len, [&](int64_t element) {
        const auto wide = widen(load<W>(x + element));
#pragma unroll
        for (int e = 0; e < W; ++e) sum += wide.v[e];
      });
      mean = line_sum(sum) / static_cast<A>(p.len);
    }
    A squares = 0;
    for_line<W>(p.len, [&](int64_t element) {
      const auto wide = widen(load<W>(x + element));
#pragma unroll
      for (int e = 0; e < W; ++e) squares += (wide.v[e] - mean) * (wide.v[e] - mean);
    });
    const A variance = line_sum(squares) / static_cast<A>(p.len);
    const A rstd = 1 / sqrt(variance + static_cast<A>(p.eps));
    save(p, i, mean, rstd);
    X* const copy = static_cast<X*>(p.copy) + i * p.len;
    N* const normed = static_cast<N*>(p.normed) + i * p.len;
    for_line<W>(p.len, [&](int64_t element) {
      const auto values = load<W>(x + element);
      if (p.copy) store(copy + element, values);
      store(normed + element, normalized<X, N, W>(p, values, mean, rstd, element));
    });
  }
}

template <class X, class N, int W>
cudaError_t launch_width(const CompactNorm& p, cudaStream_t stream) {
  using A = Acc<X>;
  if constexpr (W > 1) {
    const Stride dense{0, p.len};
    if (!fits(W, p.len,
              {operand<N>(p.normed, dense, 2), operand<X>(p.copy, dense, 2),
               operand<X>(p.x, p.x_stride, p.lines), parameter<X, A>(p.weight, p.parameters_narrow),
               parameter<X, A>(p.bias, p.parameters_narrow)}))
      return launch_width<X, N, W / 2>(p, stream);
  }
  constexpr int kItems = kHeld<A, W> / W;
  const int64_t all = p.kept * p.lines;
  const Divisor lines(p.lines);
  if (p.len > kLongestHeld)
    return launch(compact_long_norm<X, N, W>, all, dim3(kLongThreads), stream, p, lines);
  const dim3 threads = line_threads(p.len / W, kItems, all, kEnoughBlocks);
  return launch(compact_norm<X, N, W, kItems>, ceil_div(all, threads.y), threads, stream, p, lines);
}

}  // namespace

cudaError_t launch_compact_norm(const CompactNorm& p, Dtype x, Dtype normed, cudaStream_t stream) {
  return with_dtypes(x, normed, [&](auto* a, auto* b) {
    using X = std::remove_pointer_t<decltype(a)>;
    using N = std::remove_pointer_t<decltype(b)>;
    return launch_width<X, N, kWidest<X, N>>(p, stream);
  });
}

}  // namespace sdkernels::cuda
