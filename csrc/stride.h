// Where the rows of a tensor stand in memory. No PyTorch header: the kernels include this.
#pragma once

#include <cstdint>

namespace sdkernels {

// Distance between neighbouring rows, and between neighbouring lines of one row. A row (one sample)
// is walked as `lines` runs of `len` contiguous elements: element i of line l of row r stands at
// data + r * stride.row + l * stride.line + i.
struct Stride {
  int64_t row = 0, line = 0;
};

}  // namespace sdkernels
