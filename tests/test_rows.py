"""KeptRows: how they are made, what cannot be rows, and how they behave as objects."""

import copy
import dataclasses
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdkernels import DepthPlan, KeptRows, fused_stochastic_depth

LAWS = {"row": {"mode": "row"}, "batch": {"mode": "batch"}, "fixed": {"sampler": "fixed"}}

each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_rows(rows, index, slot, scale=1.0):
    assert rows.index.tolist() == index
    assert rows.slot.tolist() == slot
    assert (rows.index.dtype, rows.slot.dtype) == (torch.int64, torch.int64)
    assert rows.index.is_contiguous()
    assert rows.slot.is_contiguous()
    assert (rows.k, rows.batch, rows.scale) == (len(index), len(slot), scale)


def assert_same_rows(a, b):
    assert_rows(a, b.index.tolist(), b.slot.tolist(), b.scale)


# Making them

MASKS = {
    "some": ([True, False, True, False], [0, 2], [0, -1, 1, -1]),
    "all": ([True, True], [0, 1], [0, 1]),
    "none": ([False, False], [], [-1, -1]),
    "last": ([False, False, True], [2], [-1, -1, 0]),
    "one": ([True], [0], [0]),
    "batch-0": ([], [], []),
}
each_mask = pytest.mark.parametrize(("mask", "index", "slot"), MASKS.values(), ids=MASKS.keys())


@each_mask
def test_from_mask(mask, index, slot):
    rows = KeptRows.from_mask(torch.tensor(mask, dtype=torch.bool), 2.5)
    assert_rows(rows, index, slot, 2.5)


@each_mask
def test_from_index(mask, index, slot):
    rows = KeptRows.from_index(torch.tensor(index, dtype=torch.int64), len(mask), 2.5)
    assert_rows(rows, index, slot, 2.5)


@each_mask
def test_constructor(mask, index, slot):
    rows = KeptRows(torch.tensor(index, dtype=torch.int64), torch.tensor(slot, dtype=torch.int64))
    assert_rows(rows, index, slot)


def test_scale_is_one_by_default():
    index = torch.tensor([1])
    for rows in (KeptRows.from_mask(index > 0), KeptRows.from_index(index, 2)):
        assert rows.scale == 1.0


def test_from_mask_of_any_strides():
    columns = torch.tensor([[True, False], [False, True], [True, True]])
    assert_rows(KeptRows.from_mask(columns[:, 0]), [0, 2], [0, -1, 1])
    assert_rows(KeptRows.from_mask(torch.tensor([True]).expand(3)), [0, 1, 2], [0, 1, 2])


def test_from_index_of_any_strides():
    columns = torch.tensor([[0, 7], [2, 7]])
    assert_rows(KeptRows.from_index(columns[:, 0], 3), [0, 2], [0, -1, 1])


@given(st.lists(st.booleans(), max_size=70))
def test_mask_and_index_give_the_same_rows(mask):
    from_mask = KeptRows.from_mask(torch.tensor(mask, dtype=torch.bool), 1.5)
    index = torch.tensor([row for row, kept in enumerate(mask) if kept], dtype=torch.int64)
    assert_same_rows(from_mask, KeptRows.from_index(index, len(mask), 1.5))


@given(
    batch=st.integers(0, 70),
    p=st.floats(0, 1),
    law=st.sampled_from(list(LAWS.values())),
    seed=st.integers(0, 2**32),
)
def test_sampled_rows_are_ascending_and_slot_is_their_inverse(batch, p, law, seed):
    rows = KeptRows.sample(batch, p, generator=seeded(seed), **law)
    index = rows.index.tolist()
    assert index == sorted(set(index))
    slot = [index.index(row) if row in index else -1 for row in range(batch)]
    assert_rows(rows, index, slot, rows.scale)


@each_law
@pytest.mark.parametrize("number", [np.float64, np.float32, Fraction])
def test_p_may_be_any_real_number(number, law):
    rows = KeptRows.sample(8, number(0.25), generator=seeded(1), **law)
    assert_same_rows(rows, KeptRows.sample(8, 0.25, generator=seeded(1), **law))
    assert KeptRows.sample(8, 0, **law).k == 8


# What cannot be rows

INDEX = torch.tensor([0, 2])
SLOT = torch.tensor([0, -1, 1, -1])
MASK = SLOT >= 0
META = INDEX.to("meta")

REFUSED = {
    KeptRows.from_mask: {
        "list": (([True],), TypeError, "mask: expected a bool tensor, got list"),
        "int64": ((SLOT,), TypeError, "mask: expected a bool tensor, got torch.int64"),
        "0d": ((MASK[0],), ValueError, r"mask: expected shape \[batch\], got \(\)"),
        "2d": ((MASK[None],), ValueError, r"mask: expected shape \[batch\], got \(1, 4\)"),
        "scale": ((MASK, "2"), TypeError, "scale: expected a number, got str"),
    },
    KeptRows.from_index: {
        "list": (([0, 2], 4), TypeError, "index: expected an int64 tensor, got list"),
        "int32": ((INDEX.int(), 4), TypeError, "index: expected an int64 tensor, got torch.int32"),
        "bool": ((MASK, 4), TypeError, "index: expected an int64 tensor, got torch.bool"),
        "0d": ((INDEX[0], 4), ValueError, r"index: expected shape \[k\], got \(\)"),
        "2d": ((INDEX[None], 4), ValueError, r"index: expected shape \[k\], got \(1, 2\)"),
        "negative": ((INDEX - 1, 4), ValueError, "index: .* from 0 to 3, got -1 to 1"),
        "too-large": ((INDEX + 2, 4), ValueError, "index: .* from 0 to 3, got 2 to 4"),
        "no-batch": ((INDEX, 0), ValueError, "index: .*got 0 to 2"),
        "duplicate": ((INDEX[[1, 1]], 4), ValueError, r"index: expected unique.*got \[2, 2\]"),
        "unsorted": ((INDEX.flip(0), 4), ValueError, r"index: .* ascending .*got \[2, 0\]"),
        "meta": ((META, 4), RuntimeError, ".*cannot be called on meta tensors"),
        "batch-negative": ((INDEX, -1), ValueError, "batch: .*got -1"),
        "batch-float": ((INDEX, 4.0), ValueError, r"batch: .*got 4\.0"),
        "batch-none": ((INDEX, None), ValueError, "batch: .*got None"),
        "scale": ((INDEX, 4, None), TypeError, "scale: expected a number, got NoneType"),
    },
    KeptRows: {
        "index-list": (([0], SLOT), TypeError, "index: expected an int64 tensor, got list"),
        "index-int32": ((INDEX.int(), SLOT), TypeError, "index: .*got torch.int32"),
        "index-2d": ((INDEX[None], SLOT), ValueError, r"index: .*got .*\(1, 2\)"),
        "index-strided": ((SLOT[::2], SLOT), ValueError, "index: expected a contiguous tensor"),
        "slot-list": ((INDEX, [0, -1]), TypeError, "slot: expected an int64 tensor, got list"),
        "slot-bool": ((INDEX, MASK), TypeError, "slot: .* got torch.bool"),
        "slot-2d": ((INDEX, SLOT[None]), ValueError, r"slot: .*got .*\(1, 4\)"),
        "slot-strided": ((INDEX, SLOT[::2]), ValueError, "slot: expected a contiguous tensor"),
        "device": ((META, SLOT), ValueError, "index: .* device of slot, cpu, got meta"),
        "too-many": ((INDEX, SLOT[:1]), ValueError, "index: 2 kept rows of a batch of 1"),
        "scale": ((INDEX, SLOT, MASK), TypeError, "scale: expected a number, got Tensor"),
    },
}


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        pytest.param(make, *case, id=f"{make.__name__}-{name}")
        for make, cases in REFUSED.items()
        for name, case in cases.items()
    ],
)
def test_refused(make, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make(*arguments)


# As objects


def test_frozen():
    rows = KeptRows.from_index(INDEX, 4)
    for name in ("index", "slot", "scale", "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rows, name, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        del rows.index
    sampled = KeptRows.sample(4, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampled.scale = 1.0


def test_equality_is_identity():
    # Comparing tensors gives a tensor, and would stop a device.
    rows, same = KeptRows.from_index(INDEX, 4), KeptRows.from_index(INDEX, 4)
    assert rows == rows
    assert rows != same
    assert len({rows, same, rows}) == 2


@each_law
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda rows: pickle.loads(pickle.dumps(rows))],
    ids=["deepcopy", "pickle"],
)
def test_copies(duplicate, law):
    rows = KeptRows.sample(9, 0.5, generator=seeded(2), **law)
    other = duplicate(rows)
    assert type(other) is KeptRows
    assert_same_rows(other, rows)
    assert other.slot.data_ptr() != rows.slot.data_ptr()
    assert_same_rows(copy.copy(rows), rows)


def test_to():
    rows = KeptRows.from_index(INDEX, 4, 2.0)
    there = rows.to("meta")
    assert {there.index.device.type, there.slot.device.type} == {"meta"}
    assert (there.k, there.batch, there.scale) == (2, 4, 2.0)
    assert_rows(rows.to(torch.device("cpu"), non_blocking=True), [0, 2], [0, -1, 1, -1], 2.0)


def test_rows_made_in_inference_mode():
    """For the training step after an evaluation: PyTorch saves no inference tensor for backward."""
    torch.manual_seed(0)
    with torch.inference_mode():
        mask, index = torch.arange(6) < 3, torch.tensor([0, 2])
        plan = DepthPlan.sample(6, [0.5, 0.5], sampler="fixed")
        made = [
            plan[0], KeptRows.sample(6, 0.5, sampler="fixed"), KeptRows.from_mask(mask),
            KeptRows.from_index(index, 6), KeptRows.from_index(index, 6, weight=torch.ones(2)),
        ]  # fmt: skip
        plan.resample_()
        assert torch.is_inference_mode_enabled()
    weight = torch.randn(4, 4, requires_grad=True)
    for rows in [*made, *plan]:
        x = torch.randn(6, 4, requires_grad=True)
        y = fused_stochastic_depth(x, lambda kept: kept @ weight, 0.5, rows=rows)
        mask = (rows.slot >= 0).float()[:, None]
        torch.testing.assert_close(y, x + rows.scale * mask * (x @ weight))
        grad = torch.autograd.grad(y.sum(), x)[0]
        torch.testing.assert_close(grad, 1 + rows.scale * mask * weight.sum(1))


def test_an_unsorted_index_is_told_where_to_go():
    with pytest.raises(ValueError, match=r"^index: .*got \[2, 0\] \(KeptRows\.from_mask takes"):
        KeptRows.from_index(torch.tensor([2, 0]), 3)
