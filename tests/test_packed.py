"""packed=True: the crops of a list as one tensor of tokens."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from backends import native
from cases import TOLERANCE
from checkpointing import each_variant
from comparison import assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sdkernels import KeptRows, Packed, StochasticDepth, fused_stochastic_depth

pytestmark = pytest.mark.usefixtures("poisoned_memory")

C = 12
SHAPES = [(6, 5, C), (8, 3, C), (4, 2, 2, C)]  # two sizes of tokens, and images
KEPT = {
    "some": [[0, 2, 5], [1, 3, 4, 7], [2]],
    "none_of_one": [[1], [], [0, 3]],
    "none": [[], [], []],
    "all": [list(range(shape[0])) for shape in SHAPES],
}
SIZES = [(3, 5), (4, 2)]  # samples that are kept and their tokens
each_kept = pytest.mark.parametrize("index", KEPT.values(), ids=KEPT.keys())


class Attention(nn.Module):
    """Linear layers once on all tokens, attention crop by crop."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def one(self, qkv: Tensor) -> Tensor:
        shape = qkv.shape
        q, k, v = qkv.flatten(1, -2).unflatten(-1, (3, 2, C // 2)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2).view(*shape[:-1], C)

    def forward(self, packed: Packed) -> Tensor:
        parts = packed.split(self.qkv(packed.values))
        return self.out(packed.join([self.one(part) for part in parts]))


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, packed: Any) -> Any:
        return packed.with_values(super().forward(packed.values))


BRANCHES: dict[str, type[nn.Module]] = {"attention": Attention, "mlp": MLP}
NORMS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "layer": lambda: nn.LayerNorm(C),
    "rms": lambda: nn.RMSNorm(C),
}


class Setting:
    """A branch, its norm and layer scale, and crops; the same numbers for the same seed."""

    def __init__(
        self,
        branch: str,
        norm: str,
        dtype: torch.dtype = torch.float64,
        shapes: list[tuple[int, ...]] = SHAPES,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.branch = BRANCHES[branch]().to(dtype)
            self.norm = NORMS[norm]()
            if self.norm is not None:
                for parameter in self.norm.parameters():
                    nn.init.uniform_(parameter, 0.5, 1.5)
                self.norm.to(dtype)
            self.gamma = torch.rand(C, dtype=dtype).requires_grad_()
            self.xs = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
            self.grads = [torch.randn(shape, dtype=dtype) for shape in shapes]

    def leaves(self) -> list[Tensor]:
        parameters = [*self.branch.parameters()]
        if self.norm is not None:
            parameters += self.norm.parameters()
        return [*self.xs, self.gamma, *parameters]

    def collect(self, ys: list[Tensor]) -> list[Tensor]:
        assert [y.shape for y in ys] == [x.shape for x in self.xs]
        gradients = torch.autograd.grad(ys, self.leaves(), self.grads)
        return [*(y.detach() for y in ys), *gradients]

    def packed(self, rows: list[KeptRows], xs: list[Tensor] | None = None, **options: Any) -> Any:
        return fused_stochastic_depth(
            self.xs if xs is None else xs,
            self.branch,
            0.5,
            norm=self.norm,
            layer_scale=self.gamma,
            rows=rows,
            packed=True,
            **options,
        )

    def masked(self, rows: list[KeptRows]) -> list[Tensor]:
        """Every crop by itself, every row, times the mask."""
        ys = []
        for x, each in zip(self.xs, rows, strict=True):
            out = self.branch(Packed.of([x if self.norm is None else self.norm(x)]))
            out = (out.values if isinstance(out, Packed) else out).view(x.shape)
            mask = ((each.slot >= 0) * each.scale).to(x.dtype)
            ys.append(x + mask.view(-1, *[1] * (x.dim() - 1)) * self.gamma * out)
        return ys


def rows_of(index: list[list[int]], scale: float = 2.0) -> list[KeptRows]:
    return [
        KeptRows.from_index(torch.tensor(each, dtype=torch.int64), shape[0], scale)
        for each, shape in zip(index, SHAPES, strict=True)
    ]


@each_kept
@pytest.mark.parametrize("multiple_of", [1, 16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("branch", BRANCHES)
def test_equals_masking(branch, norm, multiple_of, index):
    setting, rows = Setting(branch, norm), rows_of(index)
    actual = setting.collect(setting.packed(rows, multiple_of=multiple_of))
    for a, b in zip(actual, setting.collect(setting.masked(rows)), strict=True):
        assert_close(a, b, TOLERANCE[torch.float64])


@each_kept
@pytest.mark.parametrize("norm", NORMS)
def test_inplace(norm, index):
    setting, rows = Setting("mlp", norm), rows_of(index)
    expected = setting.collect(setting.packed(rows))
    given = [x.clone() for x in setting.xs]
    ys = setting.packed(rows, given, inplace=True)
    assert all(y is x for y, x in zip(ys, given, strict=True))
    for a, b in zip(setting.collect(ys), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_inplace_under_a_transform(transform):
    """Refused in our own words, as without packing."""
    rows = [KeptRows.from_index(torch.tensor([0, 2]), 3)] * 2

    def function(x: Tensor) -> Tensor:
        xs = [x * 1, x * 2]
        branch = lambda p: p.values * 2  # noqa: E731
        options = {"rows": rows, "inplace": True, "packed": True}
        return fused_stochastic_depth(xs, branch, 0.5, **options)[0].sum()

    with pytest.raises(NotImplementedError, match=r"sdkernels: torch\.func transforms"):
        transform(function)(
            torch.ones(3, 4) if transform is torch.func.grad else torch.ones(2, 3, 4)
        )


@pytest.mark.parametrize("place", ["x", "residual"])
@pytest.mark.parametrize("how", ["one tensor", "same memory", "one storage"])
def test_inplace_into_shared_memory(how, place):
    """As without packing: what is written twice has both branches behind it."""
    rows = [KeptRows.from_index(torch.tensor(i), 3, 2.0) for i in ([0, 2], [0])]
    weight = torch.randn(4, requires_grad=True)
    leaf = torch.randn(3, 4, requires_grad=True)
    found = []
    for packed in (False, True):
        stream, memory = leaf * 1, torch.ones(6, 4)
        streams = {
            "one tensor": [stream, stream],
            "same memory": [stream, stream.data],
            "one storage": [memory[:3].data, memory[3:].data],
        }[how]
        assert not any(each._is_view() for each in streams)
        other = [leaf * 3, leaf.cos()]
        xs, residual = (streams, None) if place == "x" else (other, streams)
        branch: Any = lambda h: [(t * weight).sin() for t in h]  # noqa: E731
        if packed:
            branch = lambda p: (p.values * weight).sin()  # noqa: E731
        options = {"residual": residual, "inplace": True, "packed": packed}
        ys = fused_stochastic_depth(xs, branch, 0.5, rows=rows, **options)
        assert all(y is stream for y, stream in zip(ys, streams, strict=True))
        total = sum(y.square().sum() for y in ys)
        grads = torch.autograd.grad(total, (leaf, weight), allow_unused=True)
        found.append([*(y.detach() for y in ys), *grads])
    for listed, in_one in zip(*found, strict=True):
        assert (listed is None) == (in_one is None)
        if listed is not None:
            torch.testing.assert_close(in_one, listed)
    if how == "one tensor" and place == "x":  # and as masking does
        y = leaf
        for each in rows:
            mask = (each.slot >= 0).view(3, 1) * each.scale
            y = y + mask * (leaf * weight).sin()
        expected = torch.autograd.grad(2 * y.square().sum(), (leaf, weight))
        torch.testing.assert_close(found[1][2:], [*expected])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives(norm, inplace):
    rows = [KeptRows.from_index(torch.tensor(i), 3, 2.0) for i in ([0, 2], [1])]
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)
    modules = {"none": None, "layer": nn.LayerNorm(2, eps=0.1), "rms": nn.RMSNorm(2, eps=0.1)}
    chosen = modules[norm]
    if chosen is not None:
        chosen.double()

    def run(a: Tensor, b: Tensor, weight: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        xs = [a.clone(), b.clone()] if inplace else [a, b]
        branch = lambda packed: (packed.values * weight).sin()  # noqa: E731
        options = {"norm": chosen, "rows": rows, "layer_scale": gamma, "inplace": inplace}
        return tuple(fused_stochastic_depth(xs, branch, 0.5, packed=True, multiple_of=4, **options))

    inputs = [torch.randn(3, n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 1)]
    inputs += [weight, torch.rand(2, dtype=torch.float64).requires_grad_()]
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("without", [None, 0, 1], ids=["every", "not-the-first", "not-the-second"])
def test_row_weights(without):
    """Of every crop, or not of one."""
    setting, rows = Setting("mlp", "layer"), rows_of(KEPT["some"])
    weights = [torch.rand(each.k, dtype=torch.float64).requires_grad_() for each in rows]
    weighted = [replace(each, weight=w) for each, w in zip(rows, weights, strict=True)]
    if without is not None:
        weighted[without] = rows[without]
        del weights[without]
    results = []
    for packed in (True, False):
        branch = setting.branch
        if not packed:
            inner = setting.branch
            branch = lambda xs: [inner(Packed.of([x])).values.view(x.shape) for x in xs]  # noqa: E731, B023
        ys = fused_stochastic_depth(
            setting.xs,
            branch,
            0.5,
            norm=setting.norm,
            layer_scale=setting.gamma,
            rows=weighted,
            packed=packed,
        )
        leaves = [*setting.leaves(), *weights]
        results.append(torch.autograd.grad(ys, leaves, setting.grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_is_zero_and_sends_nothing_back():
    """Whatever the branch makes of it, and whatever gradient the branch finds for it."""
    seen: list[Packed] = []
    bias = torch.zeros(C, requires_grad=True)

    def branch(packed: Packed) -> Tensor:
        seen.append(packed)
        return packed.values + bias

    xs = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    norm = nn.LayerNorm(C)
    nn.init.ones_(norm.bias)
    rows = rows_of(KEPT["some"], 1.0)
    ys = fused_stochastic_depth(xs, branch, 0.5, norm=norm, rows=rows, packed=True, multiple_of=64)
    (packed,) = seen
    tokens = 3 * 5 + 4 * 3 + 4
    assert packed.values.shape == (64, C)
    assert packed.padding == 64 - tokens
    assert not packed.values[tokens:].any()
    torch.cat([y.flatten() for y in ys]).sum().backward()
    assert bias.grad.tolist() == [tokens] * C
    assert norm.bias.grad.tolist() == [tokens] * C


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


@native
@pytest.mark.parametrize("norm", NORMS)
def test_nothing_is_concatenated(norm):
    """Forward and backward: every crop's part is written where it belongs, and read there."""
    setting, rows = Setting("mlp", norm), rows_of(KEPT["some"])
    with Calls() as calls:
        setting.collect(setting.packed(rows, multiple_of=16))
    names = calls.names
    assert not any(name in names for name in ("aten::cat", "aten::clone", "aten::index_select"))
    opened = "compact_rows_into" if norm == "none" else "compact_norm_into"
    assert names[f"sdkernels::{opened}"] == 3
    assert names["sdkernels::scatter_add_rows"] == (6 if norm == "none" else 3)
    assert names["sdkernels::scatter_add_rows_backward_into"] == 3
    assert names["aten::addmm"] == 2


def test_a_crop_that_nobody_uses():
    """Its part of the gradient is zero, and not what was in memory."""
    setting, rows = Setting("mlp", "layer"), rows_of(KEPT["some"])
    ys = setting.packed(rows)
    leaves = [setting.xs[0], *setting.branch.parameters()]
    actual = torch.autograd.grad(ys[0], leaves, setting.grads[0])
    expected = torch.autograd.grad(setting.masked(rows)[0], leaves, setting.grads[0])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", ["view", "residual", "no_grad", "strided"])
def test_streams_of_all_sorts(which):
    setting, rows = Setting("mlp", "layer"), rows_of(KEPT["some"])
    expected = setting.collect(setting.packed(rows))
    options: dict[str, Any] = {}
    given = list(setting.xs)
    if which == "view":  # in place, which is written to without a node of its own
        given = [x.clone()[:] for x in setting.xs]
        options["inplace"] = True
    elif which == "residual":
        options["residual"] = [x * 1 for x in setting.xs]
    elif which == "strided":
        given = [torch.stack([x, x], -1)[..., 0] for x in setting.xs]
    if which == "no_grad":
        with torch.no_grad():
            ys = setting.packed(rows)
        assert not any(y.requires_grad for y in ys)
        for y, value in zip(ys, expected, strict=False):
            torch.testing.assert_close(y, value)
        return
    for a, b in zip(setting.collect(setting.packed(rows, given, **options)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast():
    setting, rows = Setting("attention", "layer", torch.float32), rows_of(KEPT["some"])
    wide = Setting("attention", "layer")
    for a, b in zip(wide.leaves(), setting.leaves(), strict=True):
        a.data.copy_(b.data)
    wide.grads = [grad.double() for grad in setting.grads]
    seen: list[torch.dtype] = []
    setting.branch.register_forward_pre_hook(lambda _, args: seen.append(args[0].values.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        ys = setting.packed(rows, multiple_of=8)
    assert seen == [torch.bfloat16]  # what the norm wrote
    assert all(y.dtype == torch.float32 for y in ys)
    expected = wide.collect(wide.masked(rows))
    for a, b in zip(setting.collect(ys), expected, strict=True):
        assert_close(a, b, TOLERANCE[torch.bfloat16])


@each_variant
def test_checkpointing(variant):
    setting = Setting("attention", "layer")

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            fused_stochastic_depth(list(xs), setting.branch, 0.5, norm=setting.norm, packed=True)
        )

    def gradients(ys: tuple[Tensor, ...]) -> list[Tensor]:
        for leaf in setting.leaves():
            leaf.grad = None
        torch.autograd.backward(ys, setting.grads)
        return [*(x.grad for x in setting.xs), *(p.grad for p in setting.branch.parameters())]

    torch.manual_seed(1)
    expected = gradients(run(*setting.xs))
    torch.manual_seed(1)
    for a, b in zip(gradients(checkpoint(run, *setting.xs, **variant)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_and_p_of_zero():
    """The plain expression on all rows; what is written in place stays what is asked for."""
    setting = Setting("attention", "layer")
    everything = rows_of(KEPT["all"], 1.0)
    expected = setting.masked(everything)
    for options in ({"training": False}, {"p": 0.0}):
        call = {"p": 0.5, "norm": setting.norm, "layer_scale": setting.gamma} | options
        ys = fused_stochastic_depth(setting.xs, setting.branch, packed=True, **call)
        for y, value in zip(ys, expected, strict=True):
            torch.testing.assert_close(y, value)


def test_the_module():
    torch.manual_seed(0)
    block = StochasticDepth(MLP(), 0.5, norm=nn.LayerNorm(C), packed=True, multiple_of=8)
    assert block.extra_repr().endswith("packed=True, multiple_of=8")
    xs = [torch.randn(shape) for shape in SHAPES]
    assert [y.shape for y in block(xs)] == [x.shape for x in xs]
    assert [y.shape for y in copy.deepcopy(block).eval()(xs)] == [x.shape for x in xs]


def test_args_are_lists():
    xs = [torch.zeros(shape) for shape in SHAPES]
    rows = rows_of(KEPT["some"], 1.0)
    biases = [torch.arange(float(x.shape[0])).view(-1, *[1] * (x.dim() - 1)) for x in xs]

    def branch(packed: Packed, biases: list[Tensor]) -> Tensor:
        parts = packed.split(packed.values)
        return packed.join([part + bias for part, bias in zip(parts, biases, strict=True)])

    ys = fused_stochastic_depth(xs, branch, 0.5, args=(biases,), rows=rows, packed=True)
    for y, bias, each in zip(ys, biases, rows, strict=True):
        expected = bias * (each.slot >= 0).view(bias.shape)
        assert torch.equal(y, expected.expand(y.shape))


@pytest.mark.parametrize("empty", ["run", "ones", "skip"])
def test_nothing_kept(empty):
    setting, rows = Setting("mlp", "layer"), rows_of(KEPT["none"])
    ys = setting.packed(rows, empty=empty)
    assert all(torch.equal(y, x) for y, x in zip(ys, setting.xs, strict=True))
    if empty != "skip":
        gradients = torch.autograd.grad(ys, [*setting.branch.parameters()], setting.grads)
        assert not any(gradient.any() for gradient in gradients)


# Packed itself


def test_lengths():
    crops = [torch.zeros(2, 3, 4), torch.zeros(0, 5, 4), torch.zeros(3, 2, 2, 4)]
    packed = Packed.of(crops)
    assert packed.lengths.tolist() == [3, 3, 4, 4, 4]
    assert packed.cu_seqlens.tolist() == [0, 3, 6, 10, 14, 18]
    assert packed.cu_seqlens.dtype == packed.lengths_host.dtype == torch.int32
    assert packed.max_length == 5
    assert packed.padding is None
    padded = Packed.of(crops, 16)
    assert padded.lengths.tolist() == [3, 3, 4, 4, 4, 14]
    assert padded.cu_seqlens_host.tolist() == [0, 3, 6, 10, 14, 18, 32]
    assert padded.max_length == 14
    assert len(padded) == 3
    assert Packed.of(crops, 18).lengths.tolist() == [3, 3, 4, 4, 4, 0]  # as many as ever


def attention_by_sample(packed: Packed, *qkv: Tensor, scale: float | None = None) -> Tensor:
    """[T, heads, D] each: softmax(q k^T) v of every sequence by itself, in float64."""
    starts = packed.cu_seqlens_host.tolist()
    outs = []
    for start, end in pairwise(starts):
        q, k, v = (each[start:end].double().transpose(0, 1) for each in qkv)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        outs.append(((q @ k.mT * factor).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs) if outs else qkv[2].double()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("multiple_of", [1, 16])
def test_attention(multiple_of, scale):
    """Within every sample, of crops that nobody kept too; values and gradients."""
    crops = [torch.zeros(3, 5, C), torch.zeros(0, 4, C), torch.zeros(2, 2, 3, C)]
    packed = Packed.of([crop.double() for crop in crops], multiple_of)
    tokens = 3 * 5 + 2 * 6
    qkv = torch.randn(len(packed.values), 3, 2, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(tokens, 2, 4, dtype=torch.float64)
    expected = attention_by_sample(packed, *qkv.unbind(1), scale=scale)[:tokens]
    out = packed.attention(*qkv.unbind(1), scale=scale)
    assert out.shape == (len(packed.values), 2, 4)
    assert not out[tokens:].any()
    torch.testing.assert_close(out[:tokens], expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(each, qkv, grad)[0] for each in (out[:tokens], expected))
    )


@pytest.mark.parametrize("multiple_of", [1, 16])
def test_what_varlen_attn_gets(multiple_of, monkeypatch):
    """By its documentation: int32 starts where the tensors are, and the longest sequence."""
    packed = Packed.of([torch.zeros(3, 5, C), torch.zeros(4, 2, C)], multiple_of)
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        calls.append(options)
        assert cu_seq_q is cu_seq_k
        assert cu_seq_q.dtype == torch.int32
        assert cu_seq_q.device == query.device
        assert cu_seq_q[0] == 0
        assert cu_seq_q[-1] == len(query)
        assert max_q == max_k == cu_seq_q.diff().max()
        return attention_by_sample(packed, query, key, value, **options).to(query.dtype)

    monkeypatch.setattr("sdkernels.packed._varlen_attn", lambda query: varlen_attn)
    qkv = torch.randn(len(packed.values), 3, 2, 4).unbind(1)
    for scale in (None, 0.3):
        expected = packed.attention(*qkv, scale=scale)[: 3 * 5 + 4 * 2]
        out = packed.attention(*qkv, scale=scale, varlen=True)[: 3 * 5 + 4 * 2]
        torch.testing.assert_close(out, expected)
    assert calls == [{}, {"scale": 0.3}]
    nothing = Packed.of([torch.zeros(0, 5, C)], multiple_of)  # which its kernels refuse
    assert nothing.attention(*torch.zeros(0, 3, 2, 4).unbind(1), varlen=True).shape == (0, 2, 4)
    assert len(calls) == 2


def test_varlen_attn_takes_it():
    """PyTorch's own op on fake CUDA tensors, as torch.compile sees it; no kernel runs."""
    pytest.importorskip("torch.nn.attention.varlen")
    with FakeTensorMode():
        crops = [torch.empty(k, n, C, dtype=torch.bfloat16, device="cuda") for k, n in SIZES]
        packed = Packed.of(crops, 16)
        qkv = torch.empty(len(packed.values), 3, 2, 4, dtype=torch.bfloat16, device="cuda")
        out = packed.attention(*qkv.unbind(1), varlen=True)
        assert out.shape == (len(packed.values), 2, 4)
        assert out.device.type == "cuda"


def test_attention_of_something_else():
    packed = Packed.of([torch.zeros(3, 5, C)])
    good = torch.zeros(15, 2, 4)
    with pytest.raises(ValueError, match=r"key: expected 15 tokens as went in, got shape \(14, 2"):
        packed.attention(good, good[1:], good)
    with pytest.raises(ValueError, match=r"value: expected \[T, heads, D\], got shape \(15, 8\)"):
        packed.attention(good, good, good.flatten(1))
    with pytest.raises(RuntimeError, match="varlen: expected float16 or bfloat16 on a CUDA device"):
        packed.attention(good, good, good, varlen=True)


def test_split_and_join():
    crops = [torch.randn(shape) for shape in SHAPES]
    packed = Packed.of(crops, 16)
    parts = packed.split(packed.values)
    for part, crop in zip(parts, crops, strict=True):
        assert torch.equal(part, crop)
        assert part._base is not None
    assert torch.equal(packed.join(parts), packed.values)
    heads = packed.values.view(-1, 3, 4)
    assert [part.shape for part in packed.split(heads)] == [(*s[:-1], 3, 4) for s in SHAPES]


# Bad input

XS = [torch.zeros(4, 3, C), torch.zeros(2, 5, C)]
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "tensor": ({"x": XS[0]}, TypeError, "x: expected a list of tensors with packed=True"),
    "width": (
        {"x": [XS[0], torch.zeros(2, 5, C + 1)]},
        ValueError,
        "x: expected tensors of one width with packed=True, got 12 and 13",
    ),
    "dtype": ({"x": [XS[0], XS[1].double()]}, TypeError, "x: expected tensors of one dtype"),
    "device": ({"x": [XS[0], XS[1].to("meta")]}, ValueError, "device"),
    "vectors": ({"x": [torch.zeros(4)] * 2}, ValueError, r"x: expected tensors \[B, ..., C\]"),
    "multiple": ({"multiple_of": 0}, ValueError, "multiple_of: expected an integer of at least 1"),
    "unpacked": (
        {"multiple_of": 8, "packed": False},
        ValueError,
        "multiple_of: expected 1 without packed=True, got 8",
    ),
    "tokens": (
        {"branch": lambda packed: packed.values[1:]},
        ValueError,
        "branch output: expected 22 tokens as went in, got shape",
    ),
    "width_of_out": (
        {"branch": lambda packed: packed.values[:, 1:]},
        ValueError,
        "out: expected",
    ),
    "residual": (
        {"residual": [torch.zeros(4, 5, C), torch.zeros(2, 3, C)]},
        ValueError,
        r"residual: expected the tokens of x with packed=True, \(4, 3\), got shape \(4, 5, 12\)",
    ),
    "list": (
        {"branch": lambda packed: packed.split(packed.values)},
        TypeError,
        "branch output: expected a tensor, got list",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    rows = (
        None
        if name in ("device", "vectors")
        else [KeptRows.from_index(torch.arange(4), 4), KeptRows.from_index(torch.arange(2), 2)]
    )
    given = {"x": XS, "branch": lambda packed: packed.values, "p": 0.5, "packed": True}
    with pytest.raises(error, match=message):
        fused_stochastic_depth(**{"rows": rows, **given, **change})


def test_a_branch_that_needs_samples():
    with pytest.raises(TypeError) as raised:
        fused_stochastic_depth(XS, nn.Linear(C, C), 0.5, packed=True)
    notes = getattr(raised.value, "__notes__", raised.value.args)
    assert any("packed=True a branch gets a Packed" in str(note) for note in notes)


def test_bad_parts():
    packed = Packed.of(XS)
    with pytest.raises(ValueError, match="parts: expected 2, one a crop, got 1"):
        packed.join(XS[:1])
    with pytest.raises(ValueError, match=r"parts\[1\]: expected a tensor that starts with"):
        packed.join([XS[0], XS[0]])
    with pytest.raises(ValueError, match="values: expected 22 tokens"):
        packed.split(torch.zeros(3, C))
