"""patch(inplace=...): sums that a block has made are written into, and nothing else.

By default only where nobody can see it, which test_patch_unseen.py looks into.
"""

from typing import Any

import pytest
import torch
from comparison import assert_same_bits
from patched_models import freeze_norms, make_rows, patched_copy, train_step
from zoo import NETS, output_of

import sdkernels
from sdkernels.models import adding

BATCH = 4
each_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)


@each_net
@pytest.mark.parametrize(
    "options",
    [{"inplace": True}, {"inplace": True, "empty": "skip"}, {}, {"min_saving": 0.6}],
    ids=["run", "skip", "unseen", "whole"],
)
def test_the_same_step(net, options):
    """Gradients too, which PyTorch refuses to compute from a saved tensor that was written into."""
    model, report = patched_copy(net.model().train(), net)
    freeze_norms(model)
    plan, x = make_rows(len(report.drop_probs)), net.inputs(BATCH)
    sdkernels.patch(model, drop_probs=net.drop_probs, **(options | {"inplace": False}))
    with report.use(plan):
        y, gradients = train_step(model, x)
    sdkernels.patch(model, drop_probs=net.drop_probs, **options)
    with report.use(plan):
        other, other_gradients = train_step(model, x)
    torch.testing.assert_close(other, y)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(other_gradients[name], gradient)
        else:
            assert other_gradients[name] is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm-vit", [False, True]),
        ("timm-vit-things", [False, True, False, True]),
        ("timm-cait", [False, True]),
        ("timm-convnext", [False]),
        ("transformers-dinov2", [False, True]),
    ],
)
@pytest.mark.parametrize("inplace", [True, None, False])
def test_what_is_added_in_place(name, expected, inplace, monkeypatch):
    """The first branch of a block never; those after it, where the sum is the block's own."""
    net = NETS[name]
    model = net.model().train()
    report = sdkernels.patch(model, **({} if inplace is None else {"inplace": inplace}))
    model(net.inputs(BATCH))  # compares what the tests have not
    seen = []
    op = adding.fused_stochastic_depth

    def watch(x: Any, *args: Any, **options: Any) -> Any:
        total = op(x, *args, **options)
        seen.append(total is (x if options["residual"] is None else options["residual"]))
        return total

    monkeypatch.setattr(adding, "fused_stochastic_depth", watch)
    with report.use(make_rows(len(report.drop_probs))):
        model(net.inputs(BATCH))
    assert seen == [inplace is not False and own for own in expected] * (len(seen) // len(expected))


@pytest.mark.parametrize("empty", ["run", "skip"])  # what skips gives its input on, as it is
@pytest.mark.parametrize("name", ["timm-vit", "timm-cait", "timm-efficientnet", "timm-convnext"])
def test_intermediate_features(name, empty):
    """timm keeps what went from block to block; the next block must not change it."""
    net = NETS[name]
    model: Any = net.model().train()
    freeze_norms(model)
    options = {} if name == "timm-cait" else {"intermediates_only": True}
    found = []
    for inplace in (False, True, None):
        report = sdkernels.patch(model, drop_probs=0.5, inplace=inplace, empty=empty)
        with torch.no_grad(), report.use(make_rows(len(report.drop_probs))):
            features = model.forward_intermediates(net.inputs(BATCH) * 0 + 1, **options)
        found.append(features if options else features[1])
    assert len(found[0]) > 1
    for plain, *written in zip(*found, strict=True):
        for each in written:
            assert_same_bits(each, plain)


@pytest.mark.parametrize("name", ["transformers-dinov2", "transformers-beit"])
@pytest.mark.parametrize("inplace", [True, None])
def test_hidden_states(name, inplace):
    net = NETS[name]
    model: Any = net.model().train()
    report = sdkernels.patch(model, drop_probs=0.5, inplace=inplace)
    streams: list[torch.Tensor] = []
    for entry in report.patched:
        entry.block.register_forward_pre_hook(
            lambda module, args, kwargs: streams.append(
                (args[0] if args else kwargs["hidden_states"]).clone()
            ),
            with_kwargs=True,
        )
    with torch.no_grad(), report.use(make_rows(len(report.drop_probs))):
        states = model(net.inputs(BATCH), output_hidden_states=True).hidden_states
    for state, stream in zip(states, streams, strict=False):
        assert_same_bits(state, stream)


def test_the_papers_rule_in_evaluation():
    """rescale="eval" runs the op there too."""
    net = NETS["timm-vit"]
    model = net.model().eval()
    x = net.inputs(BATCH)
    sdkernels.patch(model, rescale="eval")
    with torch.no_grad():
        expected = output_of(model(x))
        report = sdkernels.patch(model, rescale="eval", inplace=True)
        block, stream = report.patched[-1].block, torch.randn(4, 17, 32, dtype=torch.float64)
        before = stream.clone()
        block(stream)
        assert_same_bits(stream, before)
        torch.testing.assert_close(model(x), expected)
