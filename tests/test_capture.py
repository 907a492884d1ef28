"""While a CUDA graph is being captured rows may be given, and may not be drawn.

What says that a capture is going on is replaced here; tests/test_cuda.py captures.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from libraries import load
from torch import nn

import sdkernels
from sdkernels import DepthPlan, KeptRows, StochasticDepth, fused_stochastic_depth, sampling

DRAWN = "^rows: cannot be drawn while a CUDA graph is being captured"
VARIES = '^plan: expected sampler="fixed" while a CUDA graph is being captured'


@pytest.fixture
def capture(monkeypatch) -> Callable[[], None]:
    """Starts one."""

    def start() -> None:
        device = SimpleNamespace(
            is_initialized=lambda: True, is_current_stream_capturing=lambda: True
        )
        monkeypatch.setattr(sampling, "_CAPTURING_DEVICES", [device])

    return start


def x_of(batch: int = 4) -> torch.Tensor:
    return torch.arange(8.0 * batch).view(batch, 8)


LAWS: dict[str, dict[str, Any]] = {
    "bernoulli": {},
    "fixed": {"sampler": "fixed"},
    "batch": {"mode": "batch"},
    "generator": {"generator": torch.Generator()},
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_draws_are_refused(capture, law):
    draws: list[Callable[[], Any]] = [
        lambda: fused_stochastic_depth(x_of(), torch.neg, 0.5, **law),
        lambda: fused_stochastic_depth([x_of(), x_of(2)], lambda xs: xs, 0.5, **law),
        lambda: KeptRows.sample(4, 0.5, **law),
        lambda: DepthPlan.sample(4, [0.5, 0.2], **law),
    ]
    for draw in draws:
        draw()
    capture()
    for draw in draws:
        with pytest.raises(RuntimeError, match=DRAWN):
            draw()


def test_modules_and_patched_models_draw_no_rows(capture):
    model = load("timm").create_model(
        "vit_tiny_patch16_224", drop_path_rate=0.5, img_size=32, depth=2, num_classes=3
    )
    sdkernels.patch(model)
    block, images = StochasticDepth(nn.Linear(8, 8), 0.5), torch.randn(2, 3, 32, 32)
    capture()
    with pytest.raises(RuntimeError, match=DRAWN):
        block(x_of())
    with pytest.raises(RuntimeError, match=DRAWN):
        model(images)
    block.eval()(x_of())
    model.eval()(images)


def test_refreshing_a_plan_is_refused_and_leaves_it_as_it_was(capture, monkeypatch):
    plan = DepthPlan.for_step(3, 10, 8, [0.5], sampler="fixed")
    twin = DepthPlan.for_step(3, 10, 8, [0.5], sampler="fixed")
    capture()
    with pytest.raises(RuntimeError, match=DRAWN):
        plan.resample_()
    monkeypatch.undo()
    assert plan[0].slot.tolist() == twin[0].slot.tolist()
    assert plan.resample_()[0].slot.tolist() == twin.resample_()[0].slot.tolist()
    capture()
    with pytest.raises(RuntimeError, match=DRAWN):
        DepthPlan.for_step(3, 10, 8, [0.5], sampler="fixed")


def test_given_rows_are_welcome(capture):
    plan = DepthPlan.sample(4, [0.5], sampler="fixed")
    rows = KeptRows.from_index(torch.tensor([1, 2]), batch=4, scale=2.0)
    varying = DepthPlan.sample(4, [0.5])
    capture()
    for given in (plan[0], next(iter(plan)), rows):
        y = fused_stochastic_depth(x_of(), torch.neg, 0.5, rows=given)
        expected = x_of()
        expected[given.index] -= 2.0 * expected[given.index]
        assert torch.equal(y, expected)
    with pytest.raises(RuntimeError, match=VARIES):
        varying[0]
    fused_stochastic_depth(x_of(), torch.neg, 0.5, training=False)


@pytest.mark.filterwarnings("ignore")  # Dynamo's
@pytest.mark.parametrize("law", ["fixed", "generator"])
def test_compiled_code_draws_no_rows(capture, law):
    """A compiled step inside of a capture: the op of the graph, and the draw beside it."""
    torch._dynamo.reset()
    step = torch.compile(
        lambda x: fused_stochastic_depth(x, torch.neg, 0.5, **LAWS[law]), backend="aot_eager"
    )
    step(x_of())
    capture()
    with pytest.raises(RuntimeError, match=DRAWN):
        step(x_of())


def test_what_asks_touches_no_device():
    """Not even where PyTorch is built for CUDA and there is no driver."""
    initialized = torch.cuda.is_initialized()
    assert not sampling.is_capturing()
    assert torch.cuda.is_initialized() == initialized
