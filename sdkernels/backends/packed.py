"""Several crops as one tensor of tokens, without a pass of its own: for eager code.

`open_packed` compacts (and normalizes) every crop straight into its part of one tensor, and
`close_packed` adds the parts of the branch's output to the crops. Their backwards write the parts
of one gradient. With grad mode on (double backward) they are built from differentiable pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, namespace, traceable
from .autograd import (
    Gradient,
    Stream,
    _compact_rows,
    _is_plain,
    _merge_gradients,
    _needs_grad,
    _op,
    _scatter_add_op,
    _scatter_add_op_,
    _stream_of,
    check_scatter_add,
    gradients_of_kept,
    gradients_of_norm,
)
from .overlap import check_no_overlap
from .row_values import check_row_values
from .untraced import untraced

__all__ = ["close_packed", "open_packed"]

_compact_into_op = _op("compact_rows_into")
_norm_into_op = _op("compact_norm_into")
_gradients_into_op = _op("scatter_add_rows_backward_into")
_norm_backward_op = namespace.ops.compact_norm_backward.default


class _Norm(NamedTuple):
    """A norm over the last dimension, and the dtype that it writes."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool
    dtype: torch.dtype


def _parts(values: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Each crop's part of [T, C], as [k, ..., C]."""
    parts = []
    start = 0
    for shape in shapes:
        count = prod(shape)
        parts.append(values[start : start + count].view(*shape, values.shape[1]))
        start += count
    return parts


def _tokens(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes)


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: list[tuple[Tensor, Tensor]],
        norm: _Norm | None,
        weight: Tensor | None,
        bias: Tensor | None,
        padding: int,
        streams: list[Stream],
        *xs: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        values, shapes, saved = _opened(rows, norm, padding, xs, True)
        ctx.shapes, ctx.norm, ctx.streams = shapes, norm, streams
        index, slot = zip(*rows, strict=True)
        kept, mean, rstd = zip(*saved, strict=True) if norm else ((), (), ())
        ctx.save_for_backward(weight, *index, *slot, *kept, *mean, *rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        passed = [x for x, stream in zip(xs, streams, strict=True) if stream is not Stream.NONE]
        written = [x for x, s in zip(xs, streams, strict=True) if s is Stream.INPLACE]
        if written:
            ctx.mark_dirty(*written)
            return (values, *kept, *passed)
        return (values, *kept, *(x.detach() for x in passed))

    @staticmethod
    @untraced
    def backward(ctx: Any, d_values: Gradient, *others: Gradient) -> tuple[Gradient, ...]:
        shapes, norm, crops = ctx.shapes, ctx.norm, len(ctx.shapes)
        weight, *saved = ctx.saved_tensors
        index, slot = saved[:crops], saved[crops : 2 * crops]
        kept, mean, rstd = (saved[i * crops : (i + 1) * crops] for i in (2, 3, 4))
        d_kepts: list[Gradient] = list(others[:crops]) if norm else [None] * crops
        passed = iter(others[crops:] if norm else others)
        d_streams = [None if s is Stream.NONE else next(passed) for s in ctx.streams]
        d_parts: list[Gradient] = [None] * crops
        if d_values is not None:
            d_parts = list(_parts(d_values.contiguous(), shapes))
        fused = not torch.is_grad_enabled()
        d_xs: list[Gradient] = []
        d_weight: Gradient = None
        d_bias: Gradient = None
        for i in range(crops):
            d_part, d_stream, d_kept = d_parts[i], d_streams[i], d_kepts[i]
            wanted = [ctx.needs_input_grad[6 + i], *ctx.needs_input_grad[2:4]]
            d_w: Gradient = None
            d_b: Gradient = None
            if norm is None or d_part is None:
                if norm is None:
                    d_kept = d_part
                d_x = _merge_gradients(d_kept, d_stream, index[i], slot[i])
            elif fused and d_kept is None:
                shape = [kept[i].shape[-1]]
                args = (d_part, kept[i], mean[i], rstd[i], index[i], slot[i], shape, weight)
                backward = (
                    traceable.compact_norm_backward if _is_plain(kept[i]) else _norm_backward_op
                )
                found = backward(d_stream, *args, norm.rms, wanted)
                d_x, d_w, d_b = (g if w else None for g, w in zip(found, wanted, strict=True))
            else:
                shape = [kept[i].shape[-1]]
                through, d_w, d_b = gradients_of_norm(
                    kept[i], d_part, shape, weight, ctx.bias_dtype, norm.eps, norm.rms
                )
                d_kept = through if d_kept is None else d_kept + through
                d_x = _merge_gradients(d_kept, d_stream, index[i], slot[i])
            d_xs.append(d_x)
            d_weight, d_bias = _sum(d_weight, d_w), _sum(d_bias, d_b)
        return None, None, d_weight, d_bias, None, None, *d_xs


def _sum(a: Gradient, b: Gradient) -> Gradient:
    return b if a is None else a if b is None else a + b


def _opened(
    rows: list[tuple[Tensor, Tensor]],
    norm: _Norm | None,
    padding: int,
    xs: Sequence[Tensor],
    keep_rows: bool,
) -> tuple[Tensor, list[tuple[int, ...]], list[tuple[Tensor, Tensor, Tensor]]]:
    """The packed tensor, the parts' shapes, and what the norm's backward needs."""
    shapes = [(index.shape[0], *x.shape[1:-1]) for (index, _), x in zip(rows, xs, strict=True)]
    tokens = _tokens(shapes)
    dtype = xs[0].dtype if norm is None else norm.dtype
    values = xs[0].new_empty((tokens + padding, xs[0].shape[-1]), dtype=dtype)
    if padding:
        values[tokens:].zero_()
    saved = []
    for part, x, (index, _) in zip(_parts(values, shapes), xs, rows, strict=True):
        if norm is None:
            _compact_into_op(part, x, index)
            continue
        args = [x.shape[-1]], norm.weight, norm.bias, norm.eps, norm.rms, keep_rows
        saved.append(_norm_into_op(part, x, index, *args))
    return values, shapes, saved


@untraced
def open_packed(
    xs: Sequence[Tensor],
    index: Sequence[Tensor],
    slot: Sequence[Tensor],
    normalizes: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    padding: int,
    with_stream: Sequence[bool],
    inplace: bool,
) -> tuple[Tensor, list[Tensor]]:
    """[T, C]: the kept rows of all crops, normalized, with zeros behind them; and the streams."""
    checks.refuse_functorch()
    rows = list(zip(index, slot, strict=True))
    for x, numbers in zip(xs, rows, strict=True):
        checks.check_rows_tensor(x, "x")
        if normalizes:
            checks.check_norm(x, [x.shape[-1]], weight, bias)
        checks.check_kept_rows(x, *numbers)
        check_row_values(*numbers)
    norm = _Norm(weight, bias, eps, rms, dtype) if normalizes else None
    if not _needs_grad(*xs, weight, bias):
        return _opened(rows, norm, padding, xs, False)[0], list(xs)
    kinds = [_stream_of(x, w, inplace) for x, w in zip(xs, with_stream, strict=True)]
    if norm is not None:
        norm = norm._replace(
            weight=None if weight is None else weight.detach(),
            bias=None if bias is None else bias.detach(),
        )
    outputs = _Open.apply(rows, norm, weight, bias, padding, kinds, *xs)
    passed = iter(outputs[1 + (len(xs) if normalizes else 0) :])
    streams = [
        x if kind is Stream.NONE else next(passed) for x, kind in zip(xs, kinds, strict=True)
    ]
    return outputs[0], streams


class _Close(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: list[tuple[Tensor, Tensor, float]],
        inplace: bool,
        out: Tensor,
        layer_scale: Tensor | None,
        *tensors: Tensor | None,
    ) -> Any:
        ctx.set_materialize_grads(False)
        crops = len(rows)
        streams, weights = tensors[:crops], tensors[crops:]
        shapes = [(rows[i][0].shape[0], *streams[i].shape[1:-1]) for i in range(crops)]  # type: ignore[union-attr]
        ys = []
        for (index, slot, scale), stream, weight, part in zip(
            rows, streams, weights, _parts(out, shapes), strict=True
        ):
            add = _scatter_add_op_ if inplace else _scatter_add_op
            y = add(stream, part, index, slot, layer_scale, weight, scale)
            ys.append(stream if inplace else y)
        if inplace:
            ctx.mark_dirty(*streams)
        ctx.shapes, ctx.scales = shapes, [scale for *_, scale in rows]
        ctx.dtype, ctx.tokens, ctx.width = out.dtype, out.shape[0], out.shape[1]
        needs_out = ctx.needs_input_grad[3] or any(ctx.needs_input_grad[4 + crops :])
        numbers = [*(index for index, _, _ in rows), *(slot for _, slot, _ in rows)]
        ctx.save_for_backward(out if needs_out else None, layer_scale, *numbers, *weights)
        return tuple(ys)

    @staticmethod
    @untraced
    def backward(ctx: Any, *grads: Gradient) -> tuple[Gradient, ...]:
        crops = len(ctx.shapes)
        out, layer_scale, *saved = ctx.saved_tensors
        index, slot, weights = (saved[i * crops : (i + 1) * crops] for i in range(3))
        _, _, wants_out, wants_scale, *rest = ctx.needs_input_grad
        wants_weights = rest[crops:]
        nothing = [None] * crops
        if not (wants_out or wants_scale or any(wants_weights)) or all(g is None for g in grads):
            return None, None, None, None, *grads, *nothing
        fused = not torch.is_grad_enabled()
        given = next(grad for grad in grads if grad is not None)
        d_out = given.new_empty((ctx.tokens, ctx.width), dtype=ctx.dtype)
        tokens = _tokens(ctx.shapes)
        d_out[tokens:].zero_()
        parts = _parts(d_out, ctx.shapes)
        outs = [None] * crops if out is None else _parts(out, ctx.shapes)
        pieces: list[Tensor] = []
        d_layer_scale: Gradient = None
        d_weights: list[Gradient] = [*nothing]
        for i, grad in enumerate(grads):
            wanted = [wants_scale, wants_weights[i]]
            if grad is None:
                pieces.append(parts[i].zero_())
                continue
            if fused:
                given_out = outs[i] if any(wanted) else None
                args = index[i], layer_scale, weights[i], ctx.scales[i], wanted
                d_scale, d_weight = _gradients_into_op(parts[i], grad, given_out, *args)
            else:
                kept = _compact_rows(grad, index[i], slot[i])
                piece, d_scale, d_weight = gradients_of_kept(
                    kept, outs[i], layer_scale, weights[i], ctx.scales[i], ctx.dtype, wanted
                )
                pieces.append(piece)
            d_layer_scale = _sum(d_layer_scale, d_scale if wants_scale else None)
            d_weights[i] = d_weight if wanted[1] else None
        if not fused:
            flat = [piece.reshape(-1, ctx.width) for piece in pieces]
            d_out = torch.cat([*flat, d_out[tokens:]])
        return None, None, d_out if wants_out else None, d_layer_scale, *grads, *d_weights


@untraced
def close_packed(
    streams: Sequence[Tensor],
    out: Tensor,
    index: Sequence[Tensor],
    slot: Sequence[Tensor],
    scales: Sequence[float],
    layer_scale: Tensor | None,
    weights: Sequence[Tensor | None],
    inplace: bool,
) -> list[Tensor]:
    """The streams, with the parts of [T, C] added to their kept rows."""
    out = out.contiguous()
    shapes = [(i.shape[0], *stream.shape[1:-1]) for i, stream in zip(index, streams, strict=True)]
    # All of them before the first is added, which may be in place.
    parts = _parts(out.detach(), shapes)
    for stream, part, i, s, weight in zip(streams, parts, index, slot, weights, strict=True):
        check_scatter_add(stream, part, i, s, layer_scale, weight)
    if inplace:
        for stream in streams:
            for read in (out, layer_scale, *weights):
                check_no_overlap(stream, read)
    numbers = list(zip(index, slot, scales, strict=True))
    ys = _Close.apply(numbers, inplace, out, layer_scale, *streams, *weights)
    return list(streams if inplace else ys)
