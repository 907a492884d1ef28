"""Bugs that were found once, by topic; each test failed before its fix."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sdkernels import (
    DepthPlan,
    KeptRows,
    compact_layer_norm,
    compact_rows,
    fused_stochastic_depth,
)

ROWS = KeptRows.from_index(torch.tensor([0, 2]), batch=3, scale=2.0)


def test_training_after_a_func_transform():
    """functorch's thread-local state outlives its transforms."""
    torch.func.vmap(lambda a: a * 2)(torch.ones(2))
    y = fused_stochastic_depth(torch.ones(3, 1), lambda kept: kept, 0.5, rows=ROWS)
    assert y.flatten().tolist() == [3.0, 1.0, 3.0]


def test_rows_that_no_two_levels_can_walk():
    x = torch.randn(3, 8, 6, 6).to(memory_format=torch.channels_last)[:, :4, :, :5]
    assert torch.equal(compact_rows(x, ROWS), x[ROWS.index])


@pytest.mark.parametrize("normalized", [(4,), (0, 4)])
def test_norm_of_rows_without_elements(normalized):
    x = torch.zeros(3, 2, 0, 4, requires_grad=True)
    y = compact_layer_norm(x, ROWS, normalized, torch.ones(normalized, requires_grad=True))
    y.sum().backward()
    assert y.shape == (2, 2, 0, 4)
    assert x.grad is not None


def test_no_rows_of_a_permuted_branch_output():
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    none = KeptRows.from_index(torch.tensor([], dtype=torch.int64), batch=3)

    def branch(kept: Tensor) -> Tensor:  # a ConvNeXt block's permutations
        return kept.permute(0, 2, 3, 1).permute(0, 3, 1, 2)

    y = fused_stochastic_depth(x, branch, 0.5, rows=none)
    y.sum().backward()
    assert torch.equal(y, x)


def test_inplace_beside_retain_grad():
    leaf = torch.randn(3, 4, requires_grad=True)
    x = leaf * 1.0
    x.retain_grad()
    y = fused_stochastic_depth(x, torch.tanh, 0.5, rows=ROWS, inplace=True)
    y.sum().backward()
    expected = torch.autograd.functional.jacobian(
        lambda v: fused_stochastic_depth(v * 1.0, torch.tanh, 0.5, rows=ROWS).sum(), leaf
    )
    torch.testing.assert_close(leaf.grad, expected)


def test_inplace_at_p_zero():
    """A schedule's first branch: what the branch saves must not be the memory that is added to."""
    linear = nn.Linear(4, 4)
    x = torch.randn(3, 4, requires_grad=True)
    y = fused_stochastic_depth(x * 1.0, linear, 0.0, norm=nn.LayerNorm(4), inplace=True)
    y.sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("options", [{"rows": ROWS}, {"p": 0.0}, {"training": False}])
def test_wide_layer_scale_widens_everywhere(options):
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    call = {"p": 0.5, "layer_scale": torch.ones(4)} | options
    y = fused_stochastic_depth(x, lambda kept: kept, **call)
    assert y.dtype == torch.float32


class Pair(NamedTuple):
    cos: Tensor
    sin: Tensor


def test_named_tuples_in_args():
    seen = []

    def branch(kept: Tensor, pair: Pair) -> Tensor:
        seen.append(pair)
        return kept * pair.cos

    x = torch.arange(3.0).view(3, 1)
    fused_stochastic_depth(x, branch, 0.5, rows=ROWS, args=(Pair(x, -x),))
    fused_stochastic_depth(x, branch, 0.5, training=False, args=(Pair(x, -x),))
    assert [type(pair) for pair in seen] == [Pair, Pair]
    assert [pair.sin.shape[0] for pair in seen] == [2, 3]


def test_bias_gradient_is_rounded_once():
    """Beside a bfloat16 weight a float32 bias keeps its digits."""
    x = torch.randn(3, 50, 4, dtype=torch.bfloat16)
    weight = torch.ones(4, dtype=torch.bfloat16)
    bias = torch.zeros(4, requires_grad=True)
    grad = torch.rand(2, 50, 4).to(torch.bfloat16)
    compact_layer_norm(x, ROWS, 4, weight, bias).backward(grad)
    expected = grad.double().sum((0, 1)).float()
    torch.testing.assert_close(bias.grad, expected, rtol=1e-6, atol=0)


def test_plans_can_be_copied():
    plan = DepthPlan.sample(8, [0.25, 0.5], sampler="fixed")
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert [rows.index.tolist() for rows in twin] == [rows.index.tolist() for rows in plan]
        assert [rows.k for rows in twin.resample_()] == [6, 4]


def test_rows_of_a_plan_follow_its_draws():
    """Views of a plan are kept from call to call: not past a draw that changes their length."""
    torch.manual_seed(0)
    plan = DepthPlan.sample(16, [0.5] * 4)
    for _ in range(5):
        assert all(torch.equal(rows.slot[rows.index], torch.arange(rows.k)) for rows in plan)
        assert all(int((rows.slot >= 0).sum()) == rows.k for rows in plan)
        plan.resample_()
