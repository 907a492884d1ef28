"""An unpatched model that drops by masks: the rows that it is given, or rows of its own.

That is what a patched model is held against.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..models import PatchedEntry
from ..reference import naive_masking
from ..rows import KeptRows

__all__ = ["Masked", "Masking", "NoDropPath", "give_drop_paths", "masked", "together"]


class NoDropPath(ValueError):
    """A branch has no drop path module that a mask could take the place of; says whose."""


class Masked(nn.Module):
    """In the place of a drop path: the same, with given rows, call after call."""

    def __init__(self, rows: list[KeptRows]) -> None:
        super().__init__()
        self.rows = rows
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows[self.calls % len(self.rows)]
        self.calls += 1
        return naive_masking(torch.zeros_like(x), lambda _: x, 0.0, rows=rows)


class Masking(nn.Module):
    """In the place of a drop path: masks as torchvision draws them, of given probabilities, call
    after call."""

    def __init__(self, p: list[float]) -> None:
        super().__init__()
        self.p = p
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        p = self.p[0]
        if len(self.p) > 1:
            p = self.p[self.calls % len(self.p)]
            self.calls += 1
        if not self.training or p == 0.0:
            return x
        noise = torch.empty(
            [x.shape[0]] + [1] * (x.dim() - 1), dtype=x.dtype, device=x.device
        ).bernoulli_(1.0 - p)
        return x * (noise.div_(1.0 - p) if p < 1.0 else noise)


def give_drop_paths(
    model: nn.Module,
    entries: Iterable[PatchedEntry],
    make: Callable[[int], nn.Module | None],
) -> nn.Module:
    """Put `make(i)` in the place of the drop path of branch i; None: nothing is dropped there.

    A module that serves several branches is replaced once, with the first one's.

    Args:
        model: is changed.
        entries: of a report of the same model, whose branches are counted.

    Raises:
        NoDropPath: a branch has no drop path module, and no batch norm at its end.
    """
    number = 0
    for entry in entries:
        block = model.get_submodule(entry.name)
        done: set[str] = set()
        for branch in entry.branches:
            drop = make(number) or nn.Identity()
            number += 1
            if branch.drop is None:  # after the last norm of the branch, in torchvision's ResNet
                name = next((name for name in ("bn3", "bn2") if hasattr(block, name)), None)
                if name is None:
                    raise NoDropPath(f"{entry.name or 'the model'} has no drop path module")
                setattr(block, name, nn.Sequential(getattr(block, name), drop))
            elif branch.drop not in done:
                done.add(branch.drop)
                owner, _, last = branch.drop.rpartition(".")
                setattr(attrgetter(owner)(block) if owner else block, last, drop)
    return model


def together(entries: Iterable[PatchedEntry], values: Iterable[Any]) -> list[list[Any]]:
    """Of each branch, the values of all branches that share its drop path module."""
    each, found = iter(values), []
    for entry in entries:
        shared: dict[str | None, list[Any]] = {}
        for branch in entry.branches:
            values_of = shared.setdefault(branch.drop, [])
            values_of.append(next(each))
            found.append(values_of)
    return found


def masked(
    model: nn.Module,
    entries: Sequence[PatchedEntry],
    values: Iterable[Any],
    kind: Callable[[list[Any]], nn.Module],
) -> nn.Module:
    """A copy of `model` whose branches drop by ``kind(values)``, one value a branch."""
    of_branch = together(entries, values)
    return give_drop_paths(copy.deepcopy(model), entries, lambda number: kind(of_branch[number]))
