// scatter_add_rows with a ReLU behind it, and its backward: for that the ReLU leaves one bit of
// each element.
#include "launch.cuh"

namespace sdkernels::cuda {
namespace {

constexpr int kUnroll = 2;

// Threads of N elements each whose bits make one byte. Their vectors are neighbours in a row, and
// they are an aligned piece of a warp.
template <int N>
constexpr int kThreadsOfByte = 8 / N;

// What a ReLU lets pass: positive numbers, and NaN.
template <class A>
__device__ __forceinline__ bool passes(A value) {
  return !(value <= 0);
}

// The bits of the threads that share a byte, in each of them. All lanes of a warp take part: with
// masks of their own, the groups would go through here one after the other.
template <int N>
__device__ __forceinline__ uint8_t gathered(unsigned bits) {
  bits <<= threadIdx.x % kThreadsOfByte<N> * N;
#pragma unroll
  for (int offset = 1; offset < kThreadsOfByte<N>; offset *= 2)
    bits |= __shfl_xor_sync(~0u, bits, offset);
  return static_cast<uint8_t>(bits);
}

template <class Y, class R, class O, int N>
__global__ void __launch_bounds__(kThreads, 2)
    scatter_add_relu(const ScatterAddRelu p, const RowTiles tiles) {
  using A = Acc<Y>;
  const A* const layer_scale = static_cast<const A*>(p.layer_scale);
  const int64_t bytes = (p.len + 7) / 8;  // of bits, in a row
  for (int64_t block = blockIdx.x; block < tiles.blocks; block += gridDim.x) {
    const int64_t group = tiles.chunks.quotient(block);
    const int64_t row = group * blockDim.y + threadIdx.y;
    const int64_t first =
        (block - group * tiles.chunks.value()) * kUnroll * blockDim.x + threadIdx.x;
    // Threads behind the last row have no vector, but take part in the shuffles of their warp.
    const int64_t vectors = row < tiles.rows ? tiles.vectors : 0;
    const int64_t slot = row < tiles.rows ? checked(p.slot[row], -1, p.kept) : -1;
    A factor = static_cast<A>(p.scale);
    if (slot >= 0 && p.row_weight) factor *= static_cast<const A*>(p.row_weight)[slot];

    // Everything is loaded before anything is stored: independent accesses in flight.
    Vec<R, N> residual[kUnroll];
    Vec<O, N> out[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = first + u * blockDim.x;
      if (vector >= vectors) break;
      residual[u] = load<N>(static_cast<const R*>(p.residual) + row * p.residual_row + vector * N);
      if (slot >= 0) out[u] = load<N>(static_cast<const O*>(p.out) + slot * p.out_row + vector * N);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = first + u * blockDim.x;
      unsigned bits = 0;
      if (vector < vectors) {
        auto sum = widen(residual[u]);
        if (slot >= 0) {
          const auto added = widen(out[u]);
          if (layer_scale) {
            const auto gamma = load<N>(layer_scale + vector * N);
#pragma unroll
            for (int e = 0; e < N; ++e) sum.v[e] += factor * gamma.v[e] * added.v[e];
          } else {
#pragma unroll
            for (int e = 0; e < N; ++e) sum.v[e] += factor * added.v[e];
          }
        }
        auto y = narrow<Y>(sum);
        if constexpr (std::is_same_v<Y, R>) {
          if (slot < 0) y = residual[u];  // the bits of a dropped row, NaN payloads included
        }
        // Of what is stored: a positive sum may have been rounded to zero.
        const auto rounded = widen(y);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (passes(rounded.v[e]))
            bits |= 1u << e;
          else
            y.v[e] = Y{};
        }
        store(static_cast<Y*>(p.y) + row * p.len + vector * N, y);
      }
      const uint8_t byte = gathered<N>(bits);
      // The first thread of a byte has elements where any of them has.
      if (vector < vectors && threadIdx.x % kThreadsOfByte<N> == 0)
        p.positive[row * bytes + vector / kThreadsOfByte<N>] = byte;
    }
  }
}

template <class G, class O, int N>
__global__ void __launch_bounds__(kThreads, 2)
    scatter_add_relu_backward(const ScatterAddReluBackward p, const RowTiles tiles) {
  using A = Acc<G>;
  const A* const layer_scale = static_cast<const A*>(p.layer_scale);
  const int64_t bytes = (p.len + 7) / 8;  // of bits, in a row
  for (int64_t block = blockIdx.x; block < tiles.blocks; block += gridDim.x) {
    const int64_t group = tiles.chunks.quotient(block);
    const int64_t row = group * blockDim.y + threadIdx.y;
    if (row >= tiles.rows) continue;
    const int64_t first =
        (block - group * tiles.chunks.value()) * kUnroll * blockDim.x + threadIdx.x;
    const int64_t slot = p.d_out ? checked(p.slot[row], -1, p.kept) : -1;
    A factor = static_cast<A>(p.scale);
    if (slot >= 0 && p.row_weight) factor *= static_cast<const A*>(p.row_weight)[slot];
    Vec<G, N> grad[kUnroll];
    unsigned bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = first + u * blockDim.x;
      if (vector >= tiles.vectors) break;
      grad[u] = load<N>(static_cast<const G*>(p.grad) + row * p.len + vector * N);
      bits[u] = p.positive[row * bytes + vector / kThreadsOfByte<N>];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = first + u * blockDim.x;
      if (vector >= tiles.vectors) break;
      const unsigned own = bits[u] >> vector % kThreadsOfByte<N> * N;
      auto d_residual = grad[u];
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (!(own >> e & 1)) d_residual.v[e] = G{};
      store(static_cast<G*>(p.d_residual) + row * p.len + vector * N, d_residual);
      if (slot < 0) continue;
      auto d_out = widen(d_residual);
      if (layer_scale) {
        const auto gamma = load<N>(layer_scale + vector * N);
#pragma unroll
        for (int e = 0; e < N; ++e) d_out.v[e] *= factor * gamma.v[e];
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e) d_out.v[e] *= factor;
      }
      store(static_cast<O*>(p.d_out) + slot * p.len + vector * N, narrow<O>(d_out));
    }
  }
}

template <class Y, class R, class O, int N>
cudaError_t launch_forward(const ScatterAddRelu& p, cudaStream_t stream) {
  if constexpr (N > 1) {
    if (!fits(N, p.len,
              {operand<Y>(p.y, {p.len}, 1), operand<R>(p.residual, {p.residual_row}, 1),
               operand<O>(p.out, {p.out_row}, 1), operand<Acc<Y>>(p.layer_scale, {}, 1)}))
      return launch_forward<Y, R, O, N / 2>(p, stream);
  }
  const RowTiles tiles(p.batch, 1, p.len / N, kUnroll, kThreadsOfByte<N>);
  return launch(scatter_add_relu<Y, R, O, N>, tiles.blocks, dim3(tiles.x, tiles.y), stream, p,
                tiles);
}

template <class G, class O, int N>
cudaError_t launch_backward(const ScatterAddReluBackward& p, cudaStream_t stream) {
  if constexpr (N > 1) {
    if (!fits(N, p.len,
              {operand<G>(p.d_residual, {p.len}, 1), operand<O>(p.d_out, {p.len}, 1),
               operand<G>(p.grad, {p.len}, 1), operand<Acc<G>>(p.layer_scale, {}, 1)}))
      return launch_backward<G, O, N / 2>(p, stream);
  }
  const RowTiles tiles(p.batch, 1, p.len / N, kUnroll);
  return launch(scatter_add_relu_backward<G, O, N>, tiles.blocks, dim3(tiles.x, tiles.y), stream, p,
                tiles);
}

}  // namespace

cudaError_t launch_scatter_add_relu(const ScatterAddRelu& p, Dtype y, Dtype residual, Dtype out,
                                    cudaStream_t stream) {
  return with_dtypes(residual, out, [&](auto* r, auto* o) {
    using R = std::remove_pointer_t<decltype(r)>;
    using O = std::remove_pointer_t<decltype(o)>;
    // In the wider of the two types, or widened by layer_scale.
    if constexpr (sizeof(R) >= sizeof(O)) {
      if (y == residual) return launch_forward<R, R, O, kWidest<R, O>>(p, stream);
    }
    if constexpr (sizeof(R) == 2) {
      if (y == Dtype::f32) return launch_forward<float, R, O, kWidest<float>>(p, stream);
    }
    return cudaErrorInvalidValue;
  });
}

cudaError_t launch_scatter_add_relu_backward(const ScatterAddReluBackward& p, Dtype grad, Dtype out,
                                             cudaStream_t stream) {
  return with_dtypes(grad, out, [&](auto* g, auto* o) {
    using G = std::remove_pointer_t<decltype(g)>;
    using O = std::remove_pointer_t<decltype(o)>;
    return launch_backward<G, O, kWidest<G, O>>(p, stream);
  });
}

}  // namespace sdkernels::cuda
