"""timm's ViT and EVA blocks on a list of crops go packed, and compute what they do one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from comparison import assert_close
from compiling import compilation
from libraries import load
from torch import Tensor, nn

import sdkernels
from sdkernels import KeptRows, functional, rows
from sdkernels.models import blocks, packing

timm = load("timm")
vision_transformer = pytest.importorskip("timm.models.vision_transformer")
eva = pytest.importorskip("timm.models.eva")

WIDTH, HEADS = 24, 2
SHAPES = [(6, 7, WIDTH), (8, 4, WIDTH), (4, 7, WIDTH)]
KEPT = {
    "some": [[0, 2, 5], [1, 3, 4, 7], [2]],
    "none-of-one": [[1], [], [0, 3]],
    "none": [[], [], []],
    "all": [list(range(shape[0])) for shape in SHAPES],
}
vit_block = partial(vision_transformer.Block, WIDTH, HEADS, drop_path=0.4)
eva_block = partial(eva.EvaBlock, WIDTH, HEADS, drop_path=0.4)
KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[[], dict[str, Any]]]] = {
    "vit": (partial(vit_block, qkv_bias=True), dict),
    "vit-layer-scale-qk-norm": (partial(vit_block, init_values=0.5, qk_norm=True), dict),
    "vit-scale-norms": (partial(vit_block, scale_attn_norm=True, scale_mlp_norm=True), dict),
    "vit-masks": (vit_block, lambda: {"attn_mask": [mask(shape) for shape in SHAPES]}),
    "vit-causal": (vit_block, lambda: {"is_causal": True}),
    "eva-rope": (partial(eva_block, init_values=0.5), lambda: {"rope": ropes()}),
    "eva-own-bias": (
        partial(eva_block, qkv_bias_separate=True, swiglu_mlp=True),
        lambda: {"rope": ropes()},
    ),
    "eva-unfused": (partial(eva_block, qkv_fused=False, swiglu_mlp=True, scale_mlp=True), dict),
    "eva-rope-attention": (
        partial(eva_block, attn_type="rope", num_prefix_tokens=0, swiglu_mlp=True),
        lambda: {"rope": ropes(prefix=0)},
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def mask(shape: tuple[int, ...]) -> Tensor:
    """Of the samples."""
    batch, tokens, _ = shape
    return torch.randn(batch, 1, tokens, tokens, dtype=torch.float64)


def ropes(prefix: int = 1) -> list[Tensor]:
    return [torch.randn(shape[1] - prefix, WIDTH, dtype=torch.float64) for shape in SHAPES]


def make(kind: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    block, arguments = KINDS[kind]
    return block().double().train(), arguments()


def rows_of(kept: list[list[int]]) -> list[KeptRows]:
    pairs = zip(kept, SHAPES, strict=True)
    return [
        KeptRows.from_index(torch.tensor(own, dtype=torch.int64), shape[0], 2.0)
        for own, shape in pairs
    ]


def step(block: Any, report: Any, kept: list[list[int]], given: dict[str, Any]) -> list[Any]:
    """Results and gradients, with other rows in the second branch."""
    torch.manual_seed(1)
    xs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in SHAPES]
    pairs = zip(kept, SHAPES, strict=True)
    others = [sorted((row + 1) % shape[0] for row in own) for own, shape in pairs]
    with report.use([rows_of(kept), rows_of(others)]):
        ys = block(xs, **given)
    torch.manual_seed(2)
    loss = sum((y * torch.randn_like(y)).sum() for y in ys)
    found = torch.autograd.grad(loss, [*xs, *block.parameters()], allow_unused=True)
    zeros = [*xs, *block.parameters()]
    grads = [torch.zeros_like(p) if g is None else g for g, p in zip(found, zeros, strict=True)]
    return [*ys, *grads]


@each_kind
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT.keys())
def test_as_crop_by_crop(kind, kept, monkeypatch):
    block, given = make(kind)
    report = sdkernels.patch(block)
    packed = step(block, report, kept, given)
    monkeypatch.setattr(blocks, "packed_form", lambda block: None)
    for got, expected in zip(packed, step(block, report, kept, given), strict=True):
        assert_close(got, expected, 1e-12)


def calls_of(block: Any, name: str, report: Any, given: dict[str, Any]) -> int:
    """How often a layer runs on three crops."""
    calls: list[int] = []
    layer = block.get_submodule(name)
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    step(block, report, KEPT["some"], given)
    handle.remove()
    return len(calls)


@pytest.mark.parametrize(
    ("kind", "once"),
    [
        ("vit", ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        ("eva-rope", ("attn.proj", "mlp.fc1", "mlp.fc2")),
        ("eva-unfused", ("attn.q_proj", "attn.v_proj", "attn.proj", "mlp.fc1_g", "mlp.fc2")),
        ("eva-rope-attention", ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    ],
)
def test_layers_run_once(kind, once):
    block, given = make(kind)
    report = sdkernels.patch(block)
    assert [calls_of(block, name, report, given) for name in once] == [1] * len(once)


class OtherAttention(vision_transformer.Attention):
    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        return super().forward(x.flip(1), attn_mask, is_causal)


@pytest.mark.parametrize("why", ["hook", "class"])
def test_what_was_not_read_runs_crop_by_crop(why, monkeypatch):
    block, given = make("vit")
    if why == "hook":
        block.attn.register_forward_hook(lambda module, args, out: out * 2)
    else:
        block.attn.__class__ = OtherAttention
    report = sdkernels.patch(block)
    packed = step(block, report, KEPT["some"], given)
    assert calls_of(block, "attn.proj", report, given) == 3
    assert calls_of(block, "mlp.fc1", report, given) == 1
    monkeypatch.setattr(blocks, "packed_form", lambda block: None)
    for got, expected in zip(packed, step(block, report, KEPT["some"], given), strict=True):
        assert_close(got, expected, 1e-12)


def test_another_version_of_the_block(monkeypatch):
    block, _ = make("vit")
    sdkernels.patch(block)
    assert packing.packed_form(block) is packing.vit
    monkeypatch.setattr(packing, "fingerprint", lambda function: "another")
    assert packing.packed_form(block) is None


def test_a_branch_of_p0_draws_no_rows(monkeypatch):
    drawn = []

    def draw(batch: int, p: float, *law: Any) -> KeptRows:
        drawn.append((batch, p))
        return rows.draw(batch, p, *law)

    monkeypatch.setattr(functional, "draw", draw)
    block, _ = make("vit")
    sdkernels.patch(block, drop_probs=[0.0, 0.5])
    block([torch.randn(shape, dtype=torch.float64) for shape in SHAPES])
    assert drawn == [(shape[0], 0.5) for shape in SHAPES]


def test_multiple_of():
    """The tokens of a list are rounded up for the layers."""
    block, given = make("vit")
    report = sdkernels.patch(block, multiple_of=16)
    seen: list[int] = []
    block.mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.shape[-2]))
    rounded = step(block, report, KEPT["some"], given)
    sdkernels.unpatch(block)
    report = sdkernels.patch(block)
    exact = step(block, report, KEPT["some"], given)
    assert seen == [48, 44]
    for got, expected in zip(rounded, exact, strict=True):
        assert_close(got, expected, 1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled():
    """Crop by crop."""
    block, given = make("vit")
    report = sdkernels.patch(block)
    expected = step(block, report, KEPT["all"], given)
    with compilation():
        compiled = torch.compile(block, backend="eager")
        torch.manual_seed(1)
        xs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in SHAPES]
        with report.use([rows_of(KEPT["all"]), rows_of(KEPT["all"])]):
            ys = compiled(xs)
    for got, y in zip(ys, expected, strict=False):
        assert_close(got, y, 1e-12)
