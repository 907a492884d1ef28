"""What each op takes and returns: its schema, and its fake for tensors without data.

The ops are functional and without autograd, which stands above them (``autograd.py``,
``csrc/autograd.cpp``). A zero-sized tensor takes the place of a result that was not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import extension
from .checks import acc_type
from .namespace import NAMESPACE, ops, qualified
from .traceable import empty_bits, empty_rows, scatter_add_dtype

# As in ``csrc/module.cpp``, which says more about some of them.
SCHEMAS = (
    "compact_rows(Tensor x, Tensor index) -> Tensor",
    "compact_rows_into(Tensor(a!) kept, Tensor x, Tensor index) -> ()",
    "expand_rows(Tensor kept, Tensor index, Tensor slot) -> Tensor",
    "scatter_rows(Tensor residual, Tensor out, Tensor index, Tensor slot) -> Tensor",
    "scatter_rows_(Tensor(a!) residual, Tensor out, Tensor index, Tensor slot) -> ()",
    "scatter_add_rows(Tensor residual, Tensor out, Tensor index, Tensor slot, Tensor? "
    "layer_scale, Tensor? row_weight, float scale) -> Tensor",
    "scatter_add_rows_(Tensor(a!) residual, Tensor out, Tensor index, Tensor slot, Tensor? "
    "layer_scale, Tensor? row_weight, float scale) -> ()",
    "scatter_add_rows_backward(Tensor grad, Tensor? out, Tensor index, Tensor? layer_scale, "
    "Tensor? row_weight, float scale, ScalarType dtype, bool[2] wanted) -> (Tensor d_out, "
    "Tensor d_layer_scale, Tensor d_row_weight)",
    "scatter_add_rows_backward_into(Tensor(a!) d_out, Tensor grad, Tensor? out, Tensor index, "
    "Tensor? layer_scale, Tensor? row_weight, float scale, bool[2] wanted) -> "
    "(Tensor d_layer_scale, Tensor d_row_weight)",
    "scatter_add_relu_rows(Tensor residual, Tensor out, Tensor index, Tensor slot, Tensor? "
    "layer_scale, Tensor? row_weight, float scale) -> (Tensor y, Tensor positive)",
    "scatter_add_relu_rows_backward(Tensor grad, Tensor positive, Tensor index, Tensor slot, "
    "Tensor? layer_scale, Tensor? row_weight, float scale, ScalarType dtype, MemoryFormat "
    "memory_format, bool wants_out) -> (Tensor d_residual, Tensor d_out)",
    "compact_norm(Tensor x, Tensor index, int[] normalized_shape, Tensor? weight, Tensor? "
    "bias, float eps, bool rms, ScalarType dtype, bool keep_rows) -> (Tensor normed, Tensor "
    "kept, Tensor mean, Tensor rstd)",
    "compact_norm_into(Tensor(a!) normed, Tensor x, Tensor index, int[] normalized_shape, "
    "Tensor? weight, Tensor? bias, float eps, bool rms, bool keep_rows) -> (Tensor kept, "
    "Tensor mean, Tensor rstd)",
    "compact_norm_backward(Tensor? d_stream, Tensor d_normed, Tensor kept, Tensor mean, "
    "Tensor rstd, Tensor index, Tensor slot, int[] normalized_shape, Tensor? weight, bool "
    "rms, bool[3] wanted) -> (Tensor d_x, Tensor d_weight, Tensor d_bias)",
    "compact_mask(Tensor mask, SymInt? k) -> (Tensor index, Tensor slot)",
)

# It owns all our registrations: they last as long as it does.
library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _schema in SCHEMAS:
    # An extension may have failed to load when it had already defined its ops.
    if extension.module is None and not hasattr(ops, _schema.partition("(")[0]):
        library.define(_schema)


def _fake(op: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    return torch.library.register_fake(qualified(op), lib=library)  # type: ignore[no-any-return]


@_fake("compact_rows")
def _(x: Tensor, index: Tensor) -> Tensor:
    return empty_rows(x, index.shape[0], x.dtype)


@_fake("compact_rows_into")
def _(kept: Tensor, x: Tensor, index: Tensor) -> None:
    return None


@_fake("expand_rows")
def _(kept: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    return empty_rows(kept, slot.shape[0], kept.dtype)


@_fake("scatter_rows")
def _(residual: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    return empty_rows(residual, residual.shape[0], residual.dtype)


@_fake("scatter_rows_")
def _(residual: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> None:
    return None


@_fake("scatter_add_rows")
def _(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> Tensor:
    dtype = scatter_add_dtype(residual, out, layer_scale)
    return empty_rows(residual, residual.shape[0], dtype)


@_fake("scatter_add_rows_")
def _(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> None:
    return None


def _gradients(
    grad: Tensor,
    out: Tensor | None,
    index: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = grad.new_empty(0)
    return (
        empty_rows(grad if out is None else out, index.shape[0], dtype),
        torch.empty_like(layer_scale) if wanted[0] and layer_scale is not None else nothing,
        torch.empty_like(row_weight) if wanted[1] and row_weight is not None else nothing.clone(),
    )


_fake("scatter_add_rows_backward")(_gradients)


@_fake("scatter_add_rows_backward_into")
def _(
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
    return _gradients(grad, *args)[1:]


@_fake("scatter_add_relu_rows")
def _(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = scatter_add_dtype(residual, out, layer_scale)
    y = empty_rows(residual, residual.shape[0], dtype)
    return y, empty_bits(y)


@_fake("scatter_add_relu_rows_backward")
def _(
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
    d_residual = torch.empty_like(grad, memory_format=memory_format)
    if not wants_out:
        return d_residual, grad.new_empty(0, dtype=dtype)
    return d_residual, empty_rows(d_residual, index.shape[0], dtype)


def _normed(
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
    shape = (index.shape[0], *x.shape[1:])
    lines = 1
    for size in shape[: x.dim() - len(normalized_shape)]:
        lines = lines * size
    return (
        x.new_empty(shape, dtype=dtype),
        x.new_empty(shape if keep_rows else 0),
        x.new_empty(0 if rms else lines, dtype=acc),
        x.new_empty(lines, dtype=acc),
    )


_fake("compact_norm")(_normed)


@_fake("compact_norm_into")
def _(
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
    args = x, index, normalized_shape, weight, bias, eps, rms, normed.dtype, keep_rows
    return _normed(*args)[1:]


@_fake("compact_norm_backward")
def _(
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
    return (
        kept.new_empty((slot.shape[0], *kept.shape[1:]) if wanted[0] else 0),
        kept.new_empty(normalized_shape if wanted[1] else 0, dtype=acc),
        kept.new_empty(normalized_shape if wanted[2] else 0, dtype=acc),
    )


@_fake("compact_mask")
def _(mask: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    count: int | torch.SymInt
    if k is None:
        count = torch.library.get_ctx().new_dynamic_size()
        torch._check(count <= mask.shape[0])
    else:
        count = k
    return mask.new_empty(count, dtype=torch.int64), mask.new_empty(mask.shape, dtype=torch.int64)
