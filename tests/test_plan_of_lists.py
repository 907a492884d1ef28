"""DepthPlan for a list of batches: the rows of several crops, branch by branch, in one copy."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from test_plan import LAWS, PROBS, CountCopies, each_law, seeded
from torch import nn

from sdkernels import DepthPlan, KeptRows, StochasticDepth

SIZES = [8, 0, 5, 12]


def contents(plan):
    return [[(rows.index.tolist(), rows.slot.tolist()) for rows in branch] for branch in plan]


def assert_same_plan(a, b):
    assert contents(a) == contents(b)
    assert [[r.scale for r in branch] for branch in a] == [[r.scale for r in br] for br in b]


def tensors_of(plan):
    return [tensor for branch in plan for rows in branch for tensor in (rows.index, rows.slot)]


@each_law
@pytest.mark.parametrize("container", [list, tuple])
def test_branches_are_lists_of_rows(law, container):
    plan = DepthPlan.sample(container(SIZES), PROBS, generator=seeded(1), **law)
    assert (len(plan), plan.batch, plan.device) == (4, SIZES, torch.device("cpu"))
    for branch, rows in enumerate(plan):
        assert [type(each) for each in rows] == [KeptRows] * 4
        assert [each.batch for each in rows] == SIZES
        assert contents([rows, rows]) == contents([plan[branch], plan[branch - 4]])
        for each in rows:
            made = KeptRows.from_index(each.index.clone(), each.batch)
            assert each.slot.tolist() == made.slot.tolist()
            assert each.index.is_contiguous()
            assert each.slot.is_contiguous()
    assert [each.k for each in plan[0]] == SIZES
    with pytest.raises(IndexError, match="out of range"):
        plan[4]


@each_law
def test_drawn_as_one_by_one(law):
    """Branch by branch and crop by crop: the order in which the op draws for a list."""
    expected = seeded(2)
    rows = [
        [KeptRows.sample(batch, p, generator=expected, **law) for batch in SIZES] for p in PROBS
    ]
    generator = seeded(2)
    assert_same_plan(DepthPlan.sample(SIZES, PROBS, generator=generator, **law), rows)
    assert torch.equal(generator.get_state(), expected.get_state())


@each_law
def test_the_op_draws_the_same(law):
    block = StochasticDepth(lambda crops: [10 * x for x in crops], 0.5, **law)
    crops = [torch.arange(1.0, n + 1)[:, None] for n in SIZES]
    torch.manual_seed(3)
    expected = [block(block(crops)), block(crops)]
    torch.manual_seed(3)
    first = DepthPlan.sample(SIZES, [0.5, 0.5], **law)
    actual = [block(block(crops, rows=first[0]), rows=first[1])]
    actual.append(block(crops, rows=DepthPlan.sample(SIZES, [0.5], **law)[0]))
    for a, e in zip(actual, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, e, strict=True))
    assert not torch.equal(actual[0][3], crops[3])


@each_law
def test_one_buffer_and_one_copy(law):
    plan = DepthPlan.sample(SIZES, PROBS, **law)
    tensors = tensors_of(plan)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert tensors[0].untyped_storage().nbytes() == 4 * 2 * sum(SIZES) * 8
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    for (_, end), (start, _) in pairwise(spans):
        assert end <= start
    with CountCopies() as counted:
        there = DepthPlan.sample(SIZES, PROBS, device="meta", **law)
    assert counted.copies == 1
    with counted:
        there.resample_()
        assert {t.device.type for t in tensors_of(there)} == {"meta"}
    assert counted.copies == 2


@each_law
def test_resample(law):
    plan = DepthPlan.sample([8, 20], [0.4, 0.5, 0.6], generator=seeded(4), **law)
    expected = seeded(4)
    DepthPlan.sample([8, 20], [0.4, 0.5, 0.6], generator=expected, **law)
    before, seen = [t.data_ptr() for t in tensors_of(plan)], set()
    for _ in range(20):
        assert plan.resample_() is plan
        twin = DepthPlan.sample([8, 20], [0.4, 0.5, 0.6], generator=expected, **law)
        assert_same_plan(plan, twin)
        seen.add(repr(contents(plan)))
        now = [t.data_ptr() for t in tensors_of(plan)]
        assert not [a for a, b in zip(now, before, strict=True) if a and b and a != b]
    assert len(seen) > 3


def test_fixed_rows_taken_before_change_with_the_plan():
    plan = DepthPlan.sample([64, 32], [0.5], sampler="fixed", generator=seeded(5))
    rows = plan[0]
    before = contents([rows])
    plan.resample_()
    assert contents([rows]) == contents(plan) != before


def test_the_list_of_a_branch_is_the_callers():
    plan = DepthPlan.sample([8, 4], [0.5])
    plan[0].clear()
    plan.batch.clear()
    assert len(plan[0]) == len(plan.batch) == 2


@each_law
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"]
)
def test_copies(duplicate, law):
    plan = DepthPlan.sample(SIZES, PROBS, generator=seeded(6), **law)
    contents(plan)  # fills the views
    twin = duplicate(plan)
    assert_same_plan(twin, plan)
    assert_same_plan(twin.resample_(), plan.resample_())
    twin.resample_()
    assert contents(twin) != contents(plan)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_a_list_of_one_is_a_list(law):
    plan = DepthPlan.sample([8], PROBS, generator=seeded(7), **law)
    alone = DepthPlan.sample(8, PROBS, generator=seeded(7), **law)
    assert plan.batch == [8]
    assert_same_plan(plan, [[rows] for rows in alone])


def test_repr():
    plan = DepthPlan.sample([8, 20], [0.25, 0.5], sampler="fixed")
    assert repr(plan) == "DepthPlan(batch=[8, 20], kept=[[6, 15], [4, 10]], device='cpu')"


def test_refused():
    with pytest.raises(ValueError, match=r"^batch: expected at least one .*got an empty list"):
        DepthPlan.sample([], PROBS)
    with pytest.raises(ValueError, match=r"^batch: expected the number of rows .*got -1"):
        DepthPlan.sample([8, -1], PROBS)
    with pytest.raises(ValueError, match=r"^batch: expected the number of rows .*got \[4\]"):
        DepthPlan.sample([8, [4]], PROBS)


def test_gradients_through_crops():
    """A plan's rows, a crop each, through a block: as each crop alone with its rows."""
    torch.manual_seed(8)
    mlp, norm = nn.Sequential(nn.Linear(6, 6), nn.GELU()), nn.LayerNorm(6)
    block = StochasticDepth(lambda crops: [mlp(x) for x in crops], 0.5, norm=norm)
    alone = StochasticDepth(mlp, 0.5, norm=norm)
    crops = [torch.randn(n, tokens, 6, requires_grad=True) for n, tokens in ((4, 9), (8, 3))]
    (rows,) = DepthPlan.sample([4, 8], [0.5])
    leaves = [*crops, *mlp.parameters(), *norm.parameters()]
    together = torch.autograd.grad(sum(y.square().sum() for y in block(crops, rows=rows)), leaves)
    ys = [alone(x, rows=each) for x, each in zip(crops, rows, strict=True)]
    expected = torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)
    for a, e in zip(together, expected, strict=True):
        torch.testing.assert_close(a, e)
