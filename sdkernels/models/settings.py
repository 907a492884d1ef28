"""What a block is set to: a comparison of one block speaks for those that are set to the same."""

from __future__ import annotations

import enum
import functools
import numbers
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .parametrized import plain_class

__all__ = ["EVERYBODY", "Stamp", "key_of", "settings"]

_PLAIN = (bool, numbers.Number, str, bytes, range, type(None), type, enum.Enum, torch.dtype,
          torch.device, torch.layout, torch.memory_format)  # fmt: skip
EVERYBODY = frozenset((*nn.Module().__dict__, "_sdkernels"))  # what says nothing of a block
_NUMBERS = frozenset((bool, int, float, str))


class _Same:
    """An object that equals itself and nothing else, and is not kept alive for that."""

    def __init__(self, value: Any) -> None:
        self.hash = id(value)
        try:
            self.get: Callable[[], Any] = weakref.ref(value)
        except TypeError:  # equal to nothing: it is compared again rather than kept alive
            self.get = lambda: None

    def __eq__(self, other: object) -> bool:
        value = self.get()
        return isinstance(other, _Same) and value is not None and other.get() is value

    def __hash__(self) -> int:
        return self.hash


def key_of(value: Any, within: tuple[int, ...] = ()) -> Any:
    """What of a value two blocks must have in common."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if id(value) in within:  # it contains itself
        return within.index(id(value))
    within = (*within, id(value))
    if isinstance(value, (list, tuple)):
        return type(value), tuple(key_of(each, within) for each in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(key_of(each, within) for each in value)
    if isinstance(value, dict):
        return type(value), tuple((key_of(k, within), key_of(v, within)) for k, v in value.items())
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return functools.partial, tuple(key_of(each, within) for each in parts)
    if is_lazy(value):
        return Tensor, None, value.dtype
    if isinstance(value, Tensor):
        return Tensor, value.shape, value.dtype
    if isinstance(value, weakref.ref):  # torch.nn.RNNBase has some to its own parameters
        return weakref.ref
    return _Same(value)


def settings(
    block: nn.Module, skip: Callable[[str, nn.Module], bool], without: Collection[str] = ()
) -> tuple[Any, ...]:
    """All that a block and its modules are made of, but the values of tensors.

    Two blocks with equal settings run the same code. Classes count, attributes (numbers, strings
    and containers of them by value, other objects by identity), and the sizes of parameters.

    Args:
        skip: which modules do not count, by their names.
        without: attributes of the block that do not count.
    """
    found: list[Any] = []
    for path, module in block.named_modules():
        if skip(path, module):
            continue
        kind = plain_class(module)
        patched = "_sdkernels" in module.__dict__
        found.append((path, getattr(kind, "_original", kind) if patched else kind))
        hidden = EVERYBODY if path else EVERYBODY.union(without)
        found += [(n, key_of(v)) for n, v in sorted(module.__dict__.items()) if n not in hidden]
        for table in (module._parameters, module._buffers):
            found += [(n, key_of(value)) for n, value in table.items()]
    return tuple(found)


class Stamp:
    """Tells, in a few microseconds, whether an attribute or a part of modules was replaced.

    Numbers and strings count by value, others by identity, tensors not at all.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.tables: list[dict[str, Any]] = []
        self.places: list[tuple[dict[str, Any], str]] = []
        for module in modules:
            own = module.__dict__
            self.tables += [own, module._modules]
            names = [n for n, v in own.items() if n not in EVERYBODY and not isinstance(v, Tensor)]
            self.places += [(own, name) for name in names]
            self.places += [(module._modules, name) for name in module._modules]
        self.sizes, self.values = self._sizes(), self._values()

    def holds(self) -> bool:
        try:
            return self._values() == self.values and self._sizes() == self.sizes
        except KeyError:
            return False

    def _sizes(self) -> list[int]:
        return [len(table) for table in self.tables]

    def _values(self) -> list[Any]:
        found = [table[name] for table, name in self.places]
        return [v if type(v) in _NUMBERS else id(v) for v in found]
