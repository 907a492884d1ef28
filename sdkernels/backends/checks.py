"""What the ops check of their arguments, in the words of ``csrc/row_ops.h`` and ``norm_ops.h``.

``CHECKS`` has one function for each op, with the op's signature: it runs before every backend that
is not the extension's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .overlap import check_no_internal_overlap, check_no_overlap
from .row_values import are_trusted, check_index_values, check_row_values
from .untraced import untraced

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

# As C++ prints them.
_SCALAR_TYPES = {
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.float16: "Half",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.complex32: "ComplexHalf",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.bfloat16: "BFloat16",
}
_FORMATS = {
    torch.contiguous_format: "Contiguous",
    torch.preserve_format: "Preserve",
    torch.channels_last: "ChannelsLast",
    torch.channels_last_3d: "ChannelsLast3d",
}


def _name(dtype: torch.dtype) -> str:
    return _SCALAR_TYPES.get(dtype) or str(dtype).removeprefix("torch.").capitalize()


def acc_type(*dtypes: torch.dtype) -> torch.dtype:
    """The type of the arithmetic on data of these dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def bytes_of_bits(x: Tensor) -> int:
    """Bytes that hold a bit for every element of one row."""
    return -(-prod(x.shape[1:]) // 8)


transforms_active = torch._C._are_functorch_transforms_active


def refuse_functorch() -> None:
    if transforms_active():
        raise NotImplementedError(
            "sdkernels: torch.func transforms (grad, vjp, jvp, vmap, ...) cannot go through the "
            "compacted branch; use torch.autograd, or evaluation mode (training=False), where the "
            "op is plain PyTorch"
        )


# ---- tensors -------------------------------------------------------------------------------------


def check_rows_tensor(x: Tensor, name: str) -> None:
    if x.dim() < 1:
        raise ValueError(f"{name}: expected a tensor with a batch dimension, got 0 dimensions")


def check_floating(x: Tensor, name: str) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {_name(x.dtype)}"
        )


def check_same_device(x: Tensor, name: str, device: torch.device, reference: str) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected the device of {reference}, {device}, got {x.device}")


def check_index_tensor(index: Tensor, name: str, device: torch.device) -> None:
    if index.dtype is not torch.int64:
        raise TypeError(f"{name}: expected int64, got {_name(index.dtype)}")
    if index.dim() != 1 or not index.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor of one dimension, got shape {list(index.shape)}"
        )
    check_same_device(index, name, device, "x")


def check_kept_rows(x: Tensor, index: Tensor, slot: Tensor) -> None:
    """The kept rows against a batch."""
    if x.is_cpu and are_trusted(index, slot) and slot.shape[0] == x.shape[0]:
        return  # on the path of every call
    device = x.device
    check_index_tensor(index, "rows.index", device)
    check_index_tensor(slot, "rows.slot", device)
    batch, k = slot.shape[0], index.shape[0]
    if batch != x.shape[0]:
        raise ValueError(
            f"rows: made for a batch of {batch} rows, but dimension 0 of the tensor is {x.shape[0]}"
        )
    if k > batch:
        raise ValueError(f"rows.index: {k} kept rows of a batch of {batch}")


def check_out(residual: Tensor, out: Tensor, index: Tensor) -> None:
    """`out` must hold the kept rows of something shaped like `residual`."""
    check_floating(residual, "residual")
    check_floating(out, "out")
    check_same_device(out, "out", residual.device, "residual")
    shape, expected = out.shape, residual.shape
    if not shape or shape[0] != index.shape[0] or shape[1:] != expected[1:]:
        raise ValueError(
            f"out: expected {index.shape[0]} kept rows of residual's shape {list(expected)}, got "
            f"{list(shape)} (the branch must return one row for each kept row, in order, of the "
            "residual's shape)"
        )


def check_layer_scale(layer_scale: Tensor, row: Sequence[int]) -> None:
    """It must broadcast against one row without enlarging it."""
    sizes = zip(reversed(layer_scale.shape), reversed(row), strict=False)
    # Two comparisons: Dynamo does not find a number among symbolic ones that equal it.
    if layer_scale.dim() > len(row) or any(not (s == 1 or s == full) for s, full in sizes):
        raise ValueError(
            f"layer_scale: shape {list(layer_scale.shape)} does not broadcast against one row "
            f"of shape {list(row)}"
        )


def _check_scales(
    x: Tensor, index: Tensor, layer_scale: Tensor | None, row_weight: Tensor | None
) -> None:
    if layer_scale is not None:
        check_floating(layer_scale, "layer_scale")
        check_same_device(layer_scale, "layer_scale", x.device, "residual")
        check_layer_scale(layer_scale, x.shape[1:])
    if row_weight is not None:
        check_floating(row_weight, "rows.weight")
        check_same_device(row_weight, "rows.weight", index.device, "rows.index")
        if row_weight.shape != index.shape:
            raise ValueError(
                f"rows.weight: expected shape [{index.shape[0]}], one weight a kept row, got "
                f"{list(row_weight.shape)}"
            )


def check_scatter_add(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
) -> None:
    check_rows_tensor(residual, "residual")
    check_kept_rows(residual, index, slot)
    check_out(residual, out, index)
    _check_scales(residual, index, layer_scale, row_weight)


def check_scatter(residual: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> None:
    check_rows_tensor(residual, "residual")
    check_kept_rows(residual, index, slot)
    check_out(residual, out, index)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected a floating point type, got {_name(dtype)}")


def check_normalized_shape(x: Tensor, shape: Sequence[int]) -> None:
    """It must be the last dimensions of one row."""
    if not 0 < len(shape) < x.dim() or list(x.shape[-len(shape) :]) != list(shape):
        raise ValueError(
            f"norm: normalizes over {list(shape)}, which are not the last dimensions of one row "
            f"of x, shape {list(x.shape)}"
        )


def check_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> None:
    check_rows_tensor(x, "x")
    check_floating(x, "x")
    check_normalized_shape(x, normalized_shape)
    for parameter, name in ((weight, "norm.weight"), (bias, "norm.bias")):
        if parameter is None:
            continue
        check_floating(parameter, name)
        check_same_device(parameter, name, x.device, "x")
        if parameter.shape != tuple(normalized_shape):
            raise ValueError(
                f"{name}: expected shape {list(normalized_shape)}, got {list(parameter.shape)}"
            )


# ---- the ops -------------------------------------------------------------------------------------


def _compact_rows(x: Tensor, index: Tensor) -> None:
    check_rows_tensor(x, "x")
    check_index_tensor(index, "rows.index", x.device)
    check_index_values(index, x.shape[0])


def _check_written(y: Tensor, name: str, rows: int, x: Tensor) -> None:
    """A tensor of the caller's that is written to: all of it, in order of its dimensions."""
    check_same_device(y, name, x.device, "x")
    shape = [rows, *x.shape[1:]]
    if list(y.shape) != shape or not y.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor of shape {shape}, got {list(y.shape)}"
        )


def _compact_rows_into(kept: Tensor, x: Tensor, index: Tensor) -> None:
    _compact_rows(x, index)
    _check_written(kept, "kept", index.shape[0], x)
    if kept.dtype is not x.dtype:
        raise TypeError(f"kept: expected {_name(x.dtype)}, got {_name(kept.dtype)}")
    check_no_overlap(kept, x)


def _check_kept(kept: Tensor, index: Tensor) -> None:
    if kept.shape[0] != index.shape[0]:
        raise ValueError(f"kept: expected {index.shape[0]} rows, got {kept.shape[0]}")


def _expand_rows(kept: Tensor, index: Tensor, slot: Tensor) -> None:
    check_rows_tensor(kept, "kept")
    check_index_tensor(index, "rows.index", kept.device)
    check_index_tensor(slot, "rows.slot", kept.device)
    _check_kept(kept, index)
    check_row_values(index, slot)


def _scatter_rows(residual: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> None:
    check_scatter(residual, out, index, slot)
    if out.dtype is not residual.dtype:
        raise TypeError(
            f"out: expected residual's dtype, {_name(residual.dtype)}, got {_name(out.dtype)}"
        )
    check_row_values(index, slot)


def _scatter_rows_(residual: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> None:
    _scatter_rows(residual, out, index, slot)
    check_no_internal_overlap(residual)
    check_no_overlap(residual, out)


def _scatter_add_rows(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> None:
    check_scatter_add(residual, out, index, slot, layer_scale, row_weight)
    check_row_values(index, slot)


def _scatter_add_rows_(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> None:
    _scatter_add_rows(residual, out, index, slot, layer_scale, row_weight, scale)
    check_no_internal_overlap(residual)
    for read in (out, layer_scale, row_weight):
        check_no_overlap(residual, read)


def _scatter_add_rows_backward(
    grad: Tensor,
    out: Tensor | None,
    index: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> None:
    check_rows_tensor(grad, "grad")
    check_floating(grad, "grad")
    check_index_tensor(index, "rows.index", grad.device)
    _check_dtype(dtype)
    _check_scales(grad, index, layer_scale, row_weight)
    if (wanted[0] and layer_scale is None) or (wanted[1] and row_weight is None):
        raise ValueError("wanted: the gradient of something that was not given")
    if (out is not None) != (wanted[0] or wanted[1]):
        raise ValueError(
            "out: expected where a gradient of layer_scale or row_weight is wanted, and there only"
        )
    if out is not None:
        check_out(grad, out, index)
        if out.dtype is not dtype:
            raise TypeError(f"out: expected {_name(dtype)}, got {_name(out.dtype)}")
    check_index_values(index, grad.shape[0])


def _scatter_add_rows_backward_into(
    d_out: Tensor,
    grad: Tensor,
    out: Tensor | None,
    index: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    wanted: Sequence[bool],
) -> None:
    args = out, index, layer_scale, row_weight, scale, d_out.dtype, wanted
    _scatter_add_rows_backward(grad, *args)
    _check_written(d_out, "d_out", index.shape[0], grad)
    for read in (grad, out):
        check_no_overlap(d_out, read)


def _scatter_add_relu_rows_backward(
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
) -> None:
    check_rows_tensor(grad, "grad")
    check_floating(grad, "grad")
    check_kept_rows(grad, index, slot)
    _check_dtype(dtype)
    _check_scales(grad, index, layer_scale, row_weight)
    check_same_device(positive, "positive", grad.device, "grad")
    if positive.dtype is not torch.uint8:
        raise TypeError(f"positive: expected uint8, got {_name(positive.dtype)}")
    shape = [grad.shape[0], bytes_of_bits(grad)]
    if list(positive.shape) != shape or not positive.is_contiguous():
        raise ValueError(
            f"positive: expected a contiguous tensor of shape {shape}, one bit an element of grad, "
            f"got shape {list(positive.shape)}"
        )
    dims = {torch.channels_last: 4, torch.channels_last_3d: 5, torch.contiguous_format: grad.dim()}
    if dims.get(memory_format) != grad.dim():
        raise ValueError(
            f"memory_format: {_FORMATS[memory_format]} is none of a tensor of shape "
            f"{list(grad.shape)}"
        )
    check_row_values(index, slot)


def _compact_norm(
    x: Tensor,
    index: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    keep_rows: bool,
) -> None:
    check_norm(x, normalized_shape, weight, bias)
    check_index_tensor(index, "rows.index", x.device)
    if dtype not in FLOATING or acc_type(dtype) is not acc_type(x.dtype):
        raise TypeError(f"dtype: cannot write {_name(dtype)} from x of {_name(x.dtype)}")
    check_index_values(index, x.shape[0])


def _compact_norm_into(
    normed: Tensor,
    x: Tensor,
    index: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    keep_rows: bool,
) -> None:
    args = normalized_shape, weight, bias, eps, rms, normed.dtype, keep_rows
    _compact_norm(x, index, *args)
    _check_written(normed, "normed", index.shape[0], x)
    check_no_overlap(normed, x)


def _compact_norm_backward(
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
) -> None:
    check_norm(kept, normalized_shape, weight, None)
    device, acc = kept.device, acc_type(kept.dtype)
    check_index_tensor(index, "rows.index", device)
    check_index_tensor(slot, "rows.slot", device)
    for tensor, name in ((d_normed, "d_normed"), (mean, "mean"), (rstd, "rstd")):
        check_same_device(tensor, name, device, "kept")
    _check_kept(kept, index)
    if d_normed.shape != kept.shape:
        raise ValueError(f"d_normed: expected shape {list(kept.shape)}, got {list(d_normed.shape)}")
    if d_normed.dtype not in FLOATING or acc_type(d_normed.dtype) is not acc:
        raise TypeError(f"d_normed: got {_name(d_normed.dtype)} beside kept of {_name(kept.dtype)}")
    length = prod(normalized_shape)
    lines = kept.numel() // length if length else 0
    for statistic, name in ((rstd, "rstd"), *(() if rms else ((mean, "mean"),))):
        fits = statistic.numel() == lines and statistic.is_contiguous() and statistic.dtype is acc
        if length and not fits:
            raise ValueError(f"{name}: expected {lines} values of {_name(acc)}")
    if d_stream is not None:
        check_same_device(d_stream, "d_stream", device, "kept")
        shape = [slot.shape[0], *kept.shape[1:]]
        if list(d_stream.shape) != shape or d_stream.dtype is not kept.dtype:
            raise ValueError(
                f"d_stream: expected shape {shape} and {_name(kept.dtype)}, got "
                f"{list(d_stream.shape)} and {_name(d_stream.dtype)}"
            )
    check_row_values(index, slot)


def _compact_mask(mask: Tensor, k: int | None) -> None:
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {_name(mask.dtype)}")
    if mask.dim() != 1:
        raise ValueError(f"mask: expected shape [batch], got {list(mask.shape)}")
    if k is not None and not 0 <= k <= mask.shape[0]:
        raise ValueError(
            f"k: expected the number of true entries of mask, from 0 to {mask.shape[0]}, got {k}"
        )


CHECKS: dict[str, Callable[..., None]] = {
    "compact_rows": _compact_rows,
    "compact_rows_into": _compact_rows_into,
    "expand_rows": _expand_rows,
    "scatter_rows": _scatter_rows,
    "scatter_rows_": _scatter_rows_,
    "scatter_add_rows": _scatter_add_rows,
    "scatter_add_rows_": _scatter_add_rows_,
    "scatter_add_rows_backward": _scatter_add_rows_backward,
    "scatter_add_rows_backward_into": _scatter_add_rows_backward_into,
    "scatter_add_relu_rows": _scatter_add_rows,
    "scatter_add_relu_rows_backward": _scatter_add_relu_rows_backward,
    "compact_norm": _compact_norm,
    "compact_norm_into": _compact_norm_into,
    "compact_norm_backward": _compact_norm_backward,
    "compact_mask": _compact_mask,
}


def checked(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The op's function behind the op's checks."""
    check = CHECKS[op]

    @untraced
    def call(*args: Any) -> Any:
        check(*args)
        return function(*args)

    return call
