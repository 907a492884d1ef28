"""Forward-mode AD: Jacobian-vector products, alone and over a backward, and torch.func's."""

from typing import Any

import pytest
import torch
from cases import NAMED_CASES
from comparison import assert_same_bits
from libraries import load
from test_autograd import BLOCKS, Powers
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import NETS

import sdkernels
from sdkernels import DepthPlan, KeptRows, StochasticDepth, fused_stochastic_depth, scatter_add_rows
from sdkernels.backends import compiled, ops
from sdkernels.reference import naive_masking

pytestmark = [
    # PyTorch's forward AD imports modules that it has deprecated; vmap without a batching rule.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

ROWS = KeptRows.from_index(torch.tensor([0, 2]), batch=3, scale=2.0)


def tangent(function: Any, x: Tensor, direction: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


def test_a_literal_product():
    x, direction = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [10.0], [100.0]])
    y = tangent(
        lambda x: fused_stochastic_depth(x, lambda kept: kept * kept, 0.5, rows=ROWS), x, direction
    )
    assert y.tolist() == [[1 + 2 * 2 * 1], [10], [100 + 100 * 2 * 2 * 3]]


@pytest.mark.parametrize("name", BLOCKS)
def test_gradcheck(name):
    function, inputs = BLOCKS[name]
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(
        function,
        inputs,
        check_fwd_over_rev=True,
        check_rev_over_rev=False,
        check_undefined_grad=False,
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm-layer_scale": {
        "norm": nn.LayerNorm(3, eps=0.1),
        "layer_scale": nn.Parameter(torch.rand(3) + 0.5),
    },
    "rms": {"norm": nn.RMSNorm(3, eps=0.1)},
    "relu": {"activation": "relu"},
    "min_saving": {"min_saving": 0.9, "layer_scale": nn.Parameter(torch.rand(3) + 0.5)},
    "paper": {"rescale": "eval"},
    "inplace": {"inplace": True, "norm": nn.LayerNorm(3, eps=0.1)},
}


@pytest.mark.parametrize("kept", [0, 2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_of_the_module(name, kept):
    """With respect to x and every parameter, condition and weight."""
    rows = KeptRows.from_index(torch.arange(kept), batch=3, scale=1.5)
    block = StochasticDepth(Powers(), 0.5, **OPTIONS[name]).double()
    names = [key for key, _ in block.named_parameters()]
    x, condition = torch.randn(2, 3, 2, 3, dtype=torch.float64).unbind()
    leaves = [x, condition, torch.rand(kept).double(), *block.parameters()]

    def function(x: Tensor, condition: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        weighted = KeptRows(rows.index, rows.slot, rows.scale, weight)
        given = dict(zip(names, parameters, strict=True))
        return functional_call(block, given, (x.clone(), condition), {"rows": weighted})

    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert gradcheck(function, leaves, check_forward_ad=True)
    if name != "inplace" or kept:
        assert gradgradcheck(
            function,
            leaves,
            check_fwd_over_rev=True,
            check_rev_over_rev=False,
            check_undefined_grad=False,
        )


@pytest.mark.parametrize("case", NAMED_CASES, ids=str)
def test_as_naive_masking(case):
    inputs = case.inputs()
    direction = torch.randn_like(inputs.x)

    def of(function: Any) -> Tensor:
        call = {key: value for key, value in inputs.call().items() if key != "residual"}
        return tangent(lambda x: function(x, inputs.branch, 0.5, **call), inputs.x, direction)

    if inputs.residual is not None:
        pytest.skip("the residual is another tensor: its tangent is zero")
    actual, expected = of(fused_stochastic_depth), of(naive_masking)
    largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=case.tolerance, atol=case.tolerance * largest
    )


def test_a_list():
    x, direction = torch.randn(2, 3, 4).unbind()
    with forward_ad.dual_level():
        crops = [forward_ad.make_dual(x, direction), x]
        ys = fused_stochastic_depth(
            crops, lambda xs: [each.sin() for each in xs], 0.5, rows=[ROWS] * 2
        )
        first, second = (forward_ad.unpack_dual(y).tangent for y in ys)
    expected = direction.clone()
    expected[ROWS.index] += 2.0 * (direction * x.cos())[ROWS.index]
    torch.testing.assert_close(first, expected)
    assert second is None or not second.any()


def test_dropped_rows_are_those_of_x():
    x = torch.tensor([[-0.0], [1.0], [2.0]])
    rows = KeptRows.from_index(torch.tensor([1]), batch=3)
    with forward_ad.dual_level():
        y = fused_stochastic_depth(
            forward_ad.make_dual(x, torch.ones_like(x)), torch.sin, 0.5, rows=rows
        )
        y = forward_ad.unpack_dual(y).primal
    assert_same_bits(y[::2], x[::2])


def test_hessian_vector_products():
    """torch.autograd.functional, which differentiates twice, and forward mode over a backward."""
    block = StochasticDepth(Powers(), 0.5, norm=nn.LayerNorm(3, eps=0.1)).double()
    x, direction = torch.randn(2, 3, 2, 3, dtype=torch.float64).unbind()

    def loss(x: Tensor) -> Tensor:
        return block(x, rows=ROWS).pow(3).sum()

    def naive(x: Tensor) -> Tensor:
        return naive_masking(x, block.branch, 0.5, norm=block.norm, rows=ROWS).pow(3).sum()

    functional = torch.autograd.functional
    _, expected = functional.hvp(naive, x, direction)
    torch.testing.assert_close(functional.hvp(loss, x, direction)[1], expected)
    torch.testing.assert_close(functional.vhp(loss, x, direction)[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), direction)
        (gradient,) = torch.autograd.grad(loss(dual), dual, create_graph=True)
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, expected)
    _, product = functional.jvp(lambda x: block(x, rows=ROWS), x, direction)
    torch.testing.assert_close(product, tangent(lambda x: block(x, rows=ROWS), x, direction))


def test_jacobians():
    block = StochasticDepth(Powers(), 0.5, norm=nn.LayerNorm(3, eps=0.1)).double()
    x = torch.randn(3, 3, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return block(x, rows=ROWS)

    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(
        lambda x: naive_masking(x, block.branch, 0.5, norm=block.norm, rows=ROWS), x
    )
    torch.testing.assert_close(jacobian(function, x), expected)
    forward = jacobian(function, x, strategy="forward-mode", vectorize=True)
    torch.testing.assert_close(forward, expected)
    torch.testing.assert_close(torch.func.jacfwd(function)(x), expected)
    y, product = torch.func.jvp(function, (x,), (x,))
    torch.testing.assert_close(product, torch.einsum("abcd,cd->ab", expected, x))
    torch.testing.assert_close(y, function(x))
    hessian = torch.autograd.functional.hessian(lambda x: function(x).pow(3).sum(), x)
    torch.testing.assert_close(torch.func.hessian(lambda x: function(x).pow(3).sum())(x), hessian)


def test_rows_that_are_drawn():
    """The same as without a tangent, from the same seed."""
    x = torch.randn(8, 4)
    torch.manual_seed(3)
    expected = fused_stochastic_depth(x, torch.sin, 0.5)
    torch.manual_seed(3)
    with forward_ad.dual_level():
        y = fused_stochastic_depth(forward_ad.make_dual(x, x), torch.sin, 0.5)
        torch.testing.assert_close(forward_ad.unpack_dual(y).primal, expected)
    torch.manual_seed(3)
    y, _ = torch.func.jvp(lambda x: fused_stochastic_depth(x, torch.sin, 0.5), (x,), (x,))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("sampler", ["bernoulli", "fixed", "rounded", "balanced"])
def test_rows_of_a_plan(sampler):
    """Made, drawn again and looked at inside of a transform: the same rows, which outlive it."""
    x = torch.randn(8, 4)

    def plans():
        torch.manual_seed(3)
        given = {"batch": 8, "drop_probs": [0.5, 0.3], "sampler": sampler}
        plans = [DepthPlan.sample(**given), DepthPlan.for_step(1, 2, **given)]
        return [plan.resample_() for plan in plans]

    def function(x, plans):
        for plan in plans:
            for rows in plan:
                x = fused_stochastic_depth(x, torch.sin, 0.5, rows=rows)
        return x

    expected = function(x, plans())
    made = []
    y, _ = torch.func.jvp(lambda x: function(x, made.extend(plans()) or made), (x,), (x,))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(function(x, made), expected)
    meta = []
    torch.func.grad(lambda x: (meta.append(DepthPlan.sample(8, [0.5], device="meta")), x)[1])(
        torch.ones(())
    )
    fused_stochastic_depth(torch.empty(8, 4, device="meta"), torch.sin, 0.5, rows=meta[0][0])
    made = plans()
    torch.func.jacfwd(lambda x: function(x, made))(x)
    torch.testing.assert_close(function(x, made), expected)


def test_only_a_dual_level_is_another_way():
    assert ops.kernels() is not compiled
    with forward_ad.dual_level():
        assert ops.kernels() is compiled
    assert ops.kernels() is not compiled


def test_bad_input_is_refused_as_without():
    x = torch.randn(3, 4)
    for function, message in (
        (lambda x: scatter_add_rows(x, x, ROWS), "out: expected 2 kept rows"),
        (lambda x: scatter_add_rows(x, x[:2], ROWS, torch.ones(5)), "layer_scale: shape"),
        (lambda x: fused_stochastic_depth(x[:2], torch.sin, 0.5, rows=ROWS), "rows: made for"),
    ):
        with pytest.raises(ValueError, match=message):
            tangent(function, x, x)


def test_a_patched_model():
    load("timm")
    net = NETS["timm-vit"]
    model = net.model().train().double()
    report = sdkernels.patch(model)
    x = net.inputs(4).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    # Of scaled_dot_product_attention, only the math has a forward derivative.
    with report.use(report.plan(4)), sdpa_kernel(SDPBackend.MATH):
        loss = functional_call(model, {n: p.requires_grad_() for n, p in parameters.items()}, x)
        gradients = torch.autograd.grad(loss.sum(), list(parameters.values()))
        with forward_ad.dual_level():
            duals = {
                n: forward_ad.make_dual(p.detach(), directions[n]) for n, p in parameters.items()
            }
            y = forward_ad.unpack_dual(functional_call(model, duals, x).sum()).tangent
    expected = sum((g * d).sum() for g, d in zip(gradients, directions.values(), strict=True))
    torch.testing.assert_close(y, expected)
