"""The paper's experiments: networks, rules, data, and training that goes on where it was killed."""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch

# Nothing here is needed to use the package.
for package in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(package)

from benchmarks.measure import flops  # noqa: E402
from benchmarks.paper import claims, data, networks, report, timing, training  # noqa: E402
from benchmarks.paper.__main__ import main  # noqa: E402
from benchmarks.providers.libraries import import_module  # noqa: E402
from benchmarks.providers.networks import HAS_LIBRARIES, seeded_module  # noqa: E402
from sdkernels import DepthPlan  # noqa: E402

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMOKE = claims.Effort(
    duration="",
    recipe=training.Recipe(depth=8, epochs=2, batch=64, mode="row"),
    decay_recipe=training.Recipe(depth=8, epochs=1, batch=64, mode="row"),
    seeds=2,
    survivals=(0.5, 1.0),
    time=(14, 8, 2),
    deep=(20, 4, 2),
    image=(64, 2, 1),
)
TINY = training.Recipe(depth=8, epochs=2, batch=256, mode="row", p_last=0.5)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", None)


@pytest.fixture(scope="module")
def few(digits):
    """A tenth of the digits: an epoch of two steps at a batch of 64."""
    return replace(
        digits,
        train=tuple(part[:128] for part in digits.train),
        validation=tuple(part[:32] for part in digits.validation),
        test=tuple(part[:32] for part in digits.test),
    )


# Networks


@pytest.mark.parametrize(("n", "millions"), [(18, 1.73), (200, 19.4)])
def test_the_papers_networks(n, millions):
    with torch.device("meta"):
        net = networks.PaperResNet(n, [0.0] * 3 * n)
    assert len(net.blocks) == 3 * n
    # He et al. count 1.7 million for 110 layers and 19.4 for 1202.
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 6 * n + 2


def test_shapes_of_the_stages():
    net = networks.PaperResNet(2, [0.0] * 6, classes=7).eval()
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape[1:])))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert seen == [(16, 32, 32)] * 2 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2


def test_shortcut_has_no_parameters_of_its_own():
    x = torch.randn(2, 4, 6, 6)
    y = networks.Shortcut()(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 4:], torch.zeros(2, 4, 3, 3))
    assert y[0, 1, 2, 0].item() == pytest.approx(x[0, 1, 4:6, 0:2].mean().item(), abs=1e-6)
    projected = networks.PaperResNet(1, [0.0] * 3, projection=True)
    plain = networks.PaperResNet(1, [0.0] * 3)
    assert len(list(projected.parameters())) == len(list(plain.parameters())) + 2 * 3


def frozen(net):
    """Batch norm with its running statistics, so that samples do not depend on each other."""
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return net


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_fused_and_naive_are_the_same_function(mode):
    drop = networks.drop_probabilities("linear", 6, 0.5)
    x = torch.randn(16, 3, 32, 32)
    generator = torch.Generator().manual_seed(5)
    plan = DepthPlan.sample(16, drop, mode=mode, rescale="eval", generator=generator)
    assert any(rows.k < 16 for rows in plan)
    results = []
    for implementation in ("naive", "fused"):
        net = seeded_module(
            lambda name=implementation: networks.PaperResNet(
                2, drop, mode=mode, implementation=name
            ),
        )
        torch.manual_seed(1)
        net = frozen(net).double()
        y = net(x.double(), plan)
        gradients = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        results.append((y, *gradients))
    for naive, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, naive, rtol=1e-9, atol=1e-9)


def test_constant_depth_is_all_blocks():
    x = torch.randn(4, 3, 32, 32)
    nets = [
        seeded_module(lambda name=name: networks.PaperResNet(1, [0.0] * 3, implementation=name))
        for name in ("constant", "fused")
    ]
    torch.testing.assert_close(*(net.train()(x) for net in nets))


@pytest.mark.parametrize("rescale", ["eval", "train"])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_training_is_evaluation_in_expectation(rescale, mode):
    """Equation 5: one block, no ReLU after it: the mean over the gates is what evaluation does."""
    block = networks.Block(4, 1, 0.3, mode, rescale, "fused").double()
    block.residual.activation = None
    frozen(block)
    x = torch.rand(1, 4, 6, 6, dtype=torch.float64)
    outcomes = {}
    for seed in range(40):
        rows = DepthPlan.for_step(seed, 0, 1, [0.3], mode=mode, rescale=rescale)[0]
        outcomes[rows.k] = block.residual(x, rows=rows)
    assert outcomes.keys() == {0, 1}
    expected = 0.3 * outcomes[0] + 0.7 * outcomes[1]
    block.residual.eval()
    torch.testing.assert_close(block.residual(x), expected)


def test_schedules():
    linear = networks.drop_probabilities("linear", 54, 0.5)
    assert (linear[0], linear[-1]) == pytest.approx((0.5 / 54, 0.5))
    assert networks.drop_probabilities("uniform", 3, 0.8) == pytest.approx([0.2] * 3)
    assert sum(1 - p for p in linear) == pytest.approx(40.25)  # (3 L - 1) / 4
    plans = [DepthPlan.for_step(0, step, 1, linear) for step in range(2000)]
    depth = mean(sum(rows.k for rows in plan) for plan in plans)
    assert depth == pytest.approx(40.25, abs=0.3)  # five standard errors


@pytest.mark.skipif(not HAS_LIBRARIES, reason="needs timm and torchvision")
def test_resnet_152_has_fifty_gates():
    with torch.device("meta"):
        net = networks.PaperResNet152(networks.drop_probabilities("linear", 50, 0.5))
    patched = [block for block in net.modules() if hasattr(block, "_sdkernels")]
    assert [block._sdkernels.p[0] for block in patched] == pytest.approx(
        [0.5 * (number + 1) / 50 for number in range(50)]
    )


# Data


def write_cifar(folder, name, monkeypatch, images=20):
    """The files of torchvision's data set, with few images; returns the pixels of the last one."""
    kind = getattr(import_module("torchvision.datasets"), data.SETS[name])
    key = "labels" if name == "cifar10" else "fine_labels"
    target, rng = folder / kind.base_folder, np.random.default_rng(0)
    target.mkdir()
    monkeypatch.setattr(kind, "_check_integrity", lambda self: target.is_dir())
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    for file, _ in (*kind.train_list, *kind.test_list):
        pixels = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
        (target / file).write_bytes(pickle.dumps({"data": pixels, key: [9] * images}))
    classes = [str(number) for number in range(10 if name == "cifar10" else 100)]
    (target / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: classes}))
    return pixels


@pytest.mark.skipif(not HAS_LIBRARIES, reason="needs timm and torchvision")
@pytest.mark.parametrize(("name", "images"), [("cifar10", 100), ("cifar100", 20)])
def test_cifar_from_its_files(name, images, tmp_path, monkeypatch):
    pixels = write_cifar(tmp_path, name, monkeypatch)
    loaded = data.load(name, tmp_path)
    assert loaded.classes == (10 if name == "cifar10" else 100)
    assert len(loaded.train[1]) == 9 * images // 10
    assert len(loaded.validation[1]) == images // 10
    assert len(loaded.test[1]) == 20
    assert loaded.flips
    assert set(loaded.test[1].tolist()) == {9}
    x = loaded.train[0]
    assert x.shape[1:] == (3, 32, 32)
    assert x.mean((0, 2, 3)).abs().max() < 1e-4
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    red = torch.from_numpy(pixels[0, :1024]).float()
    image = loaded.test[0][0, 0].flatten()
    assert torch.corrcoef(torch.stack([red, image]))[0, 1] > 0.9999  # row by row
    again = data.load(name, tmp_path)
    assert torch.equal(again.train[0], loaded.train[0])


@pytest.mark.skipif(not HAS_LIBRARIES, reason="needs timm and torchvision")
def test_cifar_is_checked(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"something else")
    for folder in (None, tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match=r"^--data: expected the folder .*cs\.toronto\.edu"):
            data.load("cifar10", folder)


def test_cifar_needs_torchvision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "is_installed", lambda library: False)
    assert main(["train", "--dataset", "cifar10", "--out", str(tmp_path)]) == 2
    assert "--dataset: cifar10 is read by torchvision" in capsys.readouterr().err


def test_digits(digits):
    assert [len(part[1]) for part in (digits.train, digits.validation, digits.test)] == [
        1294,
        143,
        360,
    ]
    assert digits.train[0].shape[1:] == (1, 32, 32)
    assert not digits.flips  # a mirrored digit is another sign


def test_augmentation():
    x = torch.arange(1.0, 2 * 3 * 8 * 8 + 1).view(2, 3, 8, 8)
    still = data.augment(x, False, torch.Generator(), shift=0)
    assert torch.equal(still, x)
    seen, mirrored = set(), set()
    for seed in range(400):
        y = data.augment(x, True, torch.Generator().manual_seed(seed), shift=1)
        assert y.shape == x.shape
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        for image, of in zip(y, padded, strict=True):
            matches = [
                (row, column, flip)
                for row in range(3)
                for column in range(3)
                for flip in (False, True)
                if torch.equal(
                    image,
                    of[:, row : row + 8, column : column + 8].flip(2)
                    if flip
                    else of[:, row : row + 8, column : column + 8],
                )
            ]
            assert len(matches) == 1
            seen.add(matches[0][:2])
            mirrored.add(matches[0][2])
    assert len(seen) == 9
    assert mirrored == {False, True}


# Training


def test_rates_of_the_papers_recipe():
    recipe = training.Recipe()
    rates = [recipe.rate(epoch) for epoch in (0, 249, 250, 374, 375, 499)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    deep = training.Recipe(depth=1202, epochs=300, warmup=10)
    rates = [deep.rate(epoch) for epoch in (9, 10, 149, 150, 225)]
    assert rates == pytest.approx([0.01, 0.1, 0.1, 0.01, 0.001])


def test_training_learns_and_records(few):
    recipe = replace(TINY, epochs=15, batch=32, p_last=0.8, milestones=())
    trainer = training.Trainer(recipe, few, CPU)
    record = trainer.run()
    assert len(record["epochs"]) == 15
    best = min(record["epochs"], key=lambda epoch: epoch["validation_error"])
    assert record["test_error"] == best["test_error"]
    assert all(epoch["gradient"] > 0 for epoch in record["epochs"])
    assert mean(trainer.losses[-4:]) < mean(trainer.losses[:4]) - 0.1


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"channels_last": True}])
def test_other_formats(options, few):
    recipe = replace(TINY, epochs=1, batch=64, **options)
    trainer = training.Trainer(recipe, few, CPU)
    plain = training.Trainer(replace(TINY, epochs=1, batch=64), few, CPU)
    assert trainer.train_step() == pytest.approx(plain.train_step(), rel=0.02)


def train_few(out):
    """The command, on every third digit: two epochs of six steps."""
    digits = data.load("digits", None)
    parts = {name: getattr(digits, name) for name in ("train", "validation", "test")}
    third = {name: tuple(part[::3] for part in both) for name, both in parts.items()}
    command = ("train", "--device", "cpu", "--depth", "8", "--epochs", "2", "--batch", "64")
    options = ("--mode", "row", "--checkpoint-every", "4", "--out", str(out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.paper.__main__.load", lambda *_: replace(digits, **third))
        assert main([*command, *options]) == 0


KILLED = """if True:
    import os, signal, sys
    sys.path.insert(0, "tests")
    import test_paper
    Trainer = test_paper.training.Trainer
    right = Trainer.train_step

    def train_step(self):
        if self.step == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(self)

    Trainer.train_step = train_step
    test_paper.torch.set_num_threads(int(sys.argv[2]))
    test_paper.train_few(sys.argv[1])
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    """Killed in mid-epoch, between two checkpoints: the same losses to the last bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_few(whole)
    arguments = ("-c", KILLED, str(killed), str(torch.get_num_threads()))
    process = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(torch.load(killed / "checkpoint.pt", weights_only=True)["losses"]) == 8
    train_few(killed)
    runs = [json.loads((folder / "run.json").read_text()) for folder in (whole, killed)]
    for run in runs:
        for epoch in run["epochs"]:
            del epoch["seconds"]
    assert runs[0] == runs[1]


def test_a_checkpoint_of_another_run_is_refused(few, tmp_path):
    recipe = replace(TINY, epochs=1, batch=64)
    training.Trainer(recipe, few, CPU, tmp_path).run()
    with pytest.raises(ValueError, match=r"is of another run: p_last \(0\.5, now 0\.2\);.*--out"):
        training.Trainer(replace(recipe, p_last=0.2), few, CPU, tmp_path)
    record = training.Trainer(recipe, few, CPU, tmp_path).run()
    assert len(record["epochs"]) == 1  # finished before: nothing is run again
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["losses"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"is of an older version, without losses; .*--out"):
        training.Trainer(recipe, few, CPU, tmp_path)


def test_interruption_leaves_a_checkpoint(few, tmp_path):
    recipe = replace(TINY, epochs=3, batch=64)

    def stop(loss):
        if trainer.step == 3:
            raise KeyboardInterrupt

    trainer = training.Trainer(recipe, few, CPU, tmp_path, advance=stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    again = training.Trainer(recipe, few, CPU, tmp_path)
    assert again.step == 3
    assert again.losses == trainer.losses


def test_two_processes_train_one_network(tmp_path):
    """With a gate for the whole mini-batch; both processes end with the same weights."""
    arguments = ("train", "--device", "cpu", "--depth", "8", "--epochs", "1", "--batch", "256")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
        *("-m", "benchmarks.paper", *arguments, "--out", str(tmp_path)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run.json").read_text())
    assert len(run["epochs"]) == 1
    assert len(run["losses"]) == 5
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["identity"]["processes"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "9"], "--depth: expected 6n + 2"),
        (["--p-last", "0"], "--p-last: expected a probability above 0"),
        (["--epochs", "0"], "--epochs: expected at least 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys, tmp_path):
    assert main(["train", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_none_is_one_sentence(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["claim", "time", "--device", "abacus", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "argument --device: " in capsys.readouterr().err


def test_a_recipe_has_one_of_its_choices():
    assert training.Recipe(amp="bf16").amp == "bf16"
    with pytest.raises(ValueError, match="amp: expected one of bf16, got 'fp16'"):
        training.Recipe(amp="fp16")


# Claims


@pytest.mark.skipif(not HAS_LIBRARIES, reason="needs timm and torchvision")
def test_every_claim_has_a_table_and_curves_a_plot(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.paper.__main__.load", lambda *_: few)
    monkeypatch.setitem(claims.EFFORTS, "quick", SMOKE)
    arguments = ["claim", "all", "--preset", "quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "claims.json").read_text())
    assert result["claims"].keys() == claims.CLAIMS.keys()
    text = (tmp_path / "report.md").read_text()
    for name, record in result["claims"].items():
        assert f"## {record['title']}" in text
        assert f"![{name}]" in text or name not in report.PLOTS
    for name in report.PLOTS:
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    depth = result["claims"]["time"]["expected_depth"]
    assert depth["plan"] == pytest.approx(depth["formula"], abs=0.3)
    assert "about 75 %" in text
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    assert "report.md" in capsys.readouterr().out


def test_claims_share_their_runs(few, tmp_path):
    lab = claims.Lab(SMOKE, few, CPU, tmp_path)
    recipe = replace(TINY, epochs=1, batch=64)
    first = lab.train(recipe)
    assert lab.train(recipe) == first
    assert len(list(tmp_path.iterdir())) == 1
    lab.train(replace(recipe, seed=1))
    assert len(list(tmp_path.iterdir())) == 2


def test_ideal_pays_in_full_for_what_is_around_the_blocks():
    def samples(seconds, kept=1.0):
        return [timing.Sample(each, kept, 0.0) for each in seconds]

    nothing = torch.nn.Identity()
    nets = {
        timing.SKELETON: timing.Timed(nothing, []),
        timing.CONSTANT: timing.Timed(nothing, []),
        "fused": timing.Timed(nothing, [0.0, 0.5], "batch", floor="floor"),
        "floor": timing.Timed(nothing, [0.0, 0.5], "batch"),
        "naive": timing.Timed(nothing, [0.0, 0.5], "batch", masked=True),
    }
    measured = {
        timing.SKELETON: samples([1.0, 1.0, 1.0]),
        timing.CONSTANT: samples([5.0, 5.0, 50.0]),  # something else ran in the last repeat
        "fused": samples([3.3, 3.3, 3.3], kept=0.5),  # the rows kept less than they do on average
        "floor": samples([3.0, 1.1, 3.0], kept=0.5),
        "naive": samples([5.5, 5.5, 5.5]),
    }
    constant, fused, floor, naive = timing.table(nets, measured)
    assert fused["over_floor"] == pytest.approx(1.1)
    assert floor["over_floor"] is None
    assert constant["of_constant"] == constant["ideal"] == 1.0
    assert fused["ideal"] == pytest.approx((1 + 4 * 0.75) / 5)
    assert fused["over_ideal"] == pytest.approx(3.3 / (1 + 4 * 0.5))
    assert fused["of_constant"] == pytest.approx(1.1 * 0.8)
    assert naive["of_constant"] == pytest.approx(1.1)
    assert naive["ideal"] == fused["ideal"]


def test_floor_computes_the_branches_of_the_kept_samples_and_nothing_of_the_stream():
    drop = networks.drop_probabilities("linear", 3, 0.5)
    generator = torch.Generator().manual_seed(0)
    plan = DepthPlan.sample(8, drop, mode="row", rescale="eval", generator=generator)
    assert all(0 < rows.k < 8 for rows in plan)
    images = torch.randn(8, 3, 32, 32)
    fused, floor, skeleton = (
        seeded_module(lambda name=name: networks.PaperResNet(1, drop, implementation=name))
        for name in ("fused", "floor", "skeleton")
    )
    needed = flops.count(lambda: fused(images, plan).sum().backward())
    assert flops.count(lambda: floor(images, plan).sum().backward()) == needed
    branches = [p for block in floor.blocks for p in block.residual.branch.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branches)
    torch.testing.assert_close(floor(images, plan), skeleton(images), rtol=0, atol=0)


def test_report_of_another_schema_is_refused(tmp_path, capsys):
    (tmp_path / "claims.json").write_text('{"schema": 0}')
    assert main(["report", str(tmp_path)]) == 2
    assert "expected schema 2, got 0" in capsys.readouterr().err


def test_examples():
    import doctest

    for module in (networks, report):
        assert doctest.testmod(module).failed == 0
