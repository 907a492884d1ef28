"""The report says how a patched block runs now, whatever has happened to its drop paths."""

import math
import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from libraries import load
from torch import Tensor, nn
from zoo import NETS

import sdkernels
from sdkernels.models import drop_probs
from sdkernels.models.report import _flops

VIT = NETS["timm-vit"]
P = [0.0, 0.0, 0.5, 0.5]


def hook(model: nn.Module) -> None:
    model.blocks[1].drop_path1.register_forward_hook(lambda module, args, out: None)


def pre_hook(model: nn.Module) -> None:
    model.blocks[1].drop_path1.register_forward_pre_hook(lambda module, args: None)


def backward_hook(model: nn.Module) -> None:
    model.blocks[1].drop_path1.register_full_backward_hook(lambda module, d_in, d_out: None)


def forward(model: nn.Module) -> None:
    drop = model.blocks[1].drop_path1
    drop.forward = lambda x: x * 0.5


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def unknown(model: nn.Module) -> None:
    model.blocks[1].drop_path1 = Halves()


def compiled(model: nn.Module) -> None:
    model.blocks[1].drop_path1 = torch.compile(model.blocks[1].drop_path1, backend="eager")


def tensor(model: nn.Module) -> None:
    model.blocks[1].drop_path1.drop_prob = torch.tensor([0.5, 0.5])


NAN = math.nan
WHOLE: dict[str, tuple[Callable[[Any], None], str, list[float]]] = {
    "hook": (hook, "its drop path module has hooks", P),
    "pre_hook": (pre_hook, "its drop path module has hooks", P),
    "backward_hook": (backward_hook, "its drop path module has hooks", P),
    "forward": (forward, "the forward of its drop path module was replaced", P),
    "unknown": (
        unknown,
        "the class of its drop path, Halves, is not known",
        [0.0, 0.0, NAN, 0.5],
    ),
    "compiled": (
        compiled,
        "the class of its drop path, OptimizedModule, is not known",
        [0.0, 0.0, NAN, 0.5],
    ),
    "tensor": (
        tensor,
        "the drop probability of its drop path is not one number",
        [0.0, 0.0, NAN, 0.5],
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_drop_path_that_draws_itself(name):
    """Found after patch: one of two is enough, and the whole block runs as before."""
    change, reason, probabilities = WHOLE[name]
    model = VIT.model().train()
    report = sdkernels.patch(model)
    plan, before = report.plan(4), report.expected_saving()
    assert before > 0.1
    assert not report.whole
    change(model)

    (entry,) = report.whole
    assert (entry.name, entry.reason) == ("blocks.1", reason)
    assert entry.kind is load("timm.models.vision_transformer").Block
    assert [each.name for each in report.idle] == ["blocks.0"]
    assert report.expected_saving() == 0.0
    for found in (report.drop_probs, drop_probs(model)):
        assert [str(p) for p in found] == [str(p) for p in probabilities]
    text = str(report)
    assert "1 of them run as before: p == 0; 1 of them run as before, see below" in text
    column = " ".join(f"{p:.4g}" for p in probabilities[2:])
    assert f"blocks.1  Block  {column}, runs as before: {reason}" in text
    assert "saving 0.0%" in text

    refused = pytest.raises(RuntimeError, match=f"^plan: blocks.1 draws its own rows: {reason}$")
    for draw in (lambda: report.plan(4), lambda: report.plan_for_step(0, 0, 4)):
        with refused:
            draw()
    for rows in (plan, list(plan)):
        with refused, report.use(rows):
            pass


def test_an_identity_with_hooks():
    """What libraries make of p = 0: the hooks are called, whatever patch() was given for it."""
    model = VIT.model().train()
    report = sdkernels.patch(model, drop_probs=0.5)
    drop = model.blocks[0].drop_path1
    assert type(drop) is nn.Identity
    calls = []
    handle = drop.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    assert [each.name for each in report.whole] == ["blocks.0"]
    model(VIT.inputs(4))
    assert calls == [4]
    assert [e.reason for e in sdkernels.patch(model).left] == ["its drop path module has hooks"]
    handle.remove()
    assert len(sdkernels.patch(model).patched) == 2


def test_a_drop_path_in_evaluation_drops_nothing():
    """In a block that trains. The probability is still its own: it counts again in training."""
    model = VIT.model().train()
    report = sdkernels.patch(model)
    both = report.expected_saving()
    model.blocks[1].drop_path1.eval()
    one = report.expected_saving()
    assert 0.0 < one < both
    assert report.drop_probs == P
    assert "blocks.1  Block  0.5 (in evaluation) 0.5" in str(report)
    model.blocks[1].drop_path1.train()
    model.blocks[1].eval()  # a block that is frozen, in a model that trains
    assert 0.0 <= report.expected_saving() < one
    assert "blocks.1  Block  0.5 (in evaluation) 0.5 (in evaluation)" in str(report)
    model.eval()  # as a whole it says nothing about training
    assert report.expected_saving() == both
    assert "blocks.1  Block  0.5 0.5" in str(report)


def test_a_report_that_is_unpickled_with_its_model():
    model = VIT.model().train()
    report = sdkernels.patch(model)
    other, loaded = pickle.loads(pickle.dumps((model, report)))
    assert loaded.source("blocks.1") == report.source("blocks.1")
    loaded = pickle.loads(pickle.dumps(loaded))
    assert all(each.holds for each in loaded.check(VIT.inputs(4)))
    assert loaded.drop_probs == drop_probs(other) == P


class Merges(nn.Linear):
    """As a low-rank adapter, which goes into the weight where `eval` is called."""

    def train(self, mode: bool = True) -> "Merges":
        if self.training and not mode:
            self.weight.data += 1.0
        return super().train(mode)  # type: ignore[return-value]


def test_a_module_that_does_more_where_its_mode_is_changed():
    """The model is as it was."""
    model = VIT.model().train()
    head = model.head
    model.head = Merges(head.in_features, head.out_features).double()
    before = model.head.weight.detach().clone()
    report = sdkernels.patch(model)
    report.check(VIT.inputs(4))
    assert report.expected_saving(VIT.inputs(4)) > 0.1
    assert torch.equal(model.head.weight, before)


class Tries(nn.Module):
    """Goes on where a part of it raises."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with suppress(RuntimeError):
            self.inner(x[..., 1:])
        return self.inner(x)


def test_what_is_counted_where_a_part_raises():
    part = Tries()
    counts = _flops(part, (torch.randn(4, 8),), {})
    assert counts[id(part.first)] == 2 * 4 * 8 * 8
    assert counts[id(part.inner)] == 2 * 4 * 8 * 2
    assert counts[id(part)] == counts[id(part.first)] + counts[id(part.inner)]


def test_what_another_thread_runs_is_not_counted():
    other = nn.Linear(8, 8)

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=other, args=(x,))
            thread.start()
            thread.join()
            return x

    model = nn.Sequential(Waits(), nn.Linear(8, 8))
    assert _flops(model, (torch.randn(4, 8),), {}).keys() == {id(m) for m in model.modules()}


@pytest.mark.parametrize("p", [torch.tensor(0.25), torch.tensor([0.25]), 0.25, None])
def test_a_probability_of_another_kind(p):
    model = VIT.model().train()
    report = sdkernels.patch(model)
    model.blocks[1].drop_path1.drop_prob = p
    expected = [0.0, 0.0, 0.0 if p is None else 0.25, 0.5]
    assert report.drop_probs == expected
    assert [law.p for law in report.plan(4)._branches] == expected
    assert not report.whole
    model(VIT.inputs(4))
