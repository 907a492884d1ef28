"""What `_C.pyi` offers, in PyTorch code that Inductor fuses.

``ops.kernels()`` hands these functions out while torch.compile or torch.export traces, and under
forward-mode AD. Arithmetic is in float32 (float64 for float64 data) with one rounding at the end,
as in the kernels. In a graph the movement of rows has backwards of its own; every other derivative
is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .checks import acc_type, check_layer_scale, check_normalized_shape
from .traceable import scatter_add_dtype


def _per_row(values: Tensor, dims: int) -> Tensor:
    """One value a row, to broadcast against rows of a tensor with `dims` dimensions."""
    return values.view([-1] + [1] * (dims - 1))


def _at_slot(kept: Tensor, slot: Tensor) -> Tensor:
    """[B, ...]: for every row of the batch its kept row, zeros for a dropped one.

    A gather: a scatter takes atomics as soon as the compiler can't see that rows are unique. The
    row of zeros behind the kept ones is never made, Inductor turns it into a masked load; it keeps
    the gather inside of memory where no row is kept.
    """
    padded = F.pad(kept, [0, 0] * (kept.dim() - 1) + [0, 1])
    return padded[torch.where(slot < 0, kept.shape[0], slot)]


class _Compact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return _at_slot(grad, slot), None, None


def _sum(stream: Tensor, kept: Tensor, slot: Tensor) -> Tensor:
    # Not `stream + 0` for a dropped row: -0 has to stay what it is.
    return torch.where(_per_row(slot >= 0, stream.dim()), stream + _at_slot(kept, slot), stream)


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, kept: Tensor, index: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return _sum(stream, kept, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad, grad[index], None, None


class _ReplaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(index, slot)
        return _replaced(residual, out, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        index, slot = ctx.saved_tensors
        kept = _per_row(slot >= 0, grad.dim())
        return torch.where(kept, 0.0, grad), grad[index], None, None


def _replaced(residual: Tensor, out: Tensor, slot: Tensor) -> Tensor:
    return torch.where(_per_row(slot >= 0, residual.dim()), _at_slot(out, slot), residual)


# Outside of a graph, PyTorch derives the same expressions in every mode that it has.


def _gather(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    """The kept rows."""
    return _Compact.apply(x, index, slot) if is_compiling() else x[index]


def _add_rows(stream: Tensor, kept: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    """`stream` with `kept` added to its kept rows; both have the type of the arithmetic."""
    return _AddRows.apply(stream, kept, index, slot) if is_compiling() else _sum(stream, kept, slot)


def compact(
    x: Tensor, index: Tensor, slot: Tensor, with_stream: bool, inplace: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    # The gradient of x has two sources, the kept rows and the stream; in a graph their sum fuses.
    return _gather(x, index, slot), x


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
    acc = acc_type(x.dtype)
    shape = list(normalized_shape)
    check_normalized_shape(x, shape)
    kept = _gather(x, index, slot).to(acc)
    weight = None if weight is None else weight.to(acc)
    bias = None if bias is None else bias.to(acc)
    if rms:
        normed = F.rms_norm(kept, shape, weight, eps)
    else:
        normed = F.layer_norm(kept, shape, weight, bias, eps)
    return normed.to(dtype), x


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
    check_scatter_add(residual, out, index, slot, layer_scale, row_weight)
    dtype = scatter_add_dtype(residual, out, layer_scale)
    acc = acc_type(residual.dtype, out.dtype, dtype)
    scaled = out.to(acc) * scale
    if layer_scale is not None:
        scaled = scaled * layer_scale.to(acc)
    if row_weight is not None:
        scaled = scaled * _per_row(row_weight.to(acc), out.dim())
    y = _add_rows(residual.to(acc), scaled, index, slot)
    y = y.to(residual.dtype if inplace else dtype)
    if relu:  # of what is stored: a positive sum may have been rounded to zero
        y = torch.relu(y)
    return residual.copy_(y) if inplace else y


def open_rows(x: Tensor, index: Tensor, slot: Tensor, inplace: bool) -> tuple[Tensor, Tensor, bool]:
    return _gather(x, index, slot), x, False


def scatter(
    residual: Tensor, out: Tensor, index: Tensor, slot: Tensor, opened: bool, inplace: bool
) -> Tensor:
    _check_out(residual, out, index)
    if not inplace:
        residual = residual.to(torch.promote_types(residual.dtype, out.dtype))
    out = out.to(residual.dtype)
    if is_compiling():
        y: Tensor = _ReplaceRows.apply(residual, out, index, slot)
    else:
        y = _replaced(residual, out, slot)
    return residual.copy_(y) if inplace else y


def check_inplace(x: Tensor) -> None:
    """The write itself is refused where PyTorch forbids it."""


def check_scatter_add(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
) -> None:
    """Only shapes that broadcasting would let pass; PyTorch refuses the rest."""
    _check_out(residual, out, index)
    if layer_scale is not None:
        check_layer_scale(layer_scale, out.shape[1:])


def _check_out(residual: Tensor, out: Tensor, index: Tensor) -> None:
    if out.dim() != residual.dim() or out.shape != (index.shape[0], *residual.shape[1:]):
        raise ValueError(
            f"out: expected {index.shape[0]} kept rows of residual's shape "
            f"{list(residual.shape)}, got {list(out.shape)} (the branch must return one row for "
            "each kept row, in order, of the residual's shape)"
        )
