// The backward of scatter_add_rows: d_out, and in the same pass the sums for layer_scale and
// row_weight.
#include "launch.cuh"
#include "sum_partials.cuh"

namespace sdkernels::cuda {
namespace {

// ---- d_out alone --------------------------------------------------------------------------------

// As in scatter_add.cu.
template <int N>
constexpr int kUnroll = N == 8 ? 4 : 2;

template <class G, class O, int N>
__global__ void __launch_bounds__(kThreads, 2)
    scale_rows(const ScatterAddBackward p, const RowTiles tiles) {
  using A = Acc<G>;
  for (int64_t block = blockIdx.x; block < tiles.blocks; block += gridDim.x) {
    const int64_t group = tiles.chunks.quotient(block);
    const int64_t j = group * blockDim.y + threadIdx.y;
    if (j >= tiles.rows) continue;
    const int64_t first =
        (block - group * tiles.chunks.value()) * kUnroll<N> * blockDim.x + threadIdx.x;
    const int64_t row = checked(p.index[j], 0, p.batch);
    A factor = static_cast<A>(p.scale);
    if (p.row_weight) factor *= static_cast<const A*>(p.row_weight)[j];
    Vec<G, N> grad[kUnroll<N>];
    int64_t lines[kUnroll<N>], elements[kUnroll<N>];
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      const int64_t vector = first + u * blockDim.x;
      if (vector >= tiles.vectors) break;
      lines[u] = tiles.per_line.quotient(vector);
      elements[u] = (vector - lines[u] * tiles.per_line.value()) * N;
      grad[u] =
          load<N>(at(static_cast<const G*>(p.grad), p.grad_stride, row, lines[u]) + elements[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      if (first + u * blockDim.x >= tiles.vectors) break;
      auto d_out = widen(grad[u]);
      const int64_t gamma_line = lines[u] * p.layer_scale_line;
      if (p.layer_scale && p.layer_scale_element) {
        const auto gamma =
            load_parameters<N, G, A>(p.layer_scale, p.layer_scale_narrow, gamma_line + elements[u]);
#pragma unroll
        for (int e = 0; e < N; ++e) d_out.v[e] *= factor * gamma.v[e];
      } else {
        A all = factor;
        if (p.layer_scale)
          all *= load_parameter<G, A>(p.layer_scale, p.layer_scale_narrow, gamma_line);
#pragma unroll
        for (int e = 0; e < N; ++e) d_out.v[e] *= all;
      }
      store(at(static_cast<O*>(p.d_out), p.d_out_stride, j, lines[u]) + elements[u],
            narrow<O>(d_out));
    }
  }
}

// ---- with the sums ------------------------------------------------------------------------------
// A block has y x x threads. Its x threads hold a tile of a line, one vector each, so that gamma
// stays in registers; its y rows of threads walk the lines. The lines of a row that share a gamma
// (all of them, or one where gamma varies from line to line) are dealt out to `parts` items, and
// the items of all rows to `slices` blocks of each tile. A block leaves one partial sum for each
// element of its tile (or one in all, where gamma does not vary along a line), a row of threads one
// for each of its items.

struct SumTiles {
  int64_t tiles, slices, parts, items, items_per_slice, blocks;
  int64_t lines;        // of a row that share a gamma
  Divisor line_tiles;   // tile -> line, where gamma varies from line to line
  Divisor items_parts;  // item -> row
  Divisor block_tiles;  // block -> slice
  int x, y;

  SumTiles(const ScatterAddBackward& p, int width) : lines(p.layer_scale_line ? 1 : p.lines) {
    const int64_t vectors = p.len / width;
    x = power_of_two(vectors, kWarp);
    y = kThreads / x;
    const int64_t tiles_of_line = ceil_div(vectors, x);
    tiles = tiles_of_line * (p.layer_scale_line ? p.lines : 1);
    // Every row of threads adds up some lines before it leaves partial sums, which are read again.
    constexpr int64_t kLeastLines = 4;
    const int64_t work = p.kept * lines;
    const auto count = [&] {
      return std::max<int64_t>(1, std::min(kEnoughBlocks / tiles, work / (kLeastLines * y)));
    };
    // Little work: smaller blocks, for more of them.
    while (tiles * count() < kEnoughBlocks / 4 && x * y > 2 * kWarp) y /= 2;
    slices = count();
    parts = std::min(lines, ceil_div(slices * y, p.kept));
    items = p.kept * parts;
    items_per_slice = ceil_div(items, slices);
    slices = ceil_div(items, items_per_slice);
    blocks = tiles * slices;
    line_tiles = Divisor(tiles_of_line);
    items_parts = Divisor(parts);
    block_tiles = Divisor(tiles);
  }
};

template <class G, class O, int N>
__global__ void __launch_bounds__(kThreads, 2)
    scale_rows_and_sum(const ScatterAddBackward p, const SumTiles tiles, Acc<G>* layer_scale_sums,
                       Acc<G>* row_weight_sums) {
  using A = Acc<G>;
  constexpr int kSumUnroll = N == 4 ? 4 : 2;
  alignas(16) __shared__ A shared[kThreads * N];
  const A scale = static_cast<A>(p.scale);
  const A* const row_weight = static_cast<const A*>(p.row_weight);
  const int threads = blockDim.x * blockDim.y;  // two warps at least
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int64_t block = blockIdx.x; block < tiles.blocks; block += gridDim.x) {
    const int64_t slice = tiles.block_tiles.quotient(block);
    const int64_t tile = block - slice * tiles.tiles;
    const int64_t own_line = tiles.line_tiles.quotient(tile);  // 0 where all lines share a gamma
    const int64_t line_tile = tile - own_line * tiles.line_tiles.value();
    const int64_t element = (line_tile * blockDim.x + threadIdx.x) * N;
    const bool active = element < p.len;
    const int64_t gamma_offset = own_line * p.layer_scale_line;

    Vec<A, N> gamma = filled<A, N>(1);
    if (p.layer_scale && active) {
      const bool narrow = p.layer_scale_narrow;
      gamma = p.layer_scale_element
                  ? load_parameters<N, G, A>(p.layer_scale, narrow, gamma_offset + element)
                  : filled<A, N>(load_parameter<G, A>(p.layer_scale, narrow, gamma_offset));
    }

    Vec<A, N> total = filled<A, N>(0);
    const int64_t last = min(tiles.items, (slice + 1) * tiles.items_per_slice);
    for (int64_t item = slice * tiles.items_per_slice + threadIdx.y; item < last;
         item += blockDim.y) {
      const int64_t j = tiles.items_parts.quotient(item);
      const int64_t part = item - j * tiles.parts;
      const int64_t row = checked(p.index[j], 0, p.batch);
      const A weight = row_weight ? row_weight[j] : A(1);
      const G* const grads = static_cast<const G*>(p.grad) + row * p.grad_stride.row + element;
      const O* const outs = static_cast<const O*>(p.out) + j * p.out_stride.row + element;
      O* const d_outs = static_cast<O*>(p.d_out) + j * p.d_out_stride.row + element;
      Vec<A, N> sum = filled<A, N>(0);
      for (int64_t l = part; l < tiles.lines; l += tiles.parts * kSumUnroll) {
        Vec<G, N> grad[kSumUnroll];
        Vec<O, N> out[kSumUnroll];
#pragma unroll
        for (int u = 0; u < kSumUnroll; ++u) {
          const int64_t line = own_line + l + u * tiles.parts;
          if (!active || l + u * tiles.parts >= tiles.lines) break;
          grad[u] = load<N>(grads + line * p.grad_stride.line);
          out[u] = load<N>(outs + line * p.out_stride.line);
        }
#pragma unroll
        for (int u = 0; u < kSumUnroll; ++u) {
          const int64_t line = own_line + l + u * tiles.parts;
          if (!active || l + u * tiles.parts >= tiles.lines) break;
          const auto g = widen(grad[u]);
          const auto o = widen(out[u]);
          Vec<A, N> d_out;
#pragma unroll
          for (int e = 0; e < N; ++e) {
            sum.v[e] += g.v[e] * o.v[e];
            d_out.v[e] = scale * weight * gamma.v[e] * g.v[e];
          }
          store(d_outs + line * p.d_out_stride.line, narrow<O>(d_out));
        }
      }
      A of_row = 0;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (active) total.v[e] += weight * sum.v[e];  // 0 * inf would be NaN
        of_row += gamma.v[e] * sum.v[e];
      }
      if (row_weight_sums) {
        // The x threads of an item, a whole warp or an aligned piece of one.
        of_row = sum_of_group(of_row, blockDim.x, thread);
        if (threadIdx.x == 0)
          row_weight_sums[(tile * tiles.parts + part) * p.kept + j] = scale * of_row;
      }
    }
    if (!layer_scale_sums) continue;

    if (p.layer_scale_element) {
      share(shared, thread, total);
      __syncthreads();
      const int width = blockDim.x * N;
      for (int c = thread; c < width; c += threads) {
        A sum = 0;
        for (int y = 0; y < static_cast<int>(blockDim.y); ++y) sum += shared[y * width + c];
        const int64_t column = line_tile * width + c;
        if (column < p.len)
          layer_scale_sums[slice * p.layer_scale_size + gamma_offset + column] = scale * sum;
      }
    } else {
      A sum = 0;
#pragma unroll
      for (int e = 0; e < N; ++e) sum += total.v[e];
      sum = sum_of_group(sum, kWarp, thread);
      if (thread % kWarp == 0) shared[thread / kWarp] = sum;
      __syncthreads();
      if (thread == 0) {
        sum = 0;
        for (int warp = 0; warp < threads / kWarp; ++warp) sum += shared[warp];
        layer_scale_sums[(slice * tiles.line_tiles.value() + line_tile) * p.layer_scale_size +
                         gamma_offset] = scale * sum;
      }
    }
    __syncthreads();  // shared is written again by the next block of work
  }
}

template <class G, class O, int N>
cudaError_t launch_sums(const ScatterAddBackward& p, const Allocate& allocate,
                        cudaStream_t stream) {
  using A = Acc<G>;
  const SumTiles tiles(p, N);
  const int64_t layer_scale_count =
      tiles.slices * (p.layer_scale_element ? 1 : tiles.line_tiles.value());
  const int64_t row_weight_count = tiles.tiles * tiles.parts;
  SumPartials<A> layer_scale_sums, row_weight_sums;
  if (p.d_layer_scale)
    layer_scale_sums =
        SumPartials<A>(allocate, layer_scale_count, p.layer_scale_size, p.d_layer_scale);
  if (p.d_row_weight)
    row_weight_sums = SumPartials<A>(allocate, row_weight_count, p.kept, p.d_row_weight);
  cudaError_t error = launch(scale_rows_and_sum<G, O, N>, tiles.blocks, dim3(tiles.x, tiles.y),
                             stream, p, tiles, layer_scale_sums.partials, row_weight_sums.partials);
  if (error == cudaSuccess) error = layer_scale_sums.launch_total(stream);
  if (error == cudaSuccess) error = row_weight_sums.launch_total(stream);
  return error;
}

template <class G, class O, int N>
cudaError_t launch_width(const ScatterAddBackward& p, const Allocate& allocate,
                         cudaStream_t stream) {
  if constexpr (N > 1) {
    if (!fits(N, p.len,
              {operand<O>(p.d_out, p.d_out_stride, p.lines),
               operand<G>(p.grad, p.grad_stride, p.lines), operand<O>(p.out, p.out_stride, p.lines),
               parameter<G, Acc<G>>(p.layer_scale_element ? p.layer_scale : nullptr,
                                    p.layer_scale_narrow, p.layer_scale_line)}))
      return launch_width<G, O, N / 2>(p, allocate, stream);
  }
  // Of eight elements, gamma and the sums would leave registers for one block of 256 threads only.
  if (p.out) return launch_sums<G, O, std::min(N, 4)>(p, allocate, stream);
  const RowTiles tiles(p.kept, p.lines, p.len / N, kUnroll<N>);
  return launch(scale_rows<G, O, N>, tiles.blocks, dim3(tiles.x, tiles.y), stream, p, tiles);
}

}  // namespace

cudaError_t launch_scatter_add_backward(const ScatterAddBackward& p, Dtype grad, Dtype out,
                                        const Allocate& allocate, cudaStream_t stream) {
  return with_dtypes(grad, out, [&](auto* g, auto* o) {
    using G = std::remove_pointer_t<decltype(g)>;
    using O = std::remove_pointer_t<decltype(o)>;
    return launch_width<G, O, kWidest<G, O>>(p, allocate, stream);
  });
}

}  // namespace sdkernels::cuda
