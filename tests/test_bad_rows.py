"""Hand-made rows whose values do not fit are refused wherever they reach a kernel."""

import pytest
import torch

from sdkernels import (
    KeptRows,
    compact_layer_norm,
    compact_rms_norm,
    compact_rows,
    fused_stochastic_depth,
    scatter_add_rows,
)

X = torch.arange(12.0).view(4, 3)
INDEX = torch.tensor([0, 2])
HUGE = 2**40

VALUES = {
    "too-large": ([0, 4], [0, -1, -1, -1], r"rows\.index: entry 1 is 4, .*from 0 to 3"),
    "huge": ([0, HUGE], [0, -1, -1, -1], rf"rows\.index: entry 1 is {HUGE}, .*from 0 to 3"),
    "negative": ([-1, 2], [-1, -1, 1, -1], r"rows\.index: entry 0 is -1, .*from 0 to 3"),
    "duplicate": ([2, 2], [-1, -1, 1, -1], r"rows\.index: .*unique, ascending.*got 2 after 2"),
    "unsorted": ([2, 0], [1, -1, 0, -1], r"rows\.index: .*unique, ascending.*got 0 after 2"),
    "slot-swapped": ([0, 2], [1, -1, 0, -1], r"rows\.slot: entry 0 is 1, expected 0"),
    "slot-missing": ([0, 2], [0, -1, -1, -1], r"rows\.slot: entry 2 is -1, expected 1"),
    "slot-extra": ([0, 2], [0, 1, 1, -1], r"rows\.slot: entry 1 is 1, expected -1"),
    "slot-huge": ([0, 2], [0, -1, 1, HUGE], rf"rows\.slot: entry 3 is {HUGE}, expected -1"),
    "slot-negative": ([0, 2], [0, -1, 1, -2], r"rows\.slot: entry 3 is -2, expected -1"),
    "slot-of-no-rows": ([], [-1, 0, -1, -1], r"rows\.slot: entry 1 is 0, expected -1"),
}


def add(x, rows, inplace=False):
    return scatter_add_rows(x, torch.ones(rows.k, 3), rows, inplace=inplace)


def op(x, rows, inplace=False):
    return fused_stochastic_depth(x, torch.sin, 0.5, rows=rows, inplace=inplace)


FUNCTIONS = {
    "compact": compact_rows,
    "layer_norm": lambda x, rows: compact_layer_norm(x, rows, 3),
    "rms_norm": lambda x, rows: compact_rms_norm(x, rows, 3),
    "scatter_add": add,
    "scatter_add-inplace": lambda x, rows: add(x, rows, inplace=True),
    "op": op,
    "op-inplace": lambda x, rows: op(x, rows, inplace=True),
}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


@each_function
@pytest.mark.parametrize(("index", "slot", "message"), VALUES.values(), ids=VALUES.keys())
def test_values_of_hand_made_rows(index, slot, message, function):
    rows = KeptRows(torch.tensor(index, dtype=torch.int64), torch.tensor(slot))
    leaf = X.clone().requires_grad_()
    x = leaf * 1  # not a leaf, so that it may be written to
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        # Compaction itself does not read slot, its backward does.
        function(x, rows).sum().backward()
    assert "\n" not in str(caught.value)
    assert torch.equal(x, X)
    assert leaf.grad is None


@each_function
def test_values_that_changed_behind_the_package(function):
    # from_index does not copy: what it looked at may be overwritten later.
    index = INDEX.clone()
    rows = KeptRows.from_index(index, 4)
    index[1] = HUGE
    with pytest.raises(ValueError, match=r"^rows\.index: entry 1"):
        function(X.clone(), rows)
