"""The options of fused_stochastic_depth: modes, evaluation, args, residual, lists."""

from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from cases import Case
from comparison import assert_same_bits
from torch import Tensor, nn

from sdkernels import KeptRows, Shared, StochasticDepth, fused_stochastic_depth
from sdkernels.reference import naive_masking

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROWS = KeptRows.from_index(torch.tensor([0, 2]), batch=3, scale=2.0)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same_gradients(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, grad),
        torch.autograd.grad(expected, leaves, grad, materialize_grads=True),
    )


# Modes and probabilities


def test_batch_mode_keeps_all_rows_or_none():
    x = torch.ones(6, 2)
    results = {
        tuple(fused_stochastic_depth(x, lambda kept: kept, 0.75, "batch").flatten().tolist())
        for _ in range(64)
    }
    assert results == {(1.0,) * 12, (5.0,) * 12}


def test_row_mode_decides_for_each_row():
    x = torch.ones(64, 2)
    y = fused_stochastic_depth(x, lambda kept: kept, 0.75)
    assert set(y[:, 0].tolist()) == {1.0, 5.0}
    assert torch.equal(y[:, 0], y[:, 1])


def test_fixed_sampler_keeps_a_fixed_number():
    sizes: list[int] = []

    def branch(kept: Tensor) -> Tensor:
        sizes.append(len(kept))
        return kept

    for _ in range(20):
        y = fused_stochastic_depth(torch.ones(10, 1), branch, 0.75, sampler="fixed")
        assert y.sum().item() == pytest.approx(20)  # the scale is B / k
    assert sizes == [2] * 20


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_drop_everything(mode):
    """torchvision divides by 1 - p only where that is not zero."""
    x, weight = torch.randn(4, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    y = fused_stochastic_depth(x, lambda kept: kept * weight, 1.0, mode)
    assert_same_bits(y, x)
    y.sum().backward()
    assert x.grad.tolist() == torch.ones(4, 3).tolist()
    assert weight.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("rescale", "in_training", "in_evaluation"),
    [("train", 1 / 0.75, 1.0), ("eval", 1.0, 0.75), ("none", 1.0, 1.0)],
)
def test_rescale(rescale, in_training, in_evaluation):
    x = torch.ones(64, 1, dtype=torch.float64)
    y = fused_stochastic_depth(x, lambda kept: kept, 0.25, rescale=rescale)
    assert set(y.flatten().tolist()) == {1.0, 1 + in_training}
    y = fused_stochastic_depth(x, lambda kept: kept, 0.25, training=False, rescale=rescale)
    assert set(y.flatten().tolist()) == {1 + in_evaluation}


# Evaluation, and p = 0: the literal expression


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{"training": False}, {"p": 0.0}], ids=["evaluation", "p0"])
def test_literal_expression(options, dtype):
    case = Case(dtype=dtype, branch_dtype=dtype, norm="layer", layer_scale="C", conditions=1)
    inputs = case.inputs()
    call = inputs.call() | {"rows": None, "p": 0.5} | options
    x, branch, norm, args = inputs.x, inputs.branch, inputs.norm, inputs.args
    y = fused_stochastic_depth(x, branch, **call)
    assert_same_bits(y, x + branch(norm(x), *args) * inputs.layer_scale)
    residual = torch.randn(x.shape, dtype=dtype)
    y = fused_stochastic_depth(x, branch, **(call | {"residual": residual, "norm": None}))
    assert_same_bits(y, residual + branch(x, *args) * inputs.layer_scale)
    stream = x.detach().clone()
    y = fused_stochastic_depth(stream, branch, **(call | {"inplace": True, "norm": None}))
    assert y is stream
    expected = x + branch(x, *args) * inputs.layer_scale
    if "p" in options:  # in place the branch works on a copy of its rows, and the kernels add
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    else:
        assert_same_bits(y, expected)


def test_evaluation_has_no_op_of_ours():
    inputs = Case(norm="layer", layer_scale="C").inputs()
    call = inputs.call() | {"rows": None}
    y = fused_stochastic_depth(inputs.x, inputs.branch, 0.5, training=False, **call)
    names, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert names == {"AddBackward0", "MulBackward0", "TanhBackward0", "NativeLayerNormBackward0",
                     "torch::autograd::AccumulateGrad"}  # fmt: skip


# args


def test_args_are_compacted():
    seen: dict[str, Any] = {}

    def branch(kept: Tensor, *args: Any) -> Tensor:
        seen["args"] = args
        return kept

    table = torch.arange(3)
    args = (
        torch.tensor([10, 20, 30]),  # [B] integers
        torch.tensor([True, False, True]),
        torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.bfloat16),
        torch.ones(1, 3),  # broadcasts
        torch.tensor(5.0),
        Shared(table),  # three entries by chance
        (torch.arange(3), [torch.arange(3) + 10], {"mask": torch.arange(3) + 20, "name": "rope"}),
        None,
        "text",
    )
    fused_stochastic_depth(torch.ones(3, 2), branch, 0.5, args=args, rows=ROWS)
    got = seen["args"]
    assert got[0].tolist() == [10, 30]
    assert got[1].tolist() == [True, True]
    assert got[1].dtype == torch.bool
    assert got[2].tolist() == [[1], [3]]
    assert got[3] is args[3]
    assert got[4] is args[4]
    assert got[5] is table
    vector, (inner,), mapping = got[6]
    assert isinstance(got[6], tuple)
    assert (vector.tolist(), inner.tolist()) == ([0, 2], [10, 12])
    assert mapping["mask"].tolist() == [20, 22]
    assert mapping["name"] == "rope"
    assert got[7:] == (None, "text")
    # In evaluation they come whole, and Shared is taken off.
    fused_stochastic_depth(torch.ones(3, 2), branch, 0.5, args=args, training=False)
    assert seen["args"][0] is args[0]
    assert seen["args"][5] is table
    assert seen["args"][6][2]["mask"] is args[6][2]["mask"]


def test_args_in_ordered_and_default_dicts():
    given = (defaultdict(list), OrderedDict())
    for mapping in given:
        mapping["mask"] = torch.tensor([20, 21, 22])
    seen: list[Any] = []

    def branch(kept: Tensor, *args: Any) -> Tensor:
        seen.extend(args)
        return kept

    fused_stochastic_depth(torch.ones(3, 2), branch, 0.5, args=given, rows=ROWS)
    assert [(type(got), got["mask"].tolist()) for got in seen] == [
        (type(mapping), [20, 22]) for mapping in given
    ]
    assert seen[0]["absent"] == []
    assert [mapping["mask"].tolist() for mapping in given] == [[20, 21, 22]] * 2


def test_gradients_of_args():
    x, scale, shift, table = double(3, 4), double(3, 1), double(3, 4), double(3, 4)

    def branch(kept: Tensor, pair: tuple[Tensor, dict[str, Tensor]], whole: Tensor) -> Tensor:
        return torch.sin(kept) * pair[0] + pair[1]["shift"] + whole.sum(0)

    pair = (scale, {"shift": shift})
    actual = fused_stochastic_depth(x, branch, 0.5, args=(pair, Shared(table)), rows=ROWS)
    expected = naive_masking(x, branch, 0.5, args=(pair, table), rows=ROWS)
    assert_same_gradients(actual, expected, [x, scale, shift, table])


# residual


@pytest.mark.parametrize("norm", [None, "norm"])
def test_projection_shortcut(norm):
    """x and the residual have different shapes and strides."""
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dtype=torch.float64)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    x.requires_grad_()
    shortcut = double(3, 6, 4, 4)
    norm = nn.LayerNorm((4, 8, 8), dtype=torch.float64) if norm else None
    options = {"residual": shortcut, "rows": ROWS, "norm": norm, "layer_scale": double(6, 1, 1)}
    actual = fused_stochastic_depth(x, conv, 0.5, **options)
    expected = naive_masking(x, conv, 0.5, **options)
    leaves = [x, shortcut, options["layer_scale"], *conv.parameters()]
    assert_same_gradients(actual, expected, leaves)


def test_residual_made_from_x():
    x, weight = double(3, 4), double(4, 5)
    branch = lambda kept: torch.sin(kept) @ weight  # noqa: E731
    actual, expected = (
        function(x, branch, 0.5, residual=x @ weight, rows=ROWS)
        for function in (fused_stochastic_depth, naive_masking)
    )
    assert_same_gradients(actual, expected, [x, weight])


# Lists of tensors


class ListBranch(nn.Module):
    """Works on all crops at once, as the attention of DINOv2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, xs: list[Tensor], biases: list[Tensor], factor: Tensor) -> list[Tensor]:
        joined = torch.cat([x.flatten(0, -2) for x in xs])
        parts = torch.sin(self.linear(joined)).split([x[..., 0].numel() for x in xs])
        return [
            part.view_as(x) * factor + bias for part, x, bias in zip(parts, xs, biases, strict=True)
        ]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("counts", [(2, 3), (0, 1), (0, 0), (3, 5)])
def test_lists(counts, inplace):
    xs = [double(3, 2, 4), double(5, 1, 4)]
    biases = [double(3, 1, 4), double(5, 1, 4)]
    factor, layer_scale, norm = double(4), double(4), nn.LayerNorm(4, dtype=torch.float64)
    rows = [
        KeptRows.from_index(torch.arange(k), len(x), 2.0) for k, x in zip(counts, xs, strict=True)
    ]
    branch = ListBranch()
    streams = [x.clone() for x in xs] if inplace else xs
    actual = fused_stochastic_depth(
        streams, branch, 0.5, args=(biases, Shared(factor)), norm=norm, layer_scale=layer_scale,
        rows=rows, inplace=inplace,
    )  # fmt: skip
    if inplace:
        assert all(y is x for y, x in zip(actual, streams, strict=True))

    def branch_of_one(x: Tensor, bias: Tensor) -> Tensor:
        return branch([x], [bias], factor)[0]

    options = {"norm": norm, "layer_scale": layer_scale}
    expected = [
        naive_masking(x, branch_of_one, 0.5, args=(bias,), rows=r, **options)
        for x, bias, r in zip(xs, biases, rows, strict=True)
    ]
    leaves = [*xs, *biases, factor, layer_scale, *norm.parameters(), *branch.parameters()]
    grads = [torch.randn_like(x) for x in xs]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, grads), torch.autograd.grad(expected, leaves, grads)
    )


def test_lists_in_evaluation_and_skipped():
    xs = [torch.randn(3, 4), torch.randn(2, 4)]
    double_all = lambda xs: [2 * x for x in xs]  # noqa: E731
    for options in ({"training": False}, {"p": 0.0}):
        ys = fused_stochastic_depth(xs, double_all, **({"p": 0.5} | options))
        for x, y in zip(xs, ys, strict=True):
            assert torch.equal(y, x + 2 * x)
    ys = fused_stochastic_depth(xs, double_all, 1.0, empty="skip")
    assert all(y is x for x, y in zip(xs, ys, strict=True))


def test_lists_draw_rows_for_each_tensor():
    xs = [torch.ones(64, 1), torch.ones(64, 1)]
    first, second = fused_stochastic_depth(xs, lambda xs: xs, 0.5)
    assert not torch.equal(first, second)
    residuals = [torch.zeros(64, 2), torch.zeros(64, 3)]
    branch = lambda xs: [xs[0].expand(-1, 2), xs[1].expand(-1, 3)]  # noqa: E731
    ys = StochasticDepth(branch, 0.5)(xs, residual=residuals)
    assert [set(y.flatten().tolist()) for y in ys] == [{0.0, 2.0}] * 2
