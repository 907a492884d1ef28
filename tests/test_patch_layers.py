"""patch(model, rows="block"): layers of timm, transformers and one's own on their kept rows."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libraries
import pytest
import torch
from compiling import compilation
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.utils.checkpoint import checkpoint

from sdkernels import DepthPlan, KeptRows, linear_decay, patch, uniform, unpatch
from sdkernels.models import LayerReport, drop_probs, use

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

needs_scaling_in_graphs = pytest.mark.skipif(
    torch.__version__.split(".")[:2] < ["2", "13"], reason="Dynamo cannot follow the scaling"
)

BATCH, TOKENS = 6, 7


@dataclass
class Net:
    """A small model, its input, and the submodules whose outputs a layer adds."""

    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    parts: tuple[str, ...] = ()  # none: they cannot be told, and rescale="none" is all there is
    tolerance: float = 1e-10  # of the largest value; some norms round to float32


def ids() -> Tensor:
    return torch.randint(0, 50, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


def padded() -> Tensor:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[0, 5:] = mask[3, 2:] = 0
    return mask


SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def decoder(name: str, **sizes: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        library = libraries.load("transformers")
        more = {"intermediate_size": 32, "num_key_value_heads": 1, "vocab_size": 50} | sizes
        config = getattr(library, f"{name}Config")(**SIZES, head_dim=8, **more)
        model = getattr(library, f"{name}ForCausalLM")(config)
        return model, {"input_ids": ids(), "attention_mask": padded(), "labels": ids()}

    return make


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    library = libraries.load("transformers")
    config = library.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    inputs = {"input_ids": ids(), "attention_mask": padded(), "labels": ids()}
    return library.GPT2LMHeadModel(config), inputs


def bert() -> tuple[nn.Module, dict[str, Any]]:
    library = libraries.load("transformers")
    config = library.BertConfig(
        vocab_size=50, intermediate_size=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **SIZES,
    )  # fmt: skip
    inputs = {"input_ids": ids(), "attention_mask": padded(), "labels": ids()}
    return library.BertForMaskedLM(config), inputs


def vit() -> tuple[nn.Module, dict[str, Any]]:
    library = libraries.load("transformers")
    config = library.ViTConfig(intermediate_size=32, image_size=8, patch_size=4, **SIZES)
    model = library.ViTForImageClassification(config)
    return model, {"pixel_values": torch.randn(BATCH, 3, 8, 8), "labels": torch.tensor([0, 1] * 3)}


def speech(name: str, stable: bool) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        library = libraries.load("transformers")
        config = getattr(library, f"{name}Config")(
            intermediate_size=32, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 4),
            num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
            feat_proj_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, do_stable_layer_norm=stable,
            feat_extract_norm="layer" if stable else "group", **SIZES,
        )  # fmt: skip
        model = getattr(library, f"{name}Model")(config)
        mask = torch.ones(BATCH, 400, dtype=torch.int64)
        mask[1, 200:] = 0
        return model, {"input_values": torch.randn(BATCH, 400), "attention_mask": mask}

    return make


def timm_net(name: str, image: int = 32, **options: Any) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        model = libraries.load("timm").create_model(name, num_classes=4, **options)
        return model, {"x": torch.randn(BATCH, 3, image, image)}

    return make


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
NETS = {
    "llama": Net(decoder("Llama"), ("self_attn", "mlp")),
    "qwen3": Net(decoder("Qwen3"), ("self_attn", "mlp")),
    "gemma": Net(decoder("Gemma"), ("self_attn", "mlp"), 1e-5),
    "gemma2": Net(
        decoder("Gemma2", query_pre_attn_scalar=8),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        1e-5,
    ),
    "gpt2": Net(gpt2, ("attn", "mlp")),
    "bert": Net(bert),
    "vit": Net(vit, ("attention", "mlp")),
    "wav2vec2": Net(speech("Wav2Vec2", False)),
    "wav2vec2-stable": Net(speech("Wav2Vec2", True), ("attention", "feed_forward")),
    "hubert": Net(speech("Hubert", False)),
    "timm-vit": Net(timm_net("vit_tiny_patch16_224", **SMALL), ("drop_path1", "drop_path2")),
    "timm-vit-dropping": Net(
        timm_net("vit_tiny_patch16_224", drop_path_rate=0.3, init_values=0.5, **SMALL),
        ("drop_path1", "drop_path2"),
    ),
    "timm-eva": Net(
        timm_net("eva02_tiny_patch14_224", drop_path_rate=0.3, **{**SMALL, "patch_size": 8}),
        ("drop_path1", "drop_path2"),
    ),
    "timm-convnext": Net(
        timm_net("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), drop_path_rate=0.3),
        ("drop_path",),
    ),
    "timm-swin": Net(
        timm_net(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8,
            depths=(2, 1), num_heads=(2, 2), drop_path_rate=0.3,
        ),
        ("drop_path1", "drop_path2"),
    ),
}  # fmt: skip


class MaskedPart(nn.Module):
    """What a layer adds, on every row, times the mask of the rows and the scale."""

    def __init__(self, part: nn.Module | None, rows: KeptRows) -> None:
        super().__init__()
        self.part, self.rows = part, rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = args[0] if self.part is None else self.part(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        factor = (self.rows.slot >= 0).to(first.dtype) * self.rows.scale
        masked = first * factor.view(-1, *[1] * (first.dim() - 1))
        return (masked, *out[1:]) if isinstance(out, tuple) else masked


class MaskedLayer(nn.Module):
    def __init__(self, layer: nn.Module, rows: KeptRows) -> None:
        super().__init__()
        self.layer, self.rows = layer, rows

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept = (self.rows.slot >= 0).view(-1, *[1] * (x.dim() - 1))
        return torch.where(kept, self.layer(x, *args, **kwargs), x)


def make_rows(layers: int, scale: float) -> list[KeptRows]:
    generator = torch.Generator().manual_seed(0)
    plan = []
    for layer in range(layers):
        mask = torch.rand(BATCH, generator=generator) < 0.6
        mask[0] = layer != 1
        mask[1:] &= layer != 1  # nothing kept in the second
        plan.append(KeptRows.from_mask(mask, scale))
    return plan


def value_of(output: Any) -> Tensor:
    for name in ("loss", "last_hidden_state", "logits"):
        if getattr(output, name, None) is not None:
            value: Tensor = getattr(output, name)
            return value
    assert isinstance(output, Tensor)
    return output


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = NETS[name].make()
    model = model.double().train()
    floating = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model, floating


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    value = value_of(model(**inputs))
    weight = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(2))
    (value * weight).sum().backward()
    zero = torch.zeros(())
    return [value.detach(), *(zero if p.grad is None else p.grad for p in model.parameters())]


def compare(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(actual, expected, strict=True):
        largest = float(b.abs().max())
        torch.testing.assert_close(a, b.expand(a.shape), rtol=0, atol=tolerance * largest + 1e-15)


def options_of(net: Net) -> dict[str, Any]:
    return {"rescale": "train" if net.parts else "none"}


@pytest.mark.parametrize("rescale", ["train", "none"])
@pytest.mark.parametrize("name", NETS)
def test_equals_masking(name, rescale):
    net = NETS[name]
    if not net.parts and rescale == "train":
        pytest.skip("its branches are not told apart")
    model, inputs = made(name)
    masked = copy.deepcopy(model)
    report = patch(model, rows="block", drop_probs=0.5, rescale=rescale)
    assert isinstance(report, LayerReport)
    assert len(report.patched) >= 3
    assert not report.left
    scale = 1.6 if rescale == "train" else 1.0
    plan = make_rows(len(report.patched), scale)
    with report.use(plan):
        actual = run(model, inputs)
    for entry, rows in zip(report.patched, plan, strict=True):
        layer = masked.get_submodule(entry.name)
        for part in net.parts:
            own = layer.get_submodule(part)
            drops = "drop_path" in part
            layer.set_submodule(part, MaskedPart(None if drops else own, rows))
        if not net.parts:
            masked.set_submodule(entry.name, MaskedLayer(layer, rows))
    compare(actual, run(masked, inputs), net.tolerance)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "wav2vec2", "timm-vit"])
def test_gradient_checkpointing(name):
    """As the library does it; the rows are the same when a layer runs again."""
    results = []
    for checkpointed in (False, True):
        model, inputs = made(name)
        patch(model, rows="block", drop_probs=0.5, **options_of(NETS[name]))
        if checkpointed and name.startswith("timm"):
            model.set_grad_checkpointing()
        elif checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        results.append(run(model, inputs))
    compare(*results)


def test_checkpointing_with_a_plan():
    model, inputs = made("llama")
    report = patch(model, rows="block", drop_probs=0.5)
    model.gradient_checkpointing_enable()
    plan = report.plan_for_step(seed=1, step=3, batch=BATCH)
    with report.use(plan):
        actual = run(model, inputs)
    model.gradient_checkpointing_disable()
    model.zero_grad()
    with report.use(plan):
        compare(actual, run(model, inputs))
    model.gradient_checkpointing_enable()
    with report.use(plan):
        loss = model(**inputs).loss
    refused = pytest.raises(RuntimeError, match="run again in the backward with other rows")
    with report.use(report.plan(BATCH)), refused:
        loss.backward()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_and_evaluation_are_untouched(name):
    model, inputs = made(name)
    plain = copy.deepcopy(model).eval()
    patch(model, rows="block", drop_probs=0.5)
    run(model, inputs)
    model.eval()
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    prompt = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options), expected)


def test_copies_and_pickles():
    model, inputs = made("llama")
    kind = type(model.model.layers[0])
    keys = list(model.state_dict())
    report = patch(model, rows="block", drop_probs=0.5)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    plan = make_rows(3, 2.0)
    with report.use(plan):
        expected = run(model, inputs)
    for other in others:
        assert isinstance(other.model.layers[1], kind)
        assert list(other.state_dict()) == keys
        assert other.model.layers[1]._sdkernels.rows == [None]
        with use(other, plan):
            compare(run(other, inputs), expected)
    assert type(unpatch(model).model.layers[0]) is kind


@needs_scaling_in_graphs
def test_compiled():
    """After report.check(), one graph for the step; counts change without another."""
    model, inputs = made("timm-vit-dropping")
    report = patch(model, rows="block", drop_probs=0.5)
    with pytest.raises(Exception, match=r"report\.check"), compilation():
        torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)
    report.check(**inputs)
    assert model.training
    plans = [DepthPlan.sample(BATCH, report.drop_probs) for _ in range(3)]
    expected = []
    for plan in plans:
        model.zero_grad()
        with report.use(plan):
            expected.append(run(model, inputs))
    expected = [[value.clone() for value in values] for values in expected]
    with compilation():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        for plan, values in zip(plans, expected, strict=True):
            model.zero_grad()
            with report.use(plan):
                compare(run(compiled, inputs), values)


# Probabilities


def test_schedules():
    model, _ = made("llama")
    report = patch(model, rows="block", drop_probs=0.3)
    assert report.drop_probs == linear_decay(3, 0.3)
    report.drop_probs = uniform(3, 0.2)
    assert report.drop_probs == [0.2] * 3
    report.drop_probs = lambda progress: 0.6 * (1 - progress)
    assert report.drop_probs == pytest.approx(linear_decay(3, 0.6))
    report.progress = 0.5
    assert report.drop_probs == pytest.approx(linear_decay(3, 0.3))
    assert len(report.plan(4)) == 3
    report.progress = 1.0
    assert report.drop_probs == [0.0] * 3
    assert "p == 0" in str(report)


def test_a_run_goes_on_exactly():
    def start() -> tuple[nn.Module, LayerReport, torch.optim.Optimizer, Any]:
        model, inputs = made("llama")
        schedule = lambda progress: [0.5 * (1 - progress)] * 3  # noqa: E731
        report = patch(model, rows="block", drop_probs=schedule)
        return model, report, torch.optim.SGD(model.parameters(), 0.1), inputs

    def step(number: int, model: Any, report: Any, optimizer: Any, inputs: Any) -> None:
        report.progress = number / 8
        optimizer.zero_grad()
        with report.use(report.plan_for_step(seed=3, step=number, batch=BATCH)):
            model(**inputs).loss.backward()
        optimizer.step()

    run_through = start()
    for number in range(6):
        step(number, *run_through)
    first = start()
    for number in range(3):
        step(number, *first)
    saved = copy.deepcopy([first[0].state_dict(), first[1].state_dict(), first[2].state_dict()])
    resumed = start()
    for part, state in zip(resumed, saved, strict=False):
        part.load_state_dict(state)
    assert resumed[1].progress == 2 / 8
    assert resumed[1].drop_probs == first[1].drop_probs
    for number in range(3, 6):
        step(number, *resumed)
    for a, b in zip(resumed[0].parameters(), run_through[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_own_probabilities_are_read_at_every_call():
    model, _ = made("timm-vit-dropping")
    for block in model.blocks:
        block.drop_path1 = block.drop_path2 = libraries.load("timm.layers").DropPath(0.25)
    report = patch(model, rows="block")
    assert report.drop_probs == [0.25] * 3
    model.blocks[1].drop_path1.drop_prob = 0.5
    assert report.drop_probs == [0.25, 0.5, 0.25]


def test_expected_saving():
    model, inputs = made("llama")
    report = patch(model, rows="block", drop_probs=[0.5] * 3)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert report.expected_saving() == pytest.approx(0.5 * layers / total)
    del inputs["labels"]
    assert 0.2 < report.expected_saving(**inputs) < 0.5


# One's own layers


class Attention(nn.Linear):
    pass


class Layer(nn.Module):
    """Takes all sorts of inputs, and returns a tuple."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.attention = Attention(width, width)
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor, mask: Any = None, *, cache: Any = None, **inputs: Any) -> Any:
        self.seen = {"x": x, "mask": mask, "cache": cache, **inputs}
        return (x + self.attention(x), None)


class Block(Layer):
    """Of two branches, whose names are known."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention(x)
        return (x + self.mlp(x), None)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            x, *_ = layer(x, *args, **kwargs)
        return x


def patched(**options: Any) -> tuple[Model, LayerReport]:
    model = Model(Layer())
    return model, patch(model, rows="block", **{"drop_probs": [0.5], "rescale": "none"} | options)


class Locked(Layer):
    """Says itself what goes into a pickle."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_a_layer_that_pickles_itself():
    model = Model(Locked())
    patch(model, rows="block", drop_probs=[0.5], rescale="none")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.layers[0], Locked)
        assert other.layers[0].lock is not model.layers[0].lock
        assert len(drop_probs(other)) == 1


def test_what_belongs_to_samples():
    model, report = patched()
    x = torch.randn(4, 3, 4)
    inputs = {
        "of_samples": torch.arange(4.0).view(4, 1, 1, 1),
        "shared": torch.arange(9.0).view(1, 1, 3, 3),
        "position_embeddings": (torch.randn(1, 3, 2), torch.randn(4, 3, 2)),
        "table": torch.randn(3, 2),
        "number": torch.tensor(5.0),
        "flag": True,
    }
    rows = KeptRows.from_index(torch.tensor([1, 3]), 4)
    with report.use([rows]):
        y = model(x, torch.ones(4, 1, 1, 3), **inputs)
    seen = model.layers[0].seen
    assert y.shape == x.shape
    assert torch.equal(seen["x"], x[[1, 3]])
    assert seen["mask"].shape == (2, 1, 1, 3)
    assert seen["of_samples"].flatten().tolist() == [1, 3]
    assert seen["shared"] is inputs["shared"]
    assert seen["table"] is inputs["table"]
    assert seen["number"] is inputs["number"]
    assert seen["flag"] is True
    cos, sin = seen["position_embeddings"]
    assert cos is inputs["position_embeddings"][0]
    assert torch.equal(sin, inputs["position_embeddings"][1][[1, 3]])


class Cache:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length


def test_a_new_cache_stays_empty():
    model, _ = patched()
    model(torch.randn(4, 3, 4), cache=Cache(0), use_cache=True)
    assert model.layers[0].seen["cache"] is None
    assert model.layers[0].seen["use_cache"] is False


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "packed": ({"cu_seq_lens_q": torch.tensor([0, 5])}, "documents packed into one sequence"),
    "cache": ({"cache": Cache(3)}, "train with use_cache=False"),
    "unknown": ({"memory": torch.zeros(7, 2)}, r"memory: a Layer got a tensor of shape \(7, 2\)"),
    "both": ({"table": torch.zeros(4, 2)}, "it could be both"),
    "both-heads": ({"rope": torch.zeros(4, 3, 2)}, "it could be both"),
    "both-tokens": ({"rope": torch.zeros(4, 2, 2)}, "it could be both"),
    "numbers": ({"lengths": [3, 1, 2, 1]}, "as many numbers as there are samples"),
    "numbers-nested": ({"more": {"lengths": (3, 1, 2, 1)}}, "as many numbers as there are samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_that_are_refused(name):
    inputs, message = REFUSED[name]
    model, _ = patched()
    if name == "both-heads":
        model.layers[0].attention.num_heads = 4
    tokens = 4 if name in ("both", "both-tokens") else 3
    with pytest.raises(ValueError, match=message):
        model(torch.randn(4, tokens, 4), **inputs)


def test_few_numbers_are_of_samples_in_a_list_only():
    """Two in a tuple are the sizes of an image."""
    model, report = patched()
    rows = KeptRows.from_index(torch.tensor([1]), 2)
    with report.use([rows]):
        model(torch.randn(2, 3, 4), size=(32, 32))
        with pytest.raises(ValueError, match="as many numbers as there are samples"):
            model(torch.randn(2, 3, 4), lengths=[3, 2])


class Maps(Layer):
    def forward(self, x: Tensor) -> Any:
        return x + self.attention(x), x.mean(-1)


class Shorter(Layer):
    def forward(self, x: Tensor) -> Any:
        return (x + self.attention(x))[:, 1:]


class Normed(Layer):
    """A norm behind the sum, and a drop path inside."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = libraries.load("timm.layers").DropPath(0.5)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x + self.drop_path(self.attention(x)))


class NormBehind(Normed):
    """A norm behind the drop path, which is the identity at zero while it has no bias."""

    def forward(self, x: Tensor) -> Any:
        return x + self.norm(self.drop_path(self.attention(x)))


class ScaledShortcut(Normed):
    """A factor on the shortcut, which is one at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.factor * x + self.drop_path(self.attention(x))


class NormsBehind(Layer):
    """Norms behind branches that are zero at the start, where they are linear in anything."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = nn.Linear(4, 4), nn.RMSNorm(4)
        for parameter in (*self.attention.parameters(), *self.mlp.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Any:
        x = x + self.norm(self.attention(x))
        return x + self.norm(self.mlp(x))


class Centred(Layer):
    def forward(self, x: Tensor) -> Any:
        return x + self.attention(x - x.mean(0))


class BatchSecond(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (NormBehind, {}, RuntimeError, "a NormBehind changes it"),
        (ScaledShortcut, {}, RuntimeError, "a ScaledShortcut changes it"),
        (NormsBehind, {"rescale": "train"}, RuntimeError, 'patch with rescale="none"'),
        (Centred, {}, RuntimeError, "the samples of a Centred depend on each other"),
        (BatchSecond, {}, RuntimeError, "the samples of a BatchSecond depend on each other"),
        (Maps, {}, ValueError, "returned more than its hidden states"),
        (Shorter, {}, ValueError, "expected to return the shape that it was given"),
        (Normed, {}, RuntimeError, "a Normed changes it"),
        (Layer, {"rescale": "train"}, RuntimeError, 'patch with rescale="none"'),
    ],
)
def test_layers_that_are_refused(kind, options, error, message):
    model = Model(kind())
    patch(model, rows="block", **{"drop_probs": [0.5], "rescale": "none"} | options)
    x = torch.randn(8, 3, 4)
    torch.manual_seed(0)
    with pytest.raises(error, match=message):
        model(x)


def test_projections_that_start_at_zero():
    model, inputs = made("llama")
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.zeros_(projection.weight)
    before = copy.deepcopy(model.state_dict())
    patch(model, rows="block", drop_probs=[0.5] * 3)
    run(model, inputs)
    assert {layer._sdkernels.found.parts for layer in model.model.layers} == {("self_attn", "mlp")}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "timm-vit"])
def test_the_look_at_a_layer_of_low_precision(name, dtype):
    """None: under autocast. It is the precision of the look that counts, not that of the layer."""
    model, inputs = NETS[name].make()
    if dtype is not None:
        model = model.to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    report = patch(model.train(), rows="block", drop_probs=0.5)
    report.drop_probs = uniform(3, 0.5)
    rows = KeptRows.from_index(torch.tensor([1, 3]), BATCH, 2.0)
    with report.use([rows] * 3), torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        model(**inputs)
    for entry in report.patched:
        assert entry.block._sdkernels.found.parts == NETS[name].parts
        assert entry.block._sdkernels.found.apart


def test_the_look_at_a_layer_leaves_no_trace():
    """No gradient, no statistics, no random numbers; the model is in training afterwards."""
    model, inputs = made("timm-convnext")
    report = patch(model, rows="block", drop_probs=0.5)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    report.check(**inputs)
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_forward_in_the_place_of_a_submodules_own():
    """As accelerate's hooks put one there: it is called, and stays."""
    calls = []
    model = Model(Block())
    attention = model.layers[0].attention

    def forward(x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return type(attention).forward(attention, x)

    attention.forward = forward
    report = patch(model, rows="block", drop_probs=[0.5])
    for k in ([1, 3], [0]):
        with report.use([KeptRows.from_index(torch.tensor(k), 4, 2.0)]):
            model(torch.randn(4, 3, 4))
        assert calls[-1] == len(k)
        assert attention.__dict__["forward"] is forward


def test_tracing_records_the_layer_as_it_was():
    model, _ = patched()
    x = torch.randn(4, 3, 4)
    with pytest.warns(UserWarning, match="is its original forward"):
        traced = torch.jit.trace(model, (x,), check_trace=False)
    assert torch.equal(traced(x), copy.deepcopy(unpatch(model))(x))


class Vanishes(nn.Module):
    """A drop path under a name that says nothing."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * mask / (1 - self.rate)


class DropPath(Vanishes):
    """The same under the name that libraries give it."""


class Dropping(Layer):
    def __init__(self, kind: type[Vanishes] = DropPath) -> None:
        super().__init__()
        self.gone = kind(0.5)

    def forward(self, x: Tensor) -> Any:
        return x + self.gone(self.attention(x)), None


def test_a_drop_path_under_another_name():
    model = Model(Dropping(Vanishes))
    report = patch(model, rows="block")
    assert report.drop_probs == [0.5]
    x = torch.randn(4, 3, 4)
    rows = KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)
    with report.use([rows]):
        y = model(x)
    expected = x + (2.0 * (rows.slot >= 0)).view(-1, 1, 1) * model.layers[0].attention(x)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("check", [False, True])
def test_tracing_of_the_papers_rule(check):
    """What is recorded in evaluation multiplies the branches, once the layer was looked at."""
    model = Model(Dropping())
    report = patch(model, rows="block", rescale="eval")
    x = torch.randn(4, 3, 4)
    if not check:
        with pytest.raises(RuntimeError, match=r"call report\.check"):
            torch.jit.trace(model.eval(), (x,), check_trace=False)
        return
    report.check(x)
    traced = torch.jit.trace(model.eval(), (x,), check_trace=False)
    expected = x + 0.5 * model.layers[0].attention(x)
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(model(x), expected)


def test_a_drop_path_of_which_nothing_is_known_afterwards():
    model = Model(Dropping())
    report = patch(model, rows="block")
    model.layers[0].gone = nn.Tanh()
    assert math.isnan(report.drop_probs[0])
    assert [each.name for each in report.whole] == ["layers.0"]
    assert report.expected_saving() == 0.0
    assert "runs as before" in str(report)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_check_of_a_model_with_a_cache(name):
    """Each run of a layer would add to it."""
    model, inputs = made(name)
    report = patch(model, rows="block", drop_probs=0.5)
    assert all(each.holds for each in report.check(**inputs))
    report.drop_probs = [0.0, 0.5, 0.5]  # the first layer writes into the cache
    model(**inputs)


@pytest.mark.parametrize("check", [True, False])
def test_the_look_at_a_layer_calls_no_hooks(check):
    model = Model(Block())
    report = patch(model, rows="block", drop_probs=[0.5])
    calls: list[Any] = []
    for module in (model.layers[0], model.layers[0].attention):
        module.register_forward_hook(lambda *args: calls.append(args[2]))
    if check:
        assert report.check(torch.randn(4, 3, 4))[0].holds
        assert not calls
        return
    with report.use([KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)]):
        model(torch.randn(4, 3, 4))
    inside, (whole, _) = calls
    assert (len(inside), len(whole)) == (2, 4)
    assert inside.requires_grad


class MeetingAttention(Attention):
    """Tells of every call."""

    meet: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.meet is not None:
            self.meet()
        return super().forward(x)


@pytest.mark.parametrize("name", ["guessed", "drop_path"])
def test_two_threads_at_once(name):
    """The second comes into the layer before the first leaves, and leaves it after that."""
    layer = Block() if name == "guessed" else Dropping()
    layer.attention = MeetingAttention(4, 4)
    model, x = Model(layer), torch.randn(4, 3, 4)
    evaluated = model.eval()(x)
    report = patch(model.train(), rows="block", drop_probs=[0.5])
    report.check(x)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(model(x))) for _ in range(2)]
    inside, left = [threading.Event(), threading.Event()], threading.Event()

    def meet() -> None:
        second = threading.current_thread() is threads[1]
        inside[second].set()
        assert (left if second else inside[1]).wait(60)

    with report.use([KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)]):
        expected = model(x)
        layer.attention.meet = meet
        threads[0].start()
        assert inside[0].wait(60)
        threads[1].start()
        threads[0].join()
        left.set()
        threads[1].join()
    layer.attention.meet = None
    assert len(results) == 2
    assert all(torch.equal(result, expected) for result in results)
    assert torch.equal(model.eval()(x), evaluated)


class Checkpointed(Block):
    """Runs a part of itself again in the backward."""

    def __init__(self, drops: bool, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        if drops:
            self.drop_path = DropPath(0.5)

    def forward(self, x: Tensor) -> Any:
        def inner(x: Tensor) -> Tensor:
            drop = getattr(self, "drop_path", nn.Identity())
            x = x + drop(self.attention(x))
            return x + drop(self.mlp(x))

        if self.reentrant is None:
            return inner(x)
        return checkpoint(inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_a_checkpoint_inside_of_a_layer(drops, reentrant):
    gradients = []
    for inner in (None, reentrant):
        torch.manual_seed(0)
        model = nn.Sequential(Checkpointed(drops, inner)).double()
        x = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
        report = patch(model, rows="block", drop_probs=[0.5])
        with report.use([KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)]):
            model(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    compare(*gradients)


class Breaking(Dropping):
    """Ends a graph of torch.compile and goes on in another."""

    def forward(self, x: Tensor) -> Any:
        out = self.attention(x)
        torch._dynamo.graph_break()
        return x + self.gone(out), None


@needs_scaling_in_graphs
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_graph_that_ends_in_a_layer():
    model, x = Model(Breaking()), torch.randn(4, 3, 4)
    report = patch(model, rows="block")
    report.check(x)
    with report.use([KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)]):
        expected = run(model, {"x": x})
        expected = [value.clone() for value in expected]
        model.zero_grad()
        with compilation():
            compare(run(torch.compile(model, backend="aot_eager"), {"x": x}), expected, 1e-6)


class Counting(Dropping):
    """Reads and writes what it holds, and has its drop path under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.calls = self.gone, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.gone.last = x.shape[0]
        assert isinstance(self.gone, DropPath)
        return x + self.gone(self.attention(x)) + self.again(self.attention(x)), None


def test_what_a_layer_holds_and_leaves():
    model, x = Model(Counting()), torch.randn(4, 3, 4)
    report = patch(model, rows="block")
    layer: Any = model.layers[0]
    rows = KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)
    for step in range(2):
        with report.use([rows]):
            y = model(x)
        assert (layer.calls, layer.gone.last) == (step + 1, 2)
    expected = x + (4.0 * (rows.slot >= 0)).view(-1, 1, 1) * layer.attention(x)
    torch.testing.assert_close(y, expected)


class Bound(Block):
    """Chooses a method of its own at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = self.first

    def first(self, x: Tensor) -> Any:
        return super().forward(x)

    def forward(self, x: Tensor) -> Any:
        return self.chosen(x)


class Lists(Block):
    """Has a list of modules for a part, and looks into it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Any:
        assert self.attention
        assert len(self.mlp) == len([*self.mlp]) == 1
        return super().forward(x.to(self.mlp[0].weight.dtype))


class ByForward(Block):
    """Calls the forwards of its parts."""

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention.forward(x)
        return x + self.mlp.forward(x), None


class Drops(Block):
    def __init__(self) -> None:
        super().__init__()
        self.drop = DropPath(0.5)


class DropsByName(Drops):
    def forward(self, x: Tensor) -> Any:
        x = x + self.drop(x=self.attention(x))
        return x + self.drop(x=self.mlp(x)), None


class DropsByForward(Drops):
    def forward(self, x: Tensor) -> Any:
        x = x + self.drop.forward(self.attention(x))
        return x + self.drop.forward(self.mlp(x)), None


@pytest.mark.parametrize("kind", [Bound, Lists, ByForward, DropsByName, DropsByForward])
def test_how_a_layer_calls_its_parts(kind):
    model, x = Model(kind()), torch.randn(4, 3, 4)
    layer: Any = model.layers[0]
    report = patch(model, rows="block", drop_probs=[0.5])
    rows = KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)
    with report.use([rows]):
        y = model(x)
    kept = x[[1, 3]] + 2.0 * layer.attention(x[[1, 3]])
    torch.testing.assert_close(y[[1, 3]], kept + 2.0 * layer.mlp(kept))
    assert torch.equal(y[[0, 2]], x[[0, 2]])


class Growing(Dropping):
    """Makes a module of its own in the first call, keeps a part, and takes an attribute away."""

    def __init__(self) -> None:
        super().__init__()
        self.late: Any = None
        self.once = True

    def forward(self, x: Tensor) -> Any:
        if self.late is None:
            self.late = nn.Linear(4, 4)
            self.best = self.gone
            del self.once
        return x + self.gone(self.late(x)), None


def test_modules_that_a_layer_makes_in_a_call():
    model, x = Model(Growing()), torch.randn(4, 3, 4)
    layer: Any = model.layers[0]
    report = patch(model, rows="block")
    with report.use([KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)]):
        model(x)
        late = layer.late
        model(x).sum().backward()
    assert layer.late is late
    assert late.weight.grad is not None
    assert layer.best is layer.gone
    assert not hasattr(layer, "once")


class Masked(Drops):
    def forward(self, x: Tensor, mask: Any = None, **inputs: Any) -> Any:
        return x + self.drop(mask.softmax(-1)[:, 0] @ self.attention(x)), None


def test_a_token_that_attends_to_nothing():
    """It is no number, whatever the other samples are."""
    model = Model(Masked())
    report = patch(model, rows="block")
    mask = torch.zeros(4, 1, 3, 3)
    mask[3, :, 0] = -math.inf
    with report.use([KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)]):
        y = model(torch.randn(4, 3, 4), mask)
    assert y.isnan().any(-1).nonzero().tolist() == [[3, 0]]
    assert model.layers[0]._sdkernels.found.apart


def test_the_look_at_a_layer_seeds_no_other_device(monkeypatch):
    """The state of its generator is not kept."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    model, x = Model(Block()), torch.randn(4, 3, 4)
    report = patch(model, rows="block", drop_probs=[0.5])
    with report.use([KeptRows.from_index(torch.tensor([1, 3]), 4, 2.0)]):
        model(x)
    assert model.layers[0]._sdkernels.found.apart
    assert not seeds


def test_replicas_share_what_was_seen():
    model = Model(Block())
    patch(model, rows="block", drop_probs=[0.5])
    layer = model.layers[0]
    assert layer._replicate_for_data_parallel()._sdkernels.found is layer._sdkernels.found
    assert copy.deepcopy(layer)._sdkernels.found is not layer._sdkernels.found


@pytest.mark.parametrize("asked", ["attentions", "router_logits"])
def test_what_transformers_collects_from_parts(asked):
    """By hooks, which would see the kept rows only; hidden states are those of whole layers."""
    if asked == "attentions":
        model, inputs = made("llama")
        model.set_attn_implementation("eager")
    else:
        model, inputs = decoder("Mixtral", num_local_experts=2)()
    patch(model.train(), rows="block", drop_probs=[0.5] * 3)
    model(**inputs, **{f"output_{asked}": False})
    with pytest.raises(ValueError, match=rf"the {asked} of a \w+ are asked for"):
        model(**inputs, **{f"output_{asked}": True})
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert [len(each) for each in states] == [BATCH] * 4
    assert getattr(model.eval()(**inputs, **{f"output_{asked}": True}), asked)[0] is not None


def test_bad_arguments():
    model = Model(Layer(), Layer())
    bad = [
        ({"rows": "layer"}, ValueError, "rows: expected one of 'branch', 'block'"),
        ({"drop_probs": [0.5]}, ValueError, "drop_probs: expected 2 entries, one for each layer"),
        ({"drop_probs": "0.5"}, TypeError, "drop_probs: expected a number, a sequence"),
        ({"drop_probs": lambda t: None}, TypeError, "drop_probs: expected a number, .* NoneType"),
        ({"drop_probs": lambda t: 2.0}, ValueError, r"drop_probs: expected a drop probability in"),
        ({"drop_probs": None}, ValueError, "model: expected layers to drop"),
        ({"rescale": "eval", "drop_probs": 0.5}, ValueError, "which has no drop path"),
    ]
    for options, error, message in bad:
        with pytest.raises(error, match=message):
            patch(model, **{"rows": "block", **options})
        assert type(model.layers[0]) is Layer
    with pytest.raises(TypeError, match="got a function"):
        patch(model, drop_probs=lambda t: 0.5)
    report = patch(model, rows="block", drop_probs=0.5, rescale="none")
    with pytest.raises(ValueError, match="progress: expected a number from 0 to 1"):
        report.progress = 1.5
    with pytest.raises(ValueError, match="drop_probs: expected 2 entries"):
        report.drop_probs = [0.1]
    for nothing in (None, lambda t: None):
        with pytest.raises(TypeError, match=r"drop_probs: expected a number, .* got NoneType"):
            report.drop_probs = nothing
    assert report.drop_probs == [0.25, 0.5]
    with pytest.raises(ValueError, match="plan: expected 2 branches"), report.use([]):
        pass
    other = DepthPlan.sample(4, [0.1, 0.1], rescale="none")
    with pytest.raises(ValueError, match="drop probability of"), report.use(other):
        pass


def test_branches_of_several_probabilities():
    model, _ = made("timm-vit-dropping")
    model.blocks[2].drop_path2 = libraries.load("timm.layers").DropPath(0.1)
    with pytest.raises(ValueError, match="expected one drop probability for all branches"):
        patch(model, rows="block")
    assert patch(model, rows="block", drop_probs=uniform(3, 0.2)).drop_probs == [0.2] * 3


def test_branches_that_get_several_probabilities():
    """After patch: the layer refuses to run, and none runs as before."""
    model, inputs = made("timm-vit-dropping")
    report = patch(model, rows="block")
    model.blocks[2].drop_path2.drop_prob = 0.1
    assert not report.whole
    with pytest.raises(ValueError, match="expected one drop probability for all branches"):
        model(**inputs)


class Alone(Layer):
    """Computes from what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath(0.5)

    def forward(self) -> Any:
        return self.drop_path(self.attention.weight)


class Gathering(Dropping):
    """As a decorator that hides what a forward takes makes it."""

    def forward(*inputs: Any) -> Any:
        self, x = inputs
        return Dropping.forward(self, x)


def test_a_layer_without_an_input():
    """It is left alone, and the others are not left half patched."""
    model = Model(Dropping(), Alone(), Gathering())
    report = patch(model, rows="block")
    assert [each.name for each in report.patched] == ["layers.0", "layers.2"]
    assert [(each.name, each.reason) for each in report.left] == [
        ("layers.1", "its forward takes no input")
    ]
    row = KeptRows.from_index(torch.tensor([1]), 4, 2.0)
    with report.use([row, row]):
        y, _ = model.layers[2](torch.randn(4, 3, 4))
    assert y.shape == (4, 3, 4)


def test_layers_of_torch():
    """They are leaves of torch.fx, patched or not, and are copied and pickled under that name."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))
    )
    x = torch.randn(3, 4, 8)
    report = patch(model, rows="block", drop_probs=[0.5, 0.5], rescale="none")
    graph = symbolic_trace(model).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1"]
    rows = [KeptRows.from_index(torch.tensor(kept), 3, 1.0) for kept in ([0, 2], [1])]
    with report.use(rows):
        expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0])
        with use(other, rows):
            assert torch.equal(other(x), expected)
    assert type(unpatch(model)[0]) is nn.TransformerEncoderLayer


def test_a_layer_drop_of_its_own():
    model, _ = made("wav2vec2")
    model.config.layerdrop = 0.1
    with pytest.raises(ValueError, match="drops layers for the whole batch itself"):
        patch(model, rows="block", drop_probs=0.1, rescale="none")


def test_a_drop_path_that_draws_itself():
    report = patch(made_with_hook(), rows="block")
    assert [each.name for each in report.left] == ["blocks.1"]
    assert "has hooks" in report.left[0].reason
    with pytest.raises(ValueError, match=r"^model: strict=True, and 1 blocks are left .* hooks"):
        patch(made_with_hook(), rows="block", strict=True)


def test_a_block_that_drops_samples_by_itself():
    """DINOv2's and DINOv3's would drop some of the kept ones again."""
    model = Model(Block(), Block())
    for layer, ratio in zip(model.layers, (0.0, 0.3), strict=True):
        layer.sample_drop_ratio = ratio
    report = patch(model, rows="block", drop_probs=[0.5])
    assert [each.name for each in report.patched] == ["layers.0"]
    assert [(each.name, each.reason) for each in report.left] == [
        ("layers.1", "it drops samples by itself (sample_drop_ratio = 0.3): set that to 0")
    ]


def made_with_hook() -> nn.Module:
    model, _ = made("timm-vit-dropping")
    model.blocks[1].drop_path1.register_forward_hook(lambda *_: None)
    return model
