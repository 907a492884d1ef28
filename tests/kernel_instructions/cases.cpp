// Calls every AVX2 kernel once on a fixed shape, each between the borders of `measured`, and prints
// its name and the number of elements that it works on. Run under callgrind, which then tells the
// instructions of each call (test_kernel_instructions.py).
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "row_kernels.h"

namespace sdkernels::cpu::avx2 {
extern const Kernels table;
}

extern "C" __attribute__((noinline)) void measured(const std::function<void()>& call) {
  call();
  asm volatile("");  // a call in the last place would leave `measured` too early
}

namespace {

using namespace sdkernels;
using namespace sdkernels::cpu;

constexpr int64_t kRows = 8, kLines = 16;

struct Types {
  const char* name;
  Dtype stream, branch;
};
constexpr Types kTypes[] = {{"fp32", Dtype::f32, Dtype::f32},
                            {"bf16", Dtype::bf16, Dtype::bf16},
                            {"fp16", Dtype::f16, Dtype::f16},
                            {"mixed", Dtype::f32, Dtype::bf16}};

int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Numbers around 1 of both signs. Only NaN would take longer: where it is rounded to bf16, the one
// branch on values.
std::vector<char> numbers(Dtype dtype, int64_t count, int seed) {
  std::vector<char> data(count * size_of(dtype));
  uint32_t state = 2654435761u * (seed + 1);
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    const float value = ((state >> 8) / float(1 << 24) - 0.5f) * 4;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint16_t half = bits >> 16;  // bfloat16, truncated
    // fp16: a sign, the exponent of 1, ten digits
    if (dtype == Dtype::f16) half = (bits >> 31 << 15) | 0x3c00 | (bits >> 13 & 0x3ff);
    if (dtype == Dtype::f32)
      std::memcpy(&data[4 * i], &bits, 4);
    else
      std::memcpy(&data[2 * i], &half, 2);
  }
  return data;
}

void count(const std::string& name, int64_t elements, const std::function<void()>& call) {
  std::printf("%s %ld\n", name.c_str(), static_cast<long>(elements));
  measured(call);
}

// All rows kept, so that nothing is a plain copy; but for a ReLU, which passes over dropped rows
// too.
void run(const Types& types, int64_t len) {
  const Kernels& kernels = avx2::table;
  const int64_t row = kLines * len, elements = kRows * row;
  const auto name = [&](const char* kernel) {
    return std::string(kernel) + "-" + types.name + "-" + std::to_string(len);
  };
  auto x = numbers(types.stream, elements, 1), y = x, out = numbers(types.branch, elements, 2);
  auto d_out = out, residual = numbers(types.stream, elements, 3);
  const auto gamma = numbers(Dtype::f32, row, 4), beta = numbers(Dtype::f32, row, 5);
  std::vector<int64_t> index(kRows), half(kRows, -1), even(kRows / 2);
  for (int64_t i = 0; i < kRows; ++i) index[i] = i;
  for (int64_t i = 0; i < kRows; i += 2) half[i] = i / 2, even[i / 2] = i;
  std::vector<uint8_t> positive(kRows * ((row + 7) / 8) + 1);
  std::vector<float> mean(kRows * kLines), rstd(kRows * kLines), sums(2 * row);
  const Stride stride{row, len};

  // Of B rows, every other one of zeros.
  const int64_t size = size_of(types.stream);
  CopyRows rows{};
  rows.y = y.data();
  rows.x = x.data();
  rows.map = half.data();
  rows.lines = kLines;
  rows.bytes = len * size;
  rows.y_stride = rows.x_stride = {row * size, len * size};
  count(name("copy_rows"), elements, [&] { kernels.copy_rows(rows, 0, elements * size); });
  // The same with rows of a base in the place of zeros, and half of the rows put back in place.
  CopyRows onto = rows;
  onto.base = residual.data();
  onto.base_stride = rows.x_stride;
  count(name("copy_rows_onto"), elements, [&] { kernels.copy_rows(onto, 0, elements * size); });
  CopyRows back_in = rows;
  back_in.map = even.data();
  back_in.scatters = true;
  count(name("copy_rows_in_place"), elements / 2,
        [&] { kernels.copy_rows(back_in, 0, elements / 2 * size); });

  ScatterAdd add{};
  add.y = y.data();
  add.residual = residual.data();
  add.out = out.data();
  add.slot = index.data();
  add.scale = 2.0;
  add.lines = kLines;
  add.len = len;
  add.y_stride = add.residual_stride = add.out_stride = stride;
  const auto scatter_add = kernels.scatter_add(types.stream, types.stream, types.branch);
  count(name("scatter_add"), elements, [&] { scatter_add(add, 0, elements); });
  ScatterAdd scaled = add;
  scaled.layer_scale = gamma.data();
  scaled.layer_scale_element = 1;
  count(name("scatter_add_layer_scale"), elements, [&] { scatter_add(scaled, 0, elements); });

  ScatterAddBackward back{};
  back.d_out = d_out.data();
  back.grad = x.data();
  back.index = index.data();
  back.scale = 2.0;
  back.lines = kLines;
  back.len = len;
  back.d_out_stride = back.grad_stride = back.out_stride = stride;
  const auto scatter_add_backward = kernels.scatter_add_backward(types.stream, types.branch);
  count(name("scatter_add_backward"), elements,
        [&] { scatter_add_backward(back, 0, elements, nullptr, nullptr); });
  back.out = out.data();
  back.layer_scale = gamma.data();
  back.layer_scale_element = 1;
  count(name("scatter_add_layer_scale_backward"), elements,
        [&] { scatter_add_backward(back, 0, elements, sums.data(), nullptr); });

  const int64_t words = kRows * ((row + kBitsOfWord - 1) / kBitsOfWord);
  ScatterAddRelu relu{};
  relu.y = y.data();
  relu.positive = positive.data();
  relu.residual = residual.data();
  relu.out = out.data();
  relu.slot = half.data();
  relu.scale = 2.0;
  relu.len = relu.residual_row = relu.out_row = row;
  const auto scatter_add_relu = kernels.scatter_add_relu(types.stream, types.stream, types.branch);
  count(name("scatter_add_relu"), elements, [&] { scatter_add_relu(relu, 0, words); });

  ScatterAddReluBackward relu_back{};
  relu_back.d_residual = y.data();
  relu_back.d_out = d_out.data();
  relu_back.grad = x.data();
  relu_back.positive = positive.data();
  relu_back.slot = half.data();
  relu_back.scale = 2.0;
  relu_back.len = row;
  const auto relu_backward = kernels.scatter_add_relu_backward(types.stream, types.branch);
  count(name("scatter_add_relu_backward"), elements, [&] { relu_backward(relu_back, 0, words); });

  CompactNorm norm{};
  norm.normed = d_out.data();
  norm.kept = y.data();
  norm.mean = mean.data();
  norm.rstd = rstd.data();
  norm.x = x.data();
  norm.weight = gamma.data();
  norm.bias = beta.data();
  norm.index = index.data();
  norm.eps = 1e-5;
  norm.lines = kLines;
  norm.len = len;
  norm.x_stride = stride;
  const int64_t lines = kRows * kLines;
  const auto compact_norm = kernels.compact_norm(types.stream, types.branch);
  CompactNorm rms = norm;
  rms.mean = nullptr;
  rms.bias = nullptr;
  count(name("compact_rms_norm"), elements, [&] { compact_norm(rms, 0, lines); });
  count(name("compact_layer_norm"), elements, [&] { compact_norm(norm, 0, lines); });

  CompactNormBackward norm_back{};
  norm_back.d_x = y.data();
  norm_back.d_stream = residual.data();
  norm_back.d_normed = out.data();
  norm_back.kept = x.data();
  norm_back.mean = mean.data();
  norm_back.rstd = rstd.data();
  norm_back.weight = gamma.data();
  norm_back.slot = index.data();
  norm_back.lines = kLines;
  norm_back.len = len;
  norm_back.d_x_stride = norm_back.d_stream_stride = stride;
  const auto norm_backward = kernels.compact_norm_backward(types.stream, types.branch);
  count(name("compact_layer_norm_backward"), elements,
        [&] { norm_backward(norm_back, 0, lines, sums.data(), sums.data() + row); });
  CompactNormBackward rms_back = norm_back;
  rms_back.mean = nullptr;
  rms_back.d_stream = nullptr;
  count(name("compact_rms_norm_backward"), elements,
        [&] { norm_backward(rms_back, 0, lines, sums.data(), nullptr); });
}

}  // namespace

int main() {
  // A line that is a multiple of any vector, a short one, and one that leaves a rest.
  for (const int64_t len : {192, 64, 52})
    for (const Types& types : kTypes) run(types, len);
}
