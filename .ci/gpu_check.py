"""Everything that needs a GPU, in pieces that fit into short runs: `make gpu-check`.

Builds for the GPUs of this machine into the Python that runs this, then runs the tests that take
CUDA tensors, with the CUDA and with the Triton kernels, bandwidth and benchmarks, and
compute-sanitizer's four tools on the kernels' tests. No step takes more than nine minutes.

    .ci/gpu_check.py --minutes 9.5 --out FOLDER

stops after 9.5 minutes; the next call goes on where that one stopped, on another machine too if
FOLDER came along: it holds the results so far, and the extension that was built. It is written
after each step, and has few files: `report.md` (failures first), `results.json`, `output.txt`,
`extension.tar.gz`, `bandwidth-*.json`, `benchmarks.tar.gz`. A target of the benchmarks that was
missed is no failure. The exit code is 1 if a step failed, 2 if some are left for the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build/gpu-check"
PYTHON = sys.executable
LAST_LINES = 60  # of a step's output, in the report
LONGEST = 9  # minutes of a step
MISSED = 3  # exit code of a benchmark that ran and missed a target
MEGABYTES = 15  # of a file in the folder, at most

PYTEST = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Tests that take every device there is, and those of what only a GPU has.
KERNELS = ["ops", "kernel_shapes", "layouts", "row_weights"]
OP = ["activation", "functional", "inplace", "min_saving", "seeds", "steps", "training", "bad_law"]
# What the sanitizers slow down a hundred times: each kernel, small and odd shapes.
SANITIZED = [
    *("tests/test_kernel_shapes.py", "tests/test_functional.py"),
    *("-k", "cuda and not many_lines and not generated", "--hypothesis-profile=brief"),
]
BUILD = "build for CUDA"
EXTENSION = ("sdkernels/_C*.so", "sdkernels/_build.json")


def failed_or_missed(code: int, output: str) -> str:
    return "passed" if code == 0 else "missed" if code == MISSED else "failed"


def passed_or_failed(code: int, output: str) -> str:
    return "passed" if code == 0 else "failed"


def judge_sanitizer(code: int, output: str) -> str:
    """Failed where one of our kernels is named: initcheck sees all, PyTorch's among them."""
    if "Device not supported" in output:
        return "not run"
    ours = re.search(r"^=========\s+at .*sdkernels", output, re.MULTILINE)
    return "failed" if code != 0 or ours else "passed"


@dataclass(frozen=True)
class Step:
    """One command of the run."""

    name: str
    command: list[str]
    environ: dict[str, str] = field(default_factory=dict)
    minutes: float = LONGEST
    missing: str | None = None  # why it cannot run here
    judge: Callable[[int, str], str] = passed_or_failed  # its state, of exit code and output


@dataclass(frozen=True)
class Outcome:
    """What became of a step. It is done unless its state is "left"."""

    name: str
    command: str
    state: str  # "failed", "left", "not run", "missed" or "passed"
    seconds: float
    output: str


STATES = ("failed", "left", "not run", "missed", "passed")


def tests(names: Sequence[str], *words: str) -> list[str]:
    processes = ["-n", "8"] if has_module("xdist") else []
    return [*PYTEST, *processes, *(f"tests/test_{name}.py" for name in names), *words]


def has_module(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def sanitizer_steps() -> list[Step]:
    tool = shutil.which("compute-sanitizer")
    missing = None if tool else "compute-sanitizer is not on PATH (it is part of the CUDA toolkit)"
    steps = []
    for check in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = [tool or "compute-sanitizer", "--tool", check]
        # Our kernels only, but initcheck has to see who else writes: their inputs are PyTorch's.
        if check != "initcheck":
            command += ["--error-exitcode", "9", "--kernel-regex", "kns=sdkernels"]
        command += [*PYTEST, *SANITIZED]
        # PyTorch's allocator would hide what lies between two tensors.
        environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        name = f"compute-sanitizer {check}"
        steps.append(Step(name, command, environ, missing=missing, judge=judge_sanitizer))
    return steps


def steps(out: Path) -> list[Step]:
    """In the order of what is worth most, if time runs out."""
    build = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    bandwidth = [PYTHON, "-m", "benchmarks", "cuda-bandwidth"]
    short = [PYTHON, "-m", "benchmarks", "--preset", "gpu-short", "--device", "cuda"]
    triton = {"SDKERNELS_BACKEND": "triton"}
    return [
        Step(BUILD, build, {"SDKERNELS_BUILD": "cuda"}),
        Step("info", [PYTHON, "-m", "sdkernels.info"], {}, 2),
        Step("the kernels on CUDA tensors", tests(KERNELS, "-k", "cuda")),
        Step("graphs, streams, races, large tensors", tests(["cuda"])),
        Step("rows that do not exist", tests(["kernel_traps"])),
        Step("the op on CUDA tensors", tests(OP, "-k", "cuda")),
        *(
            Step(
                f"bandwidth, {backend}",
                [
                    *bandwidth,
                    "--backends",
                    backend,
                    "--out",
                    str(out / f"bandwidth-{backend}.json"),
                ],
                judge=failed_or_missed,
            )
            for backend in ("cpp", "triton")
        ),
        Step("Triton's kernels on CUDA tensors", tests(KERNELS, "-k", "cuda"), triton),
        Step("Triton: launches, large tensors", tests(["triton_gpu"])),
        Step("the op with Triton's kernels", tests([*OP, "cuda"], "-k", "cuda"), triton),
        Step(
            "benchmarks",
            [*short, "--out", str(ROOT / "build/gpu-benchmarks")],
            judge=failed_or_missed,
        ),
        *sanitizer_steps(),
        Step("two processes on one GPU", tests(["distributed"])),
    ]


def run(step: Step, seconds: float) -> Outcome:
    """Runs a step for `seconds` at most. What it started ends with it."""
    words = " ".join([*(f"{name}={value}" for name, value in step.environ.items()), *step.command])
    if step.missing:
        return Outcome(step.name, words, "not run", 0.0, step.missing)
    print(f"== {step.name}", flush=True)
    allowed = min(seconds, 60 * step.minutes)
    start = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, **step.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own: what it starts is on the GPU too
    )
    try:
        output, _ = process.communicate(timeout=allowed)
        state = step.judge(process.returncode, output)
    except subprocess.TimeoutExpired:
        # The time of this call is up, or the step's own.
        state = "left" if seconds < 60 * step.minutes else "failed"
        end_group(process)
        output, _ = process.communicate()
        output += f"\nstopped after {allowed:.0f} s"
    except BaseException:  # Ctrl-C
        end_group(process)
        raise
    taken = time.monotonic() - start
    print(f"   {state}, {taken:.0f} s", flush=True)
    return Outcome(step.name, words, state, taken, output)


def end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def report(outcomes: Sequence[Outcome], head: Mapping[str, str]) -> str:
    """Failures first, then what is left, was not run or missed a target, then the rest."""
    counts = ", ".join(f"{sum(o.state == state for o in outcomes)} {state}" for state in STATES)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    lines = ["# GPU check", "", head["machine"], "", f"commit {head['commit']}, {now}", "", counts]
    lines += ["", "| step | state | seconds |", "| --- | --- | --- |"]
    ranked = sorted(outcomes, key=lambda outcome: STATES.index(outcome.state))
    lines += [f"| {o.name} | {o.state} | {o.seconds:.0f} |" for o in ranked]
    for outcome in ranked:
        tail = outcome.output.strip().splitlines()[-LAST_LINES:]
        lines += ["", f"## {outcome.name}: {outcome.state}", ""]
        lines += [f"    {outcome.command}", "", "```text", *tail, "```"]
    return "\n".join(lines) + "\n"


def fingerprint() -> str:
    """Of all that the extension is made of, and for."""
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None

    sources = [
        ROOT / "setup.py",
        *(ROOT / "csrc").rglob("*.*"),
        *(ROOT / "build_tools").glob("*.py"),
    ]
    digest = hashlib.sha256(f"{sys.version} {torch.__version__} {capability}".encode())
    for path in sorted(path for path in sources if path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def pack(archive: Path, files: Iterator[Path]) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        for path in files:
            tar.add(path, path.relative_to(ROOT))
    if archive.stat().st_size > MEGABYTES << 20:
        print(f"   {archive.name} is larger than {MEGABYTES} MiB", flush=True)


def extension_files() -> Iterator[Path]:
    for pattern in EXTENSION:
        yield from ROOT.glob(pattern)


class Record:
    """The folder of results: what earlier calls did, and what this one adds.

    Results count for the commit and the kind of machine that they are of, a build for its sources.
    """

    def __init__(self, folder: Path, machine: str, commit: str, fingerprint: str) -> None:
        self.folder = folder
        self.head = {"machine": machine, "commit": commit, "fingerprint": fingerprint}
        self.outcomes: list[Outcome] = []
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.json"
        if not path.is_file():
            return
        earlier = json.loads(path.read_text())
        is_built = earlier["head"]["fingerprint"] == fingerprint and self._restore_extension()
        for fields in earlier["outcomes"]:
            outcome = Outcome(**fields)
            holds = is_built if outcome.name == BUILD else earlier["head"] == self.head
            if holds and outcome.state != "left":
                self.outcomes.append(outcome)

    def _restore_extension(self) -> bool:
        archive = self.folder / "extension.tar.gz"
        if not archive.is_file():
            return False
        with tarfile.open(archive) as tar:
            tar.extractall(ROOT, filter="data")
        print("the extension of an earlier run fits", flush=True)
        return True

    def is_done(self, step: Step) -> bool:
        return any(outcome.name == step.name for outcome in self.outcomes)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if outcome.state in ("passed", "missed"):
            if outcome.name == BUILD:
                pack(self.folder / "extension.tar.gz", extension_files())
            if outcome.name == "benchmarks":
                pack(self.folder / "benchmarks.tar.gz", iter([ROOT / "build/gpu-benchmarks"]))
        self.write()

    def write(self) -> None:
        outcomes = [asdict(each) | {"output": each.output[-20_000:]} for each in self.outcomes]
        record = {"head": self.head, "outcomes": outcomes}
        (self.folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        (self.folder / "report.md").write_text(report(self.outcomes, self.head))
        text = "".join(f"== {o.name}: {o.state}\n{o.output}\n" for o in self.outcomes)
        (self.folder / "output.txt").write_text(text[-(MEGABYTES << 20) :])


def remaining_of(end: float) -> float:
    return end - time.monotonic()


def run_all(planned: Sequence[Step], record: Record, minutes: float | None) -> int:
    """Runs what is not done yet; later steps run whatever became of earlier ones, but a build."""
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    for step in planned:
        if record.is_done(step):
            continue
        remaining = remaining_of(end)
        # A step that cannot get half of what it may need would only be begun.
        if remaining < 30 * step.minutes and not step.missing:
            outcome = Outcome(step.name, " ".join(step.command), "left", 0.0, "no time was left")
        else:
            outcome = run(step, remaining)
        record.add(outcome)
        if step is planned[0] and outcome.state in ("failed", "left"):
            print("without the extension nothing else can be checked", flush=True)
            break
    states = [outcome.state for outcome in record.outcomes]
    print(f"report: {record.folder / 'report.md'}")
    if "failed" in states:
        return 1
    return 2 if "left" in states else 0


def machine_line() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device"
    return (
        f"{torch.cuda.get_device_name()}, compute capability "
        f"{'.'.join(map(str, torch.cuda.get_device_capability()))}, torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}"
    )


def commit() -> str:
    """Of the checkout; of a copy without its history, what SDKERNELS_COMMIT says."""
    given = os.environ.get("SDKERNELS_COMMIT")
    if given:
        return given
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu-check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, help="of this call; default: no end")
    parser.add_argument("--out", type=Path, default=OUT, help="default: build/gpu-check")
    parser.add_argument("--steps", help="some of them: words of their names, with commas between")
    parser.add_argument("--again", action="store_true", help="forget the earlier calls' results")
    parser.add_argument("--list", action="store_true", help="print the steps' commands and stop")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    planned = steps(out)
    if options.steps:
        words = options.steps.split(",")
        planned = [planned[0], *(s for s in planned[1:] if any(word in s.name for word in words))]
    if options.list:
        for step in planned:
            print(f"{step.name}: {' '.join(step.command)}")
        return 0
    machine = machine_line()
    if machine == "no CUDA device":
        print("gpu-check: this PyTorch sees no CUDA device", file=sys.stderr)
        return 1
    if options.again:
        (out / "results.json").unlink(missing_ok=True)
    return run_all(planned, Record(out, machine, commit(), fingerprint()), options.minutes)


if __name__ == "__main__":
    sys.exit(main())
