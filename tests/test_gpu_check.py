"""`make gpu-check` and the bandwidth benchmark, as far as they run without a GPU."""

import importlib.util
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.measure import correctness
from benchmarks.studies import cuda_bandwidth

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / ".ci/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HEAD = {"machine": "a GPU", "commit": "abc", "fingerprint": "sources"}


def python_step(gpu_check, name, program, **options):
    return gpu_check.Step(name, [sys.executable, "-c", program], {"WORD": "spoken"}, **options)


def states(outcomes):
    return {outcome.name: outcome.state for outcome in outcomes}


def test_report_has_failures_first(gpu_check):
    def run(name, program, seconds=600, **options):
        return gpu_check.run(python_step(gpu_check, name, program, **options), seconds)

    outcomes = [
        run("good", "import os; print(os.environ['WORD'])"),
        run("absent", "", missing="no such tool"),
        run("bad", "print('reason'); raise SystemExit(3)"),
        run("slow", "import time; time.sleep(60)", minutes=0.01),
        run("late", "import time; time.sleep(60)", seconds=0.5),
        run("behind", "raise SystemExit(3)", judge=gpu_check.failed_or_missed),
    ]
    assert states(outcomes) == {
        "good": "passed",
        "absent": "not run",
        "bad": "failed",
        "slow": "failed",
        "late": "left",
        "behind": "missed",
    }
    assert outcomes[0].output == "spoken\n"
    report = gpu_check.report(outcomes, HEAD)
    assert "2 failed, 1 left, 1 not run, 1 missed, 1 passed" in report
    titles = [line for line in report.splitlines() if line.startswith("## ")]
    assert titles == [
        "## bad: failed",
        "## slow: failed",
        "## late: left",
        "## absent: not run",
        "## behind: missed",
        "## good: passed",
    ]
    assert "no such tool" in report
    assert "a GPU" in report


def test_what_a_step_started_ends_with_it(gpu_check, tmp_path):
    """A worker of pytest, or what a sanitizer runs, would go on computing on the GPU."""
    lives = tmp_path / "lives"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(lives)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    step = python_step(gpu_check, "parent", parent, minutes=1 / 60)
    assert gpu_check.run(step, 600).state == "failed"
    time.sleep(3.5)
    assert not lives.exists()


def counting(gpu_check, tmp_path, name, code=0, wait=0.0, **options):
    """A step that leaves a line for each time it ran."""
    program = (
        f"import time; open({str(tmp_path / name)!r}, 'a').write('x'); time.sleep({wait}); "
        f"raise SystemExit({code})"
    )
    return python_step(gpu_check, name, program, **options)


def times_run(tmp_path, name):
    path = tmp_path / name
    return len(path.read_text()) if path.exists() else 0


def test_the_next_call_goes_on(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "extension_files", lambda: iter([]))
    planned = [
        counting(gpu_check, tmp_path, gpu_check.BUILD),
        counting(gpu_check, tmp_path, "bad", code=1),
        counting(gpu_check, tmp_path, "long", wait=60, minutes=1 / 30),
        counting(gpu_check, tmp_path, "last"),
    ]
    out = tmp_path / "out"

    def record(**changes):
        return gpu_check.Record(out, **{**HEAD, **changes})

    # The third gets less than its two seconds, the last not half of what it may need.
    remaining = iter([600, 600, 1.5, 1.5])
    with monkeypatch.context() as patched:
        patched.setattr(gpu_check, "remaining_of", lambda end: next(remaining))
        assert gpu_check.run_all(planned, record(), 9.5) == 1
    assert states(read(gpu_check, out)) == {
        gpu_check.BUILD: "passed",
        "bad": "failed",
        "long": "left",
        "last": "left",
    }
    planned[2] = counting(gpu_check, tmp_path, "long")
    assert gpu_check.run_all(planned, record(), None) == 1
    assert states(read(gpu_check, out)) == {
        gpu_check.BUILD: "passed",
        "bad": "failed",
        "long": "passed",
        "last": "passed",
    }
    counts = [times_run(tmp_path, step.name) for step in planned]
    assert counts == [1, 1, 2, 1]

    # Another commit with the same sources: only the build holds. Other sources: nothing does.
    assert states(record(commit="def").outcomes) == {gpu_check.BUILD: "passed"}
    assert states(record(commit="def", fingerprint="others").outcomes) == {}
    (out / "extension.tar.gz").unlink()
    assert gpu_check.BUILD not in states(record().outcomes)
    assert {path.name for path in out.iterdir()} == {"results.json", "report.md", "output.txt"}


def read(gpu_check, out):
    outcomes = json.loads((out / "results.json").read_text())["outcomes"]
    return [gpu_check.Outcome(**fields) for fields in outcomes]


def test_a_failed_build_ends_the_run(gpu_check, tmp_path):
    planned = [
        counting(gpu_check, tmp_path, gpu_check.BUILD, code=1),
        counting(gpu_check, tmp_path, "next"),
    ]
    assert gpu_check.run_all(planned, gpu_check.Record(tmp_path / "out", **HEAD), None) == 1
    assert times_run(tmp_path, "next") == 0


def test_extension_of_an_earlier_machine(gpu_check, tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "sdkernels").mkdir(parents=True)
    built = tree / "sdkernels/_C.cpython-312.so"
    built.write_text("code")
    monkeypatch.setattr(gpu_check, "ROOT", tree)
    planned = [counting(gpu_check, tmp_path, gpu_check.BUILD)]
    out = tmp_path / "out"
    assert gpu_check.run_all(planned, gpu_check.Record(out, **HEAD), None) == 0
    built.unlink()
    assert gpu_check.run_all(planned, gpu_check.Record(out, **HEAD), None) == 0
    assert built.read_text() == "code"
    assert times_run(tmp_path, gpu_check.BUILD) == 1


def test_files_of_the_steps_exist(gpu_check, tmp_path):
    planned = gpu_check.steps(tmp_path)
    names = {word for step in planned for word in step.command if word.startswith("tests/")}
    assert len(names) >= 10
    assert all((ROOT / name).is_file() for name in names)
    assert all(step.minutes <= 9 for step in planned)


def test_every_test_of_a_device_is_run(gpu_check):
    """A file whose tests take every device there is stands in a step."""
    listed = {f"test_{name}.py" for name in [*gpu_check.KERNELS, *gpu_check.OP]}
    takes_devices = re.compile(r"^def test_\w+\((?:.*, )?device[,)]|DEVICES\)", re.MULTILINE)
    found = {
        path.name
        for path in (ROOT / "tests").glob("test_*.py")
        if takes_devices.search(path.read_text())
    }
    assert len(found) >= 8
    assert found <= listed


UNINITIALIZED = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at {kernel}+0x70
=========     by thread (0,0,0) in block (0,0,0)
"""


def test_initcheck_is_judged_by_our_kernels(gpu_check):
    """PyTorch's own kernels read padding now and then; the other tools look at ours only."""
    filtered = {s.name: "--kernel-regex" in s.command for s in gpu_check.sanitizer_steps()}
    assert filtered == {
        f"compute-sanitizer {tool}": tool != "initcheck"
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    }
    ours = "void sdkernels::cuda::copy_rows<float, (int)4>(Arguments)"
    theirs = "void at::native::vectorized_elementwise_kernel<(int)4>(int)"
    judge = gpu_check.judge_sanitizer
    assert judge(0, UNINITIALIZED.format(kernel=theirs)) == "passed"
    assert judge(0, UNINITIALIZED.format(kernel=ours)) == "failed"
    assert judge(9, "") == "failed"
    assert judge(1, "========= Error: Device not supported") == "not run"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(gpu_check, capsys):
    assert gpu_check.main([]) == 1
    assert "sees no CUDA device" in capsys.readouterr().err
    assert gpu_check.main(["--list", "--steps", "bandwidth"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("shape", cuda_bandwidth.ROWS)
def test_what_is_timed_is_right(shape, monkeypatch):
    """Other shares of kept rows and layouts than the benchmark of kernels has."""
    row, channels_last = cuda_bandwidth.ROWS[shape]
    small = ((5, 16) if len(row) == 2 else (8, 4, 4), channels_last)
    monkeypatch.setitem(cuda_bandwidth.ROWS, shape, small)
    for dtype, keep in (("bf16", 0.25), ("fp32", 0.75)):
        for case in cuda_bandwidth.cases(shape, dtype, 8, keep):
            x = case.tensors(torch.device("cpu")).x
            assert x.is_contiguous() != channels_last
            assert correctness.check(case, torch.device("cpu")) > 0


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
    assert "|  | cpp | triton | traceable |" in printed
    assert "| compact | 0.950 | 0.900 | - |" in printed
    assert "| expand | 0.850 missed | - | - |" in printed
    assert "no results: traceable" in printed
    record = json.loads(out.read_text())
    assert record["environment"] == {"gpu": "one"}
    assert [r["backend"] for r in record["results"]] == ["cpp", "cpp", "triton"]
    with pytest.raises(SystemExit):
        cuda_bandwidth.main([*command, "cuda"])


def test_a_shape_is_measured(monkeypatch):
    """All but the clock: every kernel runs, and its floor is its share of the copy's bytes."""

    def seconds(functions, device):
        for function in functions:
            function()
        return [1e-3, 1e-3]

    monkeypatch.setattr(cuda_bandwidth, "seconds", seconds)
    results = cuda_bandwidth.run_shape("197x384", "bf16", 8, 0.25, torch.device("cpu"))
    shares = {result.case.split(maxsplit=4)[-1]: result.share for result in results}
    assert len(shares) == len(cuda_bandwidth.KERNELS)
    # Of the copy's 8 rows, read and written: 2 are read and written; 2 are read, 8 written.
    assert shares["compact"] == pytest.approx(4 / 16)
    assert shares["expand"] == pytest.approx(10 / 16)
