// scatter_add_rows, out of place and in place.
#include "launch.cuh"

namespace sdkernels::cuda {
namespace {

// Vectors of each tensor that a thread has in flight. A dropped row has no other load to hide the
// latency of memory with; where vectors are shorter, more blocks fit on a multiprocessor instead.
template <int N>
constexpr int kUnroll = N == 8 ? 4 : 2;

template <class Y, class R, class O, int N>
__global__ void __launch_bounds__(kThreads, 2)
    scatter_add(const ScatterAdd p, const RowTiles tiles) {
  using A = Acc<Y>;
  for (int64_t block = blockIdx.x; block < tiles.blocks; block += gridDim.x) {
    const int64_t group = tiles.chunks.quotient(block);
    const int64_t i = group * blockDim.y + threadIdx.y;
    if (i >= tiles.rows) continue;
    const int64_t first =
        (block - group * tiles.chunks.value()) * kUnroll<N> * blockDim.x + threadIdx.x;
    const int64_t row = p.index ? checked(p.index[i], 0, p.batch) : i;
    const int64_t slot = p.index ? i : checked(p.slot[i], -1, p.kept);
    A factor = static_cast<A>(p.scale);
    if (slot >= 0 && p.row_weight) factor *= static_cast<const A*>(p.row_weight)[slot];

    // Everything is loaded before anything is stored: independent accesses in flight.
    Vec<R, N> residual[kUnroll<N>];
    Vec<O, N> out[kUnroll<N>];
    int64_t lines[kUnroll<N>], elements[kUnroll<N>];
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      const int64_t vector = first + u * blockDim.x;
      if (vector >= tiles.vectors) break;
      lines[u] = tiles.per_line.quotient(vector);
      elements[u] = (vector - lines[u] * tiles.per_line.value()) * N;
      residual[u] = load<N>(
          at(static_cast<const R*>(p.residual), p.residual_stride, row, lines[u]) + elements[u]);
      if (slot >= 0)
        out[u] =
            load<N>(at(static_cast<const O*>(p.out), p.out_stride, slot, lines[u]) + elements[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      if (first + u * blockDim.x >= tiles.vectors) break;
      Y* const y = at(static_cast<Y*>(p.y), p.y_stride, row, lines[u]) + elements[u];
      if constexpr (std::is_same_v<Y, R>) {
        if (slot < 0) {  // the bits of a dropped row, NaN payloads included
          store(y, residual[u]);
          continue;
        }
      }
      auto sum = widen(residual[u]);
      if (slot >= 0) {
        const auto added = widen(out[u]);
        const int64_t gamma_line = lines[u] * p.layer_scale_line;
        if (p.layer_scale && p.layer_scale_element) {
          const auto gamma = load_parameters<N, R, A>(p.layer_scale, p.layer_scale_narrow,
                                                      gamma_line + elements[u]);
#pragma unroll
          for (int e = 0; e < N; ++e) sum.v[e] += factor * gamma.v[e] * added.v[e];
        } else {
          A all = factor;
          if (p.layer_scale)
            all *= load_parameter<R, A>(p.layer_scale, p.layer_scale_narrow, gamma_line);
#pragma unroll
          for (int e = 0; e < N; ++e) sum.v[e] += all * added.v[e];
        }
      }
      store(y, narrow<Y>(sum));
    }
  }
}

template <class Y, class R, class O, int N>
cudaError_t launch_width(const ScatterAdd& p, cudaStream_t stream) {
  if constexpr (N > 1) {
    if (!fits(N, p.len,
              {operand<Y>(p.y, p.y_stride, p.lines),
               operand<R>(p.residual, p.residual_stride, p.lines),
               operand<O>(p.out, p.out_stride, p.lines),
               parameter<R, Acc<Y>>(p.layer_scale_element ? p.layer_scale : nullptr,
                                    p.layer_scale_narrow, p.layer_scale_line)}))
      return launch_width<Y, R, O, N / 2>(p, stream);
  }
  const RowTiles tiles(p.index ? p.kept : p.batch, p.lines, p.len / N, kUnroll<N>);
  return launch(scatter_add<Y, R, O, N>, tiles.blocks, dim3(tiles.x, tiles.y), stream, p, tiles);
}

}  // namespace

cudaError_t launch_scatter_add(const ScatterAdd& p, Dtype y, Dtype residual, Dtype out,
                               cudaStream_t stream) {
  return with_dtypes(residual, out, [&](auto* r, auto* o) {
    using R = std::remove_pointer_t<decltype(r)>;
    using O = std::remove_pointer_t<decltype(o)>;
    // In residual's type (in place, or the wider of the two), or widened by layer_scale.
    if (y == residual) return launch_width<R, R, O, kWidest<R, O>>(p, stream);
    if constexpr (sizeof(R) == 2) {
      if (y == Dtype::f32) return launch_width<float, R, O, kWidest<float>>(p, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace sdkernels::cuda
