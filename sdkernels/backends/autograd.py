"""The autograd functions above the ops: ``csrc/autograd.cpp`` without a compiler.

One node owns the gradient of x: compacting returns the kept rows *and* x passed through (the
stream), so that its backward receives both gradients and writes their sum in one pass. With grad
mode on (double backward), each backward is built from differentiable pieces instead of the fused
ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, namespace, traceable
from .checks import acc_type
from .choice import traceable_devices
from .overlap import check_no_internal_overlap, check_no_overlap
from .row_values import are_trusted, check_row_values
from .untraced import untraced

Gradient = Tensor | None

# ---- the ops, below autograd ---------------------------------------------------------------------

_on_cpu = "cpu" in traceable_devices
_modes = torch._C._len_torch_dispatch_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # a gradient under vmap


def _is_plain(x: Tensor) -> bool:
    """Whether the dispatcher, which costs as much as an op, would end at the PyTorch code."""
    return (
        _on_cpu
        and x.is_cpu
        and (type(x) is Tensor or type(x) is nn.Parameter)
        and not _modes()
        and not checks.transforms_active()
        and not _is_batched(x)
    )


def _op(name: str) -> Callable[..., Any]:
    """An op of ours on checked arguments, of which the first decides who serves it."""
    dispatched = getattr(namespace.ops, name).default
    pytorch_code = traceable.OPS[name]

    def call(x: Tensor, *args: Any) -> Any:
        return pytorch_code(x, *args) if _is_plain(x) else dispatched(x, *args)

    return call


_compact_op = _op("compact_rows")
_expand_op = _op("expand_rows")
_scatter_op = _op("scatter_rows")
_scatter_op_ = _op("scatter_rows_")
_scatter_add_op = _op("scatter_add_rows")
_scatter_add_op_ = _op("scatter_add_rows_")
_scatter_add_backward_op = _op("scatter_add_rows_backward")
_scatter_add_relu_op = _op("scatter_add_relu_rows")
_scatter_add_relu_backward_op = _op("scatter_add_relu_rows_backward")
_compact_norm_op = _op("compact_norm")
_norm_backward_op = namespace.ops.compact_norm_backward.default


class Stream(Enum):
    """What a compacting node returns beside the kept rows."""

    NONE = 0
    ALIAS = 1
    INPLACE = 2


class Sum(Enum):
    PLAIN = 0
    RELU = 1
    INPLACE = 2


# ---- autograd functions --------------------------------------------------------------------------


def _pass_through(ctx: Any, x: Tensor, stream: Stream) -> Tensor:
    """x as an output of the node that compacts it.

    In place it is x itself, whose history the node takes over. Otherwise an alias: it shares x's
    memory and version counter and is no view in autograd's eyes, because PyTorch refuses in-place
    writes to views that come out of a function with several outputs.
    """
    if stream is Stream.INPLACE:
        ctx.mark_dirty(x)
        return x
    return x.detach()


class _CompactRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, slot: Tensor, stream: Stream) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index, slot)
        kept = _compact_op(x, index)
        return kept if stream is Stream.NONE else (kept, _pass_through(ctx, x, stream))

    @staticmethod
    @untraced
    def backward(ctx: Any, d_kept: Gradient, d_stream: Gradient = None) -> tuple[Gradient, ...]:
        index, slot = ctx.saved_tensors
        return _merge_gradients(d_kept, d_stream, index, slot), None, None, None


class _OpenRows(torch.autograd.Function):
    """_CompactRows for a layer whose output replaces the kept rows, and its gradient theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, slot: Tensor, stream: Stream) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index, slot)
        return _compact_op(x, index), _pass_through(ctx, x, stream)

    @staticmethod
    @untraced
    def backward(ctx: Any, d_kept: Gradient, d_stream: Gradient) -> tuple[Gradient, ...]:
        index, slot = ctx.saved_tensors
        if d_stream is None:
            d_x = _merge_gradients(d_kept, None, index, slot)
        elif d_kept is None:
            d_x = d_stream.index_fill(0, index, 0.0)
        elif torch.is_grad_enabled():
            d_x = _ScatterRows.apply(d_stream, d_kept, index, slot, False, False)
        else:
            d_x = _scatter_op(d_stream, d_kept, index, slot)
        return d_x, None, None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        out: Tensor,
        index: Tensor,
        slot: Tensor,
        opened: bool,
        inplace: bool,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index, slot)
        ctx.opened = opened
        if not inplace:
            return _scatter_op(residual, out, index, slot)
        _scatter_op_(residual, out, index, slot)
        ctx.mark_dirty(residual)
        return residual

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Gradient) -> tuple[Gradient, ...]:
        d_residual = d_out = None
        if grad is not None:
            index, slot = ctx.saved_tensors
            if ctx.needs_input_grad[0]:
                # Of an opened stream, whoever opened it leaves out the kept rows.
                d_residual = grad if ctx.opened else grad.index_fill(0, index, 0.0)
            if ctx.needs_input_grad[1]:
                d_out = _compact_rows(grad, index, slot)
        return d_residual, d_out, None, None, None, None


class _ExpandRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: Tensor, index: Tensor, slot: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index, slot)
        return _expand_op(kept, index, slot)

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Gradient) -> tuple[Gradient, ...]:
        if grad is None:
            return None, None, None
        index, slot = ctx.saved_tensors
        return _compact_rows(grad, index, slot), None, None


def _compact_rows(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    """As a backward calls it: a node of its own in a double backward only."""
    if not torch.is_grad_enabled():
        return _compact_op(x, index)  # type: ignore[no-any-return]
    return _CompactRows.apply(x, index, slot, Stream.NONE)  # type: ignore[no-any-return]


def _merge_gradients(d_kept: Gradient, d_stream: Gradient, index: Tensor, slot: Tensor) -> Gradient:
    """The gradient of x from those of its kept rows and of x passed through, if there are any."""
    if d_kept is None:
        return d_stream
    if d_stream is None:
        expand = _ExpandRows.apply if torch.is_grad_enabled() else _expand_op
        return expand(d_kept, index, slot)  # type: ignore[no-any-return]
    if torch.is_grad_enabled():
        return _ScatterAddRows.apply(  # type: ignore[no-any-return]
            d_stream, d_kept, None, None, index, slot, 1.0, Sum.PLAIN
        )
    merged: Tensor = _scatter_add_op(d_stream, d_kept, index, slot, None, None, 1.0)
    return merged


class _AddKeptRows(torch.autograd.Function):
    """_ScatterAddRows where PyTorch's index_add is all there is to it.

    index_add's own node would save the branch's output. The backward is differentiable as it is.
    """

    @staticmethod
    def forward(ctx: Any, residual: Tensor, out: Tensor, index: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(index)
        ctx.scale = scale
        return residual.index_add(0, index, out, alpha=scale)

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple[Gradient, ...]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        (index,) = ctx.saved_tensors
        return grad, grad.index_select(0, index).mul_(ctx.scale), None, None


def gradients_of_kept(
    kept: Tensor,
    out: Tensor | None,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Gradient, Gradient]:
    """What scatter_add_rows_backward gives for the kept rows of a gradient, differentiable."""
    acc = acc_type(kept.dtype, dtype)
    scaled = kept.to(acc) * scale
    d_layer_scale = d_row_weight = None
    column = (-1, *[1] * (scaled.dim() - 1))
    if wanted[1]:
        assert out is not None
        assert row_weight is not None
        product = scaled * out.to(acc)
        if layer_scale is not None:
            product = product * layer_scale.to(acc)
        total = product.sum_to_size((scaled.shape[0], *column[1:]))
        d_row_weight = total.flatten().to(row_weight.dtype)
    if row_weight is not None:
        scaled = scaled * row_weight.to(acc).view(column)
    d_out = (scaled if layer_scale is None else scaled * layer_scale.to(acc)).to(dtype)
    if wanted[0]:
        assert out is not None
        assert layer_scale is not None
        total = (scaled * out.to(acc)).sum_to_size(layer_scale.shape)
        d_layer_scale = total.to(layer_scale.dtype)
    return d_out, d_layer_scale, d_row_weight


def gradients_of_norm(
    kept: Tensor,
    d_normed: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Gradient, Gradient]:
    """The gradients of a norm of the kept rows, differentiable."""
    acc = acc_type(kept.dtype)
    dims = list(range(-len(shape), 0))
    x, d = kept.to(acc), d_normed.to(acc)
    centered = x if rms else x - x.mean(dims, True)
    rstd = (centered.square().mean(dims, True) + eps).rsqrt()
    x_hat = centered * rstd
    d_x_hat = d if weight is None else d * weight.to(acc)
    through = d_x_hat - x_hat * (d_x_hat * x_hat).mean(dims, True)
    if not rms:
        through = through - d_x_hat.mean(dims, True)
    d_weight = None if weight is None else (d * x_hat).sum_to_size(shape).to(weight.dtype)
    d_bias = None if bias_dtype is None else d.sum_to_size(shape).to(bias_dtype)
    return (rstd * through).to(kept.dtype), d_weight, d_bias


class _PassRelu(torch.autograd.Function):
    """The gradient that a ReLU passes, from the bits of its result; it is its own derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        positive: Tensor,
        index: Tensor,
        slot: Tensor,
        memory_format: torch.memory_format,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(positive, index, slot)
        ctx.memory_format = memory_format
        options = (None, None, 1.0, grad.dtype, memory_format, False)
        return _scatter_add_relu_backward_op(grad, positive, index, slot, *options)[0]

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Gradient) -> tuple[Gradient, ...]:
        if grad is not None:
            grad = _PassRelu.apply(grad, *ctx.saved_tensors, ctx.memory_format)
        return grad, None, None, None, None


class _ScatterAddRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        out: Tensor,
        layer_scale: Tensor | None,
        row_weight: Tensor | None,
        index: Tensor,
        slot: Tensor,
        scale: float,
        sum: Sum,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.dtype = scale, out.dtype
        y, positive = residual, None
        args = out, index, slot, layer_scale, row_weight, scale
        if sum is Sum.PLAIN:
            y = _scatter_add_op(residual, *args)
        elif sum is Sum.RELU:
            y, positive = _scatter_add_relu_op(residual, *args)
            ctx.memory_format = traceable.row_format(y)
        else:
            _scatter_add_op_(residual, *args)
            ctx.mark_dirty(residual)
        # Only the gradients of layer_scale and row_weight need the branch's output.
        needs_out = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        out_or_none = out if needs_out else None
        ctx.save_for_backward(index, slot, layer_scale, row_weight, out_or_none, positive)
        return y

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Gradient) -> tuple[Gradient, ...]:
        nothing = (None, None, None, None)
        if grad is None:
            return (*nothing, *nothing)
        index, slot, layer_scale, row_weight, out, positive = ctx.saved_tensors
        scale, dtype = ctx.scale, ctx.dtype
        _, needs_out, *wanted = ctx.needs_input_grad[:4]
        wants_sum = wanted[0] or wanted[1]
        fused = not torch.is_grad_enabled()
        if positive is not None:
            memory_format = ctx.memory_format
            if fused and not wants_sum:
                options = (layer_scale, row_weight, scale, dtype, memory_format, needs_out)
                grad, d_out = _scatter_add_relu_backward_op(grad, positive, index, slot, *options)
                return grad, d_out if needs_out else None, None, None, *nothing
            grad = _PassRelu.apply(grad, positive, index, slot, memory_format)
        if not needs_out and not wants_sum:
            return grad, None, None, None, *nothing
        if fused:
            if not wants_sum and _is_plain(grad):
                d_out = traceable.gradient_of_out(
                    grad, index, layer_scale, row_weight, scale, dtype
                )
                return grad, d_out, None, None, *nothing
            out = out if wants_sum else None
            sums = _scatter_add_backward_op(
                grad, out, index, layer_scale, row_weight, scale, dtype, wanted
            )
            d_out, d_layer_scale, d_row_weight = sums
            d_layer_scale = d_layer_scale if wanted[0] else None
            return grad, d_out, d_layer_scale, d_row_weight if wanted[1] else None, *nothing

        kept = _compact_rows(grad, index, slot)
        args = out, layer_scale, row_weight, scale, dtype, wanted
        return grad, *gradients_of_kept(kept, *args), *nothing


class _CompactNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        index: Tensor,
        slot: Tensor,
        normalized_shape: Sequence[int],
        eps: float,
        rms: bool,
        dtype: torch.dtype,
        stream: Stream,
    ) -> Any:
        ctx.set_materialize_grads(False)
        # The kept rows of x are saved, not x: memory follows k, and x may be overwritten in place.
        # They are an output (which no caller sees) so that a double backward finds its way from
        # them to x.
        normed, kept, mean, rstd = _compact_norm_op(
            x, index, normalized_shape, weight, bias, eps, rms, dtype, True
        )
        ctx.save_for_backward(index, slot, weight, kept, mean, rstd)
        ctx.normalized_shape, ctx.eps, ctx.rms = normalized_shape, eps, rms
        ctx.bias_dtype = None if bias is None else bias.dtype
        if stream is Stream.NONE:
            return normed, kept
        return normed, kept, _pass_through(ctx, x, stream)

    @staticmethod
    @untraced
    def backward(
        ctx: Any, d_normed: Gradient, d_kept: Gradient, d_stream: Gradient = None
    ) -> tuple[Gradient, ...]:
        index, slot, weight, kept, mean, rstd = ctx.saved_tensors
        shape, rms = ctx.normalized_shape, ctx.rms
        d_x: Gradient
        d_weight: Gradient = None
        d_bias: Gradient = None
        # d_kept is there in a double backward only.
        if d_normed is not None and d_kept is None and not torch.is_grad_enabled():
            wanted = list(ctx.needs_input_grad[:3])
            args = (d_normed, kept, mean, rstd, index, slot, shape, weight, rms, wanted)
            if _is_plain(kept):
                gradients = traceable.compact_norm_backward(d_stream, *args)
            else:
                gradients = _norm_backward_op(d_stream, *args)
            d_x, d_weight, d_bias = (
                gradient if is_wanted else None
                for gradient, is_wanted in zip(gradients, wanted, strict=True)
            )
        else:
            if d_normed is not None:
                through, d_weight, d_bias = gradients_of_norm(
                    kept, d_normed, shape, weight, ctx.bias_dtype, ctx.eps, rms
                )
                d_kept = through if d_kept is None else d_kept + through
            d_x = _merge_gradients(d_kept, d_stream, index, slot)
        return d_x, d_weight, d_bias, None, None, None, None, None, None, None


# ---- what `_C.pyi` offers ------------------------------------------------------------------------


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# Function.apply looks for functorch's transforms first; they were refused.
_compact_rows_apply = super(torch.autograd.Function, _CompactRows).apply
_open_rows_apply = super(torch.autograd.Function, _OpenRows).apply
_scatter_apply = super(torch.autograd.Function, _ScatterRows).apply
_compact_norm_apply = super(torch.autograd.Function, _CompactNorm).apply
_scatter_add_apply = super(torch.autograd.Function, _ScatterAddRows).apply
_add_kept_rows_apply = super(torch.autograd.Function, _AddKeptRows).apply


def _stream_of(x: Tensor, with_stream: bool, inplace: bool) -> Stream:
    """In place, x itself passes through the node.

    Not where it needs no gradient or is a view, whose history only an operation with one result may
    take over: the stream is then x as it stands.
    """
    if not with_stream:
        return Stream.NONE
    if not inplace:
        return Stream.ALIAS
    if not _needs_grad(x) or x._is_view() or x.retains_grad:
        return Stream.NONE
    return Stream.INPLACE


# What is chosen below depends on the tensors alone: a checkpoint has to save as many when it runs
# again as it did the first time.

# Elements up to which PyTorch's own node, whose backward takes more passes over x, is faster than a
# node of Python's: 0.84 of the time of forward and backward at 2**12, 0.87 at 2**14, 1.08 at 2**16.
_FEW_ELEMENTS = 2**14
_SUMMED_AS_THEY_ARE = (torch.float32, torch.float64)  # the types of the arithmetic


def _is_usual(x: Tensor) -> bool:
    """Whether PyTorch's calls do on x what the ops do."""
    return _on_cpu and x.is_cpu and type(x) is Tensor and x.is_contiguous()


def _fit(x: Tensor, index: Tensor, slot: Tensor) -> bool:
    """Whether the rows fit x, as far as that can be told in one step; it is for nearly every call.

    On small tensors looking takes longer than the work.
    """
    shape = x.shape
    fit = x.is_cpu and are_trusted(index, slot) and shape and slot.numel() == shape[0]
    return bool(fit) and not checks.transforms_active()


def _check_rows_of(x: Tensor, index: Tensor, slot: Tensor) -> None:
    if not _fit(x, index, slot):
        checks.refuse_functorch()
        checks.check_rows_tensor(x, "x")
        checks.check_kept_rows(x, index, slot)
        check_row_values(index, slot)


@untraced
def compact(
    x: Tensor, index: Tensor, slot: Tensor, with_stream: bool, inplace: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    _check_rows_of(x, index, slot)
    if x.numel() <= _FEW_ELEMENTS and not inplace and _is_usual(x):
        return x.index_select(0, index), x
    stream = _stream_of(x, with_stream, inplace)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _compact_op(x, index), x.detach() if stream is Stream.ALIAS else x
    outputs = _compact_rows_apply(x, index, slot, stream)
    return (outputs, x) if stream is Stream.NONE else outputs


@untraced
def open_rows(x: Tensor, index: Tensor, slot: Tensor, inplace: bool) -> tuple[Tensor, Tensor, bool]:
    _check_rows_of(x, index, slot)
    stream = _stream_of(x, True, inplace)
    if stream is Stream.NONE or not _needs_grad(x):
        return _compact_rows(x, index, slot), x, False
    return *_open_rows_apply(x, index, slot, stream), True


@untraced
def scatter(
    residual: Tensor, out: Tensor, index: Tensor, slot: Tensor, opened: bool, inplace: bool
) -> Tensor:
    checks.refuse_functorch()
    checks.check_scatter(residual, out, index, slot)
    check_row_values(index, slot)
    if not inplace:
        residual = residual.to(torch.promote_types(residual.dtype, out.dtype))
    args = residual, out.to(residual.dtype), index, slot
    if inplace:
        check_inplace(residual, out)
        check_no_overlap(residual, args[1])
        _scatter_apply(*args, opened, True)
        return residual
    if not _needs_grad(residual, out):
        return _scatter_op(*args)  # type: ignore[no-any-return]
    return _scatter_apply(*args, opened, False)  # type: ignore[no-any-return]


@untraced
def compact_norm(
    x: Tensor,
    index: Tensor,
    slot: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    with_stream: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    checks.refuse_functorch()
    checks.check_norm(x, normalized_shape, weight, bias)
    checks.check_kept_rows(x, index, slot)
    check_row_values(index, slot)
    stream = _stream_of(x, with_stream, inplace)
    options = tuple(normalized_shape), eps, rms, dtype
    if not _needs_grad(x, weight, bias):
        shape = options[0]
        normed = _compact_norm_op(x, index, shape, weight, bias, eps, rms, dtype, False)[0]
        return normed, x.detach() if stream is Stream.ALIAS else x
    outputs = _compact_norm_apply(x, weight, bias, index, slot, *options, stream)
    return outputs[0], x if stream is Stream.NONE else outputs[2]


@untraced
def scatter_add(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    inplace: bool,
    relu: bool,
) -> Tensor:
    is_plain_sum = (
        layer_scale is None
        and row_weight is None
        and not (inplace or relu)
        and (dtype := residual.dtype) in _SUMMED_AS_THEY_ARE
        and type(out) is Tensor
        and out.dtype is dtype
        and out.is_cpu
        and _is_usual(residual)
    )
    if not (
        is_plain_sum
        and _fit(residual, index, slot)
        and out.shape == (index.numel(), *residual.shape[1:])
    ):
        check_scatter_add(residual, out, index, slot, layer_scale, row_weight)
    scale = float(scale)
    if is_plain_sum:
        return _add_kept_rows_apply(residual, out, index, scale)  # type: ignore[no-any-return]
    if inplace:
        tensors = residual, out, layer_scale, row_weight
        check_sum_inplace(*tensors)
        _scatter_add_apply(*tensors, index, slot, scale, Sum.INPLACE)
        return residual.relu_() if relu else residual
    if _needs_grad(residual, out, layer_scale, row_weight):
        kind = Sum.RELU if relu else Sum.PLAIN
        return _scatter_add_apply(  # type: ignore[no-any-return]
            residual, out, layer_scale, row_weight, index, slot, scale, kind
        )
    args = residual, out, index, slot, layer_scale, row_weight, scale
    y: Tensor = _scatter_add_relu_op(*args)[0] if relu else _scatter_add_op(*args)
    return y


@untraced
def check_scatter_add(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
) -> None:
    checks.refuse_functorch()
    checks.check_scatter_add(residual, out, index, slot, layer_scale, row_weight)
    check_row_values(index, slot)


@untraced
def check_inplace(x: Tensor, *read: Tensor | None) -> None:
    """Raise what PyTorch raises where x must not be written in place, from what is read."""
    check_no_internal_overlap(x)
    if x.is_inference() and not torch.is_inference_mode_enabled():
        # PyTorch's operations raise this when they have written.
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed"
        )
    if _needs_grad(x, *read) and _is_refused(x):
        x.mul_(x.new_ones(()).requires_grad_())  # raises PyTorch's own error


@untraced
def check_sum_inplace(residual: Tensor, *read: Tensor | None) -> None:
    """Raise what PyTorch raises where what was computed from these must not be added in place."""
    check_inplace(residual, *read)
    for each in read:
        check_no_overlap(residual, each)


def _is_refused(x: Tensor) -> bool:
    """As in PyTorch's own check: leaves, views of leaves, and views with a history of their own."""
    if x.requires_grad and x.is_leaf:
        return True
    if not x._is_view():
        return False
    default = torch._C._autograd.CreationMeta.DEFAULT
    is_odd: bool = torch._C._autograd._get_creation_meta(x) != default
    base = x._base
    return is_odd or (x.requires_grad and base is not None and base.is_leaf)
