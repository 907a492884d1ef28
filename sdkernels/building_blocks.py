"""The differentiable pieces that fused_stochastic_depth is made of, and the checks of tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .backends.checks import FLOATING, acc_type
from .backends.ops import is_compiling, kernels
from .rows import KeptRows
from .tracing import is_recorded, refuse_training

Activation = Literal["relu"]

__all__ = [
    "compact_layer_norm",
    "compact_rms_norm",
    "compact_rows",
    "scatter_add_rows",
    "scatter_rows",
]

# Asked for once: not every version of PyTorch can trace the question. (On a device that is missing
# here the norm writes x's type, and what follows casts.)
_DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
AUTOCAST_DEVICES = frozenset(
    device
    for device in (*_DEVICES, torch._C._get_privateuse1_backend_name())
    if torch.amp.is_autocast_available(device)
)
DTENSORS = "torch.distributed.tensor"  # nobody has one before this is imported
STRIDED = torch.strided


def compact_rows(x: Tensor, rows: KeptRows) -> Tensor:
    """Gather the kept rows.

    Equivalent PyTorch code: ``x[rows.index]``.

    Args:
        x: [B, ...], any dtype and strides.
        rows: the rows to keep, of a batch of B rows.

    Returns:
        [k, ...], the dtype of `x`, dimensions in the memory order of `x`. Differentiable (twice);
        the gradient of a dropped row is zero.

    Raises:
        TypeError, ValueError: the rows do not fit `x`.

    Example:
        >>> rows = KeptRows.from_index(torch.tensor([0, 2]), batch=3)
        >>> compact_rows(torch.tensor([[1.0], [2.0], [3.0]]), rows)
        tensor([[1.],
                [3.]])
    """
    _check_batched(x)
    _check_call(rows, x)
    kept: Tensor = kernels().compact(x, rows.index, rows.slot, False, False, False)[0]
    return kept


def compact_layer_norm(
    x: Tensor,
    rows: KeptRows,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Gather the kept rows and apply layer normalization, in one pass.

    Equivalent PyTorch code: ``F.layer_norm(x[rows.index], normalized_shape, weight, bias, eps)``.
    Under autocast the result has the autocast dtype.

    Args:
        x: [B, ...], floating point.
        rows: the rows to keep, of a batch of B rows.
        normalized_shape: the last dimensions of one row.
        weight, bias: of shape `normalized_shape`.
        eps: added to the variance.

    Returns:
        [k, ...], contiguous. Statistics are computed in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: rows, shape or parameters do not fit `x`.

    Example:
        >>> rows = KeptRows.from_index(torch.tensor([1]), batch=2)
        >>> compact_layer_norm(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), rows, 2).round(decimals=3)
        tensor([[-1.,  1.]])
    """
    _check_norm_arguments(x, rows, normalized_shape, weight=weight, bias=bias)
    return compact_norm(x, rows, normalized_shape, weight, bias, eps, False, False, False)[0]


def compact_rms_norm(
    x: Tensor,
    rows: KeptRows,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Gather the kept rows and apply root mean square normalization, in one pass.

    Equivalent PyTorch code: ``F.rms_norm(x[rows.index], normalized_shape, weight, eps)``. Under
    autocast the result has the autocast dtype.

    Args:
        x: [B, ...], floating point.
        rows: the rows to keep, of a batch of B rows.
        normalized_shape: the last dimensions of one row.
        weight: of shape `normalized_shape`.
        eps: added to the mean square. Default, as in PyTorch: the machine epsilon of the type that
            the arithmetic is in, float32 (float64 for float64 input).

    Returns:
        [k, ...], contiguous.

    Raises:
        TypeError, ValueError: rows, shape or weight do not fit `x`.

    Example:
        >>> rows = KeptRows.from_index(torch.tensor([1]), batch=2)
        >>> compact_rms_norm(torch.tensor([[1.0, 2.0], [3.0, 3.0]]), rows, 2).round(decimals=3)
        tensor([[1., 1.]])
    """
    _check_norm_arguments(x, rows, normalized_shape, weight=weight)
    return compact_norm(x, rows, normalized_shape, weight, None, eps, True, False, False)[0]


def scatter_add_rows(
    x: Tensor,
    out: Tensor,
    rows: KeptRows,
    layer_scale: Tensor | None = None,
    *,
    inplace: bool = False,
    activation: Activation | None = None,
) -> Tensor:
    """Add a branch's output to the kept rows.

    Equivalent PyTorch code: ``x.index_add(0, rows.index, rows.scale * layer_scale * out)``, with
    the arithmetic in float32, one rounding, and the dtype of ``x + layer_scale * out``. Where the
    rows have weights, row j of `out` is multiplied by ``rows.weight[j]`` as well.

    With ``activation="relu"`` the result is the ReLU of that sum, in the same pass; a bit for each
    element is kept for the backward, not the result. (In place, and in compiled code, the ReLU is
    an operation of its own.)

    Args:
        x: [B, ...], floating point: the stream.
        out: [k, ...], floating point: the branch's output, one row for each kept row.
        rows: the kept rows, of a batch of B rows.
        layer_scale: anything that broadcasts against one row of `out`.
        inplace: write into `x`, and return it.
        activation: "relu", or None for the sum itself.

    Returns:
        [B, ...], strides in the order of `x`; dropped rows are those of `x` to the last bit (their
        ReLU with an activation). Differentiable (twice).

    Raises:
        TypeError, ValueError: rows, `out` or `layer_scale` do not fit `x`, or an activation that
            is not known.
        RuntimeError: in place where PyTorch forbids it (a leaf that requires grad).

    Example:
        >>> rows = KeptRows.from_index(torch.tensor([0, 2]), batch=3, scale=2.0)
        >>> scatter_add_rows(torch.ones(3, 1), torch.tensor([[1.0], [2.0]]), rows).flatten()
        tensor([3., 1., 5.])
    """
    relu = check_activation(activation)
    check_input(x)
    _check_call(rows, x)
    check_tensor(out, "out")
    if layer_scale is not None:
        check_tensor(layer_scale, "layer_scale")
    check_local(out=out, layer_scale=layer_scale)
    if inplace:
        check_inplace(x)
    y: Tensor = kernels().scatter_add(
        x, out, rows.index, rows.slot, layer_scale, rows.weight, rows.scale, inplace, relu
    )
    return y


def scatter_rows(x: Tensor, out: Tensor, rows: KeptRows, *, inplace: bool = False) -> Tensor:
    """Put a layer's output in place of the kept rows.

    Equivalent PyTorch code: ``x.index_copy(0, rows.index, out)``, in the dtype that ``x + out``
    would have. Scale and weights of the rows are not used.

    Args:
        x: [B, ...], floating point: the stream.
        out: [k, ...], floating point: one row for each kept row.
        rows: the kept rows, of a batch of B rows.
        inplace: write into `x`, and return it.

    Returns:
        [B, ...], strides in the order of `x`; dropped rows are those of `x` to the last bit.
        Differentiable (twice); the gradient of a kept row of `x` is zero.

    Raises:
        TypeError, ValueError: rows or `out` do not fit `x`.
        RuntimeError: in place where PyTorch forbids it (a leaf that requires grad).

    Example:
        >>> rows = KeptRows.from_index(torch.tensor([0, 2]), batch=3)
        >>> scatter_rows(torch.ones(3, 1), torch.tensor([[5.0], [7.0]]), rows).flatten()
        tensor([5., 1., 7.])
    """
    check_input(x)
    _check_call(rows, x)
    check_tensor(out, "out")
    check_local(out=out)
    if inplace:
        check_inplace(x)
    y: Tensor = kernels().scatter(x, out, rows.index, rows.slot, False, inplace)
    return y


def compact_norm(
    x: Tensor,
    rows: KeptRows,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    with_stream: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    if eps is None:
        eps = torch.finfo(acc_type(x.dtype)).eps
    dtype = norm_dtype(x)
    opened: tuple[Tensor, Tensor] = kernels().compact_norm(
        x, rows.index, rows.slot, shape, weight, bias, eps, rms, dtype, with_stream, inplace
    )
    return opened


def norm_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a norm of x is written.

    What follows a norm under autocast casts its output at once: that dtype, directly.
    """
    dtype, device = x.dtype, x.device.type
    if dtype != torch.float64 and device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return dtype


def check_activation(activation: object) -> bool:
    """Whether there is one."""
    if activation is not None and activation != "relu":
        raise ValueError(f"activation: expected 'relu' or None, got {activation!r}")
    return activation is not None


def check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        if is_recorded(value):
            refuse_training()
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout is not STRIDED or value.is_nested:
        layout = str(value.layout).removeprefix("torch.")
        got, instead = f"a {layout} tensor", "make it dense with to_dense()"
        if value.is_nested:
            got, instead = f"a nested tensor ({layout})", "pad it with nested.to_padded_tensor()"
        raise TypeError(f"{name}: expected a dense tensor, got {got}; {instead}")


def _check_batched(x: Any, name: str = "x") -> None:
    check_tensor(x, name)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected a tensor with a batch dimension, got 0 dimensions")


def check_inplace(x: Tensor, name: str = "x") -> None:
    kernels().check_inplace(x)
    if not is_compiling() and x.is_neg():
        raise ValueError(
            f"{name}: expected a tensor that can be written to in place, got one with the negative "
            "bit set (the imaginary part of a conjugate); call resolve_neg() on it"
        )


def check_input(x: Any, name: str = "x") -> None:
    if (
        type(x) is Tensor
        and x.dtype in FLOATING
        and x.layout is STRIDED
        and not x.is_nested
        and x.dim() > 0
    ):
        return  # as nearly always, in one step: this is on the path of every call
    _check_batched(x, name)
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, "
            f"got {str(x.dtype).removeprefix('torch.')}"
        )


def check_local(norm: nn.Module | None = None, **tensors: object) -> None:
    """Refuse what is spread over several processes."""
    distributed: Any = sys.modules.get(DTENSORS)
    if distributed is None or is_compiling():
        return
    if norm is not None:
        tensors.update({f"norm.{name}": value for name, value in norm.named_parameters()})
    for name, value in tensors.items():
        if isinstance(value, distributed.DTensor):
            raise TypeError(
                f"{name}: expected a tensor of this process, got a DTensor; give the op local "
                "tensors (to_local()), and with fully_shard make the module that calls it one unit"
            )


def _check_norm_arguments(
    x: Tensor, rows: KeptRows, normalized_shape: object, **parameters: object
) -> None:
    check_input(x)
    _check_call(rows, x)
    if not isinstance(normalized_shape, (int, list, tuple)):
        raise TypeError(
            "normalized_shape: expected an int or a sequence of ints, "
            f"got {type(normalized_shape).__name__}"
        )
    for name, parameter in parameters.items():
        if parameter is not None:
            check_tensor(parameter, name)


def _check_call(rows: Any, x: Tensor) -> None:
    """What the op looks at before it calls a building block."""
    if not is_compiling() and is_recorded(x):
        refuse_training()
    check_rows(rows, x)
    check_local(x=x)


def check_rows(rows: Any, x: Tensor) -> None:
    if not isinstance(rows, KeptRows):
        raise TypeError(f"rows: expected KeptRows, got {type(rows).__name__}")
    if rows.batch != x.size(0):  # `shape` is slower
        raise ValueError(
            f"rows: made for a batch of {rows.batch} rows, but x has {x.shape[0]} "
            f"(shape {tuple(x.shape)})"
        )
