// Shares work out to PyTorch's own threads, whatever compiled this file.
//
// at::parallel_for is an OpenMP pragma in a header of ATen: it needs the compiler's <omp.h>, and
// what it becomes is the compiler's affair. clang calls functions of LLVM's OpenMP library, which
// the libgomp that PyTorch's wheels bring for Linux does not have; linked to a second library, the
// kernels would run on a thread pool of their own. GOMP_parallel is in every OpenMP library there
// (gcc's, LLVM's, Intel's), so it is called by name, and found in the one that torch has loaded.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#if AT_PARALLEL_OPENMP && defined(__linux__)
#define SDKERNELS_OPENMP_BY_NAME
extern "C" {
// Weak: null where torch has loaded no such library; one thread does the work then.
__attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* data, unsigned threads,
                                         unsigned flags);
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_thread_num();
}
#endif

namespace sdkernels::cpu {

// Calls f(first, last) for parts of [begin, end), one a thread and about `grain` (at least 1) or
// more each. f must not throw.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
#ifdef SDKERNELS_OPENMP_BY_NAME
  if (begin >= end) return;
  at::internal::lazy_init_num_threads();
  if (end - begin <= grain || !GOMP_parallel || at::in_parallel_region() ||
      at::get_num_threads() == 1) {
    f(begin, end);
    return;
  }
  struct Work {
    int64_t begin, end, grain;
    const F& f;
  } all{begin, end, grain, f};
  const auto part = [](void* data) {
    const Work& work = *static_cast<const Work*>(data);
    const int64_t size = work.end - work.begin;
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), at::divup(size, work.grain));
    const int64_t length = at::divup(size, threads);
    const int64_t first = work.begin + omp_get_thread_num() * length;
    if (first < work.end) work.f(first, std::min(first + length, work.end));
  };
  GOMP_parallel(part, &all, 0, 0);  // 0 threads: as many as at::set_num_threads has set
#else
  at::parallel_for(begin, end, grain, f);
#endif
}

}  // namespace sdkernels::cpu
