"""Everything that needs a GPU, in one run: `make gpu-check`.

Builds for the GPUs of this machine into the Python that runs this, then runs the whole test suite,
once with the CUDA and once with the Triton kernels, compute-sanitizer's four tools on the kernels'
tests, and the benchmarks. Writes `build/gpu-check.md`, failures first. The exit code is the number
of failed steps.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "build/gpu-check.md"
PYTHON = sys.executable
LAST_LINES = 60  # of a step's output, in the report

BANDWIDTH = [PYTHON, "-m", "benchmarks", "cuda-bandwidth"]
PYTEST = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# All but the tests that choose a backend themselves, and those of what no kernel takes part in.
TRITON = ["tests"] + [
    f"--ignore-glob=tests/test_{name}.py"
    for name in ("triton*", "backends", "build", "benchmarks", "gpu_check", "cuda_*")
]
# What the sanitizer slows down a hundred times: small and large shapes once, not the long runs.
SANITIZED = [
    *("tests/test_kernel_shapes.py", "tests/test_functional.py"),
    *("-k", "cuda and not many_lines and not generated", "--hypothesis-profile=brief"),
]


@dataclass(frozen=True)
class Step:
    """One command of the run."""

    name: str
    command: list[str]
    environ: dict[str, str]
    minutes: int = 60
    missing: str | None = None  # why it cannot run here


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    step: Step
    state: str  # "passed", "failed" or "not run"
    seconds: float
    output: str


def sanitizer_steps() -> list[Step]:
    tool = shutil.which("compute-sanitizer")
    missing = None if tool else "compute-sanitizer is not on PATH (it is part of the CUDA toolkit)"
    steps = []
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9"]
        # Our kernels only, but initcheck has to see who else writes: their inputs are PyTorch's.
        if check != "initcheck":
            command += ["--kernel-regex", "kns=sdkernels"]
        command += [*PYTEST, "-x", *SANITIZED]
        # PyTorch's allocator would hide what lies between two tensors.
        environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        steps.append(Step(f"compute-sanitizer {check}", command, environ, 120, missing))
    return steps


def steps(quick: bool) -> list[Step]:
    build = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    sanitizers = [] if quick else sanitizer_steps()
    return [
        Step("build for CUDA", build, {"SDKERNELS_BUILD": "cuda"}),
        Step("info", [PYTHON, "-m", "sdkernels.info"], {}, 5),
        Step("graphs, streams, races, large tensors", [*PYTEST, "tests/test_cuda.py"], {}),
        Step("rows that do not exist", [*PYTEST, "tests/test_kernel_traps.py"], {}),
        Step("whole test suite, on CPU and CUDA", PYTEST, {}, 90),
        Step("tests with Triton kernels", [*PYTEST, *TRITON], {"SDKERNELS_BACKEND": "triton"}, 90),
        *sanitizers,
        Step("bandwidth", [*BANDWIDTH, "--backends", "cpp,triton"], {}),
        Step(
            "benchmarks", [PYTHON, "-m", "benchmarks", "--preset", "quick", "--device", "cuda"], {}
        ),
    ]


def run(step: Step) -> Outcome:
    if step.missing:
        return Outcome(step, "not run", 0.0, step.missing)
    print(f"== {step.name}", flush=True)
    start = time.monotonic()
    try:
        result = subprocess.run(
            step.command,
            cwd=ROOT,
            env={**os.environ, **step.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * step.minutes,
        )
        state, output = "passed" if result.returncode == 0 else "failed", result.stdout
    except subprocess.TimeoutExpired as expired:
        partial = expired.stdout or b""
        text = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        state, output = "failed", f"{text}\nstopped after {step.minutes} minutes"
    taken = time.monotonic() - start
    print(f"   {state}, {taken:.0f} s", flush=True)
    return Outcome(step, state, taken, output)


def report(outcomes: list[Outcome]) -> str:
    """Failures first, then what was not run, then the rest."""
    order = ["failed", "not run", "passed"]
    counts = ", ".join(f"{sum(o.state == state for o in outcomes)} {state}" for state in order)
    lines = [
        "# GPU check",
        "",
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "",
        counts,
    ]
    lines += ["", "| step | state | seconds |", "| --- | --- | --- |"]
    ranked = sorted(outcomes, key=lambda outcome: order.index(outcome.state))
    lines += [f"| {o.step.name} | {o.state} | {o.seconds:.0f} |" for o in ranked]
    for outcome in ranked:
        tail = outcome.output.strip().splitlines()[-LAST_LINES:]
        lines += ["", f"## {outcome.step.name}: {outcome.state}", ""]
        lines += [f"    {' '.join(outcome.step.command)}", "", "```text", *tail, "```"]
    return "\n".join(lines) + "\n"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> int:
    """Run all steps and write the report; later steps run whatever became of earlier ones."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without compute-sanitizer")
    options = parser.parse_args()
    if not has_gpu():
        print("gpu-check: this PyTorch sees no CUDA device", file=sys.stderr)
        return 1
    outcomes = []
    for step in steps(options.quick):
        outcomes.append(run(step))
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(report(outcomes))
    print(f"report: {REPORT}")
    return sum(outcome.state == "failed" for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
