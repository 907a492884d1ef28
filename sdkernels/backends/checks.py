"""What the ops check of their arguments before a kernel sees them.

The autograd functions have looked at them already; these are for a direct call, so that no kernel
reads or writes outside of its tensors. The values of rows are looked at by the kernels.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from .traceable import check_layer_scale, check_normalized_shape

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_batch(x: Tensor, name: str, rows: int | None = None) -> None:
    if x.dim() < 1 or (rows is not None and x.shape[0] != rows):
        expected = "a batch dimension" if rows is None else f"{rows} rows"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(x.shape)}")


def check_rows(rows: Tensor, name: str, x: Tensor) -> None:
    """Row numbers: rows.index, or rows.slot."""
    if rows.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {rows.dtype}")
    if rows.dim() != 1 or not rows.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor of one dimension, got {tuple(rows.shape)}"
        )
    check_device(rows, name, x)


def check_device(tensor: Tensor, name: str, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device}, got one on {tensor.device}")


def check_floating(x: Tensor, name: str) -> None:
    check_dtype(x.dtype, name)


def check_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {dtype}")


def check_shape(tensor: Tensor, name: str, shape: tuple[int, ...], x: Tensor) -> None:
    """A floating point tensor of this shape on the device of x."""
    check_floating(tensor, name)
    check_device(tensor, name, x)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_written(x: Tensor, name: str) -> None:
    """For a tensor that is read and written: two of its elements must not be one in memory."""
    repeated = (size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True))
    if x.numel() and any(repeated):  # the strides of a tensor without elements mean nothing
        raise ValueError(
            f"{name}: expected memory of its own for every element, got shape {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )


def check_scales(layer_scale: Tensor | None, row_weight: Tensor | None, x: Tensor, k: int) -> None:
    if layer_scale is not None:
        check_floating(layer_scale, "layer_scale")
        check_device(layer_scale, "layer_scale", x)
        check_layer_scale(layer_scale, x.shape[1:])
    if row_weight is not None:
        check_shape(row_weight, "row_weight", (k,), x)


def check_bits(bits: Tensor, name: str, x: Tensor) -> None:
    """A bit for every element of x, row by row."""
    if bits.dtype != torch.uint8:
        raise TypeError(f"{name}: expected uint8, got {bits.dtype}")
    check_device(bits, name, x)
    shape = (x.shape[0], -(-prod(x.shape[1:]) // 8))
    if tuple(bits.shape) != shape or not bits.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor of shape {shape}, got shape "
            f"{tuple(bits.shape)} with strides {bits.stride()}"
        )


def check_memory_format(memory_format: torch.memory_format, x: Tensor) -> None:
    """A format that x can have (that of row_format())."""
    dims = {torch.channels_last: 4, torch.channels_last_3d: 5, torch.contiguous_format: x.dim()}
    if dims.get(memory_format) != x.dim():
        raise ValueError(
            f"memory_format: {memory_format} is none of a tensor of shape {tuple(x.shape)}"
        )


def check_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None = None
) -> None:
    check_batch(x, "x")
    check_floating(x, "x")
    check_normalized_shape(x, shape)
    for parameter, name in ((weight, "norm.weight"), (bias, "norm.bias")):
        if parameter is not None:
            check_shape(parameter, name, shape, x)
