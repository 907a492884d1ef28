// The ops as autograd functions call them: through the dispatcher, below autograd.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <optional>
#include <tuple>

namespace sdkernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline Tensor compact_op(const Tensor& x, const Tensor& index) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&)>("sdkernels::compact_rows");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, index);
}

inline Tensor expand_op(const Tensor& kept, const Tensor& index, const Tensor& slot) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const Tensor&)>("sdkernels::expand_rows");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(kept, index, slot);
}

inline Tensor scatter_add_op(const Tensor& residual, const Tensor& out, const Tensor& index,
                             const Tensor& slot, const OptionalTensor& layer_scale,
                             const OptionalTensor& row_weight, double scale) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        const OptionalTensor&, const OptionalTensor&, double)>(
      "sdkernels::scatter_add_rows");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(residual, out, index, slot, layer_scale, row_weight, scale);
}

inline void scatter_add_op_(Tensor residual, const Tensor& out, const Tensor& index,
                            const Tensor& slot, const OptionalTensor& layer_scale,
                            const OptionalTensor& row_weight, double scale) {
  static const auto op =
      find_op<void(Tensor, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                   const OptionalTensor&, double)>("sdkernels::scatter_add_rows_");
  at::AutoDispatchBelowADInplaceOrView guard;
  op.call(std::move(residual), out, index, slot, layer_scale, row_weight, scale);
}

inline Tensor scatter_op(const Tensor& residual, const Tensor& out, const Tensor& index,
                         const Tensor& slot) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
          "sdkernels::scatter_rows");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(residual, out, index, slot);
}

inline void scatter_op_(Tensor residual, const Tensor& out, const Tensor& index,
                        const Tensor& slot) {
  static const auto op = find_op<void(Tensor, const Tensor&, const Tensor&, const Tensor&)>(
      "sdkernels::scatter_rows_");
  at::AutoDispatchBelowADInplaceOrView guard;
  op.call(std::move(residual), out, index, slot);
}

inline std::tuple<Tensor, Tensor, Tensor> scatter_add_backward_op(
    const Tensor& grad, const OptionalTensor& out, const Tensor& index,
    const OptionalTensor& layer_scale, const OptionalTensor& row_weight, double scale,
    at::ScalarType dtype, std::array<bool, 2> wanted) {
  static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
      const OptionalTensor&, double, at::ScalarType, std::array<bool, 2>)>(
      "sdkernels::scatter_add_rows_backward");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(grad, out, index, layer_scale, row_weight, scale, dtype, wanted);
}

inline std::tuple<Tensor, Tensor> scatter_add_relu_op(const Tensor& residual, const Tensor& out,
                                                      const Tensor& index, const Tensor& slot,
                                                      const OptionalTensor& layer_scale,
                                                      const OptionalTensor& row_weight,
                                                      double scale) {
  static const auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const OptionalTensor&, const OptionalTensor&, double)>(
          "sdkernels::scatter_add_relu_rows");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(residual, out, index, slot, layer_scale, row_weight, scale);
}

inline std::tuple<Tensor, Tensor> scatter_add_relu_backward_op(
    const Tensor& grad, const Tensor& positive, const Tensor& index, const Tensor& slot,
    const OptionalTensor& layer_scale, const OptionalTensor& row_weight, double scale,
    at::ScalarType dtype, at::MemoryFormat format, bool wants_out) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
      const OptionalTensor&, double, at::ScalarType, at::MemoryFormat, bool)>(
      "sdkernels::scatter_add_relu_rows_backward");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(grad, positive, index, slot, layer_scale, row_weight, scale, dtype, format,
                 wants_out);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> compact_norm_op(
    const Tensor& x, const Tensor& index, at::IntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms,
    at::ScalarType dtype, bool keep_rows) {
  static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, at::IntArrayRef, const OptionalTensor&, const OptionalTensor&,
      double, bool, at::ScalarType, bool)>("sdkernels::compact_norm");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, index, normalized_shape, weight, bias, eps, rms, dtype, keep_rows);
}

inline std::tuple<Tensor, Tensor, Tensor> compact_norm_backward_op(
    const OptionalTensor& d_stream, const Tensor& d_normed, const Tensor& kept, const Tensor& mean,
    const Tensor& rstd, const Tensor& index, const Tensor& slot, at::IntArrayRef normalized_shape,
    const OptionalTensor& weight, bool rms, std::array<bool, 3> wanted) {
  static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(
      const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, at::IntArrayRef, const OptionalTensor&, bool,
      std::array<bool, 3>)>("sdkernels::compact_norm_backward");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(d_stream, d_normed, kept, mean, rstd, index, slot, normalized_shape, weight, rms,
                 wanted);
}

inline void compact_into_op(Tensor kept, const Tensor& x, const Tensor& index) {
  static const auto op =
      find_op<void(Tensor, const Tensor&, const Tensor&)>("sdkernels::compact_rows_into");
  at::AutoDispatchBelowADInplaceOrView guard;
  op.call(std::move(kept), x, index);
}

inline std::tuple<Tensor, Tensor, Tensor> compact_norm_into_op(
    Tensor normed, const Tensor& x, const Tensor& index, at::IntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms,
    bool keep_rows) {
  static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(
      Tensor, const Tensor&, const Tensor&, at::IntArrayRef, const OptionalTensor&,
      const OptionalTensor&, double, bool, bool)>("sdkernels::compact_norm_into");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(std::move(normed), x, index, normalized_shape, weight, bias, eps, rms, keep_rows);
}

inline std::tuple<Tensor, Tensor> scatter_add_backward_into_op(
    Tensor d_out, const Tensor& grad, const OptionalTensor& out, const Tensor& index,
    const OptionalTensor& layer_scale, const OptionalTensor& row_weight, double scale,
    std::array<bool, 2> wanted) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(
      Tensor, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
      const OptionalTensor&, double, std::array<bool, 2>)>(
      "sdkernels::scatter_add_rows_backward_into");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(std::move(d_out), grad, out, index, layer_scale, row_weight, scale, wanted);
}

}  // namespace sdkernels
