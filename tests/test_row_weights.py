"""A weight for each kept row: gates that are trained, and gates that decide which rows run."""

from dataclasses import replace

import pytest
import torch
from cases import Case, generated_cases
from comparison import assert_same_bits, assert_same_results, run_fused, run_reference
from hypothesis import given
from torch import nn

from sdkernels import KeptRows, fused_stochastic_depth, scatter_add_rows

INDEX = torch.tensor([0, 2])
ROWS = KeptRows.from_index(INDEX, batch=4, scale=2.0)


def with_weight(*values: float) -> KeptRows:
    return replace(ROWS, weight=torch.tensor(values))


def test_literal():
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    y = fused_stochastic_depth(x, lambda kept: 10 * kept, 0.5, rows=with_weight(0.5, -1.0))
    assert y.flatten().tolist() == [1 + 0.5 * 2 * 10, 2, 3 - 2 * 30, 4]


@given(case=generated_cases(weighted=True))
def test_values_and_gradients(case, device):
    assert_same_results(
        run_fused(case.inputs(device)), run_reference(case.inputs()), case.tolerance
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_weights_of_one_change_nothing(inplace):
    inputs = Case(norm="layer", layer_scale="C").inputs()
    ones = replace(inputs.rows, weight=torch.ones(inputs.rows.k))
    results = []
    for rows in (inputs.rows, ones):
        x = inputs.x.detach().clone()
        options = {**inputs.call(), "rows": rows, "inplace": inplace}
        results.append(fused_stochastic_depth(x, inputs.branch, 0.5, **options))
    assert_same_bits(*results)


def test_list_of_tensors_has_weights_of_its_own():
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    rows = [replace(ROWS, weight=weights[0]), KeptRows.from_index(INDEX[:1], 2, weight=weights[1])]
    xs = [torch.ones(4, 3), torch.ones(2, 5)]
    ys = fused_stochastic_depth(xs, lambda kept: kept, 0.5, rows=rows)
    assert ys[0][:, 0].tolist() == [1 + 2, 1, 1 + 4, 1]
    assert ys[1][:, 0].tolist() == [1 + 3, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weight_does_not_widen(dtype):
    rows = replace(ROWS, weight=torch.ones(2, dtype=dtype, requires_grad=True))
    x = torch.ones(4, 3, dtype=torch.bfloat16)
    y = scatter_add_rows(x, torch.ones(2, 3, dtype=torch.bfloat16), rows)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert rows.weight.grad.tolist() == [6, 6]
    assert rows.weight.grad.dtype == dtype


def test_weight_of_any_strides():
    gates = torch.arange(8.0).view(4, 2).requires_grad_()
    rows = KeptRows.from_mask(ROWS.slot >= 0, 2.0, weight=gates[:, 1])
    x, out = torch.ones(4, 3), torch.ones(2, 3)
    scatter_add_rows(x, out, rows).sum().backward()
    assert gates.grad.tolist() == [[0, 6], [0, 0], [0, 6], [0, 0]]


def test_gradient_of_a_weight_in_low_precision_is_summed_in_float():
    """A bfloat16 running sum stops at 256."""
    rows = KeptRows.from_index(torch.tensor([0]), 1)
    rows = replace(rows, weight=torch.ones(1, requires_grad=True))
    ones = torch.ones(1, 5000, dtype=torch.bfloat16)
    scatter_add_rows(ones, ones, rows).backward(ones)
    assert rows.weight.grad.item() == 5000


def test_gate_that_chooses_its_rows_is_trained():
    """Mixture-of-Depths: a router keeps the k rows that it ranks highest, and learns by them."""
    torch.manual_seed(0)
    router = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    x = torch.randn(64, 4)
    needed = x[:, 0].topk(32).indices  # the rows that the branch is wanted for
    target = x.index_add(0, needed, torch.ones(32, 4))

    def loss() -> torch.Tensor:
        gate = torch.sigmoid(router(x)).flatten()
        mask = torch.zeros(64, dtype=torch.bool)
        mask[gate.topk(32).indices] = True
        rows = KeptRows.from_mask(mask, k=32, weight=gate)
        return (fused_stochastic_depth(x, torch.ones_like, 0.5, rows=rows) - target).square().mean()

    before = loss().item()
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before / 5
    chosen = router(x).flatten().topk(32).indices
    assert len(set(chosen.tolist()) & set(needed.tolist())) >= 29


def test_no_gradient_for_a_weight_that_needs_none():
    out = torch.ones(2, 3, requires_grad=True)
    rows = with_weight(3.0, 4.0)
    scatter_add_rows(torch.zeros(4, 3), out, rows).sum().backward()
    assert out.grad.tolist() == [[6] * 3, [8] * 3]


def test_branch_output_is_saved_only_for_a_weight_that_learns():
    sizes = {}
    for learns in (False, True):
        rows = replace(ROWS, weight=torch.ones(2, requires_grad=learns))
        saved = []
        out = torch.ones(2, 1000, requires_grad=True) * 1
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            scatter_add_rows(torch.ones(4, 1000), out, rows)
        sizes[learns] = sum(saved)
    assert sizes[True] - sizes[False] == 2000


@pytest.mark.parametrize("all_rows", [False, True], ids=["kept", "batch"])
def test_weights_of_the_kept_rows_or_of_the_batch(all_rows):
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    given_weight = weight if all_rows else weight[INDEX]
    for rows in (
        KeptRows.from_mask(ROWS.slot >= 0, weight=given_weight),
        KeptRows.from_index(INDEX, 4, weight=given_weight),
    ):
        assert rows.weight.tolist() == [1, 3]
        assert rows.to("cpu").weight.tolist() == [1, 3]


WRONG = {
    "list": ([1.0, 2.0], TypeError, "weight: expected a floating point tensor, got list"),
    "int": (INDEX, TypeError, "weight: expected a floating point tensor, got torch.int64"),
    "2d": (torch.ones(2, 1), ValueError, r"weight: expected shape \[2\].*, got \[2, 1\]"),
    "few": (torch.ones(1), ValueError, r"weight: expected shape \[2\].*, got \[1\]"),
    "device": (torch.ones(2, device="meta"), ValueError, "weight: expected the device of index"),
}


@pytest.mark.parametrize(("weight", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_weights(weight, error, message):
    makers = [
        lambda: replace(ROWS, weight=weight),
        lambda: KeptRows.from_mask(ROWS.slot >= 0, weight=weight),
        lambda: KeptRows.from_index(INDEX, 4, weight=weight),
    ]
    for make in makers:
        with pytest.raises(error, match=f"^{message}"):
            make()


@pytest.mark.parametrize("k", [0, 1, 3, 4, 5, -1])
def test_mask_with_a_wrong_count(k):
    with pytest.raises(ValueError, match=r"^k: expected the number of true entries of mask"):
        KeptRows.from_mask(ROWS.slot >= 0, k=k)


@pytest.mark.parametrize("k", [2.0, True, "2"])
def test_mask_with_a_count_of_another_type(k):
    with pytest.raises(TypeError, match=r"^k: expected an integer, got"):
        KeptRows.from_mask(ROWS.slot >= 0, k=k)
