"""What records a call to repeat it, and would repeat the rows of that call with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch.fx import Proxy
from torch.fx import _symbolic_trace as fx

from .backends.checks import transforms_active
from .backends.untraced import untraced

T = TypeVar("T")

__all__ = [
    "dispatch_modes",
    "fake_mode",
    "fx",
    "is_recorded",
    "jit_tracing_state",
    "outlasting",
    "refuse_fixed_rows",
    "refuse_script",
    "refuse_training",
    "with_data",
]

# By themselves, because they are asked at every call, as fx._is_fx_tracing_flag is, which says that
# torch.fx traces in some thread.
jit_tracing_state = torch._C._get_tracing_state  # None where there is none
dispatch_modes = torch._C._len_torch_dispatch_stack  # how many, make_fx's among them
_dispatch_mode = torch._C._get_dispatch_mode
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_FAKE = torch._C._TorchDispatchModeKey.FAKE


def is_recorded(*values: object) -> bool:
    """Whether torch.jit.trace or torch.fx's symbolic tracing makes a graph of what is called.

    torch.compile and torch.export are none of these: they draw rows in the graph.
    """
    return jit_tracing_state() is not None or any(map(_is_proxy, values))


def _is_proxy(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_proxy, value))
    if isinstance(value, dict):
        return any(map(_is_proxy, value.values()))
    return isinstance(value, Proxy)


def refuse_training() -> NoReturn:
    if jit_tracing_state() is not None:
        raise RuntimeError(
            "training: torch.jit.trace would repeat the rows kept in this one call for ever; trace "
            "in evaluation (training=False), or use torch.compile or torch.export, which draw new "
            "rows at every call"
        )
    raise RuntimeError(
        "training: torch.fx's symbolic tracing cannot keep rows, whose number it does not know; "
        "trace in evaluation (training=False), or make StochasticDepth a leaf of the tracer"
    )


def refuse_fixed_rows() -> None:
    """Called where rows are drawn by eager code."""
    if jit_tracing_state() is not None or _dispatch_mode(_PROXY) is not None:
        raise RuntimeError(
            "rows: torch.jit.trace and make_fx would repeat the rows drawn in this one call for "
            "ever; pass them in from outside of the graph, or use torch.compile or torch.export, "
            "which draw new rows at every call"
        )


def fake_mode() -> Any:
    """PyTorch's FakeTensorMode, of which tensors have sizes and no data; None outside of it."""
    return _dispatch_mode(_FAKE)


@contextmanager
@untraced
def with_data() -> Iterator[None]:
    """Where rows are drawn: in memory, under a FakeTensorMode and torch.func's transforms too."""
    fake = torch._C._unset_dispatch_mode(_FAKE)
    try:
        with torch._C._DisableFuncTorch():
            yield
    finally:
        if fake is not None:
            torch._C._set_dispatch_mode(fake)


@untraced
def outlasting(make: Callable[[], T]) -> T:
    """Tensors that stay what they are when a transform or a mode around this call has ended."""
    if not (dispatch_modes() or transforms_active()):
        return make()
    with with_data():
        return make()


def refuse_script(what: str, instead: str) -> NoReturn:
    raise RuntimeError(
        f"torch.jit.script: cannot read {what}; {instead}, or use torch.compile, torch.export or "
        "(in evaluation) torch.jit.trace"
    )
