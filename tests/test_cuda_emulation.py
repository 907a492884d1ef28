"""The CUDA kernels and their glue, executed on the CPU under AddressSanitizer and UBSan.

``cuda_emulation/`` compiles the sources of ``csrc/cuda`` with g++ and registers the ops for the
CPU; test files that know nothing of it then run in a process of their own. Every tensor has the
sanitizer's guard zones around it, and threads take turns in three orders. A few of them run always,
with kernels of few dtypes, all with `make test-whole`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_emulation import build
from ptx import build as ptx_build

TESTS = Path(__file__).resolve().parent

# What runs with the threads in which order. Messages about row values are the CPU kernels' own: the
# kernels trap.
RUNS = {
    "forward": "test_ops.py",
    "reverse": "test_kernel_shapes.py test_kernel_traps.py",
    "shuffled": "test_functional.py test_activation.py test_accuracy.py test_dropped_rows.py "
    "test_determinism.py -k named_cases|no_numbers|rounded|accuracy|dropped|run_after_run",
}


# Of float32 alone and beside bfloat16.
FEW = (
    "test_functional.py test_kernel_traps.py "
    "-k emulated_trap|(named_cases and f32 and not f16- and not conv)"
)


@pytest.fixture(scope="module")
def sanitizers() -> list[str]:
    """The libraries to load before Python's own."""
    if not sys.platform.startswith("linux") or build.compiler() is None:
        pytest.skip("needs g++ on Linux")
    try:
        return build.runtimes()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def start(what: str, order: str, library: Path, sanitizers: list[str]) -> subprocess.Popen[str]:
    files, _, selection = what.partition("-k ")
    environment = {
        **{name: v for name, v in os.environ.items() if not name.startswith("SDKERNELS_")},
        "SDKERNELS_EMULATED": str(library),
        "SDKERNELS_EMULATION_ORDER": order,
        "LD_PRELOAD": " ".join(sanitizers),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": str(TESTS / "cuda_emulation"),
        "OMP_NUM_THREADS": "1",
    }
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=brief"]
    if selection:
        options += ["-k", selection.replace("|", " or ")]
    command = [sys.executable, "-m", "pytest", "-p", "emulated", *options]
    return subprocess.Popen(
        [*command, *(str(TESTS / name) for name in files.split())],
        cwd=TESTS.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(sanitizers: list[str]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them, side by side."""
    library = build.emulated_ops()
    processes = {order: start(what, order, library, sanitizers) for order, what in RUNS.items()}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def check(process: subprocess.Popen[str]) -> None:
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "Overriding a previously registered kernel" in output  # the emulated ops did serve


@pytest.mark.whole
@pytest.mark.parametrize("order", RUNS)
def test_emulated(order, runs):
    check(runs[order])


def test_few_emulated(sanitizers):
    if ptx_build.nvcc() and not ptx_build.why_not():
        pytest.skip("test_ptx.py runs the same tests on what nvcc makes of the kernels")
    check(start(FEW, "shuffled", build.emulated_ops(few=True), sanitizers))


@pytest.fixture(scope="module")
def faults(sanitizers: list[str]) -> Path:
    return build.faults()


def run_fault(faults: Path, name: str, order: str = "forward") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [faults, name],
        env={**os.environ, "SDKERNELS_EMULATION_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("order", RUNS)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mirror", list(range(63, -1, -1))),
        ("rounds", [64] * 64),
        ("sum_by_shuffles", [496] * 32 + [496 + 32 * 32] * 32),
        ("votes", [8] * 64),
        ("divide", [0] * 64),
    ],
)
def test_sound_kernel(name, expected, order, faults):
    result = run_fault(faults, name, order)
    assert result.returncode == 0, result.stderr
    assert [int(number) for number in result.stdout.split()] == expected


@pytest.mark.parametrize("order", RUNS)
@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("missing_barrier", list(range(63, -1, -1))),
        ("missing_barrier_between_rounds", [64] * 64),
    ],
)
def test_missing_barrier_shows(name, right, order, faults):
    result = run_fault(faults, name, order)
    assert result.returncode == 0, result.stderr
    assert [int(number) for number in result.stdout.split()] != right


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", "threads wait for others that never come"),
        ("shuffle_of_half_a_warp", "threads wait for others that never come"),
        ("shuffle_beyond_mask", "a shuffle from a lane outside of its mask"),
        ("write_beyond", "heap-buffer-overflow"),
        ("write_beyond_shared", "index 64 out of bounds"),
        ("misaligned", "misaligned address"),
        ("trap", "the kernel trapped"),
    ],
)
def test_fault_is_noticed(name, message, faults):
    result = run_fault(faults, name)
    assert result.returncode != 0
    assert message in result.stderr
