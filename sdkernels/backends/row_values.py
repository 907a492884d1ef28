"""Looks at the values of rows: index unique and ascending, slot its inverse.

On the CPU only, as the extension does (``csrc/cpu/cpu_ops.h``): a device would have to be waited
for, and the Triton kernels trap on what does not fit.
"""

from __future__ import annotations

import weakref

from torch import Tensor

# The rows that were looked at last, with their versions: compacting and adding a branch's output
# look at the same ones.
_Looked = tuple[weakref.ref[Tensor], weakref.ref[Tensor], int, int]
_looked: _Looked | None = None


def trust_rows(index: Tensor, slot: Tensor) -> None:
    """Rows that are known to fit."""
    global _looked
    try:
        _looked = weakref.ref(index), weakref.ref(slot), index._version, slot._version
    except RuntimeError:  # of inference mode: such a tensor counts no versions
        _looked = None


def are_trusted(index: Tensor, slot: Tensor) -> bool:
    """Whether these rows, on the CPU, are those that were looked at last."""
    looked = _looked
    return (
        looked is not None
        and looked[0]() is index
        and looked[1]() is slot
        and looked[2] == index._version
        and looked[3] == slot._version
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
