"""Arguments for every dispatcher op, made from a `Case`, and what the op should return for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Inputs
from layouts import LAYOUTS
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from sdkernels.backends import traceable

Arguments = tuple[Any, ...]


def _rows_like(case: Case, rows: int, dtype: torch.dtype, layout: str) -> Tensor:
    values = torch.randn((rows, *case.shape[1:]), generator=case.generator()).to(dtype)
    return LAYOUTS[layout if rows else "contiguous"](values)


def _norm_fields(inputs: Inputs) -> tuple[list[int], Tensor | None, Tensor | None, float, bool]:
    norm = inputs.norm
    assert norm is not None
    bias = getattr(norm, "bias", None)
    detached = [None if p is None else p.detach() for p in (norm.weight, bias)]
    return list(norm.normalized_shape), *detached, norm.eps, isinstance(norm, nn.RMSNorm)


def _statistics(kept: Tensor, dims: list[int], rms: bool) -> tuple[Tensor, Tensor]:
    """The mean (empty for RMSNorm), flat, and the variance or mean square of each line."""
    if rms:
        return kept.new_empty(0), kept.square().mean(dims)
    mean = kept.mean(dims, keepdim=True)
    return mean.flatten(), (kept - mean).square().mean(dims)


def arguments(op: str, case: Case, device: torch.device | str = "cpu") -> Arguments:
    """The arguments of `op` in the setting of `case`."""
    inputs = case.inputs(device)
    x, rows = inputs.x.detach(), inputs.rows
    index, slot = rows.index, rows.slot
    row_weight = None if rows.weight is None else rows.weight.detach()
    layer_scale = None if inputs.layer_scale is None else inputs.layer_scale.detach()
    kept = _rows_like(case, case.kept, case.dtype, case.layout).to(device)
    out = _rows_like(case, case.kept, case.branch_dtype, case.grad_layout).to(device)
    if op == "compact_rows":
        return x, index
    if op == "compact_rows_into":
        return torch.full_like(kept, 7.0, memory_format=torch.contiguous_format), x, index
    if op == "expand_rows":
        return kept, index, slot
    if op in ("scatter_rows", "scatter_rows_"):
        given = _rows_like(case, case.kept, case.dtype, case.grad_layout).to(device)
        return x.clone() if op.endswith("_") else x, given, index, slot
    if op == "scatter_add_rows":
        return x, out, index, slot, layer_scale, row_weight, rows.scale
    if op == "scatter_add_rows_":
        return x.clone(), out, index, slot, layer_scale, row_weight, rows.scale
    if op == "scatter_add_rows_backward":
        wanted = [layer_scale is not None, row_weight is not None]
        given = out if any(wanted) else None
        dtype = case.branch_dtype
        return inputs.grad, given, index, layer_scale, row_weight, rows.scale, dtype, wanted
    if op == "scatter_add_rows_backward_into":
        _, given, *options = arguments("scatter_add_rows_backward", case, device)
        *options, dtype, wanted = options
        written = torch.full((case.kept, *x.shape[1:]), 7.0, dtype=dtype, device=device)
        return written, inputs.grad, given, *options, wanted
    if op == "scatter_add_relu_rows":
        return x, out, index, slot, layer_scale, row_weight, rows.scale
    if op == "scatter_add_relu_rows_backward":
        bits = -(-math.prod(x.shape[1:]) // 8)
        positive = torch.randint(256, (case.batch, bits), generator=case.generator())
        positive = positive.to(torch.uint8).to(device)
        memory_format = traceable.row_format(x)
        wants_out = case.layer_scale != "1"
        given = layer_scale, row_weight, rows.scale, case.branch_dtype, memory_format, wants_out
        return inputs.grad, positive, index, slot, *given
    if op == "compact_mask":
        return slot >= 0, case.kept if case.weighted else None
    shape, weight, bias, eps, rms = _norm_fields(inputs)
    # In half precision, or beside it under autocast, the norm may write another dtype than x's.
    dtype = case.dtype if torch.float64 in (case.dtype, case.branch_dtype) else case.branch_dtype
    if op == "compact_norm":
        return x, index, shape, weight, bias, eps, rms, dtype, True
    if op == "compact_norm_into":
        normed = torch.full((case.kept, *x.shape[1:]), 7.0, dtype=dtype, device=device)
        return normed, x, index, shape, weight, bias, eps, rms, True
    d_stream = None if case.scale == 1.0 else inputs.grad.to(case.dtype)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    dims = list(range(-len(shape), 0))
    mean, variance = _statistics(kept.to(acc), dims, rms)
    rstd = (variance + eps).rsqrt().flatten()
    wanted = [True, weight is not None, bias is not None]
    d_normed = out.to(dtype)
    return d_stream, d_normed, kept, mean, rstd, index, slot, shape, weight, rms, wanted


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def _weighted(rows: Tensor, row_weight: Tensor | None) -> Tensor:
    if row_weight is None:
        return rows
    return rows * row_weight.double().view(-1, *[1] * (rows.dim() - 1))


def _scatter(x: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    return x.double().index_copy(0, index, out.double())


def _scatter_add(
    x: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> Tensor:
    added = _weighted(out.double() * scale, row_weight)
    if layer_scale is not None:
        added = added * layer_scale.double()
    return x.double().index_add(0, index, added)


def _scatter_add_backward(
    grad: Tensor,
    out: Tensor | None,
    index: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    scaled = grad.double()[index] * scale
    unweighted = scaled if layer_scale is None else scaled * layer_scale.double()
    d_layer_scale = d_row_weight = grad.new_empty(0).double()
    if wanted[0]:
        d_layer_scale = _weighted(scaled, row_weight) * out.double()
        d_layer_scale = d_layer_scale.sum_to_size(layer_scale.shape)
    if wanted[1]:
        product = unweighted * out.double()
        d_row_weight = product.sum_to_size(len(index), *[1] * (out.dim() - 1)).flatten()
    return _weighted(unweighted, row_weight), d_layer_scale, d_row_weight


def _in_order_of_bits(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Elements as their bits are counted: [B, elements of a row]."""
    if memory_format is not torch.contiguous_format:
        x = x.movedim(1, -1)
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _bits(positive: Tensor, count: int) -> Tensor:
    """[B, count] of bool, bit by bit."""
    bits = [positive // 2**bit % 2 == 1 for bit in range(8)]
    return torch.stack(bits, 2).flatten(1)[:, :count]


def _scatter_add_relu(x: Tensor, *args: Any) -> tuple[Tensor]:
    return (_scatter_add(x, *args).relu(),)


def _scatter_add_relu_backward(
    grad: Tensor,
    positive: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    wants_out: bool,
) -> tuple[Tensor, Tensor]:
    passes = torch.empty_like(grad, dtype=torch.bool)
    bits = _bits(positive, math.prod(grad.shape[1:]))
    if memory_format is torch.contiguous_format:
        passes.copy_(bits.view(grad.shape))
    else:
        passes.movedim(1, -1).copy_(bits.view(grad.movedim(1, -1).shape))
    d_residual = torch.where(passes, grad.double(), 0.0)
    if not wants_out:
        return d_residual, grad.new_empty(0).double()
    nothing = [False, False]
    args = (index, layer_scale, row_weight, scale, dtype, nothing)
    return d_residual, _scatter_add_backward(d_residual, None, *args)[0]


def check_bits(y: Tensor, positive: Tensor) -> None:
    """One bit for every element of y that is positive or NaN, and none behind them."""
    elements = _in_order_of_bits(y, traceable.row_format(y))
    n = elements.shape[1]
    assert positive.shape == (y.shape[0], -(-n // 8))
    assert torch.equal(_bits(positive, n), ~(elements <= 0))
    assert not _bits(positive, 8 * positive.shape[1])[:, n:].any()


def _norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> Tensor:
    if rms:
        return F.rms_norm(x, shape, _double(weight), eps)
    return F.layer_norm(x, shape, _double(weight), _double(bias), eps)


def _compact_norm(
    x: Tensor,
    index: Tensor,
    shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    keep_rows: bool,
) -> tuple[Tensor, ...]:
    kept = x.double()[index]
    mean, variance = _statistics(kept, list(range(-len(shape), 0)), rms)
    normed = _norm(kept, shape, weight, bias, eps, rms)
    return normed, kept, mean, (variance + eps).rsqrt().flatten()


def _compact_norm_backward(
    d_stream: Tensor | None,
    d_normed: Tensor,
    kept: Tensor,
    mean: Tensor,
    rstd: Tensor,
    index: Tensor,
    slot: Tensor,
    shape: list[int],
    weight: Tensor | None,
    rms: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    kept = kept.double().requires_grad_()
    gamma = kept.new_ones(shape) if weight is None else weight
    gamma = gamma.double().requires_grad_()
    stat_shape = kept.shape[: kept.dim() - len(shape)] + (1,) * len(shape)
    dims = list(range(-len(shape), 0))
    variance = _statistics(kept, dims, rms)[1]
    eps = rstd.double().pow(-2).view(stat_shape) - variance.detach().view(stat_shape)
    centered = kept if rms else kept - kept.mean(dims, keepdim=True)
    x_hat = centered * (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    d_kept, d_gamma = torch.autograd.grad((x_hat * gamma), (kept, gamma), d_normed.double())
    base = kept.new_zeros((slot.shape[0], *kept.shape[1:])) if d_stream is None else d_stream
    nothing = kept.new_empty(0).detach()
    return (
        base.double().index_add(0, index, d_kept),
        d_gamma if wanted[1] else nothing,
        d_normed.double().sum_to_size(shape) if wanted[2] else nothing,
    )


def _compact_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    kept = [row for row, keep in enumerate(mask.tolist()) if keep]
    slots = [kept.index(row) if row in kept else -1 for row in range(len(mask))]
    return tuple(torch.tensor(rows, device=mask.device).double() for rows in (kept, slots))


# What each op computes, in float64.
EXPECTED: dict[str, Callable[..., Any]] = {
    "compact_rows": lambda x, index: x.double()[index],
    "compact_rows_into": lambda kept, x, index: x.double()[index],
    "expand_rows": lambda kept, index, slot: kept.new_zeros(
        (slot.shape[0], *kept.shape[1:]), dtype=torch.float64
    ).index_copy(0, index, kept.double()),
    "scatter_rows": _scatter,
    "scatter_rows_": _scatter,
    "scatter_add_rows": _scatter_add,
    "scatter_add_rows_": _scatter_add,
    "scatter_add_rows_backward": _scatter_add_backward,
    "scatter_add_rows_backward_into": lambda d_out, *args: _scatter_add_backward(
        *args[:-1], d_out.dtype, args[-1]
    ),
    "scatter_add_relu_rows": _scatter_add_relu,
    "scatter_add_relu_rows_backward": _scatter_add_relu_backward,
    "compact_norm": _compact_norm,
    "compact_norm_into": lambda normed, *args: _compact_norm(*args[:-1], normed.dtype, args[-1]),
    "compact_norm_backward": _compact_norm_backward,
    "compact_mask": lambda mask, k: _compact_mask(mask),
}


def call(function: Callable[..., Any], op: str, args: Arguments) -> tuple[Tensor, ...]:
    """The results of an op as a tuple; of an in-place op, what it wrote."""
    if op.endswith("_"):
        written = args[0].clone()
        assert function(written, *args[1:]) is None
        return (written,)
    if op.endswith("_into"):
        written = args[0].clone()
        results = function(written, *args[1:])
        return (written, *(results or ()))
    results = function(*args)
    if op == "scatter_add_relu_rows":
        # The bits follow from y: rounding may change the sign of a sum close to zero.
        y, positive = results
        if not isinstance(y, FakeTensor):
            check_bits(y, positive)
        return (y,)
    return results if isinstance(results, tuple) else (results,)
