"""fused_layer_dropout and scatter_rows: values and gradients against masking in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import TOLERANCE
from checkpointing import each_variant
from comparison import assert_close, assert_same_bits
from layouts import LAYOUTS, layouts_for
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from sdkernels import KeptRows, Shared, fused_layer_dropout, linear_decay, scatter_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")

B, N, C = 8, 5, 12
KEPT = {
    "none": [],
    "one": [3],
    "some": [0, 2, 3, 7],
    "all": list(range(B)),
}
each_kept = pytest.mark.parametrize("index", KEPT.values(), ids=KEPT.keys())


class Layer(nn.Module):
    """A pre-norm layer of attention and MLP, as models write it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.RMSNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))
        self.to(dtype)

    def attention(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, C // 2)).movedim(-3, 0).transpose(-3, -2)
        out = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        return self.out(out.transpose(-3, -2).flatten(-2))

    def forward(self, x: Tensor, bias: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        x = x + scale * self.attention(self.norm1(x), bias)
        return x + scale * self.mlp(self.norm2(x))

    def masked(self, x: Tensor, bias: Tensor | None, mask: Tensor, scale: float) -> Tensor:
        """Each branch on every row, and multiplied by the mask: what is computed today."""
        factor = mask.to(x.dtype).view(-1, 1, 1) * scale
        x = x + factor * self.attention(self.norm1(x), bias)
        return x + factor * self.mlp(self.norm2(x))


def make(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Layer, Tensor, Tensor, Tensor]:
    """A layer, its input, a bias for each sample and a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = Layer(dtype)
        x = torch.randn(B, N, C, dtype=dtype, requires_grad=True)
        bias = torch.randn(B, 1, N, N, dtype=dtype, requires_grad=True)
        grad = torch.randn(B, N, C, dtype=dtype)
    return layer, x, bias, grad


def rows_of(index: list[int], scale: float = 1.0) -> KeptRows:
    return KeptRows.from_index(torch.tensor(index, dtype=torch.int64), B, scale)


def collect(y: Tensor, grad: Tensor, layer: nn.Module, *leaves: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *layer.parameters()], grad)]


@each_kept
@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "inplace"])
@pytest.mark.parametrize("rescale", ["none", "train"])
def test_equals_masking_the_branches(index, inplace, rescale):
    layer, x, bias, grad = make()
    rows = rows_of(index, 1.0 if rescale == "none" else 1.6)
    # PyTorch's attention on no row does not read the bias.
    leaves = [x, bias] if index else [x]
    expected = collect(layer.masked(x, bias, rows.slot >= 0, rows.scale), grad, layer, *leaves)
    given = x.clone() if inplace else x
    y = fused_layer_dropout(
        given, layer, 0.5, args=(bias,), rows=rows, rescale=rescale, inplace=inplace
    )
    assert (y is given) == inplace
    for actual, value in zip(collect(y, grad, layer, *leaves), expected, strict=True):
        assert_close(actual, value, TOLERANCE[torch.float64])


def test_dropped_rows_and_their_gradients_are_untouched():
    layer, x, bias, grad = make()
    with torch.no_grad():
        x[1], x[4] = float("nan"), -0.0
        x[5, 0] = float("inf")
    rows = rows_of(KEPT["some"])
    y = fused_layer_dropout(x, layer, 0.5, args=(bias,), rows=rows)
    d_x, *others = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    dropped = rows.slot < 0
    assert_same_bits(y[dropped], x[dropped])
    assert_same_bits(d_x[dropped], grad[dropped])
    assert all(value.isfinite().all() for value in (d_x, *others))


def test_a_kept_row_gets_the_gradient_of_the_layer_alone():
    x = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    rows = KeptRows.from_index(torch.tensor([0, 2]), 3)
    y = fused_layer_dropout(x, lambda kept: kept * kept, 0.5, rows=rows)
    y.backward(torch.tensor([[1.0], [10.0], [100.0]]))
    assert y.tolist() == [[1], [2], [9]]
    assert x.grad.tolist() == [[2], [10], [600]]


@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "inplace"])
def test_a_layer_that_does_not_read_its_rows(inplace):
    """Nothing flows back into them, and zero is not missing."""
    x = torch.ones(3, 1, requires_grad=True)
    out = torch.tensor([[5.0], [7.0]], requires_grad=True)
    rows = KeptRows.from_index(torch.tensor([0, 2]), 3)
    given = x.clone() if inplace else x
    y = fused_layer_dropout(given, lambda kept: out, 0.5, rows=rows, inplace=inplace)
    y.backward(torch.tensor([[1.0], [10.0], [100.0]]))
    assert y.tolist() == [[5], [1], [7]]
    assert x.grad.tolist() == [[0], [10], [0]]
    assert out.grad.tolist() == [[1], [100]]


GRADCHECKS: dict[str, Any] = {
    "layer": lambda x, w: fused_layer_dropout(
        x, lambda kept: kept + (w * kept).sin(), 0.5, rows=KeptRows.from_index(ROWS, 3)
    ),
    "layer-inplace": lambda x, w: fused_layer_dropout(
        x.clone(),
        lambda kept: kept + (w * kept).sin(),
        0.5,
        rows=KeptRows.from_index(ROWS, 3),
        inplace=True,
    ),
    "layer-inplace-view": lambda x, w: fused_layer_dropout(
        x.clone()[:],
        lambda kept: kept + (w * kept).sin(),
        0.5,
        rows=KeptRows.from_index(ROWS, 3),
        inplace=True,
    ),
    "layer-constant": lambda x, w: fused_layer_dropout(
        x, lambda kept: w.expand(kept.shape).sin(), 0.5, rows=KeptRows.from_index(ROWS, 3)
    ),
    "layer-nothing_kept": lambda x, w: fused_layer_dropout(
        x, lambda kept: kept + w * kept, 0.5, rows=KeptRows.from_index(ROWS[:0], 3)
    ),
    "scatter_rows": lambda x, w: scatter_rows(
        x.sin(), (x[:2] * w).sin(), KeptRows.from_index(ROWS, 3)
    ),
    "scatter_rows-inplace": lambda x, w: scatter_rows(
        x.sin(), (x[:2] * w).sin(), KeptRows.from_index(ROWS, 3), inplace=True
    ),
}
ROWS = torch.tensor([0, 2])


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(GRADCHECKS[name], (x, w))
    assert gradgradcheck(GRADCHECKS[name], (x, w), gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("layout", layouts_for(4))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_layouts_and_dtypes(layout, dtype):
    x = LAYOUTS[layout](torch.randn(4, 6, 5, 3).to(dtype)).detach().requires_grad_()
    rows = KeptRows.from_index(torch.tensor([1, 2]), 4)
    y = fused_layer_dropout(x, lambda kept: 2 * kept, 0.5, rows=rows)
    factor = torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=dtype).view(-1, 1, 1, 1)
    assert y.dtype == dtype
    assert torch.equal(y, x * factor)
    assert y.stride() == torch.empty_like(x).stride()
    grad = LAYOUTS[layout](torch.randn(4, 6, 5, 3).to(dtype))
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], grad * factor)


def test_under_autocast():
    """A float32 stream, branches in bfloat16, the layer's output in float32 again."""
    layer, x, bias, grad = make(torch.float32)
    wide, wide_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    wide_bias = bias.detach().double()
    rows = rows_of(KEPT["some"], 2.0)
    expected = collect(
        wide.masked(wide_x, wide_bias, rows.slot >= 0, 2.0), grad.double(), wide, wide_x
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_layer_dropout(x, layer, 0.5, args=(bias,), rows=rows, rescale="train")
    assert y.dtype == torch.float32
    for actual, value in zip(collect(y, grad, layer, x), expected, strict=True):
        assert_close(actual, value, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "inplace"])
def test_a_layer_of_another_dtype(inplace):
    """The result has the dtype of x + out; in place, that of x."""
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    rows = KeptRows.from_index(torch.tensor([1]), 4)
    y = fused_layer_dropout(x, lambda kept: kept.float() + 1, 0.5, rows=rows, inplace=inplace)
    assert y.dtype == (torch.bfloat16 if inplace else torch.float32)
    assert torch.equal(y[0].float(), x[0].float())


# The law


def test_rows_are_drawn_as_for_a_branch():
    x = torch.zeros(64, 1)
    torch.manual_seed(1)
    expected = KeptRows.sample(64, 0.3)
    torch.manual_seed(1)
    y = fused_layer_dropout(x, lambda kept: kept + 1, 0.3)
    assert torch.equal(y.flatten() == 1, expected.slot >= 0)


@pytest.mark.parametrize(
    ("rescale", "sampler", "in_training", "in_evaluation"),
    [("none", "bernoulli", None, None), ("train", "bernoulli", 4.0, 1.0),
     ("eval", "bernoulli", 1.0, 0.25), ("train", "fixed", 8 / 2, 1.0),
     ("eval", "fixed", 1.0, 0.25)],
)  # fmt: skip
def test_the_layer_is_told_the_scale(rescale, sampler, in_training, in_evaluation):
    given: list[Any] = []

    def layer(kept: Tensor, scale: float | None = None) -> Tensor:
        given.append(scale)
        return kept

    for training in (True, False):
        options = {"rescale": rescale, "sampler": sampler, "training": training}
        fused_layer_dropout(torch.zeros(8, 1), layer, 0.75, **options)
    assert given == [in_training, in_evaluation]


def test_the_expectation_of_a_linear_layer():
    """With 1 / keep on the branch, the mean over the rows is what evaluation computes."""
    layer = lambda kept, scale: kept + scale * 0.5 * kept  # noqa: E731
    x = torch.ones(200_000, 1, dtype=torch.float64)
    torch.manual_seed(0)
    y = fused_layer_dropout(x, layer, 0.4, rescale="train")
    assert abs(y.mean().item() - 1.5) < 0.005  # six standard deviations


def test_evaluation_and_p_of_zero_run_the_layer_itself():
    x = torch.randn(4, 3)
    seen: list[Any] = []

    def layer(given: Tensor) -> Tensor:
        seen.append(given)
        return given + 1

    for options in ({"training": False}, {}):
        y = fused_layer_dropout(x, layer, 0.0, **options, inplace=True)
        assert seen[-1] is x
        assert torch.equal(y, x + 1)


def test_mode_batch_keeps_all_rows_or_none():
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        y = fused_layer_dropout(torch.zeros(6, 1), lambda kept: kept + 1, 0.5, "batch")
        seen.add(int(y.sum()))
    assert seen == {0, 6}


@pytest.mark.parametrize("empty", ["run", "ones", "skip"])
def test_nothing_kept(empty):
    layer, x, bias, grad = make()
    y = fused_layer_dropout(x, layer, 0.5, args=(bias,), rows=rows_of([]), empty=empty)
    assert torch.equal(y, x)
    parameters = list(layer.parameters())
    if empty == "skip":
        assert y is x
        return
    d_x, *others = torch.autograd.grad(y, [x, *parameters], grad)
    assert torch.equal(d_x, grad)
    assert not any(gradient.any() for gradient in others)


def test_args_of_samples_and_shared_ones():
    x = torch.zeros(4, 1)
    rows = KeptRows.from_index(torch.tensor([1, 3]), 4)
    of_samples, shared = torch.arange(4.0).view(4, 1), torch.full((4, 1), 10.0)[:2]

    def layer(kept: Tensor, entries: dict[str, Any], own: Tensor) -> Tensor:
        return kept + entries["mask"] + entries["cos"] + own

    entries = {"mask": of_samples, "cos": torch.full((1, 1), 100.0), "cache": None}
    y = fused_layer_dropout(x, layer, 0.5, args=(entries, Shared(shared)), rows=rows)
    assert y.flatten().tolist() == [0, 111, 0, 113]


# Where it runs


@each_variant
def test_checkpointing(variant):
    layer, x, bias, grad = make()

    def run(x: Tensor) -> Tensor:
        return fused_layer_dropout(x, layer, 0.5, args=(bias,))

    torch.manual_seed(3)
    expected = collect(run(x), grad, layer, x)
    torch.manual_seed(3)
    actual = checkpoint(run, x, **variant)
    if variant["use_reentrant"]:
        actual.backward(grad)
        actual = [actual.detach(), x.grad, *(p.grad for p in layer.parameters())]
    else:
        actual = collect(actual, grad, layer, x)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_memory_follows_the_kept_rows():
    """What is saved for the backward: rows of the layer, and the row numbers."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor.detach()

    layer, x, bias, _ = make()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_layer_dropout(x, layer, 0.5, args=(bias.detach(),), rows=rows_of([1, 4]))
    batched = [tensor for tensor in saved if tensor.dim() and tensor.shape[0] == B]
    assert all(tensor.dtype == torch.int64 for tensor in batched)


def test_a_training_run_learns():
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(torch.float32) for _ in range(3))
    x, target = torch.randn(B, N, C), torch.randn(B, N, C)
    optimizer = torch.optim.Adam(layers.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        y = x
        for layer, p in zip(layers, linear_decay(3, 0.4), strict=True):
            y = fused_layer_dropout(y, layer, p, rescale="train", sampler="rounded")
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


# Bad input


def raising(kept: Tensor) -> Tensor:
    raise ArithmeticError("in the layer")


def writing_and_raising(kept: Tensor) -> Tensor:
    kept.mul_(3).add_(10)
    raise ArithmeticError("in the layer")


@pytest.mark.parametrize("layer", [raising, writing_and_raising])
@pytest.mark.parametrize("index", [[1, 2], [], [0, 1, 2, 3]], ids=["some", "none", "all"])
def test_a_layer_that_raises_leaves_x_and_its_gradient_alone(layer, index):
    """In place too: autograd sees x pass through."""
    x = torch.randn(4, 3, requires_grad=True)
    given = x.clone()
    rows = KeptRows.from_index(torch.tensor(index, dtype=torch.int64), 4)
    with pytest.raises(ArithmeticError, match="in the layer"):
        fused_layer_dropout(given, layer, 0.5, rows=rows, inplace=True)
    assert torch.equal(given, x)
    grad = torch.randn(4, 3, requires_grad=True)
    (d_x,) = torch.autograd.grad(given, x, grad, create_graph=True)
    assert torch.equal(d_x, grad)
    assert torch.equal(torch.autograd.grad(d_x.sum(), grad)[0], torch.ones(4, 3))


@pytest.mark.parametrize("what", ["another op", "a product", "interrupted"])
def test_what_a_raising_layer_did_to_x(what):
    """Its own writes to x have their gradient; the rest passes through."""
    x = torch.randn(4, 3, requires_grad=True)
    given = x.clone()

    def layer(kept: Tensor) -> Tensor:
        if what == "another op":
            rows = KeptRows.from_index(torch.tensor([0, 1]), 4)
            with pytest.raises(ArithmeticError):
                fused_layer_dropout(given, raising, 0.5, rows=rows, inplace=True)
        elif what == "a product":
            given.mul_(2)
        raise KeyboardInterrupt if what == "interrupted" else ArithmeticError

    rows = KeptRows.from_index(torch.tensor([1, 2]), 4)
    with pytest.raises((ArithmeticError, KeyboardInterrupt)):
        fused_layer_dropout(given, layer, 0.5, rows=rows, inplace=True)
    factor = 2.0 if what == "a product" else 1.0
    assert torch.equal(given, factor * x)
    assert torch.autograd.grad(given.sum(), x)[0].eq(factor).all()


@pytest.mark.parametrize("inplace", ["yes", None, 2], ids=repr)
def test_inplace_is_true_or_false(inplace):
    with pytest.raises(TypeError, match=f"inplace: expected True or False, got {inplace!r}"):
        fused_layer_dropout(torch.randn(4, 3), torch.sin, 0.5, inplace=inplace)


def test_what_a_raising_layer_leaves_behind_has_its_gradient():
    """Beside that of x, which passes through."""
    x = torch.randn(4, 3, requires_grad=True)
    given = x.clone()
    left = []

    def layer(kept: Tensor) -> Tensor:
        left.append(kept * 5)
        return raising(kept)

    with pytest.raises(ArithmeticError):
        fused_layer_dropout(
            given, layer, 0.5, rows=KeptRows.from_index(torch.tensor([1, 2]), 4), inplace=True
        )
    d_x = torch.autograd.grad(left[0].sum(), x, retain_graph=True)[0]
    assert d_x[:, 0].tolist() == [0, 5, 5, 0]
    d_x = torch.autograd.grad(given.sum() + left[0].sum(), x)[0]
    assert d_x[:, 0].tolist() == [1, 6, 6, 1]


X = torch.zeros(4, 6, 3)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "layer": ({"layer": X}, TypeError, "layer: expected a callable, got Tensor"),
    "tokens": (
        {"layer": lambda kept: kept[:, 1:]},
        ValueError,
        r"layer: expected to return the shape that it was given, \(2, 6, 3\), got \(2, 5, 3\)",
    ),
    "tuple": (
        {"layer": lambda kept: (kept, None)},
        TypeError,
        "layer: expected to return a tensor, got tuple",
    ),
    "p": ({"p": 1.5}, ValueError, r"p: expected a drop probability in \[0, 1\]"),
    "mode": ({"mode": "rows"}, ValueError, "mode: expected"),
    "sampler": ({"sampler": "poisson"}, ValueError, "sampler: expected"),
    "rescale": ({"rescale": True}, ValueError, "rescale: expected"),
    "empty": ({"empty": "no"}, ValueError, "empty: expected"),
    "args": ({"args": X}, TypeError, "args: expected a list or tuple, got Tensor"),
    "entry": ({"args": (torch.zeros(3, 1),)}, ValueError, r"args\[0\]: expected 4 rows"),
    "x": ({"x": X.int()}, TypeError, "x: expected float16, bfloat16, float32 or float64"),
    "x-list": ({"x": [X]}, TypeError, "x: expected a tensor, got list"),
    "rows": ({"rows": rows_of([1])}, ValueError, "rows: made for a batch of 8 rows, but x has 4"),
    "weight": (
        {"rows": KeptRows(torch.tensor([1]), torch.tensor([-1, 0, -1, -1]), 1.0, torch.ones(1))},
        ValueError,
        "rows: expected rows without weights",
    ),
    "leaf": (
        {"x": torch.zeros(4, 6, 3, requires_grad=True), "inplace": True},
        RuntimeError,
        "leaf Variable that requires grad",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    given: dict[str, Any] = {
        "x": X,
        "layer": lambda kept, *args: kept,
        "p": 0.5,
        "rows": KeptRows.from_index(torch.tensor([0, 2]), 4),
    }
    with pytest.raises(error, match=message):
        fused_layer_dropout(**given | change)


def test_bad_input_of_scatter_rows():
    rows = KeptRows.from_index(torch.tensor([0, 2]), 4)
    with pytest.raises(ValueError, match="out: expected 2 kept rows of residual's shape"):
        scatter_rows(X, X, rows)
    with pytest.raises(TypeError, match="out: expected a tensor, got list"):
        scatter_rows(X, [X], rows)
    with pytest.raises(TypeError, match="out: expected float16"):
        scatter_rows(X, X[:2].int(), rows)
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        scatter_rows(X, X[:2], rows, inplace=True)
