"""What a patched block hands to the op as a branch: its modules, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..arguments import PerSample, Shared

__all__ = ["Composed", "chain", "entries", "per_sample"]


def per_sample(value: Any, x: Tensor | list[Tensor]) -> Any:
    """What attention broadcasts against [B, heads, N, ...], as an entry of ``args``.

    A tensor of four dimensions belongs to the samples, unless it has one row for all of them; with
    fewer, its first dimension is heads or tokens, whatever its size.
    """
    if isinstance(value, list) and isinstance(x, list):
        return [per_sample(each, crop) for each, crop in zip(value, x, strict=True)]
    if not isinstance(value, Tensor):
        return value
    return PerSample(value) if value.dim() == 4 and value.shape[0] != 1 else Shared(value)


def chain(steps: Sequence[Callable[..., Any] | None]) -> Callable[[Tensor], Tensor]:
    """One step after the other, without those that a block does not have."""

    def run(x: Tensor) -> Tensor:
        for step in steps:
            if step is not None:
                x = step(x)
        return x

    return run


class Composed:
    """A branch with what could not be fused into the op around it."""

    def __init__(self, steps: Sequence[Callable[..., Any]], branch: int, block: nn.Module) -> None:
        self.steps = steps
        self.branch = branch  # position of the branch proper, which gets the extra arguments
        self.block = block  # whose modules these are

    def __call__(self, kept: Any, *args: Any) -> Any:
        for position, step in enumerate(self.steps):
            kept = step(kept, *args) if position == self.branch else step(kept)
        return kept


def entries(args: Any, crop: int, crops: int) -> Any:
    """What of each entry belongs to one tensor of a list."""

    def own(arg: Any) -> Any:
        return arg[crop] if isinstance(arg, list) and len(arg) == crops else arg

    return (
        {k: own(v) for k, v in args.items()} if isinstance(args, Mapping) else list(map(own, args))
    )
