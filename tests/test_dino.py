"""Blocks in the style of DINOv2 and DINOv3: one tensor, or a list of crops that go packed."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpointing import each_variant
from comparison import assert_close, assert_same_bits
from compiling import compilation
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sdkernels
from sdkernels import KeptRows
from sdkernels.models import dino
from sdkernels.models.by_hand import BY_HAND
from sdkernels.models.fingerprint import fingerprint, fingerprint_of_all

C, HEADS = 12, 2
SHAPES = [(6, 5, C), (8, 3, C), (4, 5, C)]
KEPT = {
    "some": [[0, 2, 5], [1, 3, 4, 7], [2]],
    "none-of-one": [[1], [], [0, 3]],
    "none": [[], [], []],
    "all": [list(range(shape[0])) for shape in SHAPES],
}
each_kept = pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT.keys())
XFORMERS_AVAILABLE = False  # what the list form of `Second` asks for


def heads_of(qkv: Tensor, heads: int) -> list[Tensor]:
    return [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1)]


class Attention(nn.Module):
    """In the style of DINOv2."""

    def __init__(self, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_drop, self.proj_drop = attn_drop, nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self.qkv(x), self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))


class ListAttention(Attention):
    """In the style of DINOv3."""

    def compute_attention(self, qkv: Tensor, rope: Any = None) -> Tensor:
        q, k, v = heads_of(qkv, self.num_heads)
        if rope is not None:
            sin, cos = rope
            q, k = q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, rope: Any = None) -> Tensor:
        return self.proj_drop(self.proj(self.compute_attention(self.qkv(x), rope)))

    def forward_list(self, x_list: list[Tensor], rope_list: Any) -> list[Tensor]:
        pairs = zip(x_list, rope_list, strict=True)
        return [self.proj(self.compute_attention(self.qkv(x), rope)) for x, rope in pairs]


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward_list(self, x_list: list[Tensor]) -> list[Tensor]:
        return [self(x) for x in x_list]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class OwnNorm(nn.Module):
    """One that the op does not fuse."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Base(nn.Module):
    attention: type[Attention] = Attention

    def __init__(self, p: float = 0.5, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(C), norm(C)
        self.attn, self.mlp = self.attention(), MLP()
        self.ls1, self.ls2 = Scale(), Scale()
        self.sample_drop_ratio = p


def on_some(x: Tensor, branch: Callable[[Tensor, Tensor], Tensor], p: float) -> Tensor:
    if p == 0.0:
        return x + branch(x, torch.arange(len(x)))
    kept = torch.randperm(len(x))[: max(int(len(x) * (1 - p)), 1)]
    return x.index_add(0, kept, branch(x[kept], kept), alpha=len(x) / len(kept))


class Second(Base):
    """In the style of DINOv2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def one(self, x: Tensor) -> Tensor:
        p = self.sample_drop_ratio if self.training else 0.0
        x = on_some(x, lambda kept, index: self.ls1(self.attn(self.norm1(kept))), p)
        return on_some(x, lambda kept, index: self.ls2(self.mlp(self.norm2(kept))), p)

    def forward(self, x_or_x_list: Any) -> Any:
        if isinstance(x_or_x_list, Tensor):
            return self.one(x_or_x_list)
        if not XFORMERS_AVAILABLE:
            raise AssertionError("what lists need is not installed")
        return [self.one(x) for x in x_or_x_list]


class Third(Base):
    """In the style of DINOv3."""

    attention = ListAttention

    def one(self, x: Tensor, rope: Any) -> Tensor:
        p = self.sample_drop_ratio if self.training else 0.0

        def attend(kept: Tensor, index: Tensor) -> Tensor:
            own = rope and tuple(t[index] if t.dim() == 4 else t for t in rope)
            return self.ls1(self.attn.forward_list([self.norm1(kept)], [own])[0])

        x = on_some(x, attend, p)
        return on_some(x, lambda kept, index: self.ls2(self.mlp(self.norm2(kept))), p)

    def forward(self, x_or_x_list: Any, rope_or_rope_list: Any = None) -> Any:
        if isinstance(x_or_x_list, Tensor):
            return self.one(x_or_x_list, rope_or_rope_list)
        ropes = rope_or_rope_list or [None] * len(x_or_x_list)
        return [self.one(x, rope) for x, rope in zip(x_or_x_list, ropes, strict=True)]


STYLES = {
    Second: "dinov2.layers.block:NestedTensorBlock",
    Third: "dinov3.layers.block:SelfAttentionBlock",
}
each_style = pytest.mark.parametrize("kind", STYLES, ids=["dinov2", "dinov3"])


def know_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forwards of the repositories' blocks for those of this file, which are known in full."""
    monkeypatch.setattr(dino, "_KNOWN", {})
    for kind, path in STYLES.items():
        hand = BY_HAND[path]._replace(fingerprints=None)
        monkeypatch.setitem(BY_HAND, f"{kind.__module__}:{kind.__qualname__}", hand)
    for name, function in (
        ("ATTENTIONS", Attention.forward),
        ("LIST_ATTENTIONS", ListAttention.forward_list),
        ("LIST_MLPS", MLP.forward_list),
    ):
        known = getattr(dino, name) | {fingerprint(function)}
        monkeypatch.setattr(dino, name, known)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    know_styles(monkeypatch)


@pytest.fixture
def unknown(monkeypatch):
    """None of the parts is known."""
    for name in ("ATTENTIONS", "LIST_ATTENTIONS", "LIST_MLPS"):
        monkeypatch.setattr(dino, name, frozenset())


def made(kind: Callable[..., Any], seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(**options).double().train()


def crops_of(shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]


def ropes_of(how: str, shapes: list[tuple[int, ...]] = SHAPES, heads: int = HEADS) -> Any:
    """Of the samples in the second crop, of all samples in the others, where `how` is "mixed"."""
    if how == "none":
        return None
    ropes = []
    for number, (batch, tokens, width) in enumerate(shapes):
        size: tuple[int, ...] = (tokens, width // heads)
        if how == "samples" or (how == "mixed" and number == 1):
            size = (batch, 1, *size)
        angle = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        ropes.append((angle.sin(), angle.cos()))
    return ropes


def plan_of(kept: list[list[int]]) -> list[list[KeptRows]]:
    """Rows for both branches of a block: others for the second."""
    batches = [shape[0] for shape in SHAPES]
    turned = [
        sorted((batch - 1 - i) for i in own) for own, batch in zip(kept, batches, strict=True)
    ]
    return [
        [
            KeptRows.from_index(torch.tensor(own, dtype=torch.int64), batch, scale)
            for own, batch in zip(each, batches, strict=True)
        ]
        for each, scale in ((kept, 1.5), (turned, 2.0))
    ]


def masked(block: Any, plan: Any, xs: list[Tensor], ropes: Any = None) -> list[Tensor]:
    """Every crop by itself, all of its samples, with a mask of the same rows."""
    out = []
    for crop, x in enumerate(xs):
        first, second = (
            ((rows[crop].slot >= 0).to(x.dtype) * rows[crop].scale).view(-1, 1, 1) for rows in plan
        )
        options = {} if ropes is None else {"rope": ropes[crop]}
        x = x + first * block.ls1(block.attn(block.norm1(x), **options))
        out.append(x + second * block.ls2(block.mlp(block.norm2(x))))
    return out


def collect(block: Any, ys: list[Tensor], xs: list[Tensor]) -> dict[str, Tensor]:
    """Values and gradients of the inputs and of every parameter."""
    block.zero_grad()
    for x in xs:
        x.grad = None
    grads = [
        torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(n))
        for n, y in enumerate(ys)
    ]
    torch.autograd.backward(ys, grads)
    found = {f"y{n}": y.detach() for n, y in enumerate(ys)}
    found |= {f"x{n}": x.grad.clone() for n, x in enumerate(xs)}
    return found | {name: p.grad.clone() for name, p in block.named_parameters()}


def assert_as_masked(block: Any, kept: list[list[int]], how: str = "none", **options: Any) -> None:
    """A block patched with these rows, and as it was with masks of them, in float64."""
    before, plan, xs, ropes = copy.deepcopy(block), plan_of(kept), crops_of(), ropes_of(how)
    report = sdkernels.patch(block, **options)
    assert [type(entry.block).__name__ for entry in report.patched] == [type(before).__name__]
    with report.use(plan):
        ys = block(xs) if ropes is None else block(xs, ropes)
        actual = collect(block, ys, xs)
    expected = collect(before, masked(before, plan, xs, ropes), xs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, 1e-12, name)
    for number, x in enumerate(xs):  # crop by crop, as one tensor
        with report.use([rows[number] for rows in plan]):
            y = block(x) if ropes is None else block(x, ropes[number])
        assert_close(y, expected[f"y{number}"], 1e-12, f"crop {number}")


each_rope = pytest.mark.parametrize("how", ["none", "shared", "samples", "mixed"])


@each_kept
def test_a_list_is_as_crop_by_crop_masked(kept):
    assert_as_masked(made(Second), kept)


@each_kept
@each_rope
def test_a_list_with_rotary_embeddings_of_each_crop(kept, how):
    assert_as_masked(made(Third), kept, how)


@each_kept
@pytest.mark.usefixtures("unknown")
def test_parts_that_are_not_known(kept):
    assert_as_masked(made(Second), kept)
    assert_as_masked(made(Third), kept, "mixed")


@each_style
@pytest.mark.parametrize("norm", [nn.RMSNorm, OwnNorm])
def test_other_norms(kind, norm):
    assert_as_masked(made(kind, norm=norm), KEPT["some"])


@each_style
@pytest.mark.parametrize("options", [{"inplace": True}, {"min_saving": 0.6}, {"empty": "skip"}])
def test_options_of_patch(kind, options):
    assert_as_masked(made(kind), KEPT["some"], **options)
    assert_as_masked(made(kind), KEPT["none-of-one"], **options)


@each_style
def test_no_layer_scale(kind):
    block = made(kind)
    block.ls1, block.ls2 = nn.Identity(), nn.Identity()
    assert_as_masked(block, KEPT["some"])


def test_the_dropout_behind_the_projection():
    block = made(Second)
    block.attn.proj_drop = nn.Dropout(1.0)
    assert_as_masked(block, KEPT["some"])


def shapes_seen(*modules: nn.Module) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    for module in modules:
        module.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    return seen


@each_style
def test_linear_layers_run_once_on_the_kept_tokens(kind):
    block = made(kind)
    report = sdkernels.patch(block)
    seen = shapes_seen(block.attn.qkv, block.attn.proj, block.mlp[0], block.mlp[2])
    with report.use(plan_of(KEPT["some"])):
        block(crops_of())
    tokens = sum(len(own) * shape[1] for own, shape in zip(KEPT["some"], SHAPES, strict=True))
    assert [shape[-2:] for shape in seen] == [(tokens, width) for width in (C, C, C, 2 * C)]


@each_style
@each_kept
def test_multiple_of(kind, kept):
    """Tokens are rounded up, and nothing else changes; one tensor is not rounded."""
    assert_as_masked(made(kind), kept, multiple_of=32)
    block = made(kind)
    report = sdkernels.patch(block, multiple_of=32)
    seen = shapes_seen(block.attn.qkv, block.mlp[0])
    with report.use(plan_of(kept)):
        block(crops_of())
    tokens = sum(len(own) * shape[1] for own, shape in zip(kept, SHAPES, strict=True))
    if tokens > 0:
        assert [shape[-2] for shape in seen] == [-(-tokens // 32) * 32] * 2


@pytest.mark.parametrize("why", ["hook", "dropout", "forward", "class"])
def test_attention_that_does_more_runs_crop_by_crop(why):
    """It is called as it is: with its hooks, its dropout and a forward of its own."""
    block = made(Second)
    calls: list[tuple[int, ...]] = []
    if why == "hook":
        block.attn.register_forward_hook(lambda module, args, out: calls.append(tuple(out.shape)))
    elif why == "dropout":
        block.attn.attn_drop = 0.1
    elif why == "forward":
        own = block.attn.forward
        block.attn.forward = lambda x: own(x)
    else:

        class Subclass(Attention):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)

        block.attn.__class__ = Subclass
    report = sdkernels.patch(block)
    seen = shapes_seen(block.attn.qkv)
    with report.use(plan_of(KEPT["some"])):
        block(crops_of())
    expected = [(len(own), *shape[1:]) for own, shape in zip(KEPT["some"], SHAPES, strict=True)]
    assert seen == expected
    assert not calls or calls == expected


@each_style
def test_rows_of_each_crop(kind):
    """They are drawn by the law of the op, and the same again from a seed."""
    block = made(kind)
    report = sdkernels.patch(block, sampler="fixed")
    assert report.drop_probs == [0.5, 0.5]
    plan = report.plan([6, 8, 4])
    assert [[rows.k for rows in branch] for branch in plan] == [[3, 4, 2]] * 2
    xs = crops_of()
    seen = shapes_seen(block.attn.qkv, block.mlp[0])
    torch.manual_seed(3)
    first = block(xs)
    assert [shape[-2] for shape in seen] == [3 * 5 + 4 * 3 + 2 * 5] * 2
    torch.manual_seed(3)
    again = block(xs)
    other = block(xs)
    for a, b in zip(first, again, strict=True):
        assert_same_bits(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    with report.use(plan):
        assert_same_bits(block(xs)[1], block(xs)[1])
    # A sample that no branch keeps is what came in.
    dropped = [r.slot < 0 for r in plan[0]], [r.slot < 0 for r in plan[1]]
    with report.use(plan):
        for y, x, one, two in zip(block(xs), xs, *dropped, strict=True):
            assert_same_bits(y[one & two], x[one & two])


@each_style
def test_the_ratio_is_read_at_every_call(kind):
    block = made(kind)
    report = sdkernels.patch(block)
    block.sample_drop_ratio = 0.25
    assert report.drop_probs == [0.25, 0.25]
    block.sample_drop_ratio = 0.0
    assert len(report.idle) == 1
    assert sdkernels.patch(block, drop_probs=[0.1, 0.2]).drop_probs == [0.1, 0.2]
    sdkernels.unpatch(block)
    assert type(block) is kind


@each_style
def test_evaluation_is_the_original_forward(kind, monkeypatch):
    """Of a list, too; crop by crop where that needs what is not installed."""
    block = made(kind).eval()
    calls: list[Any] = []
    own = kind.one
    monkeypatch.setattr(kind, "one", lambda *args: calls.append(args[1]) or own(*args))
    xs = crops_of()
    expected = [block(x) for x in xs]
    sdkernels.patch(block)
    for installed in (False, True):
        monkeypatch.setitem(globals(), "XFORMERS_AVAILABLE", installed)
        calls.clear()
        for actual, value in zip(block(xs), expected, strict=True):
            assert_same_bits(actual, value)
        assert all(seen is x for seen, x in zip(calls, xs, strict=True))
    block.train()
    block.sample_drop_ratio = 0.0
    torch.testing.assert_close(block(xs), expected)


def test_which_lists_go_to_the_original(monkeypatch):
    """Those that it takes: a tuple of embeddings is not taken apart for crops."""
    block = made(Third).eval()
    xs, ropes = crops_of(), tuple(ropes_of("shared"))
    expected = block(xs, ropes)
    sdkernels.patch(block)
    for actual, value in zip(block(xs, ropes), expected, strict=True):
        assert_same_bits(actual, value)
    assert not dino.has_xformers(Second)
    monkeypatch.setitem(globals(), "XFORMERS_AVAILABLE", True)
    assert dino.has_xformers(Second)


@each_style
def test_the_rule_of_the_paper(kind):
    """rescale="eval": unscaled in training, times 1 - p in evaluation, for lists as well."""
    block = made(kind)
    before = copy.deepcopy(block)
    report = sdkernels.patch(block, rescale="eval")
    xs = crops_of()
    assert all(rows.scale == 1.0 for branch in report.plan([6, 8, 4]) for rows in branch)
    everything = [KeptRows.from_mask(torch.ones(x.shape[0], dtype=torch.bool), 0.5) for x in xs]
    for actual, value in zip(block.eval()(xs), masked(before, [everything] * 2, xs), strict=True):
        assert_close(actual, value, 1e-12)


@each_style
def test_copies_and_pickles(kind):
    block = made(kind)
    sdkernels.patch(block)
    xs = crops_of()
    expected = seeded(block, xs)
    dino._KNOWN.clear()
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert isinstance(other, kind)
        for actual, value in zip(seeded(other, xs), expected, strict=True):
            assert_same_bits(actual, value)


def seeded(block: Any, xs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(7)
    return block(xs)


@each_style
@each_variant
def test_checkpointing(kind, variant):
    block = made(kind)
    report = sdkernels.patch(block)
    xs, plan = crops_of(), plan_of(KEPT["none-of-one"])

    def run(*crops: Tensor) -> tuple[Tensor, ...]:
        return tuple(block(list(crops)))

    with report.use(plan):
        expected = collect(block, list(run(*xs)), xs)
        actual = collect(block, list(checkpoint(run, *xs, **variant)), xs)
    for name, value in expected.items():
        assert_same_bits(actual[name], value)


def compiled_whole(block: nn.Module) -> Any:
    return torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)


@pytest.mark.whole
@each_style
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled(kind):
    """One graph, for the rows that are drawn in it too."""
    block = made(kind)
    report = sdkernels.patch(block)
    xs, plan = crops_of(), plan_of(KEPT["some"])
    ropes = (ropes_of("mixed"),) if kind is Third else ()
    with compilation() as seen:
        compiled = compiled_whole(block)
        drawn = [compiled(xs, *ropes) for _ in range(3)]
        assert seen.graphs == 1
        assert any(not torch.equal(drawn[0][1], other[1]) for other in drawn)
    with compilation(), report.use(plan):
        actual = collect(block, compiled_whole(block)(xs, *ropes), xs)
        expected = collect(block, block(xs, *ropes), xs)
    for name, value in expected.items():
        assert_close(actual[name], value, 1e-12, name)


@each_style
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_evaluation(kind):
    block = made(kind).eval()
    sdkernels.patch(block)
    xs = crops_of()
    ropes = (ropes_of("mixed"),) if kind is Third else ()
    with compilation(), torch.no_grad():
        actual = torch.compile(block, backend="aot_eager", fullgraph=True)(xs, *ropes)
        for a, e in zip(actual, block(xs, *ropes), strict=True):
            assert_close(a, e, 1e-12)


@each_style
def test_another_version_is_left_alone(kind, monkeypatch):
    path = f"{kind.__module__}:{kind.__qualname__}"
    hand = BY_HAND[path]
    reads = {Second: ("one", "on_some"), Third: ("one",)}[kind]
    one = hand._replace(fingerprints={}, reads=reads)
    monkeypatch.setitem(BY_HAND, path, one)
    with pytest.raises(ValueError, match="its source is not that of the versions"):
        sdkernels.patch(made(kind), strict=True)
    (left,) = sdkernels.patch(made(kind)).left
    assert left.reason.startswith("its source is not that of the versions")
    # The helpers count: of the class, of its base, and of the module.
    prints = {
        fingerprint_of_all(
            [kind.forward, *(getattr(kind, name, None) or globals()[name] for name in reads)]
        )
    }
    known = one._replace(fingerprints=dict.fromkeys(prints, ""))
    assert known.stands_for(kind)
    assert not known._replace(reads=reads[:-1]).stands_for(kind)
    assert not known._replace(reads=("missing",)).stands_for(kind)
    monkeypatch.setattr(kind, "one", lambda self, x, *rope: x)
    assert not known.stands_for(kind)


def test_bad_lists():
    block = made(Third)
    sdkernels.patch(block)
    xs = crops_of()
    with pytest.raises(ValueError, match="zip"):
        block(xs, ropes_of("shared")[:2])
    with pytest.raises(ValueError, match="one width"):
        block([xs[0], xs[1][..., :6]])
    report = sdkernels.patch(block)
    with report.use(report.plan(6)), pytest.raises(ValueError, match="rows: expected a list of 3"):
        block(xs)


# The blocks of the repositories, where they can be imported


def repository(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not there")
    with warnings.catch_warnings():  # DINOv2 says which of its kernels it has not found
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{name}.layers")


def repositorys(name: str, **options: Any) -> Any:
    layers: Any = repository(name)
    torch.manual_seed(0)
    options = {"init_values": 0.5, "drop_path": 0.4, "qkv_bias": True, **options}
    if name == "dinov2":
        options = {"attn_class": layers.MemEffAttention, **options}
        block = layers.NestedTensorBlock(C, HEADS, **options)
    else:
        block = layers.SelfAttentionBlock(C, HEADS, **options)
    for scale in (block.ls1, block.ls2):
        if not isinstance(scale, nn.Identity):  # DINOv3's is empty until it is set
            nn.init.constant_(scale.gamma, 0.5)
    return block.double().train()


each_repository = pytest.mark.parametrize("name", ["dinov2", "dinov3"])


@each_repository
@each_kept
def test_blocks_of_the_repositories(name, kept):
    layers: Any = repository(name)
    assert_as_masked(repositorys(name), kept)
    assert_as_masked(repositorys(name, ffn_layer=layers.SwiGLUFFN, init_values=None), kept)
    if name == "dinov2":
        assert_as_masked(repositorys(name, drop_path=0.05), kept)
        assert_as_masked(repositorys(name, attn_class=layers.attention.Attention), kept)
    for how in ("shared", "samples", "mixed") if name == "dinov3" else ():
        assert_as_masked(repositorys(name, proj_bias=False), kept, how)


@each_repository
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_repositories_compiled(name):
    block = repositorys(name)
    report = sdkernels.patch(block)
    xs, plan = crops_of(), plan_of(KEPT["some"])
    ropes = (ropes_of("mixed"),) if name == "dinov3" else ()
    with compilation(), report.use(plan):
        actual = collect(block, compiled_whole(block)(xs, *ropes), xs)
        expected = collect(block, block(xs, *ropes), xs)
    for key, value in expected.items():
        assert_close(actual[key], value, 1e-12, key)


def test_a_block_of_dinov2_without_a_list_form():
    block_module: Any = importlib.import_module(f"{repository('dinov2').__name__}.block")
    block = block_module.Block(C, HEADS, init_values=0.5, drop_path=0.4).double().train()
    assert_as_masked(block, KEPT["some"])


@each_repository
def test_repositories_run_their_linear_layers_once(name):
    block = repositorys(name)
    report = sdkernels.patch(block, strict=True)
    seen = shapes_seen(block.attn.qkv, block.attn.proj, block.mlp.fc1)
    with report.use(plan_of(KEPT["some"])):
        block(crops_of())
    assert len(seen) == 3


@each_repository
def test_repositories_own_rows(name, monkeypatch):
    """With the rows and the scale that they draw, theirs to rounding: values and gradients."""
    block = repositorys(name)
    before = copy.deepcopy(block)
    orders = [
        torch.randperm(shape[0], generator=torch.Generator().manual_seed(2)) for shape in SHAPES
    ]
    report = sdkernels.patch(block)
    for crops in ([0], [1], [0, 1, 2]):
        if name == "dinov2" and len(crops) > 1:
            continue  # needs xFormers
        xs = [crops_of()[crop] for crop in crops]
        ropes = [ropes_of("mixed")[crop] for crop in crops] if name == "dinov3" else None
        drawn = [orders[crop] for crop in crops] * 2
        with monkeypatch.context() as patched:
            following = iter(drawn)
            patched.setattr(torch, "randperm", lambda *args, rest=following, **kwargs: next(rest))
            theirs = [before(xs[0])] if name == "dinov2" else before(xs, ropes)
        expected = collect(before, theirs, xs)
        rows = []
        for x, order in zip(xs, drawn, strict=False):
            kept = order[: int(len(x) * 0.6)].sort().values
            rows.append(KeptRows.from_index(kept, len(x), len(x) / len(kept)))
        with report.use([rows] * 2):
            ys = block(xs) if ropes is None else block(xs, ropes)
        actual = collect(block, ys, xs)
        for key, value in expected.items():
            assert_close(actual[key], value, 1e-12, key)


def whole_model(name: str) -> Any:
    layers: Any = repository(name)
    models: Any = importlib.import_module(f"{name}.models.vision_transformer")
    torch.manual_seed(0)
    options = {"img_size": 56, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}
    options["drop_path_rate"] = 0.4
    if name == "dinov2":
        block = partial(layers.NestedTensorBlock, attn_class=layers.MemEffAttention)
        options |= {"init_values": 0.1, "block_fn": block, "block_chunks": 0}
        return models.DinoVisionTransformer(**options, drop_path_uniform=True)
    made = models.DinoVisionTransformer(
        **options, layerscale_init=0.1, norm_layer="rmsnorm", pos_embed_rope_dtype="fp32"
    )
    made.init_weights()
    return made


@each_repository
def test_models_of_the_repositories(name):
    """Global and local crops through the whole model: for DINOv2's without xFormers."""
    model = whole_model(name)
    report = sdkernels.patch(model.train(), strict=True)
    assert report.drop_probs == [0.4] * 4
    images = [torch.randn(4, 3, 56, 56), torch.randn(8, 3, 28, 28)]
    with report.use(report.plan([4, 8])):
        features = model(images, [None, None], is_training=True)
        sum(each["x_norm_clstoken"].sum() for each in features).backward()
        for parameter_name, parameter in model.blocks.named_parameters():
            assert parameter.grad is not None, parameter_name
    model.eval()
    one = model(images[1], is_training=True)["x_norm_clstoken"]
    both = model(images, [None, None], is_training=True)
    torch.testing.assert_close(both[1]["x_norm_clstoken"], one)
