"""The tensor ops: the extension, which backend serves them on which device, and their fakes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import compiled, extension, traceable

if TYPE_CHECKING:
    from .. import _C as C
else:
    C = extension.load()

__all__ = ["BackendChoice", "C", "backend_table", "is_compiling", "kernels"]


def kernels() -> Any:
    """The functions of `_C.pyi`: the extension's, or PyTorch code.

    The latter while a graph is being traced, and under forward-mode AD, of which C++ has none.
    """
    return compiled if is_compiling() or forward_ad._current_level >= 0 else C


BACKENDS = ("auto", "cpp", "triton", "traceable")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class BackendChoice:
    """Which backend serves an op on a device type, and why."""

    op: str
    device: str
    backend: str
    reason: str


def _missing(backend: str, device: str) -> str | None:
    """Why `backend` cannot serve tensors of `device`; None where it can."""
    if backend == "cpp" and device == "cuda" and not C.build_config()["cuda_version"]:
        return "the extension was built without CUDA kernels"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if torch.version.hip is not None:
            return "the Triton kernels are for NVIDIA's GPUs"
        if torch.cuda.device_count() == 0 and not _interpreted():
            return "there is no CUDA device for Triton"
    return None


def _interpreted() -> bool:
    """Whether Triton's interpreter runs its kernels, on the CPU too: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _has_triton_kernel(op: str, device: str) -> bool:
    # compact_mask waits for nothing as PyTorch code, and moves next to nothing.
    return op != "compact_mask" and (device == "cuda" or _interpreted())


def _requested() -> str:
    requested = os.environ.get("SDKERNELS_BACKEND") or "auto"
    if requested not in BACKENDS:
        raise ValueError(
            f"SDKERNELS_BACKEND: expected one of {', '.join(BACKENDS)}, got {requested!r}"
        )
    return requested


def _choose(requested: str, op: str, device: str) -> tuple[str, str]:
    if requested != "auto":
        missing = _missing(requested, device)
        if missing:
            return "none", f"SDKERNELS_BACKEND={requested}, but {missing}"
        if requested != "triton" or _has_triton_kernel(op, device):
            return requested, f"SDKERNELS_BACKEND={requested}"
    no_cpp = _missing("cpp", device)
    if no_cpp is None:
        return "cpp", "native kernels"
    no_triton = _missing("triton", device)
    if no_triton is None and _has_triton_kernel(op, device):
        return "triton", no_cpp
    return "traceable", f"{no_cpp}, and {no_triton}" if no_triton else no_cpp


def _refusal(op: str, reason: str) -> Callable[..., object]:
    def refuse(*args: object) -> object:
        raise RuntimeError(f"sdkernels::{op}: {reason}")

    return refuse


def _triton(op: str, asked: bool) -> Callable[..., object]:
    """The op's Triton function, which is loaded at its first call."""
    loaded: list[Callable[..., object]] = []

    def call(*args: object) -> object:
        if not loaded:
            reason = _triton_fails()
            if reason is None:
                loaded.append(importlib.import_module(".triton", __package__).OPS[op])
            elif asked:
                raise RuntimeError(f"sdkernels::{op}: SDKERNELS_BACKEND=triton, but {reason}")
            else:
                loaded.append(traceable.OPS[op])
        return loaded[0](*args)

    return call


@functools.cache
def _triton_fails() -> str | None:
    """Why Triton does not work here after all; only trying tells."""
    try:
        reason: str | None = importlib.import_module(".triton", __package__).why_unusable()
    except Exception as error:  # of a foreign package: anything, and none of it is ours to mend
        reason = f"Triton does not load: {type(error).__name__}: {error}"
    return reason


def _override(
    library: torch.library.Library, op: str, function: Callable[..., object], device: str
) -> None:
    with warnings.catch_warnings():
        # PyTorch warns of every override; this one was asked for.
        warnings.filterwarnings(
            "ignore", message="(?s).*[Oo]verriding a previously registered kernel"
        )
        library.impl(op, function, device.upper(), allow_override=True)


def _register_backends() -> tuple[torch.library.Library, list[BackendChoice]]:
    requested = _requested()
    library = torch.library.Library("sdkernels", "IMPL")
    table = []
    for op, function in traceable.OPS.items():
        # PyTorch code serves every device that no kernel of ours is registered for.
        library.impl(op, function, "CompositeExplicitAutograd")
        for device in DEVICES:
            backend, reason = _choose(requested, op, device)
            table.append(BackendChoice(op, device, backend, reason))
            if backend == "none":
                _override(library, op, _refusal(op, reason), device)
            elif backend == "triton":
                _override(library, op, _triton(op, requested == "triton"), device)
            elif backend == "traceable" and not _missing("cpp", device):
                _override(library, op, function, device)
        table.append(BackendChoice(op, "other", "traceable", "PyTorch code, on any device"))
    return library, table


# The library object owns the registrations: they last as long as it does.
_library, _table = _register_backends()


def backend_table() -> list[BackendChoice]:
    """The backend of every op on every device type, with the reason for the choice.

    Where Triton was chosen it is loaded, to see whether it works.
    """
    table = list(_table)
    for i, choice in enumerate(table):
        if choice.backend == "triton" and (fails := _triton_fails()):
            asked = choice.reason == "SDKERNELS_BACKEND=triton"
            backend = "none" if asked else "traceable"
            table[i] = replace(choice, backend=backend, reason=f"{choice.reason}, but {fails}")
    return table


@torch.library.register_fake("sdkernels::compact_rows")
def _(x: Tensor, index: Tensor) -> Tensor:
    return traceable.empty_rows(x, index.shape[0], x.dtype)


@torch.library.register_fake("sdkernels::expand_rows")
def _(kept: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    return traceable.empty_rows(kept, slot.shape[0], kept.dtype)


@torch.library.register_fake("sdkernels::scatter_add_rows")
def _(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> Tensor:
    dtype = traceable.scatter_add_dtype(residual, out, layer_scale)
    return traceable.empty_rows(residual, residual.shape[0], dtype)


@torch.library.register_fake("sdkernels::scatter_add_rows_")
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


@torch.library.register_fake("sdkernels::scatter_add_rows_backward")
def _(
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
        traceable.empty_rows(grad if out is None else out, index.shape[0], dtype),
        torch.empty_like(layer_scale) if wanted[0] and layer_scale is not None else nothing,
        torch.empty_like(row_weight) if wanted[1] and row_weight is not None else nothing.clone(),
    )


@torch.library.register_fake("sdkernels::scatter_add_relu_rows")
def _(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = traceable.scatter_add_dtype(residual, out, layer_scale)
    y = traceable.empty_rows(residual, residual.shape[0], dtype)
    return y, traceable.empty_bits(y)


@torch.library.register_fake("sdkernels::scatter_add_relu_rows_backward")
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
    return d_residual, traceable.empty_rows(d_residual, index.shape[0], dtype)


@torch.library.register_fake("sdkernels::compact_norm")
def _(
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
    acc = traceable.acc_type(x.dtype)
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


@torch.library.register_fake("sdkernels::compact_norm_backward")
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
    acc = traceable.acc_type(kept.dtype)
    return (
        kept.new_empty((slot.shape[0], *kept.shape[1:]) if wanted[0] else 0),
        kept.new_empty(normalized_shape if wanted[1] else 0, dtype=acc),
        kept.new_empty(normalized_shape if wanted[2] else 0, dtype=acc),
    )


@torch.library.register_fake("sdkernels::compact_mask")
def _(mask: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    count: int | torch.SymInt
    if k is None:
        count = torch.library.get_ctx().new_dynamic_size()
        torch._check(count <= mask.shape[0])
    else:
        count = k
    return mask.new_empty(count, dtype=torch.int64), mask.new_empty(mask.shape, dtype=torch.int64)
