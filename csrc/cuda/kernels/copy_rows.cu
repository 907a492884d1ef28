// Rows copied through a map, for compact_rows and expand_rows: bytes, whatever the dtype.
#include "launch.cuh"

namespace sdkernels::cuda {
namespace {

constexpr int kUnroll = 4;

template <class T, int N>
__global__ void __launch_bounds__(kThreads, 2) copy_rows(const CopyRows p, const RowTiles tiles) {
  constexpr int64_t kBytes = N * sizeof(T);
  for (int64_t block = blockIdx.x; block < tiles.blocks; block += gridDim.x) {
    const int64_t group = tiles.chunks.quotient(block);
    const int64_t row = group * blockDim.y + threadIdx.y;
    if (row >= tiles.rows) continue;
    const int64_t first =
        (block - group * tiles.chunks.value()) * kUnroll * blockDim.x + threadIdx.x;
    const int64_t source = checked(p.map[row], p.zeros_allowed ? -1 : 0, p.x_rows);
    Vec<T, N> words[kUnroll];
    int64_t offsets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = first + u * blockDim.x;
      if (vector >= tiles.vectors) break;
      const int64_t line = tiles.per_line.quotient(vector);
      const int64_t element = (vector - line * tiles.per_line.value()) * kBytes;
      offsets[u] = line * p.y_stride.line + element;
      words[u] = filled<T, N>(0);
      if (source >= 0)
        words[u] = load<N>(reinterpret_cast<const T*>(
            at(static_cast<const char*>(p.x), p.x_stride, source, line) + element));
    }
    char* const y = static_cast<char*>(p.y) + row * p.y_stride.row;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * blockDim.x >= tiles.vectors) break;
      store(reinterpret_cast<T*>(y + offsets[u]), words[u]);
    }
  }
}

template <class T, int N>
bool try_words(const CopyRows& p, cudaStream_t stream, cudaError_t& error) {
  constexpr int kBytes = N * sizeof(T);
  if (!fits(kBytes, p.len,
            {operand<char>(p.y, p.y_stride, p.lines), operand<char>(p.x, p.x_stride, p.lines)}))
    return false;
  const RowTiles tiles(p.rows, p.lines, p.len / kBytes, kUnroll);
  error = launch(copy_rows<T, N>, tiles.blocks, dim3(tiles.x, tiles.y), stream, p, tiles);
  return true;
}

}  // namespace

cudaError_t launch_copy_rows(const CopyRows& p, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  try_words<uint32_t, 4>(p, stream, error) || try_words<uint32_t, 2>(p, stream, error) ||
      try_words<uint32_t, 1>(p, stream, error) || try_words<uint16_t, 1>(p, stream, error) ||
      try_words<uint8_t, 1>(p, stream, error);
  return error;
}

}  // namespace sdkernels::cuda
