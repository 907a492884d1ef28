// Rows copied through a map, for compact_rows, expand_rows and scatter_rows: bytes, whatever the
// dtype.
#include "launch.cuh"

namespace sdkernels::cuda {
namespace {

constexpr int kUnroll = 4;

template <class T, int N, Through kThrough>
__global__ void __launch_bounds__(kThreads, 2) copy_rows(const CopyRows p, const RowTiles tiles) {
  constexpr int64_t kBytes = N * sizeof(T);
  for (int64_t block = blockIdx.x; block < tiles.blocks; block += gridDim.x) {
    const int64_t group = tiles.chunks.quotient(block);
    const int64_t row = group * blockDim.y + threadIdx.y;
    if (row >= tiles.rows) continue;
    const int64_t first =
        (block - group * tiles.chunks.value()) * kUnroll * blockDim.x + threadIdx.x;
    constexpr bool kAlways = kThrough == Through::gather || kThrough == Through::scatter;
    const int64_t mapped = checked(p.map[row], kAlways ? 0 : -1, p.mapped);
    const int64_t source = kThrough == Through::scatter ? row : mapped;
    const int64_t target = kThrough == Through::scatter ? mapped : row;
    const bool on_base = kThrough == Through::gather_or_base && source < 0;
    const char* const x = static_cast<const char*>(on_base ? p.base : p.x);
    const Stride x_stride = on_base ? p.base_stride : p.x_stride;
    const int64_t x_row = on_base ? row : source;
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
      if (kThrough != Through::gather_or_zero || x_row >= 0)
        words[u] = load<N>(reinterpret_cast<const T*>(at(x, x_stride, x_row, line) + element));
    }
    char* const y = static_cast<char*>(p.y) + target * p.y_stride.row;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * blockDim.x >= tiles.vectors) break;
      store(reinterpret_cast<T*>(y + offsets[u]), words[u]);
    }
  }
}

template <class T, int N>
bool try_words(const CopyRows& p, Through through, cudaStream_t stream, cudaError_t& error) {
  constexpr int kBytes = N * sizeof(T);
  if (!fits(kBytes, p.len,
            {operand<char>(p.y, p.y_stride, p.lines), operand<char>(p.x, p.x_stride, p.lines),
             operand<char>(p.base, p.base_stride, p.lines)}))
    return false;
  const RowTiles tiles(p.rows, p.lines, p.len / kBytes, kUnroll);
  const auto kernel =
      through == Through::gather           ? copy_rows<T, N, Through::gather>
      : through == Through::gather_or_zero ? copy_rows<T, N, Through::gather_or_zero>
      : through == Through::gather_or_base ? copy_rows<T, N, Through::gather_or_base>
                                           : copy_rows<T, N, Through::scatter>;
  error = launch(kernel, tiles.blocks, dim3(tiles.x, tiles.y), stream, p, tiles);
  return true;
}

}  // namespace

cudaError_t launch_copy_rows(const CopyRows& p, Through through, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  try_words<uint32_t, 4>(p, through, stream, error) ||
      try_words<uint32_t, 2>(p, through, stream, error) ||
      try_words<uint32_t, 1>(p, through, stream, error) ||
      try_words<uint16_t, 1>(p, through, stream, error) ||
      try_words<uint8_t, 1>(p, through, stream, error);
  return error;
}

}  // namespace sdkernels::cuda
