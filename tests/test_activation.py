"""``activation="relu"``: the same function as a ReLU behind the sum, with less kept for it."""

import pytest
import torch
from cases import NAMED_CASES, Case, generated_cases
from comparison import assert_close, assert_same_bits, collect
from hypothesis import given
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdkernels import KeptRows, StochasticDepth, fused_stochastic_depth, scatter_add_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROWS = KeptRows.from_index(torch.tensor([0, 2]), batch=4, scale=2.0)


def check(case: Case, device: torch.device, **options: object) -> None:
    """Against the op without an activation and PyTorch's ReLU."""
    inputs, others = case.inputs(device), case.inputs(device)
    y = fused_stochastic_depth(
        inputs.x, inputs.branch, 0.5, **inputs.call(), activation="relu", **options
    )
    total = fused_stochastic_depth(others.x, others.branch, 0.5, **others.call(), **options)
    actual, expected = collect(y, inputs), collect(total.relu(), others)
    assert_same_bits(actual.pop("y"), expected.pop("y"))
    assert y.stride() == total.stride()
    for name, value in expected.items():
        # A gradient in another memory format is added up in another order.
        assert_close(actual[name], value.double(), case.tolerance, name)


@pytest.mark.parametrize("case", NAMED_CASES, ids=str)
def test_named_cases(case, device):
    check(case, device)


@given(case=generated_cases())
def test_generated_cases(case, device):
    check(case, device)


@pytest.mark.parametrize("case", NAMED_CASES, ids=str)
def test_every_row_runs_the_branch(case, device):
    check(case, device, min_saving=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_that_are_no_numbers(dtype, device):
    """As torch.relu: NaN stays, and so does its gradient."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 2.0])
    x = special.to(device, dtype).repeat(4, 3).requires_grad_()
    out = torch.zeros(2, 24, dtype=dtype, device=device, requires_grad=True)
    y = scatter_add_rows(x, out, ROWS.to(device), activation="relu")
    torch.testing.assert_close(y, x.relu(), equal_nan=True)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(x.relu(), x, grad)
    assert_same_bits(torch.autograd.grad(y, x, grad, retain_graph=True)[0], expected)


def test_sum_that_is_rounded_to_zero(device):
    """What is stored decides about the gradient, as where PyTorch looks at it."""
    x = torch.full((4, 8), -1e-4, dtype=torch.float16, device=device, requires_grad=True)
    out = torch.full((2, 8), 1e-4, dtype=torch.float16, device=device)
    rows = KeptRows.from_index(torch.tensor([0, 2]), batch=4, scale=1.0 + 1e-5).to(device)
    y = scatter_add_rows(x, out, rows, activation="relu")
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_literal_expression():
    """Where every row runs the branch, no op of ours is needed."""
    x, residual = torch.randn(4, 3), torch.randn(4, 3)
    for options in ({"training": False}, {"p": 0.0}):
        call = {"p": 0.5, "activation": "relu"} | options
        assert_same_bits(fused_stochastic_depth(x, torch.sin, **call), (x + x.sin()).relu())
        y = fused_stochastic_depth(x, torch.sin, **call, residual=residual)
        assert_same_bits(y, (residual + x.sin()).relu())
    y = fused_stochastic_depth(
        x, torch.sin, 0.25, training=False, rescale="eval", activation="relu"
    )
    torch.testing.assert_close(y, (x + 0.75 * x.sin()).relu())


@pytest.mark.parametrize("options", [{}, {"training": False}, {"p": 0.0}], ids=str)
def test_in_place(options):
    base = torch.randn(4, 3, requires_grad=True)
    residual = torch.randn(4, 3)
    sum_of_its_own = fused_stochastic_depth(
        base, torch.neg, 0.5, rows=ROWS, residual=residual, inplace=True, activation="relu"
    )
    assert sum_of_its_own is residual
    assert torch.equal(residual, residual.relu())
    call = {"p": 0.5, "rows": ROWS} | options
    call |= {"rows": None} if options else {}
    expected = fused_stochastic_depth(base * 1, torch.neg, **call).relu()
    stream = base * 1
    y = fused_stochastic_depth(stream, torch.neg, **call, inplace=True, activation="relu")
    assert y is stream
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, base, grad), torch.autograd.grad(expected, base, grad)
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_no_kept_row(inplace):
    none = KeptRows.from_mask(torch.zeros(4, dtype=torch.bool))
    for empty in ("run", "skip"):
        x = torch.randn(4, 3)
        expected = x.relu()
        y = fused_stochastic_depth(
            x, torch.sin, 0.5, rows=none, empty=empty, inplace=inplace, activation="relu"
        )
        assert torch.equal(y, expected)
        assert (y is x) == inplace


def test_lists():
    xs = [torch.randn(4, 3, requires_grad=True), torch.randn(2, 5, requires_grad=True)]
    plan = [ROWS, KeptRows.from_mask(torch.zeros(2, dtype=torch.bool))]

    def branch(kept: list[Tensor]) -> list[Tensor]:
        return [each.sin() for each in kept]

    for options in ({"rows": plan}, {"training": False}):
        ys = fused_stochastic_depth(xs, branch, 0.5, **options, activation="relu")
        plain = fused_stochastic_depth(xs, branch, 0.5, **options)
        for x, y, total in zip(xs, ys, plain, strict=True):
            assert torch.equal(y, total.relu())
            grad = torch.randn_like(y)
            torch.testing.assert_close(
                torch.autograd.grad(y, x, grad), torch.autograd.grad(total.relu(), x, grad)
            )
    skipped = fused_stochastic_depth(
        xs, branch, 0.5, rows=[KeptRows.from_mask(torch.zeros(len(x)) > 0) for x in xs],
        empty="skip", activation="relu",
    )  # fmt: skip
    assert all(torch.equal(y, x.relu()) for x, y in zip(xs, skipped, strict=True))


def test_module():
    block = StochasticDepth(nn.Linear(3, 3), 0.5, activation="relu")
    assert block.extra_repr().endswith(", activation='relu'")
    x = torch.randn(4, 3)
    plain = StochasticDepth(block.branch, 0.5)
    assert torch.equal(block(x, rows=ROWS), plain(x, rows=ROWS).relu())
    assert torch.equal(block.eval()(x), plain.eval()(x).relu())


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("norm", [None, "plain", "hooked"])
def test_gradients_are_nobody_elses(activation, norm):
    """The stream's gradient may be added to in place; what others hold stays as it is."""
    x = torch.randn(4, 64, requires_grad=True)
    weight = torch.randn(64, requires_grad=True)
    layer = None if norm is None else nn.LayerNorm(64)
    if norm == "hooked":
        layer.register_forward_hook(lambda module, args, output: output * 2)
    y = fused_stochastic_depth(
        x, lambda kept: kept * weight, 0.5, rows=ROWS, norm=layer, activation=activation
    )
    seen: list[tuple[Tensor, Tensor]] = []
    handle = y.grad_fn.register_hook(lambda grads, _: seen.append((grads[0], grads[0].clone())))
    grad = torch.randn_like(y)
    before = grad.clone()
    first = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
    handle.remove()
    kept = [each.clone() for each in first]
    second = torch.autograd.grad(y, (x, weight), grad)
    assert torch.equal(grad, before)
    for held, was in [*seen, *zip(first, kept, strict=True), *zip(second, kept, strict=True)]:
        assert torch.equal(held, was)
    assert len(seen) == 1


def test_branch_without_gradient():
    """Only the stream has one then."""
    x = torch.randn(4, 8, requires_grad=True)
    y = fused_stochastic_depth(x, lambda kept: kept.detach(), 0.5, rows=ROWS, activation="relu")
    (d_x,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(d_x, (y > 0).float())


class Saved:
    """The tensors that autograd saves, through hooks that hand out copies."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __enter__(self) -> "Saved":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            self.pack, lambda saved: saved.clone()
        )
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def pack(self, saved: Tensor) -> Tensor:
        self.tensors.append(saved)
        return saved.clone()


def test_saved_for_the_backward():
    """A bit an element, and not the result; what hooks put in its place is what is used."""
    x = torch.randn(4, 1000, requires_grad=True)
    with Saved() as saved:
        y = fused_stochastic_depth(x, torch.neg, 0.5, rows=ROWS, activation="relu")
    assert max(each.numel() * each.element_size() for each in saved.tensors) == 4 * 1000 // 8
    expected = fused_stochastic_depth(x, torch.neg, 0.5, rows=ROWS).relu()
    grad = torch.randn_like(y)
    assert torch.equal(
        torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x, grad)[0]
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    x = torch.randn(4, 1000, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return fused_stochastic_depth(x, torch.sin, 0.5, activation="relu")

    results = []
    for wrapped in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        x.grad = None
        y = wrapped(x * 1)
        y.square().sum().backward()
        results.append((y, x.grad))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("activation", ["gelu", "ReLU", "", nn.ReLU(), True], ids=repr)
def test_bad_activation(activation):
    x = torch.randn(4, 3)
    message = "activation: expected 'relu' or None, got "
    for call in (
        lambda: fused_stochastic_depth(x, torch.sin, 0.5, activation=activation),
        lambda: scatter_add_rows(x, x[:2], ROWS, activation=activation),
        lambda: StochasticDepth(nn.Identity(), 0.5, activation=activation),
    ):
        with pytest.raises(ValueError, match=message):
            call()
