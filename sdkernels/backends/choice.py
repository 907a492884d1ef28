"""Which backend serves which op on which device: chosen here, once, when the package is imported.

The extension where there is one that fits, else Triton on CUDA tensors, else PyTorch code.
SDKERNELS_BACKEND asks for one by name: where that is missing, its ops raise the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import contract, extension, traceable
from .checks import checked
from .namespace import qualified

BACKENDS = ("auto", "cpp", "triton", "traceable")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class BackendChoice:
    """Which backend serves an op on a device type, and why."""

    op: str
    device: str
    backend: str
    reason: str


def missing(backend: str, device: str) -> str | None:
    """Why `backend` cannot serve tensors of `device`; None where it can."""
    if backend == "cpp":
        if extension.module is None:
            assert extension.absence is not None
            return extension.absence.short
        if device == "cuda" and not extension.module.build_config()["cuda_version"]:
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
        reason = missing(requested, device)
        if reason:
            return "none", f"SDKERNELS_BACKEND={requested}, but {reason}"
        if requested != "triton" or _has_triton_kernel(op, device):
            return requested, f"SDKERNELS_BACKEND={requested}"
    no_cpp = missing("cpp", device)
    if no_cpp is None:
        return "cpp", "native kernels"
    if device == "cpu":  # the interpreter, which other packages may want, is not for speed
        return "traceable", no_cpp
    no_triton = missing("triton", device)
    if no_triton is None and _has_triton_kernel(op, device):
        return "triton", no_cpp
    return "traceable", f"{no_cpp}, and {no_triton}" if no_triton else no_cpp


def _refusal(op: str, requested: str, reason: str) -> Callable[..., object]:
    if requested == "cpp" and extension.absence is not None:
        reason = f"{reason} ({extension.absence})"

    def refuse(*args: object) -> object:
        raise RuntimeError(f"{qualified(op)}: {reason}")

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
                raise RuntimeError(f"{qualified(op)}: SDKERNELS_BACKEND=triton, but {reason}")
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


def override(
    library: torch.library.Library, op: str, function: Callable[..., object], device: str
) -> None:
    """Let `function` serve the op on a device type for as long as `library` lives."""
    with warnings.catch_warnings():
        # PyTorch warns of every override; this one was asked for.
        warnings.filterwarnings(
            "ignore", message="(?s).*[Oo]verriding a previously registered kernel"
        )
        library.impl(op, function, device.upper(), allow_override=True)


def _register_backends() -> list[BackendChoice]:
    requested = _requested()
    table = []
    for op, function in traceable.OPS.items():
        # PyTorch code serves every device that no kernel of ours is registered for.
        contract.library.impl(op, checked(op, function), "CompositeExplicitAutograd")
        for device in DEVICES:
            backend, reason = _choose(requested, op, device)
            table.append(BackendChoice(op, device, backend, reason))
            if backend == "none":
                override(contract.library, op, _refusal(op, requested, reason), device)
            elif backend == "triton":
                override(
                    contract.library, op, checked(op, _triton(op, requested == "triton")), device
                )
            elif backend == "traceable" and not missing("cpp", device):
                override(contract.library, op, checked(op, function), device)
        table.append(BackendChoice(op, "other", "traceable", "PyTorch code, on any device"))
    return table


_table = _register_backends()

# Devices on which PyTorch code serves every op.
traceable_devices = {
    device
    for device in DEVICES
    if all(c.backend == "traceable" for c in _table if c.device == device)
}


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
