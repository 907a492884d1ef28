"""The one rule for block sizes and warps.

All kernels are bound by memory, so that two things matter: enough bytes in flight, and no wasted
lanes. A thread holds 16 elements of each tensor (8 of float64): that is two 16-byte loads of half
precision, or four of float32, for each tensor. With four warps a program, and the registers that
the kernels need, an SM of compute capability 8.0 or newer keeps 12 to 40 warps and well over 32 KB
of loads in flight, which is what hides the latency of its memory. Nothing is tuned at run time: a
step must not depend on a measurement, and the sums must not either, since the order of their terms
follows from the tiles. The rule was derived, not measured: no GPU has confirmed it yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from .geometry import Walk

_THREADS = 32
_WARPS = 4
_MOST_BYTES = 16384  # of a line that is held, in the type of the arithmetic

# Terms that go into a partial sum for each one that comes out: writing and reading the partial sums
# (float32, once each) then costs about a twentieth of the traffic of the data.
_TERMS = 32


class Tile(NamedTuple):
    """What one program works on at a time: `lines` x `length` elements, powers of two."""

    lines: int
    length: int
    warps: int


def _elements_per_thread(acc: torch.dtype) -> int:
    return 8 if acc == torch.float64 else 16


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


@lru_cache(maxsize=4096)
def row_tile(walk: Walk, acc: torch.dtype) -> Tile:
    """The tile of a kernel that treats every element by itself."""
    elements = _elements_per_thread(acc) * _THREADS * _WARPS
    if walk.transposed:
        # As square as it can be: one tensor is contiguous along one side, another along the other.
        wanted = 1 << (elements.bit_length() // 2)
        length = min(wanted, _next_power_of_two(walk.length))
    else:
        length = _column_block(walk.length, elements)
    lines = min(elements // length, _next_power_of_two(walk.lines))
    warps = max(1, lines * length * _WARPS // elements)
    return Tile(lines, length, warps)


def _column_block(length: int, most: int) -> int:
    """The widest block that a line fills up to an eighth; else the one that wastes least."""
    if length >= 8 * most:
        return most
    blocks = [most >> i for i in range(most.bit_length()) if most >> i >= 128]
    if length <= blocks[-1]:
        return _next_power_of_two(length)
    waste = {block: -length % block for block in blocks}
    full = [block for block in blocks if 8 * waste[block] <= length]
    return full[0] if full else min(blocks, key=waste.__getitem__)


@lru_cache(maxsize=4096)
def norm_tile(lines: int, length: int, acc: torch.dtype) -> Tile:
    """The tile of a norm, which holds whole lines where that many elements fit into registers.

    Longer lines are walked several times, in blocks of the tile's length.
    """
    per_warp = _elements_per_thread(acc) * _THREADS
    if acc == torch.float64:
        per_warp //= 2  # the two sums of the backward take as many registers again
    block = min(_next_power_of_two(length), _MOST_BYTES // acc.itemsize)
    lines = min(max(1, per_warp * _WARPS // block), _next_power_of_two(lines))
    return Tile(lines, block, max(1, lines * block // per_warp))


def rows_per_sum(summed: int) -> int:
    """How many rows a program adds up, when its tile adds `summed` terms to an entry for each."""
    return cdiv(_TERMS, summed)


def sum_tile(acc: torch.dtype) -> Tile:
    """The tile of sums over lines, element by element: no line has to be whole."""
    return Tile(1, _elements_per_thread(acc) * _THREADS * _WARPS // 2, _WARPS)
