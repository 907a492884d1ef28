"""The row ops in PyTorch code: correct on every device, and what the kernels are compared with.

Each function has the signature of the op of the same name (``contract.py``), whose checks have run
before it. Arithmetic is in float32 (float64 for float64 data) with one rounding at the end, as in
the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import acc_type, bytes_of_bits


def empty_rows(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """`rows` rows like those of `x`, its dimensions in the same order in memory."""
    shape = (rows, *x.shape[1:])
    if x.is_contiguous():
        return x.new_empty(shape, dtype=dtype)
    if rows == x.shape[0]:
        return torch.empty_like(x, dtype=dtype)
    # PyTorch's rule for the order of dimensions, asked without allocating anything.
    like = torch.empty_strided(shape, x.stride(), device="meta")
    return x.new_empty_strided(shape, torch.empty_like(like).stride(), dtype=dtype)


def _in_order_of(layout: Tensor, x: Tensor) -> Tensor:
    """`x` with its dimensions in the order in memory of `layout`."""
    return x if layout.is_contiguous() else empty_rows(layout, x.shape[0], x.dtype).copy_(x)


def compact_rows(x: Tensor, index: Tensor) -> Tensor:
    return _in_order_of(x, x.index_select(0, index))


def compact_rows_into(kept: Tensor, x: Tensor, index: Tensor) -> None:
    kept.copy_(x.index_select(0, index))


def expand_rows(kept: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    rows = kept.new_zeros((slot.shape[0], *kept.shape[1:]))
    return _in_order_of(kept, rows.index_copy(0, index, kept))


def scatter_rows(residual: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    return residual.clone().index_copy_(0, index, out)


def scatter_rows_(residual: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> None:
    residual.index_copy_(0, index, out)


def scatter_add_dtype(residual: Tensor, out: Tensor, layer_scale: Tensor | None) -> torch.dtype:
    """The dtype of ``residual + layer_scale * out``."""
    dtype = residual.dtype
    if out.dtype is not dtype:
        dtype = torch.promote_types(dtype, out.dtype)
    if layer_scale is None or layer_scale.dim() == 0:
        return dtype
    return torch.promote_types(dtype, layer_scale.dtype)


def _per_row(row_weight: Tensor, rows: Tensor) -> Tensor:
    """[k] as [k, 1, ...], in the dtype of `rows`, to multiply them with."""
    return row_weight.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))


def _scaled(
    out: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    scaled = out if out.dtype is dtype else out.to(dtype)
    if scale != 1.0:
        scaled = scaled * scale
    if row_weight is not None:
        scaled = scaled * _per_row(row_weight, scaled)
    return scaled if layer_scale is None else scaled * layer_scale.to(dtype)


def is_plain_sum(
    residual: Tensor, out: Tensor, layer_scale: Tensor | None, row_weight: Tensor | None
) -> bool:
    """Whether PyTorch's index_add is all there is to it, on the CPU.

    It rounds once where the data have the type of the arithmetic, and loses other layouts.
    """
    dtype = residual.dtype
    return (
        layer_scale is None
        and row_weight is None
        and dtype is out.dtype
        and (dtype is torch.float32 or dtype is torch.float64)
        and residual.is_cpu
        and residual.is_contiguous()
    )


def _sum_of_kept(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    acc: torch.dtype,
) -> Tensor:
    """The kept rows of the result, in the type of the arithmetic."""
    return residual.index_select(0, index).to(acc) + _scaled(
        out, layer_scale, row_weight, scale, acc
    )


def scatter_add_rows(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> Tensor:
    if is_plain_sum(residual, out, layer_scale, row_weight):
        return residual.index_add(0, index, out, alpha=scale)
    dtype = scatter_add_dtype(residual, out, layer_scale)
    kept = _sum_of_kept(residual, out, index, layer_scale, row_weight, scale, acc_type(dtype))
    return residual.to(dtype, copy=True).index_copy_(0, index, kept.to(dtype))


def scatter_add_rows_(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> None:
    if is_plain_sum(residual, out, layer_scale, row_weight):
        residual.index_add_(0, index, out, alpha=scale)
        return
    acc = acc_type(residual.dtype, out.dtype)
    kept = _sum_of_kept(residual, out, index, layer_scale, row_weight, scale, acc)
    residual.index_copy_(0, index, kept.to(residual.dtype))


def gradient_of_out(
    grad: Tensor,
    index: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """The first result of scatter_add_rows_backward where no sum is wanted."""
    kept = compact_rows(grad, index)
    acc = acc_type(grad.dtype, dtype)
    if layer_scale is None and row_weight is None and kept.dtype is acc and acc is dtype:
        return kept.mul_(scale)
    d_out = _scaled(kept, layer_scale, row_weight, scale, acc)
    return d_out if acc is dtype else d_out.to(dtype)


def scatter_add_rows_backward(
    grad: Tensor,
    out: Tensor | None,
    index: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    d_layer_scale, d_row_weight = grad.new_empty(0), grad.new_empty(0)
    if out is None:
        d_out = gradient_of_out(grad, index, layer_scale, row_weight, scale, dtype)
        return d_out, d_layer_scale, d_row_weight
    acc = acc_type(grad.dtype, dtype)
    kept = compact_rows(grad, index)
    d_out = _scaled(kept, layer_scale, row_weight, scale, acc).to(dtype)
    if wanted[0] and layer_scale is not None:
        product = _scaled(kept, None, row_weight, scale, acc) * out.to(acc)
        total = product.sum_to_size(layer_scale.shape)
        # In the strides of layer_scale, as the kernels write it.
        d_layer_scale = torch.empty_like(layer_scale).copy_(total)
    if wanted[1] and row_weight is not None:
        product = _scaled(kept, layer_scale, None, scale, acc) * out.to(acc)
        total = product.sum_to_size((kept.shape[0], *[1] * (kept.dim() - 1)))
        d_row_weight = total.flatten().to(row_weight.dtype)
    return _in_order_of(out, d_out), d_layer_scale, d_row_weight


def scatter_add_rows_backward_into(
    d_out: Tensor,
    grad: Tensor,
    out: Tensor | None,
    index: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    args = out, index, layer_scale, row_weight, scale, d_out.dtype, wanted
    gradient, d_layer_scale, d_row_weight = scatter_add_rows_backward(grad, *args)
    d_out.copy_(gradient)
    return d_layer_scale, d_row_weight


def row_format(x: Tensor) -> torch.memory_format:
    """The format that `x` has; contiguous where it has none (as in ``csrc/row_ops.h``)."""
    if not x.is_contiguous():
        for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dims and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def empty_bits(x: Tensor) -> Tensor:
    """Room for a bit for every element of the rows of `x`."""
    return x.new_empty((x.shape[0], bytes_of_bits(x)), dtype=torch.uint8)


def _packed(flags: Tensor) -> Tensor:
    """Bools [B, n] as bits: uint8 [B, ceil(n / 8)], the first in the lowest bit."""
    batch, n = flags.shape
    bytes_of_row = -(-n // 8)
    padded = F.pad(flags, (0, 8 * bytes_of_row - n)).view(batch, bytes_of_row, 8)
    value = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded * value).sum(2, dtype=torch.uint8)


def _unpacked(bits: Tensor, n: int) -> Tensor:
    """The inverse of _packed."""
    value = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, :, None] & value).flatten(1)[:, :n] != 0


def scatter_add_relu_rows(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    y = scatter_add_rows(residual, out, index, slot, layer_scale, row_weight, scale)
    blocked = y <= 0  # not a NaN, whose gradient passes, as in PyTorch
    y.masked_fill_(blocked, 0.0)  # -0 as well
    passes = ~(blocked if row_format(y) is torch.contiguous_format else blocked.movedim(1, -1))
    return y, _packed(passes.reshape(y.shape[0], math.prod(y.shape[1:])))


def scatter_add_relu_rows_backward(
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
    passes = _unpacked(positive, math.prod(grad.shape[1:]))
    if memory_format is torch.contiguous_format:
        passes = passes.reshape(grad.shape)
    else:
        passes = passes.reshape(grad.movedim(1, -1).shape).movedim(-1, 1)
    d_residual = torch.empty_like(grad, memory_format=memory_format)
    d_residual.copy_(grad).masked_fill_(~passes, 0.0)
    if not wants_out:
        return d_residual, grad.new_empty(0, dtype=dtype)
    acc = acc_type(grad.dtype, dtype)
    kept = compact_rows(d_residual, index)
    d_out = _scaled(kept, layer_scale, row_weight, scale, acc).to(dtype)
    return d_residual, _in_order_of(kept, d_out)


def compact_mask(mask: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    slot = torch.where(mask, mask.cumsum(0) - 1, -1)
    if k is None:
        return mask.nonzero().flatten(), slot
    _check_count(mask, k)
    return torch.nonzero_static(mask, size=k).flatten(), slot


def _check_count(mask: Tensor, k: int) -> None:
    """Refuse a mask whose count is not k. Off the CPU nothing is read back: the device stops."""
    expected = "k: expected the number of true entries of mask"
    if mask.device.type != "cpu":
        torch._assert_async(mask.sum() == k, f"{expected}, got {k}")
    elif (count := int(mask.sum())) != k:
        raise ValueError(f"{expected}, {count}, got {k}")


def _dims(normalized_shape: Sequence[int]) -> list[int]:
    return list(range(-len(normalized_shape), 0))


def compact_norm(
    x: Tensor,
    index: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    keep_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = acc_type(x.dtype)
    dims = _dims(normalized_shape)
    kept = x.index_select(0, index)
    centered = kept.to(acc)
    mean = x.new_empty(0, dtype=acc)
    if not rms:
        line_mean = centered.mean(dims, keepdim=True)
        centered = centered - line_mean
        mean = line_mean.flatten()
    rstd = (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    normed = centered * rstd
    if weight is not None:
        normed = normed * weight.to(acc)
    if bias is not None:
        normed = normed + bias.to(acc)
    return normed.to(dtype), kept if keep_rows else x.new_empty(0), mean, rstd.flatten()


def compact_norm_into(
    normed: Tensor,
    x: Tensor,
    index: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    keep_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    args = normalized_shape, weight, bias, eps, rms, normed.dtype, keep_rows
    value, kept, mean, rstd = compact_norm(x, index, *args)
    normed.copy_(value)
    return kept, mean, rstd


def compact_norm_backward(
    d_stream: Tensor | None,
    d_normed: Tensor,
    kept: Tensor,
    mean: Tensor,
    rstd: Tensor,
    index: Tensor,
    slot: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    rms: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_type(kept.dtype)
    dims = _dims(normalized_shape)
    stat_shape = kept.shape[: kept.dim() - len(dims)] + (1,) * len(dims)
    rstd = rstd.view(stat_shape)
    x_hat = kept.to(acc) * rstd if rms else (kept.to(acc) - mean.view(stat_shape)) * rstd
    d = d_normed.to(acc)
    empty = kept.new_empty(0, dtype=acc)
    d_x, d_weight, d_bias = kept.new_empty(0), empty, empty.clone()
    if wanted[0]:
        d_x_hat = d if weight is None else d * weight.to(acc)
        d_kept = d_x_hat - x_hat * (d_x_hat * x_hat).mean(dims, keepdim=True)
        if not rms:
            d_kept = d_kept - d_x_hat.mean(dims, keepdim=True)
        d_kept = d_kept * rstd
        if d_stream is None:
            d_x = expand_rows(d_kept.to(kept.dtype), index, slot).contiguous()
        else:
            d_x = scatter_add_rows(d_stream, d_kept, index, slot, None, None, 1.0)
            d_x = d_x.to(kept.dtype).contiguous()
    if wanted[1]:
        d_weight = (d * x_hat).sum_to_size(normalized_shape)
    if wanted[2]:
        d_bias = d.sum_to_size(normalized_shape)
    return d_x, d_weight, d_bias


OPS: dict[str, Callable[..., object]] = {
    function.__name__: function
    for function in (
        compact_rows,
        compact_rows_into,
        expand_rows,
        scatter_rows,
        scatter_rows_,
        scatter_add_rows,
        scatter_add_rows_,
        scatter_add_rows_backward,
        scatter_add_rows_backward_into,
        scatter_add_relu_rows,
        scatter_add_relu_rows_backward,
        compact_norm,
        compact_norm_into,
        compact_norm_backward,
        compact_mask,
    )
}
