"""What a patched block hands to the op as a branch: its modules, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import Shared
from ..statistics import has_no_rows, waits_for_others

__all__ = ["Composed", "NeverEmpty", "chain", "entries", "entry", "per_sample"]


def per_sample(value: Any, x: Tensor | list[Tensor]) -> Any:
    """A tensor that attention broadcasts against [B, heads, N, ...], as an entry of ``args``.

    One with four dimensions and B entries in the first belongs to the samples; with fewer, its
    first dimension is heads or tokens, whatever its size.
    """
    if isinstance(value, list) and isinstance(x, list):
        return [per_sample(each, crop) for each, crop in zip(value, x, strict=True)]
    of_samples = (
        isinstance(value, Tensor)
        and isinstance(x, Tensor)
        and value.dim() == 4
        and value.shape[0] == x.shape[0]
    )
    return value if of_samples else Shared(value)


def chain(steps: Sequence[Callable[..., Any] | None]) -> Callable[[Tensor], Tensor]:
    """One step after the other, without those that a block does not have."""

    def run(x: Tensor) -> Tensor:
        for step in steps:
            if step is not None:
                x = step(x)
        return x

    return run


class Composed:
    """A branch with what could not be fused into the op around it, for one tensor or a list."""

    def __init__(self, steps: Sequence[Callable[..., Any]], branch: int) -> None:
        self.steps = steps
        self.branch = branch  # position of the branch proper, which gets the extra arguments

    def __call__(self, kept: Any, *args: Any) -> Any:
        if isinstance(kept, list):
            return [self.run(each, i, entries(args, i)) for i, each in enumerate(kept)]
        return self.run(kept, None, args)

    def run(self, kept: Any, crop: int | None, args: Sequence[Any]) -> Any:
        for position, step in enumerate(self.steps):
            kept = step(kept, *args) if position == self.branch else step(kept)
        return kept


class NeverEmpty(Composed):
    """One that is not run on an empty batch, which many attentions cannot reshape.

    A sample of ones runs beside no sample then, and its result is left out again: nothing is added
    to any row, no statistics are taken, and parameters get zero gradients, not None. (No sample of
    the batch: whatever is in a dropped one reaches nothing.)
    """

    def __init__(
        self,
        steps: Sequence[Callable[..., Any]],
        branch: int,
        args: Sequence[Any],
        block: nn.Module,
    ) -> None:
        super().__init__(steps, branch)
        self.args = args  # of the whole batch
        self.block = block

    def run(self, kept: Any, crop: int | None, args: Sequence[Any]) -> Any:
        if not has_no_rows(kept):
            return super().run(kept, crop, args)
        whole = self.args if crop is None else entries(self.args, crop)
        padded = [
            torch.cat([arg, of_batch[:1].detach()]) if isinstance(of_batch, Tensor) else arg
            for arg, of_batch in zip(args, whole, strict=True)
        ]
        ones = kept.new_ones((1, *kept.shape[1:]))
        with _without_statistics(self.block):
            return super().run(torch.cat([kept, ones]), crop, padded)[:0]


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """The block's BatchNorms take none from what runs."""
    modules: list[Any] = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    waiting = [norm for norm in modules if waits_for_others(norm)]
    norms = [norm for norm in modules if not waits_for_others(norm)]
    try:
        for norm in norms:
            norm.training = False
        for norm in waiting:
            norm.forward = partial(_exchange_nothing, norm)
        yield
    finally:
        for norm in norms:
            norm.training = True
        for norm in waiting:
            norm.__dict__.pop("forward", None)


def _exchange_nothing(norm: Any, x: Tensor) -> Tensor:
    """The forward of a SyncBatchNorm that joins in with no sample; x goes through as it is."""
    joined: Tensor = type(norm).forward(norm, x[:0])
    return torch.cat([joined, x])


def entry(arg: Any, crop: int) -> Any:
    """What belongs to one tensor of a list."""
    return arg[crop] if isinstance(arg, list) else arg


def entries(args: Sequence[Any], crop: int) -> list[Any]:
    return [entry(arg, crop) for arg in args]
