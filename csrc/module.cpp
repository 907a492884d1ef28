// The ops' schemas, and the Python module: the autograd functions, the sampler and build_config().
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "autograd.h"
#include "cpu/row_kernels.h"
#include "packed.h"
#include "row_ops.h"
#include "sampler.h"

namespace py = pybind11;

namespace sdkernels {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

std::map<std::string, std::string> build_config() {
  return {{"torch", TORCH_VERSION},
          {"compiler", kCompiler},
          {"cxx_flags", SDKERNELS_CXX_FLAGS},
          {"cuda_version", SDKERNELS_CUDA_VERSION},
          {"cuda_arch_list", SDKERNELS_CUDA_ARCH_LIST},
          {"cpu_capability", cpu::kernels().capability}};
}

}  // namespace

TORCH_LIBRARY(sdkernels, m) {
  // Functional, and without autograd: autograd.cpp stands above them. A zero-sized tensor takes the
  // place of a result that was not asked for.
  m.def("compact_rows(Tensor x, Tensor index) -> Tensor");
  // Where a name ends in _into, the first result is written into a contiguous tensor of the
  // caller's: a part of a larger one.
  m.def("compact_rows_into(Tensor(a!) kept, Tensor x, Tensor index) -> ()");
  m.def("expand_rows(Tensor kept, Tensor index, Tensor slot) -> Tensor");
  // residual, with `out` in place of its kept rows.
  m.def("scatter_rows(Tensor residual, Tensor out, Tensor index, Tensor slot) -> Tensor");
  m.def("scatter_rows_(Tensor(a!) residual, Tensor out, Tensor index, Tensor slot) -> ()");
  m.def(
      "scatter_add_rows(Tensor residual, Tensor out, Tensor index, Tensor slot, "
      "Tensor? layer_scale, Tensor? row_weight, float scale) -> Tensor");
  m.def(
      "scatter_add_rows_(Tensor(a!) residual, Tensor out, Tensor index, Tensor slot, "
      "Tensor? layer_scale, Tensor? row_weight, float scale) -> ()");
  m.def(
      "scatter_add_rows_backward(Tensor grad, Tensor? out, Tensor index, Tensor? layer_scale, "
      "Tensor? row_weight, float scale, ScalarType dtype, bool[2] wanted) "
      "-> (Tensor d_out, Tensor d_layer_scale, Tensor d_row_weight)");
  m.def(
      "scatter_add_rows_backward_into(Tensor(a!) d_out, Tensor grad, Tensor? out, Tensor index, "
      "Tensor? layer_scale, Tensor? row_weight, float scale, bool[2] wanted) "
      "-> (Tensor d_layer_scale, Tensor d_row_weight)");
  // `positive` has a bit for every element of y, set where the ReLU passes the gradient (also that
  // of a NaN): uint8 [B, ceil(elements of a row / 8)], element e at bit e % 8 of byte e / 8,
  // counted in y's memory format (that of row_format()); bits past the last element are zero.
  m.def(
      "scatter_add_relu_rows(Tensor residual, Tensor out, Tensor index, Tensor slot, "
      "Tensor? layer_scale, Tensor? row_weight, float scale) -> (Tensor y, Tensor positive)");
  // An empty tensor takes the place of a d_out that is not wanted.
  m.def(
      "scatter_add_relu_rows_backward(Tensor grad, Tensor positive, Tensor index, Tensor slot, "
      "Tensor? layer_scale, Tensor? row_weight, float scale, ScalarType dtype, "
      "MemoryFormat memory_format, bool wants_out) -> (Tensor d_residual, Tensor d_out)");
  m.def(
      "compact_norm(Tensor x, Tensor index, int[] normalized_shape, Tensor? weight, Tensor? bias, "
      "float eps, bool rms, ScalarType dtype, bool keep_rows) "
      "-> (Tensor normed, Tensor kept, Tensor mean, Tensor rstd)");
  m.def(
      "compact_norm_into(Tensor(a!) normed, Tensor x, Tensor index, int[] normalized_shape, "
      "Tensor? weight, Tensor? bias, float eps, bool rms, bool keep_rows) "
      "-> (Tensor kept, Tensor mean, Tensor rstd)");
  m.def(
      "compact_norm_backward(Tensor? d_stream, Tensor d_normed, Tensor kept, Tensor mean, "
      "Tensor rstd, Tensor index, Tensor slot, int[] normalized_shape, Tensor? weight, bool rms, "
      "bool[3] wanted) -> (Tensor d_x, Tensor d_weight, Tensor d_bias)");
  m.def("compact_mask(Tensor mask, SymInt? k) -> (Tensor index, Tensor slot)");
}

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("compact", compact, no_gil);
  m.def("compact_norm", compact_norm, no_gil);
  m.def("scatter_add", scatter_add, no_gil);
  m.def("open_rows", open_rows, no_gil);
  m.def("scatter", scatter, no_gil);
  m.def("open_packed", open_packed, no_gil);
  m.def("close_packed", close_packed, no_gil);
  m.def("check_inplace", py::overload_cast<const at::Tensor&>(check_inplace), no_gil);
  m.def("check_scatter_add", check_scatter_add, no_gil);
  py::class_<Draw>(m, "Draw")
      .def(py::init<double, int64_t, bool>(), py::arg("keep"), py::arg("count"),
           py::arg("whole_batch"))
      .def(py::pickle(
          [](const Draw& draw) { return py::make_tuple(draw.keep, draw.count, draw.whole_batch); },
          [](const py::tuple& state) {
            return Draw{state[0].cast<double>(), state[1].cast<int64_t>(), state[2].cast<bool>()};
          }));
  py::class_<StepKey>(m, "StepKey")
      .def(py::init<uint64_t, uint64_t, uint64_t>(), py::arg("seed"), py::arg("step"),
           py::arg("rank"));
  m.def("sample_rows", sample_rows, no_gil);
  m.def("sample_plan", sample_plan, no_gil);
  m.def("build_config", build_config);
}

}  // namespace sdkernels
