"""Gradients: literal, numerical (first and second order), partial, and of nothing kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPE_NAMES, NAMED_CASES, Case, Inputs
from comparison import assert_same_bits
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from sdkernels import (
    KeptRows,
    compact_layer_norm,
    compact_rms_norm,
    compact_rows,
    fused_stochastic_depth,
    scatter_add_rows,
)
from sdkernels.reference import naive_masking

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROWS = KeptRows.from_index(torch.tensor([0, 2]), batch=3, scale=2.0)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_gradient_of_compact_is_zero_for_dropped_rows():
    x = torch.ones(3, 2, requires_grad=True)
    compact_rows(x, ROWS).backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert x.grad.tolist() == [[1, 2], [0, 0], [3, 4]]


def test_gradients_of_scatter_add():
    x, layer_scale = torch.ones(3, 2, requires_grad=True), torch.tensor([1.0, 0.5]).requires_grad_()
    out = torch.tensor([[10.0, 20.0], [30.0, 40.0]], requires_grad=True)
    y = scatter_add_rows(x, out, ROWS, layer_scale)
    y.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert x.grad.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert out.grad.tolist() == [[2, 2], [10, 6]]
    assert layer_scale.grad.tolist() == [2 * (1 * 10 + 5 * 30), 2 * (2 * 20 + 6 * 40)]


def weighted(weight: Tensor) -> KeptRows:
    return replace(ROWS, weight=weight)


def test_both_gradients_of_x_are_added():
    x = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    y = fused_stochastic_depth(x, lambda kept: kept * kept, 0.5, rows=ROWS)
    y.backward(torch.tensor([[1.0], [10.0], [100.0]]))
    assert x.grad.tolist() == [[1 + 2 * 2 * 1], [10], [100 + 100 * 2 * 2 * 3]]


BLOCKS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "compact_rows": (lambda x: compact_rows(x, ROWS), (leaf(3, 2, 3),)),
    "compact_layer_norm": (
        lambda x, w, b: compact_layer_norm(x, ROWS, 4, w, b, 0.1),
        (leaf(3, 2, 4), leaf(4), leaf(4)),
    ),
    "compact_layer_norm-plain": (
        lambda x: compact_layer_norm(x, ROWS, (2, 4), eps=0.1),
        (leaf(3, 2, 4),),
    ),
    "compact_layer_norm-no_weight": (
        lambda x, b: compact_layer_norm(x, ROWS, 4, None, b, 0.1),
        (leaf(3, 2, 4), leaf(4)),
    ),
    "compact_rms_norm": (
        lambda x, w: compact_rms_norm(x, ROWS, 4, w, 0.1),
        (leaf(3, 2, 4), leaf(4)),
    ),
    "scatter_add_rows": (lambda x, out: scatter_add_rows(x, out, ROWS), (leaf(3, 4), leaf(2, 4))),
    "scatter_add_rows-layer_scale": (
        lambda x, out, scale: scatter_add_rows(x, out, ROWS, scale),
        (leaf(3, 2, 4), leaf(2, 2, 4), leaf(2, 1)),
    ),
    "scatter_add_rows-inplace": (
        lambda x, out, scale: scatter_add_rows(x.clone(), out, ROWS, scale, inplace=True),
        (leaf(3, 4), leaf(2, 4), leaf(4)),
    ),
    "scatter_add_rows-weight": (
        lambda x, out, weight: scatter_add_rows(x, out, weighted(weight)),
        (leaf(3, 2, 4), leaf(2, 2, 4), leaf(2)),
    ),
    "scatter_add_rows-weight-of_vectors": (
        lambda x, out, weight: scatter_add_rows(x, out, weighted(weight)),
        (leaf(3), leaf(2), leaf(2)),
    ),
    "scatter_add_rows-layer_scale-weight-inplace": (
        lambda x, out, scale, weight: scatter_add_rows(
            x.clone(), out, weighted(weight), scale, inplace=True
        ),
        (leaf(3, 2, 4), leaf(2, 2, 4), leaf(2, 1), leaf(2)),
    ),
    "scatter_add_rows-relu": (
        lambda x, out: scatter_add_rows(x, out, ROWS, activation="relu"),
        (leaf(3, 2, 4), leaf(2, 2, 4)),
    ),
    "scatter_add_rows-relu-layer_scale-weight": (
        lambda x, out, scale, weight: scatter_add_rows(
            x, out, weighted(weight), scale, activation="relu"
        ),
        (leaf(3, 2, 4), leaf(2, 2, 4), leaf(2, 1), leaf(2)),
    ),
    "fused_stochastic_depth-relu": (
        lambda x, weight: fused_stochastic_depth(
            x, lambda kept: kept * kept * weight, 0.5, rows=ROWS, activation="relu"
        ),
        (leaf(3, 4), leaf(4)),
    ),
    "scatter_add_rows-nothing_kept": (
        lambda x, out, scale: scatter_add_rows(
            x, out, KeptRows.from_mask(torch.zeros(3, dtype=torch.bool)), scale
        ),
        (leaf(3, 4), leaf(0, 4), leaf(4)),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_gradcheck(name):
    function, inputs = BLOCKS[name]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, gen_non_contig_grad_outputs=True)


class Powers(torch.nn.Module):
    """A branch whose second derivatives are neither zero nor constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        out = torch.sin(x * self.weight)
        for condition in conditions:
            out = out * condition
        return out


FUSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"norm": "layer"},
    "norm-layer_scale": {"norm": "layer", "layer_scale": "C"},
    "rms-layer_scale-args": {"norm": "rms", "layer_scale": "C1", "conditions": 1},
    "norm-layer_scale-args-residual": {
        "norm": "layer",
        "layer_scale": "C",
        "conditions": 1,
        "width": 3,
    },
    "nothing_kept": {"kept": 0, "norm": "layer", "layer_scale": "C"},
    "norm-layer_scale-weight": {"norm": "layer", "layer_scale": "C", "weighted": True},
    "nothing_kept-weight": {"kept": 0, "layer_scale": "C", "weighted": True},
}


def small_inputs(**fields: Any) -> Inputs:
    """A case in float64 that is small enough for numerical derivatives."""
    fields = {"kept": 2, "dtype": torch.float64, "branch_dtype": torch.float64} | fields
    inputs = Case("small", batch=3, **fields).inputs()
    inputs.branch = Powers()
    return inputs


@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "inplace"])
@pytest.mark.parametrize("name", FUSED)
def test_gradcheck_of_fused(name, inplace):
    inputs = small_inputs(**FUSED[name])
    leaves = tuple(inputs.leaves().values())

    def function(*perturbed: Tensor) -> Tensor:
        # gradcheck perturbs the leaves where they stand. In place needs tensors that are no leaves.
        options = inputs.call()
        x = inputs.x
        if inplace and inputs.residual is not None:
            options["residual"] = inputs.residual.clone()
        elif inplace:
            x = inputs.x.clone()
        return fused_stochastic_depth(x, inputs.branch, 0.5, **options, inplace=inplace)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("used", [["x"], ["branch.weight"], ["norm.weight", "layer_scale"]])
def test_double_backward_of_some_gradients(used):
    """The others come into the double backward undefined."""
    inputs = small_inputs(norm="layer", layer_scale="C")
    grad = inputs.grad.clone().requires_grad_()
    seconds = []
    for function in (fused_stochastic_depth, naive_masking):
        leaves = inputs.leaves()
        y = function(inputs.x, inputs.branch, 0.5, **inputs.call())
        first = torch.autograd.grad(y, list(leaves.values()), grad, create_graph=True)
        penalty = sum(g.pow(3).sum() for name, g in zip(leaves, first, strict=True) if name in used)
        seconds.append(torch.autograd.grad(penalty, [*leaves.values(), grad], allow_unused=True))
    for fused, naive in zip(*seconds, strict=True):
        torch.testing.assert_close(fused, naive)


@pytest.mark.parametrize("case", NAMED_CASES[:8], ids=str)
def test_second_gradients_in_every_dtype(case):
    """A double backward goes through other code than the kernels: it must agree with them."""
    inputs = case.inputs()
    leaves = inputs.leaves()
    leaves.pop("residual", None)  # its gradient is the incoming one
    y = fused_stochastic_depth(inputs.x, inputs.branch, 0.5, **inputs.call())
    kernels = torch.autograd.grad(y, list(leaves.values()), inputs.grad, retain_graph=True)
    differentiable = torch.autograd.grad(y, list(leaves.values()), inputs.grad, create_graph=True)
    for kernel, other in zip(kernels, differentiable, strict=True):
        assert other.requires_grad
        largest = max(1.0, kernel.abs().max().item())
        torch.testing.assert_close(
            kernel, other.detach(), rtol=case.tolerance, atol=case.tolerance * largest
        )


@pytest.mark.parametrize(
    "frozen", ["x", "layer_scale", "norm.weight", "norm.bias", "branch.weight"]
)
def test_frozen_inputs(frozen):
    inputs = Case(norm="layer", layer_scale="C").inputs()
    inputs.leaves()[frozen].requires_grad_(False)
    wide = inputs.double()
    wide_leaves = Case(norm="layer", layer_scale="C").inputs().leaves().keys()
    fused_stochastic_depth(inputs.x, inputs.branch, 0.5, **inputs.call()).backward(inputs.grad)
    naive_masking(wide.x, wide.branch, 0.5, **wide.call()).backward(inputs.grad.double())
    expected = wide.leaves()
    for name in wide_leaves - {frozen}:
        actual = inputs.leaves()[name].grad
        torch.testing.assert_close(actual.double(), expected[name].grad, rtol=1e-4, atol=1e-4)
    if frozen == "x":
        assert inputs.x.grad is None


def test_nothing_requires_grad():
    inputs = Case(norm="layer", layer_scale="C").inputs()
    with torch.no_grad():
        y = fused_stochastic_depth(inputs.x, inputs.branch, 0.5, **inputs.call())
    assert not y.requires_grad
    assert y.data_ptr() != inputs.x.data_ptr()


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_nothing_kept_gives_zero_gradients(norm):
    inputs = Case(kept=0, norm=norm, layer_scale="C", conditions=1).inputs()
    y = fused_stochastic_depth(inputs.x, inputs.branch, 0.5, **inputs.call())
    y.backward(inputs.grad)
    assert_same_bits(y, inputs.x)
    leaves = inputs.leaves()
    assert_same_bits(leaves.pop("x").grad, inputs.grad)
    for name, parameter in leaves.items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("norm", [None, "layer"])
def test_skipping_nothing_kept_leaves_no_gradients(norm):
    inputs = Case(kept=0, norm=norm, layer_scale="C").inputs()
    y = fused_stochastic_depth(inputs.x, inputs.branch, 0.5, **inputs.call(), empty="skip")
    y.backward(inputs.grad)
    leaves = inputs.leaves()
    assert_same_bits(leaves.pop("x").grad, inputs.grad)
    assert all(parameter.grad is None for parameter in leaves.values())


@pytest.mark.parametrize("case", NAMED_CASES[:8], ids=str)
def test_incoming_gradient_is_left_alone(case):
    inputs = case.inputs()
    before = inputs.grad.clone()
    y = fused_stochastic_depth(inputs.x, inputs.branch, 0.5, **inputs.call())
    y.backward(inputs.grad, retain_graph=True)
    assert_same_bits(inputs.grad, before)
    first = {name: leaf.grad.clone() for name, leaf in inputs.leaves().items()}
    for parameter in inputs.leaves().values():
        parameter.grad = None
    y.backward(inputs.grad)
    for name, parameter in inputs.leaves().items():
        assert_same_bits(parameter.grad, first[name])


def test_branch_that_ignores_its_input():
    """No gradient comes back from the branch: that of the stream goes through as it is."""
    x = torch.randn(3, 4, requires_grad=True)
    bias = torch.nn.Parameter(torch.ones(4))
    grad = torch.randn(3, 4)
    for norm in (None, torch.nn.LayerNorm(4)):
        x.grad = None
        branch = lambda kept: bias.expand(kept.shape)  # noqa: E731
        fused_stochastic_depth(x, branch, 0.5, rows=ROWS, norm=norm).backward(grad)
        assert_same_bits(x.grad, grad)


def test_rows_refreshed_before_the_backward_are_refused():
    x = torch.randn(3, 4, requires_grad=True)
    rows = KeptRows.from_index(torch.tensor([0, 2]), batch=3)
    y = fused_stochastic_depth(x, torch.sin, 0.5, rows=rows)
    rows.index.copy_(torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_default_eps_of_rms_norm(dtype):
    x = (torch.randn(3, 8) * 1e-2).to(dtype)
    expected = F.rms_norm(x[ROWS.index], (8,))
    torch.testing.assert_close(compact_rms_norm(x, ROWS, 8), expected)
    norm = torch.nn.RMSNorm(8, dtype=dtype)
    fused = fused_stochastic_depth(x, torch.neg, 0.5, rows=ROWS, norm=norm)
    torch.testing.assert_close(fused, naive_masking(x, torch.neg, 0.5, rows=ROWS, norm=norm))
