"""What modules and arguments hold: tensors and values, in containers and objects."""

from __future__ import annotations

import numbers
from collections import deque
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..settings import EVERYBODY

__all__ = ["State", "contents", "state_of"]

_VALUES = (bool, numbers.Number, str, bytes, range, type(None), type, torch.dtype, torch.device)
_NOT_OPENED = (nn.Module, FunctionType, BuiltinFunctionType, MethodType)
_DEPTH = 8


def contents(value: Any, path: str = "", within: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Tensors, values, and of all else its type and number of entries, with where they are."""
    if isinstance(value, (Tensor, *_VALUES)):
        yield path, value
        return
    yield path, type(value)
    if id(value) in within or len(within) > _DEPTH or isinstance(value, _NOT_OPENED):
        return
    within = (*within, id(value))
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, (list, tuple, deque)):
        inside = list(enumerate(value))
    elif isinstance(value, (set, frozenset)):
        inside = enumerate(sorted(map(repr, value)))
    elif hasattr(value, "tobytes"):  # of NumPy
        inside = [("bytes", value.tobytes())]
    elif hasattr(value, "__dict__") and not type(value).__module__.startswith("torch."):
        inside = list(vars(value).items())  # PyTorch's own keep no samples' values
    for key, each in inside:
        yield from contents(each, f"{path}.{key}", within)


class State:
    """What a block and its modules hold besides parameters, as it was."""

    def __init__(self, found: Iterable[tuple[str, Any]]) -> None:
        self.values: dict[str, Any] = {}
        self.counts: dict[str, Tensor] = {}  # whole numbers: counters, masks, indices
        self.tensors: dict[str, Tensor] = {}
        for path, value in found:
            if not isinstance(value, Tensor):
                self.values[path] = value
            elif value.is_floating_point() or value.is_complex():
                self.tensors[path] = value.detach().clone()
            else:
                self.counts[path] = value.detach().clone()

    def changed(self, other: State) -> str | None:
        """Where other values, whole numbers or numbers of entries are; None where nowhere."""
        names = dict.fromkeys((*self.values, *other.values))
        for name in names:
            if (name in self.values) != (name in other.values):
                return name
            a, b = self.values[name], other.values[name]
            if a is not b and a != b and not (a != a and b != b):
                return name
        missing = self.tensors.keys() ^ other.tensors.keys()
        missing |= self.counts.keys() ^ other.counts.keys()
        missing |= {
            n
            for n, t in self.counts.items()
            if n not in missing and not torch.equal(t, other.counts[n])
        }
        return min(missing) if missing else None


def state_of(modules: Iterable[tuple[str, nn.Module]]) -> State:
    """The attributes and buffers of modules."""

    def found() -> Iterator[tuple[str, Any]]:
        for name, module in modules:
            own = {n: v for n, v in module.__dict__.items() if n not in EVERYBODY}
            for key, value in (*own.items(), *module._buffers.items()):
                yield from contents(value, f"{name}.{key}".lstrip("."))

    return State(found())
