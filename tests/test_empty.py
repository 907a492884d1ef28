"""Where no row is kept: empty="ones" for branches that cannot run on no row, and what is said."""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from comparison import assert_same_bits
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from sdkernels import KeptRows, PerSample, Shared, StochasticDepth, fused_stochastic_depth
from sdkernels.reference import naive_masking

B = 4
NO_ROWS = KeptRows.from_index(torch.empty(0, dtype=torch.int64), B, 2.0)
SOME = KeptRows.from_index(torch.tensor([1, 3]), B, 2.0)


# Ordinary branches that cannot run on no row


class Attention(nn.Module):
    """As most are written."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        q, k, v = (t.view(b, -1, 2, 2).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, -1, 4))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        gate = self.conv(x.mean(2).view(b, 1, -1)).view(b, -1, 1)
        return x * gate.sigmoid()


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(x.shape[0], -1)).view_as(x)


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.fft.fft2(x).real)


class SampleBySample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.linear(each) for each in x])


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        largest = x.flatten(1).abs().amax(1)
        return self.linear(x / (largest + 0.0 * largest.max())[:, None, None])


BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "squeeze-excite": SqueezeExcite,
    "reshape": Flat,
    "instance-norm": lambda: nn.InstanceNorm1d(4, affine=True),
    "fft": Fourier,
    "stack": SampleBySample,
    "amax": Quantized,
}
each_branch = pytest.mark.parametrize("make", BRANCHES.values(), ids=BRANCHES.keys())


def make_branch(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def stream() -> Tensor:
    return torch.randn(B, 4, 4, dtype=torch.float64, requires_grad=True)


@each_branch
def test_an_ordinary_branch_cannot_run_on_no_row(make):
    """Or there would be nothing to test; and the exception says what can be done."""
    with pytest.raises(Exception, match=r".") as caught:
        fused_stochastic_depth(stream(), make_branch(make), 0.5, rows=NO_ROWS)
    text = "".join(traceback.format_exception(caught.value))
    assert 'fused_stochastic_depth ran this branch on 0 kept rows; where it cannot do that, ' \
           'empty="ones" ' in text  # fmt: skip


@each_branch
@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"activation": "relu"}], ids=str)
def test_a_row_of_ones(make, options):
    """The stream comes out as it went in, and parameters get zeros."""
    branch, leaf, norm = make_branch(make), stream(), nn.LayerNorm(4).double()
    layer_scale = torch.rand(4, dtype=torch.float64, requires_grad=True)
    y = fused_stochastic_depth(
        leaf * 1, branch, 0.5, norm=norm, layer_scale=layer_scale, rows=NO_ROWS, empty="ones",
        **options,
    )  # fmt: skip
    assert_same_bits(y, leaf.relu() if "activation" in options else leaf * 1)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(leaf.grad, grad * (leaf > 0) if "activation" in options else grad)
    for parameter in (layer_scale, *norm.parameters(), *branch.parameters()):
        assert parameter.grad is not None
        assert not parameter.grad.any()


@each_branch
def test_where_rows_are_kept_nothing_changes(make):
    branch, leaf = make_branch(make), stream()
    results = []
    for empty in ("run", "ones"):
        y = fused_stochastic_depth(leaf, branch, 0.5, rows=SOME, empty=empty)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *branch.parameters()])])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    expected = naive_masking(leaf, branch, 0.5, rows=SOME)
    torch.testing.assert_close(results[0][0], expected)


@each_branch
def test_the_module_over_many_draws(make):
    """B = 2 at p = 0.5 keeps nothing in a quarter of the steps."""
    module = StochasticDepth(make_branch(make), 0.5, empty="ones")
    unchanged = 0
    for _ in range(40):
        x = stream()[:2].detach()
        unchanged += torch.equal(module(x), x)
    assert 2 < unchanged < 25


@each_branch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_compiled(make):
    """With rows from outside, none of which are kept, the graph knows it."""
    torch._dynamo.reset()
    branch, leaf, norm = make_branch(make), stream(), nn.LayerNorm(4).double()

    def run(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
        rows = KeptRows(index, slot, 2.0)
        return fused_stochastic_depth(x, branch, 0.5, norm=norm, rows=rows, empty="ones")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = compiled(leaf, NO_ROWS.index, NO_ROWS.slot)
    assert torch.equal(y, leaf)
    y.sum().backward()
    assert all(not p.grad.any() for p in (*branch.parameters(), *norm.parameters()))
    y = compiled(leaf, SOME.index, SOME.slot)
    torch.testing.assert_close(y, run(leaf, SOME.index, SOME.slot))


# Arguments


def test_arguments():
    """Nothing of a dropped row reaches a gradient, through args neither."""
    table, weight = torch.randn(9, 4), nn.Parameter(torch.ones(4))
    x = torch.full((B, 4), torch.nan).requires_grad_()
    scale = torch.full((B, 1), torch.inf).requires_grad_()
    labels, mask = torch.tensor([8, 0, 3, 2]), torch.zeros(B, 4, dtype=torch.bool)
    seen: list[Any] = []

    def branch(kept: Tensor, *args: Any) -> Tensor:
        seen[:] = [kept, *args]
        scale, labels, mask, _, table = args
        return (kept * scale * weight + table[labels]).masked_fill(mask.logical_not(), 0.0)

    names = PerSample([*"abcd"], lambda names, index: [names[i] for i in index.tolist()])
    args = (scale, labels, mask, names, Shared(table))
    y = fused_stochastic_depth(x, branch, 0.5, rows=NO_ROWS, args=args, empty="ones")
    assert [t.tolist() for t in seen[:4]] == [[[1] * 4], [[1]], [8], [[True] * 4]]
    assert seen[4:] == [["a"], table]
    assert torch.equal(y.isnan(), x.isnan())
    y.sum().backward()
    assert not weight.grad.any()
    assert torch.equal(x.grad, torch.ones(B, 4))
    assert torch.equal(scale.grad, torch.zeros(B, 1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("kind", ["packed", torch.jagged, torch.strided], ids=str)
def test_sequences(kind):
    """Not the values of a dropped sample; what made them gets zero gradients."""
    encoder, weight = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
    raw = [torch.full((n, 3), torch.nan) for n in (2, 4, 1, 3)]
    parts = [encoder(part) for part in raw]
    seen: list[Tensor] = []

    def branch(kept: Tensor, sequences: Any) -> Tensor:
        if kind == "packed":
            padded, _ = pad_packed_sequence(sequences, batch_first=True)
        else:
            padded = torch.nested.to_padded_tensor(sequences, 0.0)
        seen.append(padded)
        return kept + padded.sum(1) * weight

    if kind == "packed":
        entry: Any = pack_sequence(parts, enforce_sorted=False)
    else:
        entry = torch.nested.as_nested_tensor(parts, layout=kind)
    x = torch.randn(B, 3)
    y = fused_stochastic_depth(x, branch, 0.5, rows=NO_ROWS, args=(entry,), empty="ones")
    assert torch.equal(y, x)
    assert torch.equal(seen[0], torch.ones(1, 2, 3))
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3))
    assert encoder.weight.grad is not None


def test_a_batch_of_no_samples():
    x, labels = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    rows = KeptRows.from_index(labels, 0)
    table = torch.randn(3, 4)
    y = fused_stochastic_depth(
        x, lambda kept, labels: kept.view(len(kept), -1) + table[labels], 0.5,
        rows=rows, args=(labels,), empty="ones",
    )  # fmt: skip
    assert y.shape == (0, 4)


# Statistics and random numbers


class Observer(nn.Module):
    """Keeps an average of what it sees in a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.average.lerp_(x.detach().mean((0, 2)), 0.1)
        return x


def as_method(net: nn.Module) -> Callable[[Tensor], Tensor]:
    class Holder:
        def __init__(self) -> None:
            self.parts = [net]

        def run(self, x: Tensor) -> Tensor:
            return self.parts[0](x)

    return Holder().run


NET: nn.Module  # for a branch that refers to a global


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda net: net,
    "closure": lambda net: lambda x: net(x),
    "method": as_method,
    "forward": lambda net: net.forward,
    "partial": lambda net: partial(lambda net, x: net(x), net),
    "default": lambda net: lambda x, net=net: net(x),
    "global": lambda net: lambda x: NET(x),
}


@pytest.mark.parametrize("wrap", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("fails", [False, True])
def test_statistics_stay_as_they_are(wrap, fails):
    global NET
    NET = net = nn.Sequential(
        nn.BatchNorm1d(4), Observer(), nn.BatchNorm1d(4, momentum=None),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.BatchNorm1d(4, track_running_stats=False),
    )  # fmt: skip
    x = torch.randn(B, 4, 1)  # one value a channel beside one row
    net(torch.randn(B, 4, 3))
    before = copy.deepcopy(net.state_dict())
    if fails:
        net.append(nn.Linear(7, 7))
        with pytest.raises(RuntimeError):
            fused_stochastic_depth(x, wrap(net), 0.5, rows=NO_ROWS, empty="ones")
        del net[-1]
    else:
        y = fused_stochastic_depth(x, wrap(net), 0.5, rows=NO_ROWS, empty="ones")
        y.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in net.parameters())
    assert all(module.training and "forward" not in module.__dict__ for module in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    net(torch.randn(B, 4, 3))
    assert not torch.equal(net[0].running_mean, before["0.running_mean"])
    assert not torch.equal(net[1].average, before["1.average"])


def test_dropout_draws_for_the_row_of_ones():
    """So that a recomputation draws the same numbers, and no generator is set back."""
    x, branch = torch.randn(B, 4), nn.Dropout()
    states = {}
    for empty in ("run", "ones"):
        torch.manual_seed(0)
        fused_stochastic_depth(x, branch, 0.5, rows=NO_ROWS, empty=empty)
        states[empty] = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(states["run"], torch.rand(1))
    torch.manual_seed(0)
    branch(torch.ones(1, 4))
    assert torch.equal(states["ones"], torch.rand(1))


# Lists


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (2, 0)])
def test_lists(counts):
    xs = [torch.randn(4, 4, 4, dtype=torch.float64, requires_grad=True) for _ in counts]
    rows = [KeptRows.from_index(torch.arange(k), 4, 2.0) for k in counts]
    biases = [torch.randn(4, 1, 4, dtype=torch.float64, requires_grad=True) for _ in counts]
    attention, norm = Attention().double(), nn.BatchNorm1d(4).double()

    def branch(kept: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
        return [attention(k + b) for k, b in zip(kept, biases, strict=True)]

    options = {"rows": rows, "args": (biases,)}
    if 0 in counts:
        with pytest.raises(RuntimeError):
            fused_stochastic_depth(xs, branch, 0.5, **options)
    ys = fused_stochastic_depth(xs, branch, 0.5, empty="ones", **options)
    for x, y, bias, r in zip(xs, ys, biases, rows, strict=True):
        expected = naive_masking(x, lambda x, b: attention(x + b), 0.5, args=(bias,), rows=r)
        torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(sum(y.sum() for y in ys), [*biases, *attention.parameters()])
    for k, grad in zip(counts, grads, strict=False):
        assert bool(grad.any()) == (k > 0)
    before = norm.running_mean.clone()
    fused_stochastic_depth(
        xs, lambda kept: [norm(each) for each in kept], 0.5,
        rows=[KeptRows.from_index(torch.arange(0), 4)] * 2, empty="ones",
    )  # fmt: skip
    assert torch.equal(norm.running_mean, before)


# What is said


class Refusal(ValueError):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@pytest.mark.parametrize(("error", "kept"), [(ValueError("no rows"), True), (Refusal(3), False)])
@pytest.mark.parametrize("empty", ["run", "ones"])
@pytest.mark.parametrize("crops", [False, True])
def test_an_exception_gets_a_note(error, kept, empty, crops, monkeypatch):
    """In the message, where Python knows no notes; what is no text there is left alone."""

    def branch(kept: Any) -> Any:
        raise copy.copy(error)

    x, rows = torch.ones(B, 3), NO_ROWS
    x, rows = ([x, x], [SOME, rows]) if crops else (x, rows)
    said = "ran this branch on " + ("0 kept rows" if empty == "run" else "one row of ones")
    with pytest.raises(type(error)) as caught:
        fused_stochastic_depth(x, branch, 0.5, rows=rows, empty=empty)
    if sys.version_info >= (3, 11):
        assert str(caught.value) == str(error)
        (note,) = caught.value.__notes__
        assert note.startswith("sdkernels: fused_stochastic_depth " + said)
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(type(error)) as caught:
        fused_stochastic_depth(x, branch, 0.5, rows=rows, empty=empty)
    assert not hasattr(caught.value, "__notes__")
    assert (said in str(caught.value)) == kept
    assert str(error) in str(caught.value)


def test_no_note_where_rows_are_kept():
    def branch(kept: Tensor) -> Tensor:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match=r"^wrong$") as caught:
        fused_stochastic_depth(torch.ones(B, 3), branch, 0.5, rows=SOME, empty="ones")
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="has no notes")
def test_a_branch_that_holds_the_whole_batch_gets_a_note():
    """Where the message names the size of the batch; not where every row is kept."""
    whole = torch.rand(B, 3)
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        fused_stochastic_depth(torch.ones(B, 3), lambda kept: kept * whole, 0.5, rows=SOME)
    (note,) = caught.value.__notes__
    assert f"ran this branch on the {SOME.k} kept rows of a batch of {B}; what it holds" in note
    assert note.endswith("through args=")

    def branch(kept: Tensor) -> Tensor:
        raise ValueError(f"wrong: {B}")

    everything = KeptRows.from_index(torch.arange(B), B)
    for x, rows in ((torch.ones(B, 3), everything), (torch.ones(10 * B, 3), None)):
        with pytest.raises(ValueError, match=r"^wrong") as refused:
            fused_stochastic_depth(x, branch, 0.5, rows=rows, sampler="fixed")
        assert not hasattr(refused.value, "__notes__")


@pytest.mark.parametrize("empty", ["run", "ones"])
def test_the_wrong_number_of_rows_is_refused_all_the_same(empty):
    with pytest.raises(ValueError, match=r"^out: expected 0 kept rows .* got \[2, 3\]"):
        fused_stochastic_depth(
            torch.ones(B, 3), lambda kept: torch.ones(2, 3), 0.5, rows=NO_ROWS, empty=empty
        )
