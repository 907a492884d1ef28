// A mask to the numbers of its true entries and their inverse map.
#include "launch.cuh"

namespace sdkernels::cuda {
namespace {

constexpr int kMaskThreads = 1024;
constexpr int kWarps = kMaskThreads / kWarp;

// One block: a mask has as many entries as the batch has rows, a few thousand at most. Every round
// takes one entry a thread and knows how many were true before it.
__global__ void __launch_bounds__(kMaskThreads, 1) compact_mask(const CompactMask p) {
  __shared__ int warp_counts[kWarps];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  int64_t before = 0;
  for (int64_t first = 0; first < p.batch; first += kMaskThreads) {
    const int64_t row = first + threadIdx.x;
    const bool kept = row < p.batch && p.mask[row * p.mask_stride];
    const unsigned votes = __ballot_sync(~0u, kept);
    if (lane == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int64_t slot = before + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) slot += warp_counts[w];
      before += warp_counts[w];
    }
    if (row < p.batch) p.slot[row] = kept ? slot : -1;
    if (kept && slot < p.kept) p.index[slot] = row;
    __syncthreads();  // the counts are written again in the next round
  }
  if (threadIdx.x != 0) return;
  if (p.count)
    *p.count = before;
  else if (before != p.kept)
    __trap();
}

}  // namespace

cudaError_t launch_compact_mask(const CompactMask& p, cudaStream_t stream) {
  return launch(compact_mask, 1, dim3(kMaskThreads), stream, p);
}

}  // namespace sdkernels::cuda
