// The backward of compact_norm, merged with the stream's gradient.
#include "norm.cuh"

namespace sdkernels::cuda {
namespace {

template <class X>
__device__ __forceinline__ const X* stream_line(const CompactNormBackward& p, int64_t row,
                                                int64_t line) {
  if (!p.d_stream) return nullptr;
  return at(static_cast<const X*>(p.d_stream), p.d_stream_stride, row, line);
}

// rstd * (d_x_hat - mean of d_x_hat - x_hat * mean of d_x_hat * x_hat), plus the stream's gradient.
// For the vector that begins at element first + offset.
template <class X, class N, int W>
__device__ __forceinline__ Vec<X, W> gradient(const CompactNormBackward& p, const Vec<X, W>& x,
                                              const Vec<N, W>& d_normed, Acc<X> mean, Acc<X> rstd,
                                              Acc<X> mean_d, Acc<X> mean_d_x_hat,
                                              const Vec<X, W>& d_stream, int64_t first,
                                              int offset = 0) {
  const auto wide = widen(x);
  auto d = widen(d_normed);
  if (p.weight) {
    const auto weight = load_parameters<W, X, Acc<X>>(p.weight, p.weight_narrow, first, offset);
#pragma unroll
    for (int e = 0; e < W; ++e) d.v[e] *= weight.v[e];
  }
#pragma unroll
  for (int e = 0; e < W; ++e)
    d.v[e] = rstd * (d.v[e] - mean_d - (wide.v[e] - mean) * rstd * mean_d_x_hat);
  if (p.d_stream) {
    const auto passed = widen(d_stream);
#pragma unroll
    for (int e = 0; e < W; ++e) d.v[e] += passed.v[e];
  }
  return narrow<X>(d);
}

// One pass over lines in registers. A thread owns the same columns of every line that its block
// takes, and with kSums adds up their share of d_weight and d_bias in registers too; `sums`
// receives [blocks, 2, len], d_weight's share and then d_bias's, and is null where they are not
// wanted.
template <class X, class N, int W, int kItems, bool kSums>
__global__ void __launch_bounds__(kLineThreads<Acc<X>, W>, 1)
    compact_norm_backward(const CompactNormBackward p, const Divisor lines, Acc<X>* sums) {
  using A = Acc<X>;
  alignas(16) __shared__ A shared[kLineThreads<A, W> * W];
  LineSum<A> line_sum(shared);
  const LineItems<kItems, W> items(p.len);
  const int first = items.first(threadIdx.x);
  const A inverse_len = static_cast<A>(p.inverse_len);
  Vec<A, W> weight_sums[kItems], bias_sums[kItems];
#pragma unroll
  for (int n = 0; n < kItems; ++n) weight_sums[n] = bias_sums[n] = filled<A, W>(0);

  const int64_t all = p.batch * p.lines;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < all;
       i += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = lines.quotient(i);
    const int64_t line = i - row * p.lines;
    const int64_t slot = checked(p.slot[row], -1, p.kept);
    X* const d_x = static_cast<X*>(p.d_x) + i * p.len;
    const X* const d_stream = stream_line<X>(p, row, line);
    // Everything is loaded before anything is stored, behind which no load can move up. Of doubles
    // there are not the registers for it.
    constexpr bool kAhead = sizeof(A) == 4;
    [[maybe_unused]] Vec<X, W> ahead[kItems];
    const auto load_stream = [&](int offset) {
      return d_stream ? load<W>(d_stream + first + offset) : narrow<X>(filled<A, W>(0));
    };
    const auto load_ahead = [&]([[maybe_unused]] int n, [[maybe_unused]] int offset) {
      if constexpr (kAhead) ahead[n] = load_stream(offset);
    };
    const auto stream = [&]([[maybe_unused]] int n, int offset) {
      if constexpr (kAhead)
        return ahead[n];
      else
        return load_stream(offset);
    };
    if (slot < 0) {  // the stream's gradient as it is, or zeros
      if (!p.d_x) continue;
      items.for_each(load_ahead);
      items.for_each([&](int n, int offset) { store(d_x + first + offset, stream(n, offset)); });
      continue;
    }
    const int64_t kept_line = slot * p.lines + line;
    const X* const x = static_cast<const X*>(p.x) + kept_line * p.len;
    const N* const d_normed = static_cast<const N*>(p.d_normed) + kept_line * p.len;
    const A mean = p.mean ? static_cast<const A*>(p.mean)[kept_line] : A(0);
    const A rstd = static_cast<const A*>(p.rstd)[kept_line];
    Vec<X, W> xs[kItems];
    Vec<N, W> ds[kItems];
    items.for_each([&](int n, int offset) {
      xs[n] = load<W>(x + first + offset);
      ds[n] = load<W>(d_normed + first + offset);
      if (p.d_x) load_ahead(n, offset);
    });
    A sum_d = 0, sum_d_x_hat = 0;
    items.for_each([&](int n, int offset) {
      const auto wide = widen(xs[n]);
      const auto d = widen(ds[n]);
      auto weight = filled<A, W>(1);
      if (p.weight) weight = load_parameters<W, X, A>(p.weight, p.weight_narrow, first, offset);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const A x_hat = (wide.v[e] - mean) * rstd;
        weight_sums[n].v[e] += d.v[e] * x_hat;
        bias_sums[n].v[e] += d.v[e];
        sum_d += d.v[e] * weight.v[e];
        sum_d_x_hat += d.v[e] * weight.v[e] * x_hat;
      }
    });
    if (!p.d_x) continue;
    const A mean_d_x_hat = line_sum(sum_d_x_hat) * inverse_len;
    const A mean_d = p.mean ? line_sum(sum_d) * inverse_len : A(0);
    items.for_each([&](int n, int offset) {
      store(d_x + first + offset,
            gradient<X, N, W>(p, xs[n], ds[n], mean, rstd, mean_d, mean_d_x_hat, stream(n, offset),
                              first, offset));
    });
  }
  if (!kSums || !sums) return;

  // The y rows of threads, one vector after the other, through shared memory.
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int width = blockDim.x * W;
  const auto leave = [&](const Vec<A, W>& own, int n, A* partials) {
    __syncthreads();
    share(shared, thread, own);
    __syncthreads();
    for (int c = thread; c < width; c += blockDim.x * blockDim.y) {
      A sum = 0;
      for (int y = 0; y < static_cast<int>(blockDim.y); ++y) sum += shared[y * width + c];
      const int element = items.first(c / W) + items.offset(n) + c % W;
      if (element < p.len) partials[element] = sum;
    }
  };
  A* const weight_partials = sums + static_cast<int64_t>(blockIdx.x) * 2 * p.len;
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    if (n == items.count()) break;
    leave(weight_sums[n], n, weight_partials);
    leave(bias_sums[n], n, weight_partials + p.len);
  }
}

// d_x for lines of any length, one block each.
template <class X, class N, int W>
__global__ void __launch_bounds__(kLongThreads, 1)
    compact_long_norm_backward(const CompactNormBackward p, const Divisor lines) {
  using A = Acc<X>;
  __shared__ A shared[2 * kWarp];
  LineSum<A> line_sum(shared);
  const A inverse_len = static_cast<A>(p.inverse_len);
  const int64_t all = p.batch * p.lines;
  for (int64_t i = blockIdx.x; i < all; i += gridDim.x) {
    const int64_t row = lines.quotient(i);
    const int64_t line = i - row * p.lines;
    const int64_t slot = checked(p.slot[row], -1, p.kept);
    X* const d_x = static_cast<X*>(p.d_x) + i * p.len;
    const X* const d_stream = stream_line<X>(p, row, line);
    const auto passed = [&](int64_t element) {
      return d_stream ? load<W>(d_stream + element) : narrow<X>(filled<A, W>(0));
    };
    if (slot < 0) {
      for_line<W>(p.len, [&](int64_t element) { store(d_x + element, passed(element)); });
      continue;
    }
    const int64_t kept_line = slot * p.lines + line;
    const X* const x = static_cast<const X*>(p.x) + kept_line * p.len;
    const N* const d_normed = static_cast<const N*>(p.d_normed) + kept_line * p.len;
    const A mean = p.mean ? static_cast<const A*>(p.mean)[kept_line] : A(0);
    const A rstd = static_cast<const A*>(p.rstd)[kept_line];
    A sum_d = 0, sum_d_x_hat = 0;
    for_line<W>(p.len, [&](int64_t element) {
      const auto wide = widen(load<W>(x + element));
      const auto d = widen(load<W>(d_normed + element));
      auto weight = filled<A, W>(1);
      if (p.weight) weight = load_parameters<W, X, A>(p.weight, p.weight_narrow, element);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        sum_d += d.v[e] * weight.v[e];
        sum_d_x_hat += d.v[e] * weight.v[e] * (wide.v[e] - mean) * rstd;
      }
    });
    const A mean_d_x_hat = line_sum(sum_d_x_hat) * inverse_len;
    const A mean_d = p.mean ? line_sum(sum_d) * inverse_len : A(0);
    for_line<W>(p.len, [&](int64_t element) {
      store(d_x + element,
            gradient<X, N, W>(p, load<W>(x + element), load<W>(d_normed + element), mean, rstd,
                              mean_d, mean_d_x_hat, passed(element), element));
    });
  }
}

// d_weight and d_bias for long lines: tiles of columns, the kept lines dealt out to `slices`.
struct ColumnTiles {
  int64_t tiles, slices, lines_per_slice;
  Divisor block_tiles;  // block -> slice

  ColumnTiles(int64_t kept_lines, int64_t len, int width)
      : tiles(ceil_div(len, kWarp * width)), block_tiles(tiles) {
    constexpr int64_t kLeastLines = 4, kRows = kThreads / kWarp;
    const int64_t lines = std::max<int64_t>(1, kept_lines);  // of none, one slice of zeros
    slices = std::max<int64_t>(1, std::min(kEnoughBlocks / tiles, lines / (kLeastLines * kRows)));
    lines_per_slice = ceil_div(lines, slices);
    slices = ceil_div(lines, lines_per_slice);
  }
};

template <class X, class N, int W>
__global__ void __launch_bounds__(kThreads, 2)
    sum_columns(const CompactNormBackward p, const ColumnTiles tiles, Acc<X>* sums) {
  using A = Acc<X>;
  alignas(16) __shared__ A shared[2][kThreads * W];
  const int thread = threadIdx.y * kWarp + threadIdx.x;
  for (int64_t block = blockIdx.x; block < tiles.tiles * tiles.slices; block += gridDim.x) {
    const int64_t slice = tiles.block_tiles.quotient(block);
    const int64_t first_column = (block - slice * tiles.tiles) * kWarp * W;
    const int64_t column = first_column + static_cast<int64_t>(threadIdx.x) * W;
    const int64_t last = min(p.kept * p.lines, (slice + 1) * tiles.lines_per_slice);
    auto weight_sum = filled<A, W>(0), bias_sum = weight_sum;
    if (column < p.len) {
#pragma unroll 2
      for (int64_t i = slice * tiles.lines_per_slice + threadIdx.y; i < last; i += blockDim.y) {
        const auto x = widen(load<W>(static_cast<const X*>(p.x) + i * p.len + column));
        const auto d = widen(load<W>(static_cast<const N*>(p.d_normed) + i * p.len + column));
        const A mean = p.mean ? static_cast<const A*>(p.mean)[i] : A(0);
        const A rstd = static_cast<const A*>(p.rstd)[i];
#pragma unroll
        for (int e = 0; e < W; ++e) {
          weight_sum.v[e] += d.v[e] * (x.v[e] - mean) * rstd;
          bias_sum.v[e] += d.v[e];
        }
      }
    }
    share(shared[0], thread, weight_sum);
    share(shared[1], thread, bias_sum);
    __syncthreads();
    for (int c = thread; c < kWarp * W; c += kThreads) {
      A weight = 0, bias = 0;
      for (int y = 0; y < kThreads / kWarp; ++y) {
        weight += shared[0][y * kWarp * W + c];
        bias += shared[1][y * kWarp * W + c];
      }
      if (first_column + c < p.len) {
        A* const partials = sums + slice * 2 * p.len + first_column + c;
        partials[0] = weight;
        partials[p.len] = bias;
      }
    }
    __syncthreads();  // shared is written again by the next block of work
  }
}

// Partial sums [count, 2, len] of both parameters; the total of one that is not wanted is dropped.
template <class A>
SumPartials<A> parameter_sums(const CompactNormBackward& p, const Allocate& allocate,
                              int64_t count) {
  SumPartials<A> sums;
  if (!p.d_weight && !p.d_bias) return sums;
  const auto allocated = [&](int64_t entries) {
    return static_cast<A*>(allocate(entries * static_cast<int64_t>(sizeof(A))));
  };
  sums.partials = allocated(count * 2 * p.len);
  sums.count = count;
  sums.entries = 2 * p.len;
  sums.second_from = p.len;
  sums.first = p.d_weight ? static_cast<A*>(p.d_weight) : allocated(p.len);
  sums.second = p.d_bias ? static_cast<A*>(p.d_bias) : allocated(p.len);
  return sums;
}

// Elements of a line that one thread holds beside their sums, at most. Of 8192 doubles x, d_normed
// and both sums would be 256 KiB: all registers of a multiprocessor.
template <class A, int W>
constexpr int kSummed = kHeld<A, W> / (sizeof(A) == 8 ? 2 : 1);

// d_x of lines that are too long for the sums.
template <class X, class N, int W>
cudaError_t launch_d_x(const CompactNormBackward& p, int64_t all, const Divisor& lines,
                       cudaStream_t stream) {
  using A = Acc<X>;
  if constexpr (kSummed<A, W> < kHeld<A, W>) {
    constexpr int kItems = kHeld<A, W> / W;
    A* const no_sums = nullptr;
    if (p.len <= kLongestHeld)
      return launch(compact_norm_backward<X, N, W, kItems, false>, all,
                    line_threads(p.len / W, kItems, all, kEnoughBlocks), stream, p, lines, no_sums);
  }
  return launch(compact_long_norm_backward<X, N, W>, all, dim3(kLongThreads), stream, p, lines);
}

// d_weight and d_bias from another pass over the kept lines.
template <class X, class N, int W>
cudaError_t launch_sums(const CompactNormBackward& p, const Allocate& allocate,
                        cudaStream_t stream) {
  using A = Acc<X>;
  const ColumnTiles tiles(p.kept * p.lines, p.len, W);
  const auto sums = parameter_sums<A>(p, allocate, tiles.slices);
  const cudaError_t error = launch(sum_columns<X, N, W>, tiles.tiles * tiles.slices,
                                   dim3(kWarp, kThreads / kWarp), stream, p, tiles, sums.partials);
  return error == cudaSuccess ? sums.launch_total(stream) : error;
}

template <class X, class N, int W>
cudaError_t launch_width(const CompactNormBackward& p, const Allocate& allocate,
                         cudaStream_t stream) {
  using A = Acc<X>;
  if constexpr (W > 1) {
    const Stride dense{0, p.len};
    if (!fits(W, p.len,
              {operand<X>(p.d_x, dense, 2), operand<X>(p.d_stream, p.d_stream_stride, p.lines),
               operand<N>(p.d_normed, dense, 2), operand<X>(p.x, dense, 2),
               parameter<X, A>(p.weight, p.weight_narrow)}))
      return launch_width<X, N, W / 2>(p, allocate, stream);
  }
  const int64_t all = p.batch * p.lines;
  const Divisor lines(p.lines);
  const bool wants_sums = p.d_weight || p.d_bias;

  constexpr int kItems = kSummed<A, W> / W;
  if (p.len > kLineThreads<A, W> * kSummed<A, W>) {
    const cudaError_t error = p.d_x ? launch_d_x<X, N, W>(p, all, lines, stream) : cudaSuccess;
    if (!wants_sums || error != cudaSuccess) return error;
    return launch_sums<X, N, W>(p, allocate, stream);
  }

  // Each block leaves two partial sums, where they are wanted: few blocks, of many lines. Small
  // ones, which a multiprocessor needs several of to have enough loads in flight, may be twice as
  // many.
  constexpr int64_t kMostSums = kEnoughBlocks / 2;
  const int64_t least_lines = wants_sums ? 4 : 1;
  const dim3 threads = line_threads(p.len / W, kItems, ceil_div(all, least_lines), kMostSums / 2);
  const int64_t most_sums = threads.x * threads.y < kThreads ? kEnoughBlocks : kMostSums;
  int64_t blocks = ceil_div(all, threads.y * least_lines);
  if (wants_sums) blocks = std::min<int64_t>({blocks, most_sums, SDKERNELS_MOST_BLOCKS});
  const auto sums = parameter_sums<A>(p, allocate, blocks);
  const cudaError_t error = launch(compact_norm_backward<X, N, W, kItems, true>, blocks, threads,
                                   stream, p, lines, sums.partials);
  return error == cudaSuccess ? sums.launch_total(stream) : error;
}

}  // namespace

cudaError_t launch_compact_norm_backward(const CompactNormBackward& p, Dtype x, Dtype normed,
                                         const Allocate& allocate, cudaStream_t stream) {
  return with_dtypes(x, normed, [&](auto* a, auto* b) {
    using X = std::remove_pointer_t<decltype(a)>;
    using N = std::remove_pointer_t<decltype(b)>;
    return launch_width<X, N, kWidest<X, N>>(p, allocate, stream);
  });
}

}  // namespace sdkernels::cuda
