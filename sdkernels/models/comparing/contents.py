"""What modules and arguments hold: tensors and values, in containers and objects."""

from __future__ import annotations

import numbers
from collections import deque
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["contents"]

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
