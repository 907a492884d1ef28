"""The rows of a whole plan, spread evenly over its branches: ``sampler="balanced"``.

One implementation beside every backend's sampler. Its words come from the same streams.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sampler import HOST, StepKey, words_of, write_rows
from .untraced import untraced

_BITS = 53  # of a probability: 1 - p is a multiple of 2**-53 for every p in [0, 1]


@untraced
def sample_balanced_plan(
    batches: Sequence[int],
    keeps: Sequence[float],
    kinds: int,
    generator: torch.Generator | None,
    steps: tuple[StepKey, StepKey] | None,
    pin_memory: bool,
) -> tuple[Tensor, list[int]]:
    """As ``sample_plan``, for branches of which row is kept with a probability of `keeps`.

    Branches i, i + kinds, ... are balanced among themselves, for each batch. Of `steps`, this
    process' own and that which all ranks share, the second says which way totals are rounded.
    """
    own = words_of(generator, steps and steps[0])
    shared = own if steps is None else words_of(None, steps[1])
    total = sum(batches)
    shape = len(keeps), 2, total
    rows = torch.zeros(shape, dtype=torch.int64, device=HOST, pin_memory=pin_memory)
    mask = torch.empty((len(keeps), total), dtype=torch.bool, device=HOST)
    numbers = [round(keep * 2**_BITS) for keep in keeps]
    shares = torch.tensor(numbers, dtype=torch.int64, device=HOST)
    words = own.take(mask.numel()).view(mask.shape)
    offsets = shared.take(kinds * len(batches)).view(kinds, -1)
    for kind in range(kinds):
        start = 0
        for crop, batch in enumerate(batches):
            part = slice(kind, None, kinds), slice(start, start + batch)
            pairs = shares[kind::kinds].repeat_interleave(batch)
            kept = _systematic(pairs, words[part].flatten(), offsets[kind, crop])
            mask[part] = kept.view(mask[part].shape)
            start += batch
    return rows, write_rows(rows, batches, mask)


def _systematic(shares: Tensor, words: Tensor, offset: Tensor) -> Tensor:
    """Systematic sampling in a random order: each with its share of 2**53 exactly.

    Put end to end from a random offset, the shares cross as many multiples of 2**53 as are kept.
    The order does not change that number, so that ranks with one offset keep as many. Sums wrap
    around at 2**64, a multiple of 2**53: they are exact.
    """
    order = words.argsort()
    shares = shares[order]
    ends = shares.cumsum(0).add_(offset).bitwise_and_(2**_BITS - 1)
    kept = torch.empty_like(shares, dtype=torch.bool)
    kept[order] = ends < shares
    return kept
