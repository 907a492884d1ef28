"""`make gpu-check` and the bandwidth benchmark, as far as they run without a GPU."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.studies import cuda_bandwidth

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / ".ci/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_report_has_failures_first(gpu_check):
    def step(name, program, **options):
        return gpu_check.Step(name, [sys.executable, "-c", program], {"WORD": "spoken"}, **options)

    outcomes = [
        gpu_check.run(step("good", "import os; print(os.environ['WORD'])")),
        gpu_check.run(step("absent", "", missing="no such tool")),
        gpu_check.run(step("bad", "print('reason'); raise SystemExit(3)")),
        gpu_check.run(step("slow", "import time; time.sleep(60)", minutes=0)),
    ]
    assert [outcome.state for outcome in outcomes] == ["passed", "not run", "failed", "failed"]
    assert outcomes[0].output == "spoken\n"
    report = gpu_check.report(outcomes)
    assert "2 failed, 1 not run, 1 passed" in report
    titles = [line for line in report.splitlines() if line.startswith("## ")]
    assert titles == ["## bad: failed", "## slow: failed", "## absent: not run", "## good: passed"]
    assert "no such tool" in report


def test_files_of_the_steps_exist(gpu_check):
    names = set()
    for step in gpu_check.steps(quick=False):
        names |= {word for word in step.command if word.startswith("tests/")}
    assert len(names) >= 4
    assert all((ROOT / name).is_file() for name in names)


def test_triton_suite_is_run_once(gpu_check):
    """A step of its own, without the tests that start tests under some backend."""
    (step,) = (s for s in gpu_check.steps(quick=True) if "SDKERNELS_BACKEND" in s.environ)
    assert step.environ == {"SDKERNELS_BACKEND": "triton"}
    files = step.command[step.command.index("tests") :]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-qq", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = set(re.findall(r"^tests/(\w+)\.py", result.stdout, re.MULTILINE))
    assert found >= {"test_cuda", "test_ops", "test_kernel_traps", "test_training"}, result.stderr
    assert not found & {"test_backends", "test_triton", "test_triton_gpu", "test_build"}


def test_initcheck_sees_every_writer(gpu_check):
    filtered = {s.name: "--kernel-regex" in s.command for s in gpu_check.sanitizer_steps()}
    assert filtered == {
        f"compute-sanitizer {tool}": tool != "initcheck"
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 1
    assert "sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", cuda_bandwidth.KERNELS)
def test_what_is_timed_is_right(name, dtype):
    kernel = cuda_bandwidth.KERNELS[name]
    for row, memory_format in (
        ((5, 16), torch.contiguous_format),
        ((8, 4, 4), torch.channels_last),
    ):
        if len(row) == 3 and "norm" in name:
            continue
        inputs = cuda_bandwidth.Inputs.make(6, row, memory_format, dtype, torch.device("cpu"))
        cuda_bandwidth.check(kernel, inputs)


def test_backends_stand_side_by_side(monkeypatch, capsys, tmp_path):
    """Each is measured in a process of its own; one that does not get through is a failure."""

    def measure(command, env, **options):
        backend = env["SDKERNELS_BACKEND"]
        assert command[command.index("--shapes") + 1] == "256x14x14"
        shares = {"cpp": {"compact": 0.95, "expand": 0.85}, "triton": {"compact": 0.9}}
        results = [
            cuda_bandwidth.Result(backend, case, 1.0, 1.0, 0.0, share, share >= 0.9)
            for case, share in shares.get(backend, {}).items()
        ]
        record = {"environment": {"gpu": "one"}, "results": [vars(each) for each in results]}
        if results:
            Path(command[command.index("--out") + 1]).write_text(json.dumps(record))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_bandwidth.subprocess, "run", measure)
    out = tmp_path / "record.json"
    command = ["--shapes", "256x14x14", "--out", str(out), "--backends"]
    assert cuda_bandwidth.main([*command, "triton"]) == 0
    capsys.readouterr()
    assert cuda_bandwidth.main([*command, "cpp,triton,traceable"]) == 1
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["cpp", "triton", "traceable"] in rows
    assert ["compact", "0.950", "0.900", "-"] in rows
    assert ["expand", "0.850", "missed", "-", "-"] in rows
    assert "no results: traceable" in printed
    record = json.loads(out.read_text())
    assert record["environment"] == {"gpu": "one"}
    assert [r["backend"] for r in record["results"]] == ["cpp", "cpp", "triton"]
    with pytest.raises(SystemExit):
        cuda_bandwidth.main([*command, "cuda"])


def test_both_ways_of_the_pair_agree():
    row, memory_format = (5, 16), torch.contiguous_format
    inputs = cuda_bandwidth.Inputs.make(6, row, memory_format, torch.float32, torch.device("cpu"))
    ours, peers = cuda_bandwidth.pair(inputs)
    for a, b in zip(ours(), peers(), strict=True):
        torch.testing.assert_close(a, b)
