"""Looks at the values of rows: index unique and ascending, slot its inverse.

On the CPU only, as the extension does (``csrc/cpu/cpu_ops.h``): a device would have to be waited
for, and the Triton kernels trap on what does not fit.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor


class _Looked(NamedTuple):
    index_ref: weakref.ref[Tensor]
    slot_ref: weakref.ref[Tensor]
    versions: tuple[int, int]


# The rows that were looked at last: compacting and adding a branch's output look at the same ones.
_looked: _Looked | None = None


def trust_rows(index: Tensor, slot: Tensor) -> None:
    """Rows that are known to fit."""
    global _looked
    if not index.is_inference() and not slot.is_inference():  # those count no versions
        versions = index._version, slot._version
        _looked = _Looked(weakref.ref(index), weakref.ref(slot), versions)


def are_trusted(index: Tensor, slot: Tensor) -> bool:
    """Whether these rows, on the CPU, are those that were looked at last."""
    looked = _looked
    return (
        looked is not None
        and looked[0]() is index
        and looked[1]() is slot
        and looked[2] == (index._version, slot._version)
    )


def check_row_values(index: Tensor, slot: Tensor) -> None:
    if type(index) is not Tensor or not index.is_cpu or are_trusted(index, slot):
        return
    rows, slots = index.tolist(), slot.tolist()
    _check_index(rows, len(slots))
    expected = [-1] * len(slots)
    for j, row in enumerate(rows):
        expected[row] = j
    if slots != expected:
        _refuse_slot(slots, expected)
    trust_rows(index, slot)


def check_index_values(index: Tensor, batch: int) -> None:
    if type(index) is Tensor and index.is_cpu:
        _check_index(index.tolist(), batch)


def _check_index(rows: list[int], batch: int) -> None:
    previous = -1
    for j, row in enumerate(rows):
        if not 0 <= row < batch:
            raise ValueError(
                f"rows.index: entry {j} is {row}, expected a row number from 0 to {batch - 1}"
            )
        if row <= previous:
            raise ValueError(
                f"rows.index: expected unique, ascending row numbers, got {row} after {previous}"
            )
        previous = row


def _refuse_slot(slots: list[int], expected: list[int]) -> None:
    for row, (slot, inverse) in enumerate(zip(slots, expected, strict=True)):
        if slot != inverse:
            raise ValueError(
                f"rows.slot: entry {row} is {slot}, expected {inverse} as the inverse of rows.index"
            )
