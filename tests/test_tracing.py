"""Tracers that repeat one call for ever: evaluation is plain PyTorch, training is refused.

A patched block runs its original forward.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import assert_same_bits
from libraries import load
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

import sdkernels
from sdkernels import (
    DepthPlan,
    KeptRows,
    PerSample,
    Shared,
    StochasticDepth,
    compact_layer_norm,
    compact_rms_norm,
    compact_rows,
    fused_stochastic_depth,
    scatter_add_rows,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore:You are using the legacy:DeprecationWarning"
)

ROWS = KeptRows.from_index(torch.tensor([0, 2]), 4, 2.0)
X, Y = torch.randn(4, 5, 6), torch.randn(7, 5, 6)


def make_block(**options: Any) -> StochasticDepth:
    torch.manual_seed(0)
    return StochasticDepth(
        nn.Linear(6, 6), 0.5, norm=nn.LayerNorm(6), layer_scale=nn.Parameter(torch.rand(6)),
        **options,
    )  # fmt: skip


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.block = make_block(**options)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x * 2)


OPTIONS = [{}, {"inplace": True}, {"activation": "relu"}, {"rescale": "eval"}, {"mode": "batch"}]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
DRAWN, FIXED, IN_PLACE = make_block(), make_block(sampler="fixed"), make_block(inplace=True)
SKIPPING, FROZEN = make_block(empty="skip"), make_block().requires_grad_(False)
PLAN, NO_ROWS = DepthPlan.sample(4, [0.5]), KeptRows.from_mask(ROWS.slot > 9)
TRAINING = {
    "drawn": DRAWN,
    "fixed": FIXED,
    "rows": lambda x: FROZEN(x, rows=ROWS),  # which the tracer's own check would pass
    "list": lambda x: fused_stochastic_depth([x, x], lambda xs: xs, 0.5)[0],
    "skip": lambda x: SKIPPING(x, rows=NO_ROWS),
    "inplace": lambda x: IN_PLACE(x * 1),
    "p0-inplace": lambda x: fused_stochastic_depth(x * 1, torch.sin, 0.0, inplace=True),
    "compact": lambda x: compact_rows(x, ROWS),
    "layer-norm": lambda x: compact_layer_norm(x, ROWS, 6),
    "rms-norm": lambda x: compact_rms_norm(x, ROWS, 6),
    "scatter-add": lambda x: scatter_add_rows(x, x[:2], ROWS),
    "sample": lambda x: x + KeptRows.sample(4, 0.5).k,
    "plan": lambda x: x + DepthPlan.sample(4, [0.5])[0].k,
    "resample": lambda x: x + PLAN.resample_()[0].k,
}


# torch.jit


@pytest.mark.parametrize("function", TRAINING.values(), ids=TRAINING.keys())
def test_jit_trace_in_training(function):
    with pytest.raises(
        RuntimeError, match=r"^(training|rows): torch\.jit\.trace .* for ever; "
    ) as caught:
        torch.jit.trace(function, X)
    assert "\n" not in str(caught.value)
    function(X)  # nothing stays behind


@each_option
def test_jit_trace_in_evaluation(options):
    """For batches of every size."""
    net = Net(**options).eval()
    traced = torch.jit.trace(net, X)
    torch.testing.assert_close(traced(Y), net(Y), rtol=0, atol=0)
    assert "sdkernels::" not in str(traced.inlined_graph)


def test_jit_trace_of_arguments():
    table = torch.randn(6)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        args = ({"scale": [scale]}, Shared(table), PerSample(x))
        return fused_stochastic_depth(
            x, lambda kept, a, b, c: kept * a["scale"][0] + b - c, 0.5, training=False, args=args
        )

    scale = torch.randn(7, 1, 1)
    traced = torch.jit.trace(run, (X, torch.randn(4, 1, 1)))
    torch.testing.assert_close(traced(Y, scale), Y + Y * scale + table - Y)


def test_jit_trace_at_p0():
    traced = torch.jit.trace(lambda x: fused_stochastic_depth(x, torch.sin, 0.0), X)
    assert_same_bits(traced(Y), Y + Y.sin())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_onnx_by_torch_script_in_training(tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(RuntimeError, match=r"^training: torch\.jit\.trace "):
        torch.onnx.export(
            Net(), (X,), tmp_path / "net.onnx", dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
        )  # fmt: skip


def test_jit_script():
    for module in (make_block(), Net().eval()):
        with pytest.raises(
            RuntimeError, match=r"^torch\.jit\.script: cannot read StochasticDepth; "
        ):
            torch.jit.script(module)


# torch.fx


def test_fx_in_training():
    with pytest.raises(RuntimeError, match=r"^training: torch\.fx's symbolic tracing .* leaf"):
        symbolic_trace(Net())
    with pytest.raises(RuntimeError, match=r"^args: torch\.fx cannot trace a StochasticDepth by"):
        symbolic_trace(make_block())


@each_option
def test_fx_in_evaluation(options):
    net = Net(**options).eval()
    traced = symbolic_trace(net)
    assert_same_bits(traced(Y), net(Y))
    if options.get("rescale") != "eval":
        (traced(Y) - Y).sum().backward()
        assert net.block.branch.weight.grad.any()


def test_fx_of_lists_and_arguments():
    class Crops(nn.Module):
        def forward(self, a: Tensor, b: Tensor, scale: Tensor) -> Any:
            def branch(xs: list[Tensor], scales: list[Any], shared: int) -> list[Tensor]:
                return [x * scale + shared for x, scale in zip(xs, scales, strict=True)]

            args = ([scale, 2], Shared(3))
            return fused_stochastic_depth([a, b], branch, 0.5, training=False, args=args)

    a, b = symbolic_trace(Crops())(X, Y, torch.tensor(5.0))
    torch.testing.assert_close(a, X * 6 + 3)
    torch.testing.assert_close(b, Y * 3 + 3)


class OfABuffer(nn.Module):
    """The stream is no input of the graph; what else the op gets is."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.register_buffer("stream", torch.randn(4, 6))
        self.which, self.linear = which, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        options: dict[str, Any] = {"training": self.training}
        if self.which == "args":
            options["args"] = ({"inside": [x]},)
            return fused_stochastic_depth(
                self.stream, lambda kept, a: kept + a["inside"][0], 0.5, **options
            )
        options[self.which] = x[0] if self.which == "layer_scale" else x
        return fused_stochastic_depth(self.stream, self.linear, 0.5, **options)


@pytest.mark.parametrize("which", ["args", "residual", "layer_scale"])
def test_fx_where_the_stream_is_a_constant(which):
    net, x = OfABuffer(which), torch.randn(4, 6)
    with pytest.raises(RuntimeError, match=r"^training: torch\.fx's symbolic tracing"):
        symbolic_trace(net)
    assert_same_bits(symbolic_trace(net.eval())(x), net(x))


@pytest.mark.parametrize("name", ["compact", "layer-norm", "rms-norm", "scatter-add"])
def test_fx_of_building_blocks(name):
    with pytest.raises(RuntimeError, match=r"^training: torch\.fx's symbolic tracing"):
        symbolic_trace(TRAINING[name])


def test_a_leaf_of_the_tracer_draws_at_every_call():
    class LeafTracer(Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, StochasticDepth) or super().is_leaf_module(module, name)

    net = Net()
    traced = GraphModule(net, LeafTracer().trace(net))
    results = []
    for function in (net, traced):
        torch.manual_seed(3)
        results.append([function(Y), function(Y)])
    assert_same_bits(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[0][1])


# make_fx


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(mode):
    for name in ("drawn", "fixed", "list", "sample", "plan", "resample"):
        with pytest.raises(RuntimeError, match=r"^rows: torch\.jit\.trace and make_fx "):
            make_fx(TRAINING[name], tracing_mode=mode, _allow_non_fake_inputs=True)(X)
    block = make_block().eval()
    traced = make_fx(block, tracing_mode=mode, _allow_non_fake_inputs=True)(X)
    assert "sdkernels" not in traced.code
    assert_same_bits(traced(X), block(X))


def test_make_fx_of_rows_from_outside():
    """They are inputs of the graph then."""
    block = make_block()

    def run(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
        return block(x, rows=KeptRows(index, slot, 2.0))

    traced = make_fx(run)(X, ROWS.index, ROWS.slot)
    other = KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)
    assert_same_bits(traced(X, other.index, other.slot), block(X, rows=other))


# torch.export draws in its graph


def test_export_in_training():
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Net(sampler="fixed"), (X,))
    assert program.module()(X).shape == X.shape
    program = torch.export.export(Net(), (X,), dynamic_shapes=dynamic)
    ys = [program.module()(Y) for _ in range(8)]
    assert not all(torch.equal(y, ys[0]) for y in ys)


# Patched models


def resnet() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = load("torchvision").models.resnet18(num_classes=3)
    twin = copy.deepcopy(model)
    sdkernels.patch(model, drop_probs=0.5, sampler="fixed")
    return model, twin


def convnext() -> tuple[Any, Any]:
    torch.manual_seed(0)
    settings = load("torchvision.models.convnext").CNBlockConfig
    net = load("torchvision").models.ConvNeXt([settings(8, 16, 2), settings(16, None, 1)], 0.5)
    twin = copy.deepcopy(net)
    assert sdkernels.patch(net).patched
    return net, twin


IMAGES = torch.randn(4, 3, 32, 32)
without_options = pytest.mark.filterwarnings("ignore:sdkernels. a patched block that is traced")


@without_options
@pytest.mark.parametrize(("make", "node"), [(resnet, "layer4"), (convnext, "features.3")])
def test_feature_extractors(make, node):
    """torchvision traces a model in training and in evaluation, whatever it is in."""
    extraction = load("torchvision.models.feature_extraction")
    net, twin = make()
    names = extraction.get_graph_node_names(net)
    assert names == extraction.get_graph_node_names(twin)
    for training in (False, True):
        outputs = []
        for model in (net, twin):
            model.train(training)
            extractor = extraction.create_feature_extractor(model, return_nodes=[node])
            assert extractor.training == training
            torch.manual_seed(1)
            outputs.append(extractor(IMAGES)[node])
        assert_same_bits(*outputs)
    torch.manual_seed(0)
    y = net.train()(IMAGES)  # patched as before
    assert any(isinstance(m, sdkernels.models.blocks.PatchedBlock) for m in net.modules())
    torch.manual_seed(2)
    assert not torch.equal(net(IMAGES), y)


@without_options
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False])
def test_jit_trace_of_a_patched_model(training):
    net, twin = resnet()
    net.train(training)
    twin.train(training)
    traced = torch.jit.trace(net, IMAGES, check_trace=not training)
    more = torch.randn(3, 3, 32, 32)
    if training:
        twin(IMAGES)  # running statistics went on
    assert_same_bits(traced(more), twin(more))


def test_what_a_trace_in_training_leaves_out_is_said():
    for options in (
        {},
        {"drop_probs": None, "rescale": "eval"},
        {"drop_probs": None, "mode": "batch"},
    ):
        net = resnet(**options)[0] if not options else convnext()[0]
        sdkernels.patch(net, **options or {"drop_probs": 0.5})
        with pytest.warns(UserWarning, match="in training is its original forward, without"):
            symbolic_trace(net.train())


def test_the_papers_rule_in_evaluation():
    """It multiplies by 1 - p there, which the original forward does not."""
    net, _ = convnext()
    sdkernels.patch(net, rescale="eval")
    net.eval()
    expected = net(IMAGES)
    assert_same_bits(symbolic_trace(net)(IMAGES), expected)
    assert_same_bits(torch.jit.trace(net, IMAGES)(IMAGES), expected)


def test_a_plan_is_not_traced():
    net, _ = convnext()
    report = sdkernels.patch(net)
    with report.use(report.plan(4)):
        for trace in (lambda: symbolic_trace(net.train()), lambda: torch.jit.trace(net, IMAGES)):
            with pytest.raises(RuntimeError, match=r"^plan: torch\.jit and torch\.fx would"):
                trace()


def timm_resnet() -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = load("timm").create_model("resnet10t", num_classes=3, drop_path_rate=0.5)
    twin = copy.deepcopy(net)
    assert len(sdkernels.patch(net).patched) == 4
    return net, twin


def timm_vit() -> tuple[Any, Any]:
    torch.manual_seed(0)
    vit = load("timm.models.vision_transformer").VisionTransformer
    net = vit(32, 8, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.5, num_classes=3)
    twin = copy.deepcopy(net)
    assert len(sdkernels.patch(net).patched) == 2
    return net, twin


@without_options
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [resnet, convnext, timm_resnet, timm_vit])
def test_script_of_a_patched_model(make, training):
    """The original forward is compiled; the model itself stays patched."""
    net, twin = make()
    patched = [m for m in net.modules() if isinstance(m, sdkernels.models.blocks.PatchedBlock)]
    outputs = []
    for model in (net, twin):
        scripted = torch.jit.script(model.train(training))
        torch.manual_seed(0)
        outputs.append(scripted(IMAGES))
    assert_same_bits(*outputs)
    now = [m for m in net.modules() if isinstance(m, sdkernels.models.blocks.PatchedBlock)]
    assert now == patched != []


def test_what_cannot_be_scripted():
    net, _ = convnext()
    report = sdkernels.patch(net)
    with report.use(report.plan(4)), pytest.raises(RuntimeError, match=r"^plan: torch\.jit and "):
        torch.jit.script(net)
    sdkernels.patch(net, rescale="eval")
    with pytest.raises(
        RuntimeError, match=r"^torch\.jit\.script: cannot read a block patched with rescale=.eval"
    ) as e:
        torch.jit.script(net.eval())
    assert "\n" not in str(e.value)
    torch.jit.script(sdkernels.unpatch(net))


@pytest.mark.filterwarnings("ignore:NOTE. The nodes:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "indices", "nodes"), [
    (timm_resnet, (3, 4), ["layer3", "layer4"]), (timm_vit, (0, 1), ["blocks.0", "blocks.1"]),
])  # fmt: skip
def test_timms_feature_extractors_by_fx(make, indices, nodes, training):
    extraction = load("timm.models._features_fx")
    features = []
    for model in make():
        model.train(training)
        for extractor in (
            extraction.FeatureGraphNet(model, out_indices=indices),
            extraction.create_feature_extractor(model, nodes),
        ):
            torch.manual_seed(1)
            found = extractor(IMAGES)
            features.append([*found.values()] if isinstance(found, dict) else found)
    assert len(features) == 4
    for each in features[1:]:
        for a, b in zip(features[0], each, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timms_features_only(name):
    """Wrappers that call the patched blocks: without a trace, they draw in training."""
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2, "out_indices": (0, 1)} if "vit" in name else {}
    net = load("timm").create_model(name, features_only=True, drop_path_rate=0.5, **options).eval()
    expected = net(IMAGES)
    report = sdkernels.patch(net)
    assert report.patched
    for a, b in zip(net(IMAGES), expected, strict=True):
        assert_same_bits(a, b)
    for parameter in net.parameters():  # also those that start at zero
        nn.init.uniform_(parameter, 0.1, 0.2)
    nothing = [KeptRows.from_mask(torch.zeros(4, dtype=torch.bool))] * len(report.drop_probs)
    net.train()
    with report.use(nothing):
        *_, last = net(IMAGES)
    assert not torch.equal(last, net(IMAGES)[-1])


@without_options
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantization_aware_training_by_fx():
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx")
    qconfig = torch.ao.quantization.get_default_qat_qconfig_mapping("x86")
    outputs = []
    for net in resnet():
        prepared = quantize.prepare_qat_fx(net.train(), qconfig, (IMAGES,))
        y = prepared(IMAGES)
        y.sum().backward()
        outputs += [y, prepared.conv1.weight.grad]
    for a, b in zip(outputs[:2], outputs[2:], strict=True):
        assert_same_bits(a, b)
