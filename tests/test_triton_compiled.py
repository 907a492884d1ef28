"""The Triton kernels as they come out of the compiler, for three generations of GPUs.

No GPU is needed for that: see triton_compiler.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

# Shared memory that a program has without asking, on every GPU; some of them run on one SM.
MOST_SHARED = 16 * 1024

Kernels = list[dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(["90"], id="9.0"),
        pytest.param(["80", "100"], id="8.0-and-10.0", marks=pytest.mark.whole),
    ],
)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    program = Path(__file__).with_name("triton_compiler.py")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run(
        [sys.executable, str(program), *request.param],
        env=environ,
        cwd=program.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    assert {kernel["kernel"] for kernel in kernels} == {
        "copy_rows_kernel",
        "place_rows_kernel",
        "scatter_add_kernel",
        "scatter_add_backward_kernel",
        "scatter_add_relu_kernel",
        "scatter_add_relu_backward_kernel",
        "compact_norm_kernel",
        "compact_norm_backward_kernel",
        "norm_parameter_sums_kernel",
    }
    return kernels


def names_of(kernels: Kernels) -> list[str]:
    return [kernel["name"] for kernel in kernels]


def test_one_compilation_for_every_number_of_rows(kernels):
    """Triton compiles anew for a number that is 1, or one that 16 divides."""
    assert not names_of([k for k in kernels if k["again"]])


def test_sixteen_bytes_at_a_time(kernels):
    """Every element of a full tile, in loads and stores of 16 bytes."""
    narrow = [k for k in kernels if k["wide_loads"] < k["reads"] or k["wide_stores"] < k["writes"]]
    assert not names_of(narrow)


def test_every_element_is_read_once(kernels):
    """A norm walks its line three times, but loads it from memory only where it is too long."""
    held = [k for k in kernels if k["blocks"] == 1]
    assert len(held) < len(kernels)
    again = [k for k in held if k["wide_loads"] > k["reads"] + k["parameter_reads"]]
    assert not names_of(again)


def test_no_spills(kernels):
    assert not names_of([k for k in kernels if k["stack"] or k["local"]])
    assert max(k["reg"] for k in kernels) <= 255


def test_shared_memory(kernels):
    assert not names_of([k for k in kernels if k["shared"] > MOST_SHARED])


def test_roots_are_rounded_to_nearest(kernels):
    """An approximation takes denormal numbers for zero."""
    assert not names_of([k for k in kernels if k["approximate_roots"]])


def test_half_precision_is_rounded_to_nearest(kernels):
    rounding = [k for k in kernels if k["rounds"]]
    assert rounding
    assert not names_of([k for k in rounding if k["roundings"] != ["rn"]])
