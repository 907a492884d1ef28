"""Modules with a parameter that torch.nn.utils.parametrize computes.

Each of them has a class of its own, derived from the one before, to which it goes back when the
parametrization is removed. Patching changes the class beneath.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["give_class", "plain_class"]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module but for its parametrizations."""
    kind = type(module)
    if kind.__module__ == parametrize.__name__ and parametrize.is_parametrized(module):
        return kind.__bases__[0]
    return kind


def give_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a module but for its parametrizations."""
    front = type(module)
    if front is not plain_class(module):
        members = {n: v for n, v in vars(front).items() if n not in ("__dict__", "__weakref__")}
        kind = type(front.__name__, (kind,), members)
    module.__class__ = kind
