"""The arguments of a block: copies of them, and what is written into them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..proof import Leaf, leaves
from .clones import uncopied
from .contents import contents

__all__ = ["all_leaves", "cloned", "doubled", "held_by", "is_list_of", "varied", "with_tensors"]

_NUMBERS = 3  # of entries in a list of sizes


def all_leaves(named: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in named.items():
        yield from leaves(value, name)


def with_tensors(named: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """A deep copy of arguments, with their tensors changed; modules stay."""
    memo: dict[int, Any] = {}
    for _, value in contents(named):
        if isinstance(value, Tensor):
            memo[id(value)] = value.detach().clone()  # in an object
    for path, leaf in all_leaves(named):
        memo[id(leaf)] = change(path, leaf)
    for value in named.values():
        if isinstance(value, nn.Module):
            memo[id(value)] = value
    try:
        return copy.deepcopy(named, dict(memo))
    except Exception:
        return copy.deepcopy(named, memo | uncopied(list(named.values()), memo))


def cloned(path: str, leaf: Tensor) -> Tensor:
    return leaf.detach().clone()


def doubled(named: dict[str, Any], doubtful: Sequence[Leaf]) -> tuple[dict[str, Any], Tensor]:
    """The arguments of one sample as those of two."""
    stream = next(iter(named))

    def twice(path: str, leaf: Tensor) -> Tensor:
        belongs = path == stream or (path, leaf.dim()) in doubtful
        return torch.cat([leaf, leaf]).detach() if belongs else leaf

    made = with_tensors(named, twice)
    return made, made[stream]


def held_by(named: dict[str, Any]) -> list[Any]:
    """What arguments are made of, and whether their tensors were written to; but for the stream."""
    found: list[Any] = []
    for name in [*named][1:]:
        for path, value in contents(named[name], name):
            tensor = isinstance(value, Tensor)
            found.append((path, (id(value), value._version) if tensor else value))
    return found


def is_list_of(value: Any, x: Tensor, fewest: int | None = None) -> bool:
    """Whether numbers may be one for each sample: as many, and no sizes of the stream.

    Args:
        fewest: fewer are none of samples. None: more than the sizes of an image or a window.
    """
    if isinstance(value, dict):
        return any(is_list_of(each, x) for each in value.values())
    if not isinstance(value, (list, tuple)):
        return False
    if any(is_list_of(each, x) for each in value):
        return True
    count = len(value)
    if count != x.shape[0] or not all(isinstance(v, (int, float)) for v in value):
        return False
    # So few, one for each sample, would not do for the rows of the comparison.
    if count < (_NUMBERS + 1 if fewest is None else fewest):
        return False
    sizes = [tuple(x.shape[first : first + count]) for first in range(x.dim())]
    return tuple(value) not in sizes and math.prod(value) not in x.shape[1:]


def varied(numbers: Tensor) -> Tensor:
    """Numbers of which no two rows are the same, where they were: others will not be."""
    numbers = numbers.clone()
    if len(numbers) < 2 or not (numbers == numbers[:1]).all():
        return numbers
    if numbers.dtype == torch.bool:
        numbers.flatten(1)[1::2, -1:] ^= True
    else:
        numbers[1::2] -= (numbers[1::2] > 1).to(numbers.dtype)
    return numbers
