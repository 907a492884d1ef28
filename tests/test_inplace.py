"""inplace=True: where autograd allows it; where not, PyTorch's own error and nothing written."""

from dataclasses import replace

import pytest
import torch
from backends import native
from cases import NAMED_CASES, Case, generated_cases
from comparison import assert_same_bits, assert_same_results, collect, run_fused, run_reference
from hypothesis import assume, given
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sdkernels import KeptRows, fused_stochastic_depth, scatter_add_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROWS = KeptRows.from_index(torch.tensor([0, 2]), batch=3, scale=2.0)


def run_inplace(case: Case, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
    """The case with its stream (x, or the residual) written in place."""
    inputs = case.inputs(device)
    options = inputs.call()
    x = inputs.x
    if inputs.residual is not None:
        stream = options["residual"] = inputs.residual.clone()
    else:
        stream = x = inputs.x.clone()
    pointer, version = stream.data_ptr(), stream._version
    y = fused_stochastic_depth(x, inputs.branch, 0.5, **options, inplace=True)
    assert y is stream
    assert y.data_ptr() == pointer
    assert y._version > version
    return collect(y, inputs)


def check(case: Case, device: torch.device | str) -> None:
    actual = run_inplace(case, device)
    assert actual["y"].dtype == case.dtype
    assert_same_results(actual, run_reference(case.inputs(device)), case.tolerance)


@pytest.mark.parametrize("case", NAMED_CASES, ids=str)
def test_named_cases(case, device):
    check(case, device)
    if case.result_dtype == case.dtype:
        out_of_place = run_fused(case.inputs(device))
        for name, value in run_inplace(case, device).items():
            assert_same_bits(value, out_of_place[name])


@given(case=generated_cases())
def test_generated_cases(case, device):
    # The gradient of a result in the stream's dtype is drawn for that of x + out.
    assume(case.result_dtype == case.dtype)
    check(case, device)


@given(case=generated_cases(grad_layout="contiguous", conditions=0))
def test_stream_of_narrower_dtype(case, device):
    """The result has the dtype of the stream, whatever the branch returns."""
    inputs = case.inputs(device)
    with torch.no_grad():
        expected = fused_stochastic_depth(inputs.x, inputs.branch, 0.5, **inputs.call())
        stream = inputs.x.clone() if case.width is None else inputs.residual.clone()
        options = inputs.call() | ({} if case.width is None else {"residual": stream})
        x = stream if case.width is None else inputs.x
        y = fused_stochastic_depth(x, inputs.branch, 0.5, **options, inplace=True)
    assert y is stream
    torch.testing.assert_close(y, expected.to(case.dtype), rtol=case.tolerance, atol=1e-6)


def test_saved_for_another_node():
    """PyTorch notices that a tensor it needs was overwritten."""
    weight = torch.randn(3, 4, requires_grad=True)
    x = weight * 1.0
    needs_x = (x * weight).sum()
    scatter_add_rows(x, torch.ones(2, 4), ROWS, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needs_x.backward()


def test_tensor_saved_by_the_branch_is_not_overwritten():
    """The branch works on rows of its own: x may be overwritten after it, and by the next block."""
    leaf = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    first = second = leaf
    for inplace in (True, False):
        x = leaf.clone()
        x = fused_stochastic_depth(x, torch.sin, 0.5, rows=ROWS, inplace=inplace)
        x = fused_stochastic_depth(x, torch.exp, 0.5, rows=ROWS, inplace=inplace)
        first, second = second, torch.autograd.grad(x.sum(), leaf)[0]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("norm", [None, torch.nn.LayerNorm(4)], ids=["plain", "norm"])
@pytest.mark.parametrize("as_residual", [False, True])
def test_leaf_that_requires_grad(norm, as_residual):
    x = torch.randn(3, 4, requires_grad=True)
    before = x.detach().clone()
    message = "leaf Variable that requires grad"
    with pytest.raises(RuntimeError, match=message):
        x.add_(1)
    with pytest.raises(RuntimeError, match=message):
        fused_stochastic_depth(
            torch.randn(3, 4) if as_residual else x,
            torch.sin,
            0.5,
            rows=ROWS,
            norm=norm,
            residual=x if as_residual else None,
            inplace=True,
        )
    with pytest.raises(RuntimeError, match=message):
        scatter_add_rows(x, torch.ones(2, 4), ROWS, inplace=True)
    assert_same_bits(x, before)
    assert x._version == 0


@pytest.mark.parametrize("norm", [None, torch.nn.LayerNorm(4)], ids=["plain", "norm"])
def test_view_of_a_leaf(norm):
    x = torch.randn(3, 8, requires_grad=True)
    before = x.detach().clone()
    message = "a view of a leaf Variable that requires grad"
    with pytest.raises(RuntimeError, match=message):
        x[:, :4].add_(1)
    with pytest.raises(RuntimeError, match=message):
        fused_stochastic_depth(x[:, :4], torch.sin, 0.5, rows=ROWS, norm=norm, inplace=True)
    with pytest.raises(RuntimeError, match=message):
        scatter_add_rows(x[:, :4], torch.ones(2, 4), ROWS, inplace=True)
    assert_same_bits(x, before)


@pytest.mark.parametrize("norm", [None, torch.nn.LayerNorm(4)], ids=["plain", "norm"])
def test_view_of_a_result(norm):
    """The gradient of the tensor that is viewed is the one that PyTorch's own add_ gives."""
    leaf = torch.randn(3, 8, requires_grad=True)
    gradients = []
    for own in (True, False):
        base = leaf * 1.0
        view = base[:, :4]
        if own:
            fused_stochastic_depth(view, torch.sin, 0.5, rows=ROWS, norm=norm, inplace=True)
        else:
            out = torch.sin(view.clone() if norm is None else norm(view.clone()))
            view.add_(out * torch.tensor([[2.0], [0.0], [2.0]]))
        gradients.append((base.detach().clone(), torch.autograd.grad(base.square().sum(), leaf)[0]))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_leaf_without_gradient_under_a_branch_with_one():
    """x becomes part of the graph, as in x.add_(branch(x))."""
    x, weight = torch.ones(3, 4), torch.full((4,), 3.0, requires_grad=True)
    y = fused_stochastic_depth(x, lambda kept: kept * weight, 0.5, rows=ROWS, inplace=True)
    assert y is x
    assert x.requires_grad
    x.sum().backward()
    assert weight.grad.tolist() == [4.0] * 4
    assert x[:, 0].tolist() == [7, 1, 7]


def test_expanded_tensor_is_refused():
    """Several rows share memory: PyTorch's own error."""
    x = torch.zeros(1, 4).expand(3, 4)
    message = "more than one element of the written-to tensor refers to a single memory location"
    with pytest.raises(RuntimeError, match=message):
        x.add_(torch.ones(3, 4))
    with pytest.raises(RuntimeError, match=message):
        scatter_add_rows(x, torch.ones(2, 4), ROWS, inplace=True)
    assert not x.any()


def test_under_no_grad():
    x = torch.ones(3, 4, requires_grad=True)
    with torch.no_grad():
        y = fused_stochastic_depth(x, torch.neg, 0.5, rows=ROWS, inplace=True)
    assert y is x
    assert x[:, 0].tolist() == [-1, 1, -1]


def test_inference_mode():
    with torch.inference_mode():
        x = torch.ones(3, 4)
        y = fused_stochastic_depth(x, torch.neg, 0.5, rows=ROWS, norm=None, inplace=True)
        z = fused_stochastic_depth(x, torch.neg, 0.5, rows=ROWS, norm=torch.nn.LayerNorm(4))
    assert y is x
    assert z.is_inference()
    assert x[:, 0].tolist() == [-1, 1, -1]


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({}, True),
        ({"layer_scale": torch.ones(4, dtype=torch.float64)}, False),  # a wider result
        ({"activation": "relu"}, False),
        ({"min_saving": 1.0}, False),  # the branch runs on x itself, and may save it
        ({"rows": None, "p": 0.0}, False),
        ({"training": False}, False),
    ],
    ids=["plain", "wider", "relu", "whole", "nothing dropped", "evaluation"],
)
def test_permitted(options, written):
    """None: in place where it saves a pass and changes nothing else."""
    leaf = torch.randn(3, 4, requires_grad=True)
    given = {"p": 0.5, "rows": ROWS} | options
    found = []
    for inplace in (None, False):
        x = leaf * 1.0
        y = fused_stochastic_depth(x, torch.exp, **given, inplace=inplace)
        assert (y is x) == (written and inplace is None)
        found.append((y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]))
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("kind", ["leaf", "expanded", "negative bit", "unbind", "unfold"])
def test_permitted_where_it_is_forbidden(kind):
    """Then the sum is a tensor of its own."""
    x = {
        "leaf": torch.randn(3, 4, requires_grad=True),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "negative bit": torch.randn(3, 4, dtype=torch.cfloat).conj().imag,
        "unbind": (torch.randn(3, 2, 4, requires_grad=True) * 1).unbind(1)[0],
        "unfold": torch.arange(6.0).unfold(0, 4, 1),  # rows that overlap
    }[kind]
    before = x.detach().clone()
    y = fused_stochastic_depth(x, torch.sin, 0.5, rows=ROWS, inplace=None)
    assert_same_bits(x.detach(), before)
    expected = fused_stochastic_depth(before, torch.sin, 0.5, rows=ROWS)
    assert_same_bits(y.detach(), expected)


def test_permitted_is_not_forced_on_a_list():
    xs = [torch.ones(3, 4), torch.ones(3, 4)]
    ys = fused_stochastic_depth(
        xs, lambda kept: [-each for each in kept], 0.5, rows=[ROWS] * 2, inplace=None
    )
    assert all(y is not x for x, y in zip(xs, ys, strict=True))
    assert all(x.eq(1).all() for x in xs)


@pytest.mark.parametrize(
    "what",
    ["layer_scale", "row weight", "branch output", "odd view", "odd view, all rows", "inference"],
)
def test_list_that_is_refused_is_not_written(what):
    """All of it is looked at before the first is added."""
    xs = [torch.ones(3, 4), torch.ones(3, 4)]
    options = {"rows": [ROWS, ROWS]}
    branch = lambda kept: list(kept)  # noqa: E731
    message = "refer to a single memory location"
    if what == "layer_scale":
        options["layer_scale"] = xs[1][0]
    elif what == "row weight":
        options["rows"] = [ROWS, replace(ROWS, weight=xs[1][0, :2])]
    elif what == "branch output":
        branch = lambda kept: [kept[0], xs[1][:2]]  # noqa: E731
    elif what == "inference":
        with torch.inference_mode():
            xs[1] = torch.ones(3, 4)
        message = "Inplace update to inference tensor"
    else:  # which PyTorch lets one write into only what needs no gradient
        options["training"] = what == "odd view"
        xs[1] = torch.ones(3, 2, 4).unbind(1)[0]
        options["layer_scale"] = torch.ones(4, requires_grad=True)
        message = "is being modified inplace"
    with pytest.raises(RuntimeError, match=message):
        fused_stochastic_depth(xs, branch, 0.5, **options, inplace=True)
    assert all(x.eq(1).all() for x in xs)


@native
def test_fake_list():
    """Fake tensors have no addresses: nothing is said to share memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        xs = [torch.ones(3, 4), torch.ones(3, 4)]
        options = {"sampler": "fixed", "layer_scale": torch.ones(4), "inplace": True}
        ys = fused_stochastic_depth(xs, lambda kept: [-x for x in kept], 0.5, **options)
    assert all(y is x for x, y in zip(xs, ys, strict=True))


# Where every row runs the branch


@pytest.mark.parametrize("options", [
    {}, {"norm": torch.nn.LayerNorm(4).double()}, {"activation": "relu"}, {"rescale": "eval"},
    {"layer_scale": torch.rand(4, dtype=torch.float64, requires_grad=True)},
], ids=["", "norm", "relu", "rescale", "layer_scale"])  # fmt: skip
@pytest.mark.parametrize("call", [
    {"training": False}, {"training": False, "p": 0.0}, {"p": 0.0}
], ids=["evaluation", "evaluation-p0", "p0"])  # fmt: skip
@pytest.mark.parametrize("shortcut", [None, "other", "alias"])
@pytest.mark.parametrize("crops", [False, True])
def test_where_every_row_runs(options, call, shortcut, crops):
    """The branch may have saved what is written to: as out of place, gradients too."""
    layer = torch.nn.Linear(4, 4).double()
    leaves = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    trained = [
        *leaves, *layer.parameters(), *(v for v in options.values() if isinstance(v, Tensor)),
        *(options["norm"].parameters() if "norm" in options else ()),
    ]  # fmt: skip

    def branch(x):
        return [layer(each).square() for each in x] if crops else layer(x).square()

    def run(inplace: bool) -> list[Tensor]:
        x, other = (leaf * 1 for leaf in leaves)
        residual = {None: None, "other": other, "alias": x.view(3, 4)}[shortcut]
        stream = x if residual is None else residual
        arguments = {"p": 0.5, **call, **options, "inplace": inplace}
        if crops:
            (y,) = fused_stochastic_depth(
                [x], branch, residual=None if residual is None else [residual], **arguments
            )
        else:
            y = fused_stochastic_depth(x, branch, residual=residual, **arguments)
        assert (y is stream) == inplace
        grads = torch.autograd.grad(y.square().sum(), trained, allow_unused=True)
        return [y, *grads]

    for a, e in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, e)


def test_where_every_row_runs_without_gradients():
    """Nothing is saved then, and nothing copied."""
    seen = []
    x = torch.ones(3, 4)
    with torch.no_grad():
        y = fused_stochastic_depth(
            x, lambda t: (seen.append(t), t * 2)[1], 0.5, training=False, inplace=True
        )
    assert seen[0] is x is y
    assert torch.equal(x, torch.full((3, 4), 3.0))
