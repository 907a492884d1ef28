"""Running statistics of BatchNorm and its like stay as they are where a branch runs on no row.

PyTorch's BatchNorm counts an empty batch as one of its batches, and the statistics of InstanceNorm
become NaN.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import UninitializedBuffer

__all__ = ["untouched_statistics", "waits_for_others"]


def waits_for_others(module: nn.Module) -> bool:
    """Whether the module's statistics are those of several processes, which wait for this one."""
    return (
        isinstance(module, nn.SyncBatchNorm)
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size(module.process_group) > 1
    )


class _Saved:
    """The running statistics of a module, to be put back."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.buffers = [
            (buffer, None if isinstance(buffer, UninitializedBuffer) else buffer.clone())
            for name, buffer in module._buffers.items()
            if buffer is not None and (name.startswith("running_") or name == "num_batches_tracked")
        ]

    def put_back(self) -> None:
        for buffer, value in self.buffers:
            if value is None:  # made by the call, which started them from nothing
                self.module.reset_running_stats()
            else:
                # Not a write that autograd sees: the backward of an earlier call may have saved it.
                buffer.data.copy_(value)


def _takes_statistics(module: nn.Module) -> bool:
    return module.training and len(module._buffers) > 0 and not waits_for_others(module)


def untouched_statistics(branch: Callable[..., Any]) -> Callable[..., Any]:
    """The branch, where modules that it calls on an empty tensor take no statistics.

    Where other processes have samples for a SyncBatchNorm, its statistics are theirs.
    """

    def run(*args: Any) -> Any:
        if is_compiling():
            owner = getattr(branch, "__self__", branch)
            modules = owner.modules() if isinstance(owner, nn.Module) else ()
            saved = [_Saved(module) for module in modules if _takes_statistics(module)]
            out = branch(*args)
            for each in saved:
                each.put_back()
            return out
        with _hooks():
            return branch(*args)

    return run


@contextmanager
def _hooks() -> Iterator[None]:
    """Whatever way the branch comes to its modules by, it calls them."""
    thread = threading.get_ident()
    running: list[_Saved] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() != thread or not _takes_statistics(module):
            return
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.numel() == 0:
            running.append(_Saved(module))

    def after(module: nn.Module, args: Any, out: Any) -> None:
        if running and running[-1].module is module and threading.get_ident() == thread:
            running.pop().put_back()

    handles = (
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
