"""The benchmarks' harness: its arithmetic, its refusals, and one tiny run of everything."""

import doctest
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Nothing here is needed to use the package.
for package in ("matplotlib", "pytest_benchmark", "rich", "sklearn"):
    pytest.importorskip(package)

from benchmarks import compiled, correctness, figures, memory, presets, providers, targets  # noqa: E402
from benchmarks.__main__ import parse_arguments  # noqa: E402

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY_BLOCK = providers.BlockCase(width=32, tokens=16, batch=8, keep=0.5, head_width=16)


def record(case, provider, repeat, samples, memory=None):
    """One turn, as pytest-benchmark writes it to its JSON file."""
    info = {"baseline": case.pop("baseline"), "floor": case.pop("floor"), "memory": memory}
    info |= {"case": case, "provider": provider, "repeat": repeat}
    return {"extra_info": info, "stats": {"data": samples}}


def test_merge():
    merged = figures.merge([[1.0, 1.1, 1.2], [1.3, 1.0, 1.4]])
    assert merged.median == pytest.approx(1.15)
    assert merged.turn_medians == (1.1, 1.3)
    assert merged.spread == pytest.approx(0.1 / 1.15)
    assert (merged.low, merged.high, merged.samples) == (1.0, 1.4, 6)


def test_merge_refuses_no_samples():
    with pytest.raises(ValueError, match="at least one sample"):
        figures.merge([[]])


def test_block_ratios():
    times = {
        "naive": [[4.0, 4.0], [4.0, 4.0]],
        "fused": [[2.0, 2.0], [2.2, 2.2]],
        "dense": [[2.0, 2.0], [2.0, 2.0]],
    }
    kept = {"naive": 1000, "fused": 550, "dense": 500}
    records = [
        record(
            {"name": "b", "kind": "block", "baseline": "naive", "floor": "dense"},
            provider,
            repeat,
            samples,
            {"kind": memory.SAVED, "bytes": kept[provider]} if repeat == 0 else None,
        )
        for provider, turns in times.items()
        for repeat, samples in enumerate(turns)
    ]
    (case,) = figures.collect(records)
    fused = case["providers"]["fused"]
    assert fused["median"] == pytest.approx(2.1)
    assert fused["speedup"] == pytest.approx(4.0 / 2.1)
    assert fused["over_floor"] == pytest.approx(1.05)
    assert fused["over_floor_turns"] == pytest.approx((1.0, 1.1))
    assert fused["memory_of_baseline"] == pytest.approx(0.55)
    assert case["providers"]["naive"]["speedup"] == 1.0


def test_op_bandwidth_is_net_of_the_empty_backward():
    case = {"name": "o", "kind": "op", "traffic_bytes": 300, "copy_bytes": 400}
    times = {"fused": 5.0, "torch": 9.0, "copy": 4.0, "empty": 1.0}
    records = [
        record(case | {"baseline": "torch", "floor": None}, provider, 0, [seconds])
        for provider, seconds in times.items()
    ]
    (result,) = figures.collect(records)
    fused = result["providers"]["fused"]
    # The copy moves 100 bytes per second, the op 300 bytes in 5 - 1 seconds.
    assert fused["of_copy_bandwidth"] == pytest.approx(0.75)
    assert fused["speedup"] == pytest.approx(1.8)
    assert "of_copy_bandwidth" not in result["providers"]["copy"]


def test_host_cost_is_the_extra_over_plain():
    times = {"plain": 10.0, "naive": 14.0, "fused": 16.0}
    records = [
        record({"name": "h", "kind": "host", "baseline": "naive", "floor": "plain"}, name, 0, [t])
        for name, t in times.items()
    ]
    (case,) = figures.collect(records)
    assert case["providers"]["fused"]["extra"] == pytest.approx(6.0)
    assert case["providers"]["fused"]["extra_of_baseline"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("measured", "at_most", "met", "gap"),
    [
        (1.02, True, True, 0.0),
        (1.122, True, False, 0.1),
        (1.122, False, True, -0.1),
        (0.918, False, False, 0.1),
        (None, True, None, None),
    ],
)
def test_targets(measured, at_most, met, gap):
    outcome = targets.Outcome("t", "c", 1.02, at_most, "x", measured)
    assert outcome.met is met
    assert outcome.gap == pytest.approx(gap)


def test_every_target_has_its_case_in_the_quick_preset():
    names = presets.PRESETS["quick"].names()
    outcomes = targets.outcomes([])
    assert outcomes
    assert all(outcome.case in names for outcome in outcomes)
    assert all(outcome.met is None for outcome in outcomes)


def test_unknown_preset_lists_the_valid_ones():
    with pytest.raises(presets.SelectionError) as error:
        presets.get_preset("fast")
    assert all(name in str(error.value) for name in ("'fast'", *presets.PRESETS))


def test_filter():
    preset = presets.PRESETS["smoke"]
    assert presets.select(preset, None) == preset.names()
    assert presets.select(preset, "host, train") == ["host-identity-8x4x16", "train-digits"]
    assert len(presets.select(preset, "op-*-bwd")) == 1
    with pytest.raises(presets.SelectionError) as error:
        presets.select(preset, "nothing")
    assert all(name in str(error.value) for name in preset.names())


@pytest.mark.parametrize("case", presets.PRESETS["smoke"].cases, ids=lambda case: case.name)
def test_providers_compute_the_same(case):
    assert correctness.check(case, CPU) > 0


@pytest.mark.parametrize("op", providers.OPS)
@pytest.mark.parametrize("dtype", providers.DTYPES)
def test_ops_compute_the_same(op, dtype):
    assert correctness.check(providers.OpCase(op, "fwd", dtype, (8, 16, 32), 4), CPU) > 0


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_compiled_providers_compute_the_same():
    case = compiled.CompileCase(compiled.STATIC, 32, 16, 8, keep=0.5, head_width=16)
    assert correctness.check(case, CPU) > 0


def wrong_scale(x, branch, p, *, norm, layer_scale, rows):
    out = layer_scale * branch(norm(x[rows.index]))
    return x.index_add(0, rows.index, out, alpha=1.01 * rows.scale)


def wrong_gradient(x, branch, p, *, norm, layer_scale, rows):
    out = layer_scale.detach() * branch(norm(x[rows.index])) + 0 * layer_scale
    return x.index_add(0, rows.index, out, alpha=rows.scale)


def not_a_number(x, branch, p, *, norm, layer_scale, rows):
    return wrong_scale(x, branch, p, norm=norm, layer_scale=layer_scale, rows=rows) * float("nan")


@pytest.mark.parametrize(
    ("provider", "what"),
    [
        (wrong_scale, "output"),
        (wrong_gradient, "gradient of scale1"),
        (not_a_number, "output"),
    ],
)
def test_wrong_provider_is_refused(monkeypatch, provider, what):
    monkeypatch.setitem(providers.BLOCK_PROVIDERS, "wrong", provider)
    with pytest.raises(correctness.ProviderMismatch, match=rf"'wrong' differs .* its {what}"):
        correctness.check(TINY_BLOCK, CPU)


def test_saved_activations():
    x = torch.ones(8, 4, requires_grad=True)
    weight = torch.ones(4, 4, requires_grad=True)
    # Saved: x (128 bytes, for d_weight; d_x needs the weight alone) and exp's result, once each.
    assert memory.saved_activation_bytes(lambda: (x @ weight).exp(), [weight]) == 2 * 128
    assert memory.saved_activation_bytes(lambda: (x[:4] @ weight) + x[:4], [weight]) == 128


@pytest.mark.parametrize("name", ["figures", "presets", "report"])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"benchmarks.{name}")).failed == 0


def run(*arguments, program=("-m", "benchmarks")):
    return subprocess.run(
        (sys.executable, *program, *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_run_end_to_end(tmp_path):
    result = run("--preset", "smoke", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    for table in ("Ops", "Blocks", "Host cost", "Training", "Reach"):
        assert table in result.stdout
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["schema"] == figures.SCHEMA
    assert [case["name"] for case in written["cases"]] == presets.PRESETS["smoke"].names()[:-1]
    block = next(case for case in written["cases"] if case["kind"] == "block")
    assert block["providers"].keys() == providers.BLOCK_PROVIDERS.keys()
    assert block["providers"]["fused"]["memory"]["bytes"] > 0
    rounds = presets.PRESETS["smoke"].rounds["block"]
    assert block["providers"]["fused"]["samples"] == rounds.repeats * rounds.rounds
    # Same kept rows from the same seed: eleven steps stay together to rounding.
    assert written["training"]["largest_loss_difference"]["fused"] < 1e-4
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "blocks.png",
        "ops-8x16x32-k4.png",
        "training.png",
    }


def test_wrong_provider_stops_the_run(tmp_path):
    program = """if True:
        import sys
        from benchmarks import providers
        right = providers.BLOCK_PROVIDERS["index_add"]
        providers.BLOCK_PROVIDERS["fused"] = lambda *a, **k: 1.01 * right(*a, **k)
        from benchmarks.__main__ import main
        sys.exit(main(sys.argv[1:]))
    """
    arguments = ("--preset", "smoke", "--filter", "block", "--out", str(tmp_path))
    result = run(*arguments, program=("-c", program))
    assert result.returncode == 1
    assert "provider 'fused' differs" in " ".join(result.stdout.split())
    assert "median" not in result.stdout
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (["--preset", "fast"], "quick"),
        (["--preset", "smoke", "--filter", "nothing"], "host-identity-8x4x16"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_arguments_list_the_valid_ones(arguments, listed, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments)
    assert stop.value.code == 2
    assert listed in capsys.readouterr().err


def test_help_documents_presets_and_filters(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(
        preset.name in text and preset.duration in text for preset in presets.PRESETS.values()
    )
    assert "shell patterns" in text
