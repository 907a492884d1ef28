// What the CPU ops share: dtypes, the look at row values, and sums that do not depend on the
// threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <vector>

#include "../row_ops.h"
#include "parallel.h"
#include "row_kernels.h"

namespace sdkernels::cpu {

// Elements that are worth a thread of their own where they are copied or added, and where they are
// summed up (in norms, in gradients of a layer scale): some 10 us of work, as a second thread takes
// 2 to 3 to join in.
constexpr int64_t kGrain = 65536;
constexpr int64_t kSumGrain = 16384;

inline Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return Dtype::f64;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      return Dtype::f32;
  }
}

// The kernels trust the rows, so they are looked at first: a few integers against whole rows of
// data.
inline void check_index_values(const at::Tensor& index, int64_t batch) {
  const int64_t* rows = index.const_data_ptr<int64_t>();
  int64_t previous = -1;
  for (int64_t j = 0; j < index.size(0); ++j) {
    TORCH_CHECK_VALUE(rows[j] >= 0 && rows[j] < batch, "rows.index: entry ", j, " is ", rows[j],
                      ", expected a row number from 0 to ", batch - 1);
    TORCH_CHECK_VALUE(rows[j] > previous,
                      "rows.index: expected unique, ascending row numbers, got ", rows[j],
                      " after ", previous);
    previous = rows[j];
  }
}

// ... and that slot is their inverse: slot[index[j]] == j, -1 elsewhere.
inline void check_row_values(const at::Tensor& index, const at::Tensor& slot) {
  check_index_values(index, slot.size(0));
  const int64_t* rows = index.const_data_ptr<int64_t>();
  const int64_t* slots = slot.const_data_ptr<int64_t>();
  int64_t j = 0;
  for (int64_t b = 0; b < slot.size(0); ++b) {
    const bool kept = j < index.size(0) && rows[j] == b;
    TORCH_CHECK_VALUE(slots[b] == (kept ? j : -1), "rows.slot: entry ", b, " is ", slots[b],
                      ", expected ", kept ? j : -1, " as the inverse of rows.index");
    j += kept;
  }
}

// A sum over many pieces of work into one array of `entries`. The pieces are cut by size alone and
// added up in order, so the result is the same for any number of threads.
class ChunkedSum {
 public:
  // `work` is counted in elements or in lines; `width` is the number of elements in a unit of it.
  // Without entries it cuts the work all the same.
  ChunkedSum(int64_t entries, int64_t work, int64_t width, at::ScalarType acc)
      : entries_(entries), work_(work) {
    // Enough chunks for any machine's threads and for float to keep its digits, but none that is
    // not worth a thread, and so few that the partial sums stay below 1/8 of the data.
    constexpr int64_t kChunks = 64, kAdditions = 512;
    const int64_t accurate = at::divup(kAdditions * entries, width);
    const int64_t least = at::divup(8 * entries, width);
    size_ = std::max(at::divup(work, kChunks), at::divup(kSumGrain, width));
    if (entries > 0) size_ = std::max(least, std::min(size_, accurate));
    partials_ = at::zeros({at::divup(work, size_), entries}, at::TensorOptions().dtype(acc));
  }

  int64_t chunks() const { return partials_.size(0); }
  // Chunks that are worth a thread, where so many units of work are.
  int64_t grain(int64_t units) const { return at::divup(units, size_); }
  int64_t begin(int64_t chunk) const { return chunk * size_; }
  int64_t end(int64_t chunk) const { return std::min(work_, begin(chunk) + size_); }
  void* partial(int64_t chunk) const {
    return static_cast<char*>(partials_.mutable_data_ptr()) +
           chunk * entries_ * partials_.element_size();
  }

  // The entries of the sum from `first` on, as many as `sizes` holds. Added in double by this
  // thread alone: at::sum would cut its work by the number of threads.
  at::Tensor total(int64_t first, at::IntArrayRef sizes) const {
    at::Tensor total = at::empty(sizes, partials_.options());
    const int64_t count = total.numel();
    std::vector<double> sums(count);
    AT_DISPATCH_FLOATING_TYPES(partials_.scalar_type(), "total", [&] {
      const scalar_t* partial = partials_.const_data_ptr<scalar_t>() + first;
      for (int64_t chunk = 0; chunk < chunks(); ++chunk, partial += entries_)
        for (int64_t i = 0; i < count; ++i) sums[i] += partial[i];
      std::copy_n(sums.data(), count, total.mutable_data_ptr<scalar_t>());
    });
    return total;
  }

 private:
  int64_t entries_, work_, size_;
  at::Tensor partials_;
};

}  // namespace sdkernels::cpu
