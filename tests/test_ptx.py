"""The GPU kernels as nvcc and Triton compile them, executed without a GPU: ``ptx/`` translates
their PTX.

Test files that know nothing of it run in a process of their own, under AddressSanitizer and with
threads that take turns in some order. A few of them run always, all with `make test-ptx`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation.build import runtimes
from ptx import build
from ptx.launches import Count
from ptx.translate import entries

from sdkernels.backends import contract

TESTS = Path(__file__).resolve().parent

# By order of threads: files and -k.
CUDA = {
    "forward": ("test_ops.py test_kernel_traps.py", ""),
    "reverse": ("test_kernel_shapes.py", ""),
    "shuffled": (
        "test_functional.py test_activation.py test_accuracy.py test_dropped_rows.py "
        "test_determinism.py",
        "named_cases or no_numbers or rounded or accuracy or dropped or run_after_run",
    ),
}
TRITON = {
    "forward": ("test_ops.py", "not (large or opcheck or fake_layouts)"),
    "reverse": ("test_functional.py test_layouts.py", "named_cases or any_layout or beside_a_view"),
    "shuffled": ("test_row_weights.py", "values_and_gradients"),
}
# Few kernels: for CUDA of float32 alone and beside bfloat16.
FEW_CUDA = (
    "test_functional.py test_kernel_traps.py",
    "emulated_trap or (named_cases and f32 and not f16- and not conv)",
)
FEW_TRITON = ("test_functional.py", "named_cases and (k0 or f32+bf16) and not conv")


@pytest.fixture(scope="module")
def sanitizers() -> list[str]:
    """The libraries to load before Python's own."""
    if reason := build.why_not():
        pytest.skip(reason)
    try:
        return runtimes()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def nvcc() -> None:
    if not build.nvcc():
        pytest.skip("nvcc is not installed here")


@pytest.fixture(scope="module")
def triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")


def environment(sanitizers: list[str], order: str, **variables: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SDKERNELS_") and name != "TRITON_INTERPRET"
    }
    return {
        **kept,
        "SDKERNELS_PTX_ORDER": order,
        "LD_PRELOAD": " ".join(sanitizers),
        "ASAN_OPTIONS": build.ASAN_OPTIONS,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def run(module: str, *arguments: str, env: dict[str, str]) -> str:
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=TESTS.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_tests(plugin: str, what: tuple[str, str], env: dict[str, str]) -> None:
    files, selection = what
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=brief"]
    options += ["-k", selection] if selection else []
    paths = [str(TESTS / name) for name in files.split()]
    output = run("pytest", "-p", f"ptx.{plugin}", *options, *paths, env=env)
    assert build.SERVED in output


def test_few_of_cuda(sanitizers, nvcc):
    variables = {"SDKERNELS_EMULATED": "1", "SDKERNELS_PTX_FEW": "1"}
    run_tests("cuda_plugin", FEW_CUDA, environment(sanitizers, "shuffled", **variables))


def test_few_of_triton(sanitizers, triton):
    run_tests("triton_plugin", FEW_TRITON, environment(sanitizers, "shuffled"))


@pytest.mark.ptx
@pytest.mark.parametrize("order", CUDA)
def test_cuda(order, sanitizers, nvcc):
    env = environment(sanitizers, order, SDKERNELS_EMULATED="1")
    run_tests("cuda_plugin", CUDA[order], env)


@pytest.mark.ptx
def test_cuda_of_compute_100(sanitizers, nvcc):
    """nvcc makes other code from 10.0 on, of every kernel."""
    variables = {"SDKERNELS_EMULATED": "1", "SDKERNELS_PTX_ARCH": "100"}
    env = environment(sanitizers, "shuffled", **variables)
    run_tests("cuda_plugin", ("test_ops.py", "not (large or opcheck or fake_layouts)"), env)


@pytest.mark.ptx
def test_compute_80_differs_in_one_conversion(nvcc):
    """8.0 widens bfloat16 by moving its bits, which 9.0 has an instruction for: whatever runs for
    9.0 has run for 8.0 as well.
    """

    def kernels(architecture: str) -> dict[str, str]:
        found = {}
        for ptx in build.ptx_beside(build.kernel_objects(architecture=architecture)):
            for name, entry in entries(ptx).items():
                found[name] = re.sub(
                    r"cvt\.f32\.bf16 (%\w+), (%\w+);", r"mov.b32 \1, {0,\2};", entry.neutral
                )
        return found

    old, new = kernels("80"), kernels("90")
    assert old.keys() == new.keys()
    assert not [name for name, text in old.items() if text != new[name]]


@pytest.mark.ptx
@pytest.mark.parametrize("order", TRITON)
def test_triton(order, sanitizers, triton):
    run_tests("triton_plugin", TRITON[order], environment(sanitizers, order))


@pytest.mark.ptx
@pytest.mark.parametrize("architecture", ["80", "100"])
def test_triton_of_other_architectures(architecture, sanitizers, triton):
    env = environment(sanitizers, "shuffled", SDKERNELS_PTX_ARCH=architecture)
    run_tests("triton_plugin", ("test_functional.py", "named_cases"), env)


@pytest.mark.parametrize("dtypes", ["few", pytest.param("all", marks=pytest.mark.ptx)])
def test_launches_of_a_branch(dtypes, sanitizers, nvcc):
    """As many as the documentation says, and fewer than naive masking starts."""
    clean = environment(sanitizers, "forward", LD_PRELOAD="", ASAN_OPTIONS="")
    counts = [Count(**c) for c in json.loads(run("ptx.launches", "--json", dtypes, env=clean))]
    documented = (TESTS.parent / "docs/gpu-launches.md").read_text().splitlines()
    naive = {(c.dtype, c.layer_scale): c.launches for c in counts if c.rule == "naive masking"}
    fused = [c for c in counts if c.rule.startswith("fused")]
    assert {(c.dtype, c.layer_scale) for c in fused} == set(naive)
    assert not [c.line for c in fused if c.line not in documented]
    assert not [c for c in fused if c.launches >= naive[c.dtype, c.layer_scale]]


SOUND = {
    "mirror": list(range(63, -1, -1)),
    "rounds": [64] * 64,
    "sum_by_shuffles": [496] * 32 + [496 + 32 * 32] * 32,
    "other_shuffles": [
        (i - 3 if i % 32 >= 3 else i)
        + 100 * (i + 5 if i % 16 + 5 < 16 else i)
        + 10000 * (i // 8 * 8 + 1)
        for i in range(64)
    ],
    "votes": [8] * 64,
}
FAULTS = {
    "missing_barrier": "a race: ",
    "missing_barrier_between_rounds": "a race: ",
    "divergent_barrier": "a barrier in divergent code",
    "shuffle_of_half_a_warp": "lanes wait for others of their mask that never come",
    "shuffle_beyond_mask": "a shuffle from a lane outside of its mask",
    "write_beyond": "a store of 4 bytes outside of any tensor",
    "read_before": "a load of 4 bytes outside of any tensor",
    "write_beyond_shared": "an access outside of shared memory",
    "uninitialized_shared": "-1 ",
    "misaligned": "a store of 16 bytes at a misaligned address",
    "trap": "the kernel trapped",
    "few_threads": "a block of 64 threads, which the kernel forbids",
}


@pytest.fixture(scope="module", params=["forward", "reverse", "shuffled"])
def faults(request: pytest.FixtureRequest, sanitizers: list[str], nvcc: None) -> dict[str, str]:
    env = environment(sanitizers, request.param)
    return json.loads(run("ptx.fault", *SOUND, *FAULTS, env=env))


def test_sound_kernels(faults):
    assert {name: [int(n) for n in faults[name].split()] for name in SOUND} == SOUND


def test_faults_are_noticed(faults):
    unseen = {name: faults[name] for name, message in FAULTS.items() if message not in faults[name]}
    assert not unseen


def test_block_past_its_mask(sanitizers, triton):
    sound, faulty = run("ptx.triton_fault", env=environment(sanitizers, "forward")).splitlines()
    assert sound == "equal"
    assert "bytes outside of any tensor" in faulty


@pytest.mark.ptx
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_traffic_budget(backend, sanitizers, request):
    """What the design says that an op reads and writes of whole rows, within 3 %."""
    request.getfixturevalue("nvcc" if backend == "cuda" else "triton")
    clean = environment(sanitizers, "forward", LD_PRELOAD="", ASAN_OPTIONS="")
    counts = json.loads(run("ptx.count", "--json", backend, "all", env=clean))
    counted = {c["op"].split()[0] for c in counts}
    assert counted == {schema.partition("(")[0] for schema in contract.SCHEMAS} - {"compact_mask"}
    beyond = [c for c in counts if abs(c["touched"] - c["budget"]) > 0.03 * c["budget"]]
    assert not beyond
    # Everything is asked for once. But Triton reads float32 beside 16 bits in two halves, which lie
    # in the same sectors.
    in_halves = [c for c in counts if backend == "triton" and "+" in c["dtypes"]]
    again = [c for c in counts if c["again"] > (1.0 if c in in_halves else 0.03) * c["budget"]]
    assert not again
