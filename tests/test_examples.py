"""The scripts in examples/ run, and learn something, in a setting that takes seconds."""

import importlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import libraries
import pytest
import torch

from sdkernels import Packed

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

pytest.importorskip("sklearn")

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


def epochs_of(output: str) -> dict[int, tuple[float, float]]:
    """epoch -> (loss, accuracy)"""
    found = re.findall(r"epoch +(\d+)  loss (\S+)  accuracy (\S+)", output)
    return {int(epoch): (float(loss), float(right)) for epoch, loss, right in found}


def torchrun(script: str, *arguments: str, seconds: int = 180) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, str(EXAMPLES / script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its workers
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def example(monkeypatch):
    """Imports a script of examples/ as a module, its own imports with it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_timm(example, capsys):
    libraries.load("timm")
    script = example("train_timm_vit")
    arguments = ["--epochs", "2", "--device", "cpu", "--batch-size", "64"]
    script.main(arguments)
    output = capsys.readouterr().out
    assert "6 blocks patched" in output
    first = epochs_of(output)
    assert first[2][0] < first[1][0] < 3
    torch.rand(100)  # whatever drew before, a seed gives the same run
    script.main(arguments)
    assert epochs_of(capsys.readouterr().out) == first


def test_torchvision_of_another_build_of_torch(tmp_path):
    """What PyPI's torchvision does beside a CPU build of PyTorch."""
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "timm.py").write_text(broken)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_timm_vit.py")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "pip install --force-reinstall --no-deps torchvision --index-url" in result.stderr
    assert "operator torchvision::nms does not exist" in result.stderr


@needs_gloo
def test_ddp():
    epochs = epochs_of(torchrun("ddp_digits.py", "--epochs", "2"))
    assert epochs[2][0] < epochs[1][0]
    assert epochs[2][1] > 0.3


@needs_gloo
def test_ddp_goes_on_where_it_stopped(example, capsys, monkeypatch, tmp_path):
    """A process alone: interrupted after an epoch, it ends as an uninterrupted run does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script = example("ddp_digits")
    common = ["--batch-size", "128"]
    script.main([*common, "--epochs", "3"])
    expected = epochs_of(capsys.readouterr().out)
    assert set(expected) == {1, 2, 3}
    file = ["--checkpoint", str(tmp_path / "digits.pt")]
    script.main([*common, *file, "--epochs", "1"])
    torch.rand(100)
    script.main([*common, *file, "--epochs", "3"])
    assert epochs_of(capsys.readouterr().out) == expected


@needs_gloo
def test_fsdp2():
    epochs = epochs_of(torchrun("fsdp2_digits.py", "--epochs", "2", "--bf16"))
    assert epochs[2][0] < epochs[1][0]
    assert epochs[2][1] > 0.25


def saved(output: str) -> int:
    """Per cent"""
    (share,) = re.findall(r"saved (\d+)%", output)
    return int(share)


def test_own_block(example, capsys):
    example("own_block").main(["--epochs", "1"])
    output = capsys.readouterr().out
    (difference,) = re.findall(r"differ by at most (\S+);", output)
    assert float(difference) < 1e-4
    assert 20 < saved(output) < 40


def test_resnet_schedule(example, capsys):
    example("resnet_schedule").main(["--epochs", "2"])
    output = capsys.readouterr().out
    epochs = epochs_of(output)
    assert epochs[2][0] < epochs[1][0]
    assert saved(output) == 28  # half of 0.5, and what the first block of (l / L) adds


def test_multi_crop(example, capsys):
    script = example("multi_crop")
    script.main(["--epochs", "2", "--batch-size", "128"])
    output = capsys.readouterr().out
    epochs = epochs_of(output)
    assert set(epochs) == {1, 2}
    assert 38 <= saved(output) <= 42
    script.main(["--epochs", "2", "--batch-size", "128", "--packed"])
    packed = epochs_of(capsys.readouterr().out)
    for epoch, (loss, right) in epochs.items():  # the same numbers, but for rounding
        assert packed[epoch][0] == pytest.approx(loss, abs=0.01)
        assert packed[epoch][1] == pytest.approx(right, abs=0.05)


def neighbours_of(output: str) -> list[tuple[float, float]]:
    """Loss (0 of the untrained net) and accuracy of every epoch."""
    found = re.findall(r"epoch +\d+  (?:loss (\S+)  )?k-NN accuracy (\S+)", output)
    return [(float(loss or 0), float(right)) for loss, right in found]


SMALL_DINO = ("--depth", "2", "--width", "32", "--batch-size", "128", "--epochs", "2")


def test_dino_as_masked(example, capsys, monkeypatch):
    """The same training with masks of the same rows; and its loss falls."""
    script = example("dino_digits")
    script.main(SMALL_DINO)
    output = capsys.readouterr().out
    packed = neighbours_of(output)
    assert len(packed) == 3
    assert packed[2][0] < packed[1][0]
    assert 37 <= saved(output) <= 43

    def masked(xs, branch, p, *, rows, norm, layer_scale, training, packed):
        ys = []
        for i, x in enumerate(xs):
            out = branch(Packed.of([norm(x)])).view(x.shape) * layer_scale
            if rows is not None and training:
                out = out * ((rows[i].slot >= 0) * rows[i].scale).view(-1, 1, 1)
            ys.append(x + out)
        return ys

    monkeypatch.setattr(script, "fused_stochastic_depth", masked)
    script.main(SMALL_DINO)
    for (loss, right), (expected, other) in zip(
        packed, neighbours_of(capsys.readouterr().out), strict=True
    ):
        assert loss == pytest.approx(expected, abs=0.01)
        assert right == pytest.approx(other, abs=0.03)


@needs_gloo
def test_dino_sharded():
    """Checkpointed, and sharded on two processes."""
    epochs = neighbours_of(torchrun("dino_digits.py", *SMALL_DINO))
    assert epochs[2][0] < epochs[1][0]


@pytest.mark.whole
@needs_gloo
def test_dino_compiled_and_sharded():
    """Two processes compile the blocks that are checkpointed, and shard them."""
    epochs = neighbours_of(torchrun("dino_digits.py", *SMALL_DINO, "--compile", seconds=400))
    assert epochs[2][0] < epochs[1][0]


@pytest.mark.whole
def test_dino_learns(example, capsys):
    """Nearest neighbours tell more than those of the untrained net."""
    example("dino_digits").main([])
    untrained, *_, (_, trained) = neighbours_of(capsys.readouterr().out)
    assert trained > untrained[1] + 0.05


def test_layer_dropout(example, capsys, tmp_path):
    """A run that was stopped ends as one that was not, to the last digit."""

    def run(*arguments: str) -> tuple[dict[int, float], str]:
        script.main(["--steps", "60", "--batch-size", "8", "--depth", "3", *arguments])
        output = capsys.readouterr().out
        losses = re.findall(r"step +(\d+)  loss (\S+)  ", output)
        return {int(step): float(loss) for step, loss in losses}, output.splitlines()[-1]

    script = example("layer_dropout")
    losses, text = run()
    assert losses[60] < losses[50] < 3
    file = ["--checkpoint", str(tmp_path / "model.pt")]
    run(*file, "--stop-after", "25")
    torch.rand(100)
    resumed, same_text = run(*file)
    assert resumed[60] == losses[60]
    assert text == same_text


def test_gates(example, capsys):
    example("gates").main(["--epochs", "2"])
    output = capsys.readouterr().out
    epochs = epochs_of(output)
    assert epochs[2][0] < epochs[1][0]
    assert "6 routers of 6 trained" in output
    assert saved(output) == 38
