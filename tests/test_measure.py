"""`sdkernels.measure`: what it says, what it refuses, and that it changes nothing."""

import copy
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import libraries
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import NETS

import sdkernels
from sdkernels.measure import MeasureError, Measurement, masking, measurement, turns
from sdkernels.measure.__main__ import main
from sdkernels.measure.comparing import Differs, compare

ROOT = Path(__file__).parents[1]
QUICK = {"budget": 0.0, "turns": 2, "progress": False}


def vit(drop_path_rate=0.4, **options):
    timm = libraries.load("timm.models.vision_transformer")
    torch.manual_seed(0)
    return timm.VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=4,
        drop_path_rate=drop_path_rate,
        **options,
    ).train()


IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def measured():
    return sdkernels.measure(vit(), IMAGES, **QUICK)


def test_what_is_measured(measured):
    assert isinstance(measured, Measurement)
    assert (measured.model, measured.batch, measured.device) == ("VisionTransformer", 6, "cpu")
    assert (measured.patched, measured.idle, measured.left) == (2, 1, ())
    assert measured.drop_probs == pytest.approx((0.0, 0.0, 0.4, 0.4))
    assert measured.compared == 1 + len(list(vit().parameters()))
    assert measured.largest_error < 1e-4
    assert measured.not_compared is None
    # Half of the branches drop 0.4; patches and head are not in them.
    assert 1 / (1 - 0.2) > measured.expected_speedup > 1 / (1 - 0.1)
    assert {name: len(each) for name, each in measured.seconds.items()} == {
        "unpatched": 2,
        "patched": 2,
    }
    assert measured.speedup_low <= measured.speedup <= measured.speedup_high
    unpatched, patched = measured.saved_bytes
    assert 0 < patched < unpatched
    assert measured.outside_is_timed
    assert 0 < measured.outside <= 1
    assert measured.peak_bytes is None
    assert measured.host_bound is None


def test_ten_lines(measured):
    lines = str(measured).splitlines()
    assert len(lines) == 10
    names = [line[:12].strip() for line in lines]
    assert len(set(names)) == 10
    assert "2 patched, 1 of them with p = 0, 0 left alone" in lines[1]
    assert "as unpatched with the same rows" in lines[2]
    assert f"expected {measured.expected_speedup:.2f}" in lines[3]
    assert "known on CUDA only" in lines[6]
    assert "drop_probs=[0.4] * 4" in lines[9]


def test_nothing_is_changed():
    model = vit(proj_drop_rate=0.1).eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    numpy = pytest.importorskip("numpy")
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    wanted = random.random(), numpy.random.random(), torch.rand(())
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    sdkernels.measure(model, IMAGES, drop_probs=0.3, **QUICK)
    assert (random.random(), numpy.random.random(), torch.rand(())) == wanted
    assert [type(module) for module in model.modules()] == classes
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert bool((model.head.weight.grad == 1).all())


def test_nothing_is_changed_where_it_is_interrupted():
    model, calls = vit(), []
    classes = [type(module) for module in model.modules()]

    def loss(output):
        calls.append(random.random())
        if len(calls) > 5:
            raise KeyboardInterrupt
        return output.sum()

    random.seed(2), torch.manual_seed(2)
    wanted = random.random(), torch.rand(())
    random.seed(2), torch.manual_seed(2)
    with pytest.raises(KeyboardInterrupt):
        sdkernels.measure(model, IMAGES, loss=loss, **QUICK)
    assert (random.random(), torch.rand(())) == wanted
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", ["timm-convnext", "torchvision-resnet", "transformers-swin"])
def test_every_library(name):
    net = NETS[name]
    model, images = net.model(torch.float32), net.inputs(8, torch.float32)
    found = sdkernels.measure(model, images, drop_probs=0.5, sampler="fixed", **QUICK)
    assert found.not_compared is None
    assert found.compared > 10
    assert max(found.drop_probs) == 0.5
    assert len(str(found).splitlines()) == 10


@pytest.mark.parametrize("sampler", ["bernoulli", "fixed"])
def test_batches_losses_and_autocast(sampler):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = vit()

        def forward(self, images, labels=None):
            logits = self.net(images)
            return {"logits": logits, "loss": F.cross_entropy(logits, labels)}

    labels = torch.zeros(6, dtype=torch.long)
    options = {"sampler": sampler, "amp": torch.bfloat16, **QUICK}
    batches = ({"images": IMAGES, "labels": labels}, (IMAGES, labels))
    for batch in batches:
        found = sdkernels.measure(Wrapped(), batch, loss=lambda out: out["loss"], **options)
        assert found.compared == 2 + len(list(vit().parameters()))
        assert found.not_compared is None
        assert "bfloat16" in str(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo, which instantiates functions
def test_compiled(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    torch._dynamo.reset()
    found = sdkernels.measure(vit(), IMAGES, sampler="fixed", compile=True, **QUICK)
    torch._dynamo.reset()
    assert found.compiled
    assert not found.outside_is_timed
    assert ", compiled" in str(found)


def refusal(model, batch=IMAGES, **options):
    with pytest.raises(MeasureError) as error:
        sdkernels.measure(model, batch, **{**QUICK, **options})
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_model_without_drop_path():
    assert "no drop path" in refusal(nn.Linear(4, 4), torch.zeros(2, 4))
    assert "every drop probability is 0" in refusal(vit(0.0))


def test_blocks_that_cannot_be_patched():
    class DropPath(nn.Module):
        def forward(self, x):
            return x

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.drop_path = nn.Linear(4, 4), DropPath()

        def forward(self, x):
            return x + self.drop_path(self.f(x))

    assert "none of its 1 blocks" in refusal(nn.Sequential(Own()), torch.zeros(2, 4))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), "can't allocate memory"]
)
@pytest.mark.parametrize("step", [1, 6])
def test_out_of_memory(error, step):
    calls = []

    def loss(output):
        calls.append(None)
        if len(calls) >= step:
            raise RuntimeError(error) if isinstance(error, str) else error
        return output.sum()

    text = refusal(vit(), loss=loss)
    assert text.startswith("memory ran out while ")
    assert "with 6 samples on cpu; a smaller batch may fit" in text
    assert ("comparing" in text) == (step == 1)


def test_a_frozen_model():
    assert "none of its parameters requires grad" in refusal(vit().requires_grad_(False))


def test_another_error_is_not_hidden():
    def loss(output):
        raise RuntimeError("own")

    with pytest.raises(RuntimeError, match=r"^own$"):
        sdkernels.measure(vit(), IMAGES, loss=loss, **QUICK)


def test_a_model_that_computes_something_else_is_not_timed(monkeypatch):
    right = masking.naive_masking

    def wrong(*arguments, **options):
        return 1.01 * right(*arguments, **options)

    monkeypatch.setattr(masking, "naive_masking", wrong)
    monkeypatch.setattr(measurement, "time_in_turns", None)
    assert "something else than the unpatched one: output 0: largest error" in refusal(vit())


def test_random_numbers_that_cannot_be_switched_off():
    model = vit()
    model.blocks[1].mlp.fc1.register_forward_hook(lambda module, x, y: F.dropout(y, 0.5))
    found = sdkernels.measure(model, IMAGES, **QUICK)
    assert found.compared == 0
    assert "draws random numbers besides" in str(found).splitlines()[2]


@pytest.mark.parametrize("batch", ["text", (), {"x": 3}, torch.tensor(1.0)])
def test_a_batch_without_tensors(batch):
    with pytest.raises(TypeError, match=r"batch: expected a tensor"):
        sdkernels.measure(vit(), batch, **QUICK)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        sdkernels.measure(3, IMAGES)
    with pytest.raises(ValueError, match="turns"):
        sdkernels.measure(vit(), IMAGES, turns=0)


# The pieces


def test_masks_follow_the_law():
    torch.manual_seed(0)
    drop = masking.Masking([0.3, 0.0])
    x = torch.ones(20000, 2)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert drop(x) is x  # the other branch's
    assert not torch.equal(drop(x), x)
    assert drop.eval()(x) is x


def test_turns_begin_with_another_step_each():
    called, told = [], []
    steps = {name: lambda name=name: called.append(name) for name in "abc"}
    timed = turns.time_in_turns(
        steps,
        torch.device("cpu"),
        3,
        warm_up=1,
        say=lambda turn, of, name: told.append((turn, name)),
    )
    assert "".join(called) == "cababcbcacab"
    assert {name: len(each) for name, each in timed.seconds.items()} == dict.fromkeys("abc", 3)
    assert [turn for turn, _ in told] == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3
    for name in "abc":
        assert all(h <= s for h, s in zip(timed.host[name], timed.seconds[name], strict=True))


def test_a_budget_ends_the_turns():
    steps = {"a": lambda: None}
    timed = turns.time_in_turns(steps, torch.device("cpu"), 50, budget=0.0)
    assert len(timed.seconds["a"]) == turns.LEAST


def test_comparing():
    one, zero = torch.ones(3), torch.zeros(3)
    assert compare({"output": one * 1.0001}, {"output": one}) == pytest.approx(1e-4, rel=0.01)
    assert compare({"gradient of a": None}, {"gradient of a": zero}) == 0.0
    for got in (one * 1.01, one * float("nan")):
        with pytest.raises(Differs, match="output"):
            compare({"output": got}, {"output": one})
    with pytest.raises(Differs, match="missing"):
        compare({"gradient of a": None}, {"gradient of a": one})
    # Rounding of a gradient that is zero but for rounding.
    big = {"gradient of a": one, "gradient of b": zero + 1e-9}
    assert compare({**big, "gradient of b": zero - 1e-9}, big) == 0.0


# The command


def test_bad_names(capsys):
    for name in (
        "timm:no_such_net",
        "nothing",
        ":x",
        "no.such.module:f",
        "sys:nothing",
        "os:getcwd",
    ):
        if name.startswith("timm"):
            libraries.load("timm")
        assert main([name]) == 1
        error = capsys.readouterr().err
        assert error.startswith("python -m sdkernels.measure: MODEL: ")
        assert len(error.splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["timm:x", "--drop-path", "2"])


@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_bad_seconds(capsys, seconds):
    with pytest.raises(SystemExit):
        main(["timm:x", "--seconds", seconds])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: --seconds: expected a number from 0, got " in error


@pytest.fixture
def command(tmp_path):
    """The command, for a model of one's own."""
    (tmp_path / "own.py").write_text(
        "import sys\n"
        f"sys.path.append({str(ROOT / 'tests')!r})\n"
        "import test_measure\n"
        "def make():\n"
        "    return test_measure.vit(0.0)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    arguments = ["own:make", "--image", "16", "--batch", "4", "--uniform"]

    def start(*more):
        return subprocess.Popen(
            [sys.executable, "-m", "sdkernels.measure", *arguments, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    return start


@pytest.mark.slow
def test_the_command(command):
    libraries.load("timm")
    process = command("--seconds", "0")
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert len(out.splitlines()) == 10
    assert "2 patched, 0 left alone; drop probability 0.40 on average" in out
    assert "timing both in turns" in error
    assert "Warning" not in error


@pytest.mark.slow
def test_an_interrupted_command(command):
    libraries.load("timm")
    process = command("--seconds", "1000")
    for line in process.stderr:
        if "in turns" in line:
            break
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=100)
    assert process.returncode == 130
    assert out == ""
    assert error.splitlines()[-1] == (
        "python -m sdkernels.measure: interrupted, nothing was measured"
    )
    assert "Traceback" not in error
