"""Arguments that say which rows to draw, refused by everything that takes them."""

import re

import pytest
import torch
from torch import nn

from sdkernels import DepthPlan, KeptRows, StochasticDepth, fused_stochastic_depth

NAN, INFINITY = float("nan"), float("inf")


def op(p=0.5, **options):
    x = torch.ones(4, 3)
    return fused_stochastic_depth(x, torch.neg, p, **options)


DRAW = {
    "sample": lambda p=0.5, **options: KeptRows.sample(4, p, **options),
    "plan": lambda p=0.5, **options: DepthPlan.sample(4, [0.5, p], **options),
    "op": op,
}
# Evaluation draws nothing and refuses the same: a mistake shows before the first training step.
ENTRIES = {
    **DRAW,
    "op-evaluation": lambda **options: op(training=False, **options),
    "module": lambda p=0.5, **options: StochasticDepth(torch.neg, p, **options),
}

RANGE = r"p: expected a drop probability in \[0, 1\], got "
NUMBER = "p: expected a drop probability as a number, got "
REFUSED = {
    "p-negative": ({"p": -0.1}, ValueError, RANGE + r"-0\.1"),
    "p-above-1": ({"p": 1.0000001}, ValueError, RANGE + r"1\.0000001"),
    "p-int": ({"p": 2}, ValueError, RANGE + "2"),
    "p-nan": ({"p": NAN}, ValueError, RANGE + "nan"),
    "p-infinity": ({"p": INFINITY}, ValueError, RANGE + "inf"),
    "p-str": ({"p": "0.5"}, TypeError, NUMBER + "str"),
    "p-none": ({"p": None}, TypeError, NUMBER + "NoneType"),
    "p-list": ({"p": [0.5]}, TypeError, NUMBER + "list"),
    "p-complex": ({"p": 0.5 + 0j}, TypeError, NUMBER + "complex"),
    "p-tensor": ({"p": torch.tensor(0.5)}, TypeError, NUMBER + "Tensor"),
    "mode": ({"mode": "rows"}, ValueError, "mode: expected one of 'row', 'batch', got 'rows'"),
    "mode-none": ({"mode": None}, ValueError, "mode: expected one of 'row', 'batch', got None"),
    "mode-list": ({"mode": ["row"]}, ValueError, r"mode: expected one of .*, got \['row'\]"),
    "sampler": (
        {"sampler": "uniform"},
        ValueError,
        "sampler: expected one of 'bernoulli', 'fixed', 'rounded'.*, got 'uniform'",
    ),
    "sampler-none": ({"sampler": None}, ValueError, "sampler: expected one of .*, got None"),
    "rescale": (
        {"rescale": "test"},
        ValueError,
        "rescale: expected one of 'train', 'eval', 'none', got 'test'",
    ),
    "rescale-bool": ({"rescale": True}, ValueError, "rescale: expected one of .*, got True"),
    "fixed-batch": (
        {"sampler": "fixed", "mode": "batch"},
        ValueError,
        'sampler: "fixed" .*mode="batch"',
    ),
    "rounded-batch": (
        {"sampler": "rounded", "mode": "batch"},
        ValueError,
        'sampler: "rounded" .*mode="batch"',
    ),
}
each_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
each_draw = pytest.mark.parametrize("entry", DRAW.values(), ids=DRAW.keys())


def assert_refused(call, error, message):
    state = torch.get_rng_state()
    with pytest.raises(error, match=f"^{message}") as caught:
        call()
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


@each_entry
@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_law(options, error, message, entry):
    if entry is DRAW["plan"]:  # which takes a list of them
        message = re.sub("^p:", "drop_probs:", message)
    assert_refused(lambda: entry(**options), error, message)


@pytest.mark.parametrize("entry", ["sample", "op", "op-evaluation", "module"])
def test_balanced_belongs_to_plans(entry):
    message = 'sampler: "balanced" spreads .* draw a DepthPlan'
    assert_refused(lambda: ENTRIES[entry](sampler="balanced"), ValueError, message)


@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0.0, "training": False}], ids=["p0", "both"])
def test_law_is_checked_where_it_is_not_needed(options):
    call = {"sampler": "fixed", "mode": "batch", **options}
    assert_refused(lambda: op(**call), ValueError, 'sampler: "fixed" .*mode="batch"')


@pytest.mark.parametrize("entry", ["op", "op-evaluation", "module"])
@pytest.mark.parametrize("empty", ["stop", None, True], ids=repr)
def test_empty(empty, entry):
    message = f"empty: expected one of 'run', 'ones', 'skip', got {empty!r}"
    assert_refused(lambda: ENTRIES[entry](empty=empty), ValueError, message)


@pytest.mark.parametrize("entry", ["op", "op-evaluation", "module"])
@pytest.mark.parametrize("inplace", ["yes", "", 2, ()], ids=repr)
def test_inplace(inplace, entry):
    message = re.escape(f"inplace: expected True, False or None, got {inplace!r}")
    assert_refused(lambda: ENTRIES[entry](inplace=inplace), TypeError, message)


class ElsewhereGenerator(torch.Generator):
    device = torch.device("cuda", 0)


@each_draw
def test_generator_on_another_device(entry):
    message = "generator: expected a CPU generator .*got one on cuda:0"
    assert_refused(lambda: entry(generator=ElsewhereGenerator()), ValueError, message)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_draw
def test_cuda_generator(entry):
    message = "generator: expected a CPU generator .*got one on cuda"
    assert_refused(lambda: entry(generator=torch.Generator("cuda")), ValueError, message)


@each_draw
@pytest.mark.parametrize("generator", [5, "cpu", torch.ones(1)], ids=["int", "str", "tensor"])
def test_generator_of_the_wrong_type(generator, entry):
    message = f"generator: .*got {type(generator).__name__}"
    assert_refused(lambda: entry(generator=generator), TypeError, message)


@pytest.mark.parametrize("batch", [-1, 4.0, "4", None, True], ids=repr)
@pytest.mark.parametrize("make", [KeptRows.sample, DepthPlan.sample], ids=["sample", "plan"])
def test_batch(make, batch):
    p = 0.5 if make == KeptRows.sample else [0.5]
    message = rf"batch: expected the number of rows of the batch, got {batch!r}"
    assert_refused(lambda: make(batch, p), ValueError, message)


@pytest.mark.parametrize("layer_scale", [0.1, [1.0], 1], ids=repr)
def test_module_layer_scale(layer_scale):
    message = f"layer_scale: expected a tensor, got {type(layer_scale).__name__}"
    assert_refused(
        lambda: StochasticDepth(torch.neg, 0.5, layer_scale=layer_scale), TypeError, message
    )


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.Identity(), "layer"], ids=type)
def test_module_norm(norm):
    message = f"norm: expected nn.LayerNorm or nn.RMSNorm, got {type(norm).__name__}"
    assert_refused(lambda: StochasticDepth(torch.neg, 0.5, norm=norm), TypeError, message)


def test_what_equals_a_value_that_was_right_before():
    op(0.5, min_saving=1.0)
    assert_refused(lambda: op(0.5 + 0j), TypeError, NUMBER + "complex")
    assert_refused(lambda: op(0.5, min_saving=True), ValueError, "min_saving: .*got True")
