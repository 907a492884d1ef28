"""Modules keep their statistics as they are where a branch runs on no row, or on one of ones.

PyTorch's BatchNorm counts an empty batch as one of its batches, the statistics of InstanceNorm
become NaN, and the row of ones is nobody's. In eager code global hooks find a module whatever way
the branch comes to it by; a graph has no hooks, there the modules are looked for beforehand.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import UninitializedBuffer

__all__ = ["no_statistics"]


@contextmanager
def no_statistics(branch: Callable[..., Any], kept: Tensor, on_ones: bool) -> Iterator[None]:
    """What runs inside takes none; `kept` is like what the branch gets.

    On no row, only modules that get an empty tensor are looked at: what the branch computes of
    other things counts. Where other processes have samples for a SyncBatchNorm, it takes theirs.
    """
    if is_compiling():
        modules = _modules_of(branch)
        owners = [_Rest(m, kept, on_ones) for m in modules if m.training and not _waits(m)]
    else:  # hooks do not see a method that is called as a function
        owner = getattr(branch, "__self__", None)
        owners = [_Rest(owner, kept, on_ones)] if isinstance(owner, nn.Module) else []
    try:
        if is_compiling():
            yield
        else:
            with _hooks(kept, on_ones):
                yield
    finally:
        for each in owners:
            each.end()


class _Rest:
    """A module, from before a call of it until after."""

    def __init__(self, module: Any, like: Tensor, on_ones: bool) -> None:
        self.module = module
        self.asleep = on_ones and module.training and isinstance(module, _NormBase)
        self.lent = self.asleep and module.running_mean is None
        if self.asleep:
            # One row may be too few to normalize with, so that it runs as in evaluation.
            module.training = False
        if self.lent:
            self.tracked = module.track_running_stats
            module.track_running_stats = True
            module.running_mean = like.new_zeros(module.num_features)
            module.running_var = like.new_ones(module.num_features)
        self.buffers = [
            (name, buffer, None if isinstance(buffer, UninitializedBuffer) else buffer.clone())
            for name, buffer in module._buffers.items()
            # A graph would write all of them at every call.
            if buffer is not None and not self.asleep and not (is_compiling() and not _is_one(name))
        ]

    def end(self) -> None:
        module = self.module
        if self.asleep:
            module.training = True
        if self.lent:
            module.track_running_stats = self.tracked
            module.running_mean = module.running_var = None
        for name, buffer, value in self.buffers:
            if value is None:  # made by the call, which started them from nothing
                module.reset_running_stats()
                continue
            # Not a write that autograd sees: the backward of an earlier call may have saved it.
            buffer.data.copy_(value)
            if module._buffers[name] is not buffer:
                module._buffers[name] = buffer


def _is_one(name: str) -> bool:
    return name.startswith("running_") or name == "num_batches_tracked"


def _waits(module: nn.Module) -> bool:
    """Whether the module's statistics are those of several processes, which wait for this one."""
    return (
        isinstance(module, nn.SyncBatchNorm)
        and module.training
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size(module.process_group) > 1
    )


@contextmanager
def _hooks(kept: Tensor, on_ones: bool) -> Iterator[None]:
    thread = threading.get_ident()
    resting: list[_Rest] = []
    joining: list[tuple[nn.Module, Tensor]] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if threading.get_ident() != thread:
            return None
        x = args[0] if args else None
        if _waits(module):
            if on_ones and isinstance(x, Tensor):  # it joins in with no sample
                joining.append((module, x))
                return (x[:0], *args[1:])
        elif (module._buffers or isinstance(module, _NormBase)) and (
            on_ones or (module.training and (not isinstance(x, Tensor) or x.numel() == 0))
        ):
            resting.append(_Rest(module, x if isinstance(x, Tensor) else kept, on_ones))
        return None

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        if resting and resting[-1].module is module:
            resting.pop().end()
        if joining and joining[-1][0] is module:
            _, x = joining.pop()
            return torch.cat([out, x]) if isinstance(out, Tensor) else None
        return None

    # A compiled part of the branch calls them, and does not trace them.
    eager: Callable[..., Any] = torch.compiler.disable if "torch._dynamo" in sys.modules else _same
    handles = (
        register_module_forward_pre_hook(eager(before)),
        register_module_forward_hook(eager(after), always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook


def _modules_of(branch: Any) -> list[nn.Module]:
    """The modules that a branch runs: itself, or what a function or an object of it refers to.

    Called in a graph, where Dynamo does not open the cells of a closure.
    """
    found: dict[nn.Module, None] = {}
    _collect(branch, found, 4)
    return list(found)


def _collect(value: Any, found: dict[nn.Module, None], depth: int) -> None:
    kind = type(value)
    if issubclass(kind, nn.Module):
        found.update(dict.fromkeys(value.modules()))
        return
    if depth <= 0 or issubclass(kind, (type, ModuleType, Tensor, str)):
        return
    held: list[Any] = []
    if kind is MethodType:
        held += [value.__self__, value.__func__]
    elif kind is FunctionType:
        held += value.__defaults__ or ()
        try:
            names = value.__globals__
        except AttributeError:  # Dynamo knows none of a function that was made in the graph
            names = {}
        used = (names.get(name) for name in value.__code__.co_names)
        held += [each for each in used if issubclass(type(each), nn.Module)]
    elif kind is partial:
        held += [value.func, *value.args, *value.keywords.values()]
    elif issubclass(kind, (list, tuple)):
        held += value
    elif issubclass(kind, dict):
        held += value.values()
    else:
        held += getattr(value, "__dict__", {}).values()
    for each in held:
        _collect(each, found, depth - 1)
