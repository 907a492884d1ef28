"""DepthPlan: a sequence of KeptRows in one buffer, refreshed in place."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdkernels import DepthPlan, KeptRows, fused_stochastic_depth, linear_decay

LAWS = {"row": {"mode": "row"}, "batch": {"mode": "batch"}, "fixed": {"sampler": "fixed"}}
PROBS = [0.0, 0.25, 0.5, 0.9]

each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def contents(plan):
    return [(rows.index.tolist(), rows.slot.tolist()) for rows in plan]


def addresses(plan):
    """Of slot and index; that of an index without entries is 0."""
    return [tensor.data_ptr() for rows in plan for tensor in (rows.slot, rows.index)]


@each_law
def test_is_a_sequence_of_rows(law):
    plan = DepthPlan.sample(8, PROBS, generator=seeded(1), **law)
    assert len(plan) == 4
    assert (plan.batch, plan.device) == (8, torch.device("cpu"))
    rows = list(plan)
    assert len(rows) == 4
    for branch, each in enumerate(rows):
        for same in (plan[branch], plan[branch - 4]):
            assert type(same) is KeptRows
            assert same.index.tolist() == each.index.tolist()
            assert same.slot.tolist() == each.slot.tolist()
            assert (same.batch, same.scale) == (8, each.scale)
    assert plan[0].k == 8


@each_law
def test_rows_of_a_plan_are_rows(law):
    # Each passes for rows made from their own index, and for the kernels.
    x = torch.arange(8.0)[:, None]
    for rows in DepthPlan.sample(8, PROBS * 5, generator=seeded(2), **law):
        made = KeptRows.from_index(rows.index.clone(), 8)
        assert rows.slot.tolist() == made.slot.tolist()
        assert rows.slot.is_contiguous()
        y = fused_stochastic_depth(x, torch.ones_like, 0.5, rows=rows)
        assert torch.equal(y, x + (rows.slot >= 0)[:, None] * rows.scale)


@pytest.mark.parametrize("rescale", ["train", "eval", "none"])
@each_law
def test_scales(rescale, law):
    plan = DepthPlan.sample(10, [0.0, 0.25, 0.5], rescale=rescale, **law)
    alone = [KeptRows.sample(10, p, rescale=rescale, **law) for p in (0.0, 0.25, 0.5)]
    assert [rows.scale for rows in plan] == [rows.scale for rows in alone]


@pytest.mark.parametrize("branch", [4, -5, 100])
def test_branch_out_of_range(branch):
    with pytest.raises(IndexError, match="out of range"):
        DepthPlan.sample(8, PROBS)[branch]


@pytest.mark.parametrize(
    "branch", ["0", 1.0, None, True, slice(0, 2), slice(0, 3), slice(None)], ids=repr
)
@pytest.mark.parametrize("length", [2, 3])
def test_branch_is_an_integer(branch, length):
    # Not even slices: rows in one buffer would be taken apart along the wrong dimension.
    with pytest.raises(TypeError, match="indices must be integers"):
        DepthPlan.sample(8, PROBS[:length], sampler="fixed")[branch]


@each_law
def test_rows_lie_in_one_buffer(law):
    plan = DepthPlan.sample(8, PROBS, **law)
    tensors = [tensor for rows in plan for tensor in (rows.index, rows.slot)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert tensors[0].untyped_storage().nbytes() == 4 * 2 * 8 * 8
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    for (_, end), (start, _) in pairwise(spans):
        assert end <= start


class CountCopies(TorchDispatchMode):
    """Counts the tensors that are sent from one device to another."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        source = args[1] if func is torch.ops.aten.copy_.default else next(iter(args), None)
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            self.copies += source.device != result.device
        return result


@each_law
def test_one_copy_to_the_device_a_step(law):
    with CountCopies() as counted:
        plan = DepthPlan.sample(8, PROBS, device="meta", **law)
    assert counted.copies == 1
    with counted:
        plan.resample_()
        assert {rows.slot.device.type for rows in plan} == {"meta"}
    assert counted.copies == 2
    assert plan.device == torch.device("meta")


@each_law
def test_resample_draws_new_rows_into_the_same_memory(law):
    plan = DepthPlan.sample(8, [0.4, 0.5, 0.6], generator=seeded(3), **law)
    before, seen = addresses(plan), [contents(plan)]
    for _ in range(20):
        assert plan.resample_() is plan
        seen.append(contents(plan))
        moved = [a != b for a, b in zip(addresses(plan), before, strict=True) if a and b]
        assert not any(moved)
    assert len({repr(step) for step in seen}) > 3
    for index, slot in seen[-1]:
        assert slot == [index.index(row) if row in index else -1 for row in range(8)]


def test_fixed_rows_taken_before_change_with_the_plan():
    plan = DepthPlan.sample(64, [0.5], sampler="fixed", generator=seeded(4))
    rows = plan[0]
    before = contents([rows])
    plan.resample_()
    assert contents([rows]) == contents(plan) != before
    assert rows.k == plan[0].k == 32


def test_bernoulli_rows_taken_before_are_refused():
    plan = DepthPlan.sample(64, [0.5], generator=seeded(5))
    rows = plan[0]
    for _ in range(100):
        if plan.resample_()[0].k != rows.k:
            break
    assert plan[0].k != rows.k
    with pytest.raises(ValueError, match=r"^rows\.(index|slot): "):
        fused_stochastic_depth(torch.ones(64, 2), torch.neg, 0.5, rows=rows)


@each_law
def test_backward_after_resample_is_refused(law):
    x = torch.ones(8, 2, requires_grad=True)
    plan = DepthPlan.sample(8, [0.5], generator=seeded(6), **law)
    y = fused_stochastic_depth(x, torch.sin, 0.5, rows=plan[0])
    plan.resample_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = fused_stochastic_depth(x, torch.sin, 0.5, rows=plan[0])
    y.sum().backward()
    assert x.grad is not None


@each_law
@pytest.mark.parametrize(("batch", "probs"), [(0, PROBS), (0, []), (8, [])])
def test_nothing_to_draw(batch, probs, law):
    plan = DepthPlan.sample(batch, probs, **law)
    assert (len(plan), plan.batch) == (len(probs), batch)
    for _ in range(2):
        assert contents(plan) == [([], [])] * len(probs)
        assert plan.resample_() is plan


@pytest.mark.parametrize(
    "probs",
    [tuple(PROBS), iter(PROBS), linear_decay(4, 0.5), [0, 1, 0, 1]],
    ids=lambda p: type(p).__name__,
)
def test_probabilities_from_any_iterable(probs):
    assert len(DepthPlan.sample(8, probs)) == 4


@pytest.mark.parametrize("probs", [0.5, None], ids=repr)
def test_probabilities_of_the_wrong_type(probs):
    with pytest.raises(TypeError, match=f"^drop_probs: .*got {type(probs).__name__}"):
        DepthPlan.sample(8, probs)


def test_repr():
    plan = DepthPlan.sample(8, [0.25, 0.5], sampler="fixed")
    assert repr(plan) == "DepthPlan(batch=8, kept=[6, 4], device='cpu')"
