"""SDKERNELS_BACKEND and SDKERNELS_CPU_CAPABILITY: the same tests, run by other code."""

import os
import platform
import re
from pathlib import Path
from subprocess import CompletedProcess

import processes
import pytest

from sdkernels.backends import extension, ops, traceable

TESTS = Path(__file__).resolve().parent

# Run in another process: what they test must not depend on who does the work.
CORE = ["test_ops.py", "test_functional.py", "test_accuracy.py", "test_dropped_rows.py"]


def run(program: str, *arguments: str, **environ: str) -> CompletedProcess[str]:
    """Run a Python program with `environ` on top of the environment, without variables of ours."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SDKERNELS_")}
    env = clean | {"OMP_NUM_THREADS": "2"} | environ
    return processes.run("-c", program, *arguments, cwd=TESTS.parent, env=env)


# Who serves the CPU, and why; then the tests that are named on the command line, if any.
PROGRAM = """
import sys
from sdkernels.backends import extension, ops
capability = extension.module and extension.module.build_config()["cpu_capability"]
print(*{(c.backend, c.reason) for c in ops.backend_table() if c.device == "cpu"}, capability)
if sys.argv[1:]:
    import pytest
    sys.exit(pytest.main(sys.argv[1:]))
"""


def run_tests(selection: str, *more: str, **environ: str) -> str:
    """Run the core tests and more, and return the line that says who served them."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=brief", "-k", selection]
    result = run(PROGRAM, *options, *(str(TESTS / file) for file in (*CORE, *more)), **environ)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[0]


def few_and(whole: str) -> pytest.MarkDecorator:
    selections = [
        pytest.param("named_cases", id="few"),
        pytest.param(whole, id="whole", marks=pytest.mark.whole),
    ]
    return pytest.mark.parametrize("selection", selections)


@few_and("not layouts")
def test_traceable_backend(selection):
    first_line = run_tests(selection, SDKERNELS_BACKEND="traceable")
    assert first_line.startswith("('traceable', 'SDKERNELS_BACKEND=traceable')")


def test_backend_by_name():
    named = run(PROGRAM, SDKERNELS_BACKEND="cpp")
    assert named.stdout.startswith("('cpp', 'SDKERNELS_BACKEND=cpp')"), named.stderr
    chosen = run(PROGRAM, SDKERNELS_BACKEND="auto")
    assert chosen.stdout.startswith("('cpp', 'native kernels')"), chosen.stderr


@pytest.mark.parametrize(("backend", "is_pytorch_code"), [("traceable", True), ("cpp", False)])
def test_backend_is_the_one_that_runs(backend, is_pytorch_code):
    """Not only the one in the table."""
    program = """
import torch, sdkernels
with torch.profiler.profile() as profiler:
    torch.ops.sdkernels.compact_rows(torch.ones(2, 3), torch.tensor([1]))
print("aten::index_select" in {event.name for event in profiler.events()})
"""
    result = run(program, SDKERNELS_BACKEND=backend)
    assert result.stdout.strip() == str(is_pytorch_code), result.stderr


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False]], ids=["more", "fewer"])
def test_mask_of_another_count(mask):
    """PyTorch code refuses it in the words of the kernel; a row too many must not get lost."""
    program = f"import torch, sdkernels; sdkernels.KeptRows.from_mask(torch.tensor({mask}), k=2)"
    for backend in ("traceable", "cpp"):
        result = run(program, SDKERNELS_BACKEND=backend)
        assert result.stderr.splitlines()[-1] == (
            f"ValueError: k: expected the number of true entries of mask, {sum(mask)}, got 2"
        )


def test_invalid_backend():
    result = run("import sdkernels", SDKERNELS_BACKEND="cuda")
    assert result.returncode != 0
    message = "SDKERNELS_BACKEND: expected one of auto, cpp, triton, traceable, got 'cuda'"
    assert message in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def capabilities() -> list[str]:
    """The instruction sets of this processor, from the message that refuses another one."""
    refused = run(PROGRAM, SDKERNELS_CPU_CAPABILITY="none")
    assert refused.returncode != 0
    found = re.search(
        r"SDKERNELS_CPU_CAPABILITY: expected one of (.*) on this processor, got 'none'$",
        refused.stderr.splitlines()[-1],
    )
    assert found
    return found[1].split(", ")


def test_widest_instruction_set_is_chosen(capabilities):
    assert extension.module.build_config()["cpu_capability"] in capabilities
    if "SDKERNELS_CPU_CAPABILITY" not in os.environ:
        assert extension.module.build_config()["cpu_capability"] == capabilities[0]
    if platform.machine() == "x86_64":
        every = ["avx512_bf16", "avx512", "avx2", "baseline"]
        assert capabilities == every[-len(capabilities) :]


@few_and("not layouts and not opcheck")
@pytest.mark.parametrize("capability", ["avx512_bf16", "avx512", "avx2", "baseline"])
def test_every_instruction_set(capability, selection, capabilities):
    if capability not in capabilities:
        pytest.skip(f"this processor has {', '.join(capabilities)}")
    if capability == capabilities[0]:
        pytest.skip("this one serves every other test")
    # Large rows are written in another way.
    first_line = run_tests(
        f"({selection}) or rows_that_a_norm_keeps",
        "test_determinism.py",
        SDKERNELS_CPU_CAPABILITY=capability,
    )
    assert first_line.endswith(capability)


def test_same_bits_on_every_instruction_set(capabilities):
    program = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from comparison import as_integers
from test_determinism import PARALLEL_CASES, run_ours
for case in PARALLEL_CASES:
    for name, value in run_ours(case).items():
        bits = as_integers(value).numpy().tobytes()
        print(case, name, hashlib.sha256(bits).hexdigest())
"""
    printed = {}
    for capability in capabilities:
        result = run(program, str(TESTS), SDKERNELS_CPU_CAPABILITY=capability)
        assert result.returncode == 0, result.stderr
        printed[capability] = result.stdout.splitlines()
    assert len(printed[capabilities[0]]) > 30
    for capability in capabilities[1:]:
        assert printed[capability] == printed[capabilities[0]]


def test_halves_are_the_same_on_every_instruction_set(capabilities):
    """Read from half precision, rounded to it, and both: payload and quiet bit of NaN, ties,
    subnormal numbers and infinities, alone and beside others."""
    program = """
import torch
ops = torch.ops.sdkernels
none, dropped = torch.empty(0, dtype=torch.int64), torch.tensor([-1])
kept = torch.tensor([0])
lower = torch.tensor([0x1001, 0x7fff, 0x8000, 0x8001, 0xffff, 0])[:, None]
floats = (torch.arange(2**16) << 16 | lower).to(torch.int32).view(torch.float32).view(1, -1)
floats = torch.cat([floats, floats.view(-1, 128, 8).transpose(1, 2).reshape(1, -1)], 1)
for dtype in (torch.float16, torch.bfloat16):
    halves = torch.arange(2**16).to(torch.int16).view(dtype).view(1, -1)
    arguments = none, dropped, None, None, 1.0
    read = ops.scatter_add_rows(halves, torch.empty(0, 2**16), *arguments)
    written = ops.scatter_add_rows_backward(
        floats, None, kept, None, None, 1.0, dtype, [False, False])[0]
    both = ops.scatter_add_relu_rows(halves, halves[:0], *arguments)[0]
    for x in (read.view(torch.int32), written.view(torch.int16), both.view(torch.int16)):
        print(dtype, *x[0].tolist())
"""
    program = "import sdkernels" + program
    printed = []
    for capability in capabilities:
        result = run(program, SDKERNELS_CPU_CAPABILITY=capability)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout.splitlines())
    assert len(printed[0]) == 6
    for others in printed[1:]:
        same = [a == b for a, b in zip(others, printed[0], strict=True)]
        assert all(same), same


def test_every_op_has_a_backend_on_every_device():
    table = {(choice.op, choice.device) for choice in ops.backend_table()}
    assert table == {(op, d) for op in traceable.OPS for d in ("cpu", "cuda", "other")}
