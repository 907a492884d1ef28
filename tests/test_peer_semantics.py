"""What other implementations test of theirs, as tests of the op, in words of our own.

torchvision: the law of what comes out. torchtune: which layers run, and on what. xFormers: gathers
from several tensors, and the scaled addition.
"""

from typing import Any

import pytest
import torch
from test_samplers import assert_binomial
from torch import Tensor, nn

from sdkernels import (
    KeptRows,
    StochasticDepth,
    compact_rows,
    fused_stochastic_depth,
    scatter_add_rows,
)

# torchvision, TestStochasticDepth


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_rows_come_out_scaled_or_as_they_were(p):
    """Of ones beside a stream of zeros: 0 with probability p, else 1 / (1 - p), a row at a time."""
    trials, rows = 50, 40
    dropped = 0
    for _ in range(trials):
        y = fused_stochastic_depth(torch.zeros(rows, 3, 2), lambda kept: kept + 1.0, p)
        assert torch.equal(y, y[:, :1, :1].expand_as(y))
        values = y[:, 0, 0]
        dropped += int((values == 0).sum())
        torch.testing.assert_close(
            values[values != 0], torch.full((int((values != 0).sum()),), 1 / (1 - p))
        )
    assert_binomial(dropped, trials * rows, p)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_the_batch_comes_out_as_one(p):
    trials = 400
    sums = [
        fused_stochastic_depth(torch.zeros(5, 2), lambda kept: kept + 1.0, p, "batch").sum().item()
        for _ in range(trials)
    ]
    assert {round(total * (1 - p), 4) for total in sums} == {0.0, 10.0}
    assert_binomial(sums.count(0.0), trials, p)


# torchtune, layer dropout


class Counted(nn.Module):
    """Adds one, and notes how many rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return torch.ones_like(x)


@pytest.mark.parametrize(
    ("options", "training", "expected", "rows"),
    [
        ({"p": 0.0}, True, 1.0, [6]),
        ({"p": 1.0}, True, 0.0, [0]),
        ({"p": 1.0, "empty": "skip"}, True, 0.0, []),
        ({"p": 1.0, "mode": "batch", "empty": "skip"}, True, 0.0, []),
        ({"p": 1.0}, False, 1.0, [6]),  # evaluation never drops
        ({"p": 0.5}, False, 1.0, [6]),
        ({"p": 0.5, "rescale": "eval"}, False, 0.5, [6]),
    ],
)
def test_which_layers_run(options: dict[str, Any], training, expected, rows):
    layer = Counted()
    block = StochasticDepth(layer, **options).train(training)
    assert block(torch.zeros(6, 2)).unique().tolist() == [expected]
    assert layer.rows == rows


def test_a_stack_runs_each_layer_on_its_own_rows():
    """And the same again from the same seed."""
    layers = [Counted() for _ in range(8)]
    stack = nn.Sequential(*[StochasticDepth(layer, 0.5, rescale="none") for layer in layers])
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        results.append(stack(torch.zeros(16, 1)))
    first, second = results
    assert torch.equal(first, second)
    assert all(layer.rows[0] == layer.rows[1] for layer in layers)
    assert first.sum() == sum(layer.rows[0] for layer in layers)  # a layer adds 1 to a row
    assert len(first.unique()) > 1


# xFormers, scaled_index_add and index_select_cat


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "kept"), [(1, 1), (8, 3), (8, 8), (33, 17)])
@pytest.mark.parametrize("scaling", [True, False])
def test_scaled_addition(batch, kept, dtype, scaling):
    x = torch.randn(batch, 5, 16).to(dtype).requires_grad_()
    out = torch.randn(kept, 5, 16).to(dtype).requires_grad_()
    scale = (torch.randn(16) + 1).to(dtype).requires_grad_() if scaling else None
    index = torch.randperm(batch)[:kept].sort().values
    leaves = [x, out] + ([scale] if scaling else [])
    grad = torch.randn(batch, 5, 16).to(dtype)
    actual = scatter_add_rows(x, out, KeptRows.from_index(index, batch, 0.73), scale)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    added = wide[1] * wide[2] if scaling else wide[1]
    expected = torch.index_add(wide[0], 0, index, added, alpha=0.73)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(actual.double(), expected, **tolerance)
    gradients = torch.autograd.grad(actual, leaves, grad)
    references = torch.autograd.grad(expected, wide, grad.double())
    for gradient, reference in zip(gradients, references, strict=True):
        bound = tolerance["atol"] * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(gradient.double(), reference, rtol=tolerance["rtol"], atol=bound)


def test_rows_of_several_tensors_side_by_side():
    """Crops of other sizes go through one matrix product, as lists do in DINOv2."""
    xs = [torch.randn(4, 5, 3, requires_grad=True), torch.randn(6, 2, 3, requires_grad=True)]
    rows = [KeptRows.sample(len(x), 0.5, sampler="fixed") for x in xs]
    flat = torch.cat([compact_rows(x, r).flatten(0, 1) for x, r in zip(xs, rows, strict=True)])
    expected = torch.cat([x[r.index].flatten(0, 1) for x, r in zip(xs, rows, strict=True)])
    assert torch.equal(flat, expected)
    grad = torch.randn_like(flat)
    for a, e in zip(
        torch.autograd.grad(flat, xs, grad), torch.autograd.grad(expected, xs, grad), strict=True
    ):
        assert torch.equal(a, e)
