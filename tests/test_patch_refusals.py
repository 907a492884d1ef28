"""What patch refuses, and what it leaves alone."""

import functools
import re
from typing import Any

import pytest
import torch
from libraries import load
from patched_models import patched_blocks
from test_rewriting import Drop
from torch import nn
from zoo import NETS

import sdkernels
from sdkernels import KeptRows
from sdkernels.functional import _is_plain
from sdkernels.models import drop_probs, fingerprint

VIT = NETS["timm-vit"]

BAD = [
    ({"drop_probs": [0.5]}, ValueError, "drop_probs: expected 4 entries, one for each branch"),
    ({"drop_probs": 1.5}, ValueError, r"drop_probs: expected a drop probability in \[0, 1\]"),
    ({"drop_probs": [0.1, 0.2, 0.3, -1]}, ValueError, "drop_probs: expected a drop probability"),
    ({"drop_probs": "abcd"}, TypeError, "drop_probs: expected a number or a sequence"),
    ({"sampler": "uniform"}, ValueError, "sampler: expected one of"),
    ({"mode": "pixel"}, ValueError, "mode: expected one of"),
    ({"rescale": "x"}, ValueError, "rescale: expected one of"),
    ({"empty": "x"}, ValueError, "empty: expected one of"),
    ({"min_saving": 2.0}, ValueError, "min_saving: expected"),
    ({"inplace": "yes"}, TypeError, "inplace: expected True, False or None, got 'yes'"),
    ({"multiple_of": 0}, ValueError, "multiple_of: expected an integer of at least 1, got 0"),
    ({"mode": "batch", "sampler": "fixed"}, ValueError, "sampler:"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_leave_the_model_alone(options, error, message):
    model = VIT.model()
    with pytest.raises(error, match=message):
        sdkernels.patch(model, **options)
    assert not patched_blocks(model)


def test_fixed_does_not_fit_a_drop_path_of_mode_batch():
    model = NETS["torchvision-convnext"].model().train()
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.mode = "batch"
    with pytest.raises(ValueError, match=r'sampler: "fixed" keeps a fixed .* of mode "batch"'):
        sdkernels.patch(model, sampler="fixed")
    assert not patched_blocks(model)
    assert sdkernels.patch(model, sampler="fixed", mode="row").patched
    assert sdkernels.patch(model).patched


def test_bad_models():
    for function in (sdkernels.patch, sdkernels.unpatch, drop_probs):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
            function("vit_small_patch16_224")


def test_what_is_left_alone():
    vision: Any = load("timm.models.vision_transformer")
    drop: Any = load("timm.layers.drop")

    class Changed(vision.Block):
        def forward(self, x):
            return x + self.drop_path1(self.attn(self.norm1(x)))

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop_path = drop.DropPath(0.5)

        def forward(self, x):
            return self.drop_path(x)

    model = nn.Sequential(Changed(8, 2, drop_path=0.5), Mine(), vision.Block(8, 2, drop_path=0.5))
    report = sdkernels.patch(model)
    assert [entry.name for entry in report.patched] == ["0", "2"]
    reasons = {entry.name: entry.reason for entry in report.left}
    assert reasons["0"].startswith("its forward does not call its drop path")  # the second one
    assert "its result is returned, and added to nothing" in reasons["1"]
    assert "2 blocks patched, 2 left alone" in str(report)


@pytest.mark.filterwarnings("ignore")
def test_other_obstacles():
    load("timm")
    model = VIT.model()
    block = model.blocks[0]
    block.forward = block.forward
    model.blocks[1].drop_path1.register_forward_hook(lambda *_: None)
    reasons = [entry.reason for entry in sdkernels.patch(model).left]
    assert reasons == ["its forward was replaced", "its drop path module has hooks"]

    class DropPath(nn.Module):
        p = 0.5

    model = VIT.model()
    model.blocks[0].drop_path1 = DropPath()
    model.blocks[1].compile()
    reasons = [entry.reason for entry in sdkernels.patch(model).left]
    assert reasons == [
        "the class of its drop path, DropPath, is not known",
        "it was compiled: compile after patch",
    ]


def test_fast_norms_of_timm_are_called():
    """timm's fast norm computes in another precision: it is not replaced."""
    model = VIT.model()
    sdkernels.patch(model)
    assert _is_plain(model.blocks[0].norm1)
    model.blocks[0].norm1._fast_norm = True
    assert not _is_plain(model.blocks[0].norm1)


def test_fingerprints_see_the_code_and_nothing_else():
    def first(self, x: torch.Tensor) -> torch.Tensor:
        """A docstring."""
        return self.a(x) + 1  # a comment

    def second(self, x):
        return self.a(x) + 1

    def third(self, x):
        return self.a(x) + 2

    second.__name__ = "first"
    sources = [fingerprint.fingerprint(f) for f in (first, second, third)]
    assert None not in sources
    assert len(set(sources)) == 3  # the name in the source counts
    assert fingerprint.fingerprint(len) is None
    assert fingerprint.fingerprint(lambda self, x: self.a(x) + 1) is None
    assert fingerprint.fingerprint(functools.wraps(first)(third)) == sources[2]


class Plain(nn.Module):
    """It has no drop path, or gives it what is no branch."""

    def __init__(self, drop: nn.Module | None = None):
        super().__init__()
        self.f, self.drop_path = nn.Linear(4, 4), drop

    def forward(self, x):
        return x + self.f(x) if self.drop_path is None else self.drop_path(x)


def test_an_unknown_model_is_named():
    with pytest.warns(UserWarning, match="model: no block with a drop path was found to patch"):
        sdkernels.patch(Plain())
    with pytest.warns(UserWarning, match="model: no block with a residual branch was found"):
        sdkernels.patch(Plain(), drop_probs=0.5)


def drop_path(x, p=0.0, training=False):
    keep = 1 - p
    if p == 0.0 or not training:
        return x
    return x * torch.rand(len(x), *[1] * (x.dim() - 1)).to(x).add(keep).floor() / keep


def drop_path_of(*, branch, p=0.0):
    return drop_path(branch, p, True)


class Named(nn.Module):
    """The branch is given to its drop path by name."""

    def __init__(self):
        super().__init__()
        self.f, self.p = nn.Linear(4, 4, dtype=torch.float64), 0.5
        self.drop_path = Drop()

    def forward(self, x):
        return x + drop_path(x=self.f(x), p=self.p, training=self.training)


class NamedLast(Named):
    def forward(self, x):
        return x + drop_path(p=self.p, training=self.training, x=self.f(x))


class NamedModule(Named):
    def forward(self, x):
        return x + self.drop_path(x=self.f(x))


class NamedOnly(Named):
    def forward(self, x):
        return x + drop_path_of(branch=self.f(x), p=self.p)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [Named, NamedLast, NamedModule])
def test_a_branch_that_is_given_by_name(kind):
    block = kind().train()
    if kind is not NamedModule:
        del block.drop_path
    report = sdkernels.patch(block, strict=True)
    x = torch.randn(4, 4, dtype=torch.float64)
    with report.use([KeptRows.from_index(torch.tensor([1, 3]), batch=4, scale=2.0)]):
        y = block(x)
    kept = torch.tensor([0.0, 2.0, 0.0, 2.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(y, x + kept * block.f(x))
    assert not report.whole


class Unpacked(Named):
    def forward(self, x):
        return x + self.drop_path(*[self.f(x)])


class UnpackedNames(Named):
    def forward(self, x):
        return x + self.drop_path(**{"x": self.f(x)})


@pytest.mark.parametrize("kind", [Unpacked, UnpackedNames])
def test_a_branch_that_is_unpacked_in_the_call(kind):
    (left,) = sdkernels.patch(kind()).left
    assert "its arguments are unpacked in the call" in left.reason


def test_what_is_not_known_of_a_name_is_said():
    block = NamedOnly()
    del block.drop_path
    (left,) = sdkernels.patch(block).left
    assert re.fullmatch(
        r"drop_path_of: it cannot be told .* drop_path_of does \(line \d+\)", left.reason
    )


def test_strict():
    model = VIT.model()
    assert sdkernels.patch(model, strict=True).patched
    sdkernels.unpatch(model)
    with pytest.raises(ValueError, match="model: strict=True, and 0 blocks are left alone"):
        sdkernels.patch(Plain(), strict=True)
    drop = next(m for m in model.modules() if type(m).__name__ == "DropPath")
    both = nn.Sequential(model, Plain(drop))
    with pytest.raises(ValueError, match=r"1 blocks are left alone: 1 \(Plain\): .*drop_path"):
        sdkernels.patch(both, strict=True)
    assert not patched_blocks(both)
    assert sdkernels.patch(both).left
