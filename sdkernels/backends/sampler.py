"""Which rows are kept, drawn on the host: ``csrc/sampler.cpp`` without a compiler.

A seed gives the same rows as there, number by number: both take 64 bits a decision from PyTorch's
CPU generator, or from the Philox stream of a training step.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from .checks import transforms_active
from .row_values import trust_rows
from .untraced import untraced

_INT64_MIN = -(2**63)
HOST = torch.device("cpu")  # whatever the default device
_MOST_LISTED = 256  # rows up to which Python's lists are faster than PyTorch's operations


@dataclass(frozen=True)
class Draw:
    """One layer's draw.

    Bernoulli: each row is kept with probability `keep`; with `whole_batch` one draw decides for all
    rows. With a `count`, exactly that many rows, every subset of that size equally likely.
    """

    keep: float
    count: int  # negative: Bernoulli
    whole_batch: bool

    @functools.cached_property
    def below(self) -> int:
        """A row is kept where its word, without a sign, is below this."""
        return _threshold(self.keep) << 11


@dataclass(frozen=True)
class StepKey:
    """Names one step's stream of random numbers; rank below 2**32."""

    seed: int
    step: int
    rank: int


class Words(Protocol):
    """A source of random words."""

    def take(self, count: int) -> Tensor:
        """The next `count` words of 64 random bits, as int64."""


def _generator_words(count: int, generator: torch.Generator | None) -> Tensor:
    words = torch.empty(count, dtype=torch.int64, device=HOST)
    return words.random_(_INT64_MIN, None, generator=generator)


class _GeneratorWords:
    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator

    def take(self, count: int) -> Tensor:
        return _generator_words(count, self._generator)


class _StepWords:
    """Philox4x32-10 (Salmon et al., SC 2011), as PyTorch's own engine runs it.

    The key is the seed; the counter holds the step, the rank and 32 bits to count with, so that no
    two streams of a seed share a block of random bits.
    """

    _MASK = 2**32 - 1
    _MULTIPLIERS = torch.tensor([[0xD2511F53], [0xCD9E8D57]], device=HOST)

    def __init__(self, key: StepKey) -> None:
        self._key = key
        self._taken = 0

    def take(self, count: int) -> Tensor:
        first = self._taken
        self._taken += count
        begin, end = first // 2, -(-self._taken // 2)  # two words a block
        numbers = torch.arange(begin, end, dtype=torch.int64, device=HOST)
        words = self._blocks(numbers).flatten()
        return words[first - 2 * begin :][:count]

    def _blocks(self, number: Tensor) -> Tensor:
        """[n, 2] words of the blocks with these numbers."""
        mask, key = self._MASK, self._key
        step = torch.full_like(number, key.step & mask)
        # The counter's words 0 and 2, and its words 1 and 3. int64 holds 32 bits without a sign.
        even = torch.stack((number & mask, step))
        odd = torch.stack(((number >> 32) + key.rank & mask, step.fill_(key.step >> 32)))
        for round_ in range(10):
            # The upper 32 bits of an unsigned product, from the signed one that wraps around.
            product = even.mul_(self._MULTIPLIERS).flip(0)
            keys = [(key.seed & mask) + round_ * 0x9E3779B9, (key.seed >> 32) + round_ * 0xBB67AE85]
            round_key = _int64([each & mask for each in keys])[:, None]
            even = (product >> 32).bitwise_and_(mask).bitwise_xor_(odd).bitwise_xor_(round_key)
            odd = product.bitwise_and_(mask)
        return even.bitwise_or_(odd << 32).t()


def words_of(generator: torch.Generator | None, step: StepKey | None) -> Words:
    return _GeneratorWords(generator) if step is None else _StepWords(step)


def _threshold(keep: float) -> int:
    return ceil(keep * 2.0**53)


def _bernoulli(words: Tensor, threshold: int | Tensor) -> Tensor:
    """Where a uniform number of 53 bits is below keep: True with probability keep exactly.

    1 - p is a multiple of 2**-53 for every p in [0, 1]. Overwrites `words`.
    """
    return words.bitwise_right_shift_(11).bitwise_and_(2**53 - 1) < threshold


def _choose_rows(batch: int, count: int, words: Words) -> list[int]:
    """Selection sampling (Knuth, TAOCP volume 2, algorithm 3.4.2 S): `count` rows, ascending."""
    stream = iter(words.take(batch).tolist())
    kept: list[int] = []
    wanted = count
    for row in range(batch):
        left = batch - row
        word = next(stream) % 2**64
        # A uniform integer below `left`, without bias: 2**64 need not be a multiple of it.
        while word < 2**64 % left:
            stream = iter([*stream, *words.take(1).tolist()])
            word = next(stream) % 2**64
        if word % left < wanted:
            kept.append(row)
            wanted -= 1
    return kept


def _int64(values: list[int]) -> Tensor:
    """A tensor of them, in a fraction of torch.tensor's time."""
    if not values:
        return torch.empty(0, dtype=torch.int64, device=HOST)
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _draw_rows(batch: int, draw: Draw, words: Words) -> tuple[Tensor, Tensor]:
    """index and slot."""
    if draw.count >= 0:
        kept = _choose_rows(batch, draw.count, words)
    elif draw.whole_batch:
        kept = list(range(batch)) if _bernoulli(words.take(1), _threshold(draw.keep)).item() else []
    elif batch > _MOST_LISTED:
        mask = _bernoulli(words.take(batch), _threshold(draw.keep))
        return mask.nonzero().view(-1), _slots(mask)
    else:
        return _rows_below(words.take(batch), draw.below)
    return _rows_of(kept, batch)


def _rows_below(words: Tensor, below: int) -> tuple[Tensor, Tensor]:
    """The rows whose word, without a sign, is below."""
    negative = below - 2**64
    return _rows_of(
        [row for row, word in enumerate(words.tolist()) if word < negative or 0 <= word < below],
        words.numel(),
    )


def _rows_of(kept: list[int], batch: int) -> tuple[Tensor, Tensor]:
    slots = [-1] * batch
    for j, row in enumerate(kept):
        slots[row] = j
    return _int64(kept), _int64(slots)


def _slots(mask: Tensor) -> Tensor:
    return mask.cumsum(-1).mul_(mask).sub_(1)


@untraced
def sample_rows(
    batch: int, draw: Draw, generator: torch.Generator | None, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    """index [k] and slot [batch], int64, on `device`: one copy from the host, no waiting."""
    if transforms_active():
        # One draw for all, as the extension's: its numbers are none that a transform follows.
        with torch._C._DisableFuncTorch():
            index, slot = _draw_rows(batch, draw, _GeneratorWords(generator))
    # As in nearly every call:
    elif draw.count < 0 and batch <= _MOST_LISTED and not draw.whole_batch:
        index, slot = _rows_below(_generator_words(batch, generator), draw.below)
    else:
        index, slot = _draw_rows(batch, draw, _GeneratorWords(generator))
    if device is None or device.type == "cpu":
        trust_rows(index, slot)
        return index, slot
    k = index.shape[0]
    # Pinned, the copy is asynchronous; the allocator keeps the memory until it is done.
    pin_memory = device.type == "cuda"
    host = torch.empty(batch + k, dtype=torch.int64, device=HOST, pin_memory=pin_memory)
    torch.cat((slot, index), out=host)
    sent = host.to(device, non_blocking=True)
    return sent[batch:], sent[:batch]


@untraced
def sample_plan(
    batches: Sequence[int],
    draws: Sequence[Draw],
    generator: torch.Generator | None,
    step: StepKey | None,
    pin_memory: bool,
) -> tuple[Tensor, list[int]]:
    """The rows of several layers in one host tensor, and the number of kept rows of each draw.

    [layers, 2, total] (slot, then index, those of batch after batch); ``draws[layer * batches +
    batch]``. The numbers come from `step` where it is given, otherwise from the generator.
    """
    words = words_of(generator, step)
    total, crops = sum(batches), len(batches)
    layers = len(draws) // crops
    shape = layers, 2, total
    rows = torch.zeros(shape, dtype=torch.int64, device=HOST, pin_memory=pin_memory)
    if draws and total and all(draw.count < 0 and not draw.whole_batch for draw in draws):
        return rows, _draw_all(rows, batches, draws, words)
    kept: list[int] = []
    for layer in range(layers):
        start = 0
        for crop, batch in enumerate(batches):
            index, slot = _draw_rows(batch, draws[layer * crops + crop], words)
            k = index.shape[0]
            rows[layer, 0, start : start + batch] = slot
            rows[layer, 1, start : start + k] = index
            kept.append(k)
            start += batch
    return rows, kept


def _draw_all(
    rows: Tensor, batches: Sequence[int], draws: Sequence[Draw], words: Words
) -> list[int]:
    """Writes the rows of Bernoulli draws."""
    layers, _, total = rows.shape
    thresholds = _int64([_threshold(draw.keep) for draw in draws]).view(layers, -1)
    thresholds = thresholds.repeat_interleave(_int64([*batches]), 1)
    mask = _bernoulli(words.take(layers * total).view(layers, total), thresholds)
    return write_rows(rows, batches, mask)


def write_rows(rows: Tensor, batches: Sequence[int], mask: Tensor) -> list[int]:
    """Writes the rows where the mask [layers, total] is true, and returns how many of each draw.

    In a number of operations that no plan's size changes.
    """
    kept = []
    start = 0
    for batch in batches:
        part, slot = mask[:, start : start + batch], rows[:, 0, start : start + batch]
        slot.copy_(_slots(part))
        layer, row = part.nonzero(as_tuple=True)
        rows[:, 1, start : start + batch][layer, slot[layer, row]] = row
        kept.append(part.sum(1))
        start += batch
    counts: list[int] = torch.stack(kept, 1).flatten().tolist()
    return counts
