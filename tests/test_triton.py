"""The Triton backend: its kernels on the CPU, through Triton's interpreter, and who chooses it.

What the compiler makes of them is looked at in test_triton_compiled.py.
"""

import importlib.util
import os
from pathlib import Path

import processes
import pytest
import torch
from test_backends import run

from sdkernels.backends import extension

TESTS = Path(__file__).resolve().parent
INTERPRETED = {"SDKERNELS_BACKEND": "triton", "TRITON_INTERPRET": "1"}

INTERPRETER = """
import sys
sys.path.insert(0, "tests")
import triton_interpreter
triton_interpreter.prepare()
"""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
without_cuda_kernels = pytest.mark.skipif(
    extension.module is None or bool(extension.module.build_config()["cuda_version"]),
    reason="no extension without CUDA kernels",
)

# The interpreter needs milliseconds for each program of a grid: nothing large.
CASES = [
    "test_ops.py",
    "test_bad_ops.py",
    "test_functional.py",
    "test_activation.py",
    "test_row_weights.py::test_values_and_gradients",
    "test_accuracy.py",
    "test_dropped_rows.py::test_bits_are_kept",
    "test_dropped_rows.py::test_bits_are_kept_in_place_beside_another_dtype",
    "test_layouts.py::test_layer_scale_in_any_layout",
    "test_layouts.py::test_nothing_is_written_beside_a_view",
]
TOO_LARGE = (
    "test_large or large-B8 or sum_of_many_rows or opcheck or fake_layouts or cuda "
    "or (rounds_once and 64) or (bits_are_kept and (conv or wide))"
)


FEW = ["test_functional.py"]


@needs_triton
@pytest.mark.parametrize(
    ("files", "selection"),
    [
        pytest.param(FEW, "named_cases and (k0 or f32+bf16)", id="few"),
        pytest.param(CASES, f"not ({TOO_LARGE})", id="whole", marks=pytest.mark.whole),
    ],
)
def test_in_the_interpreter(files, selection):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SDKERNELS_")}
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=brief"]
    program = str(TESTS / "triton_interpreter.py")
    options += ["-k", selection, *(str(TESTS / case) for case in files)]
    result = processes.run(program, *options, cwd=TESTS.parent, env=clean | INTERPRETED)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_triton
def test_every_op_has_kernels_or_a_reason():
    program = """
from sdkernels.backends import ops, traceable, triton
assert set(traceable.OPS) == {*triton.OPS, "compact_mask"}
for choice in ops.backend_table():
    if choice.device == "cpu":
        assert choice.backend == ("cpp" if choice.op == "compact_mask" else "triton"), choice
"""
    result = run(program, **INTERPRETED)
    assert result.returncode == 0, result.stderr


@needs_triton
def test_rows_outside_of_the_batch():
    """They are refused, and nothing is read or written there: so far away, that would crash."""
    program = """
import torch
from sdkernels.backends.triton import OPS
x, out = torch.ones(3, 4), torch.ones(1, 4)
slot, one = torch.tensor([-1, 0, -1]), torch.ones(1)
bits = torch.zeros(3, 1, dtype=torch.uint8)
for far in (3, -1, 2**40, -2**40):
    bad = torch.tensor([far])
    in_slot = torch.tensor([-1, max(far, 1), -1])
    calls = {
        "compact_rows": (x, bad),
        "compact_rows_into": (out.clone(), x, bad),
        "expand_rows": (out, bad, in_slot),
        "scatter_rows": (x, out, bad, in_slot),
        "scatter_rows_": (x, out, bad, slot),
        "scatter_add_rows": (x, out, bad, in_slot, None, None, 1.0),
        "scatter_add_rows_": (x, out, bad, slot, None, None, 1.0),
        "scatter_add_rows_backward": (x, None, bad, None, None, 1.0, x.dtype, [False, False]),
        "scatter_add_rows_backward_into": (
            out.clone(), x, None, bad, None, None, 1.0, [False, False]
        ),
        "scatter_add_relu_rows": (x, out, bad, in_slot, None, one, 1.0),
        "scatter_add_relu_rows_backward": (
            x, bits, bad, in_slot, None, one, 1.0, x.dtype, torch.contiguous_format, True
        ),
        "compact_norm": (x, bad, [4], None, None, 1e-5, False, x.dtype, True),
        "compact_norm_into": (out.clone(), x, bad, [4], None, None, 1e-5, False, True),
        "compact_norm_backward": (
            None, out, out, one, one, bad, in_slot, [4], None, False, [True, True, True]
        ),
    }
    assert calls.keys() == OPS.keys()
    for op, arguments in calls.items():
        try:
            OPS[op](*arguments)
        except Exception as error:
            assert "AssertionError('rows" in str(error), (op, far, error)
        else:
            raise AssertionError((op, far))
    assert (x == 1).all()
"""
    result = run(INTERPRETER + program, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


# Runs the ops by Triton and by PyTorch code.
COMPARE = """
import torch
from cases import Case
from op_samples import arguments, call
from sdkernels.backends import traceable, triton
def compare(case, ops=tuple(triton.OPS)):
    for op in ops:
        args = arguments(op, case)
        for a, b in zip(call(triton.OPS[op], op, args), call(traceable.OPS[op], op, args)):
            torch.testing.assert_close(a, b, msg=lambda message: f"{op} of {case}: {message}")
"""


@needs_triton
def test_more_rows_than_a_grid_dimension_has():
    program = """
from sdkernels.backends.triton import launching
launching._MOST_ROWS = 3
compare(Case(norm="layer", layer_scale="C", weighted=True))
compare(Case("conv", kept=8, layout="channels_last", norm="rms", layer_scale="C1", weighted=True))
"""
    result = run(INTERPRETER + COMPARE + program, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


@needs_triton
def test_row_weights_in_any_layout():
    program = """
case = Case(layer_scale="C", weighted=True)
every_second = torch.arange(2.0 * case.kept)[::2]
for op in [op for op in triton.OPS if op.startswith("scatter_add")]:
    args = list(arguments(op, case))
    (weight,) = (i for i, arg in enumerate(args) if getattr(arg, "shape", None) == (case.kept,)
                 and arg.is_floating_point())
    for args[weight] in (every_second, torch.tensor(3.0).expand(case.kept)):
        for a, b in zip(call(triton.OPS[op], op, args), call(traceable.OPS[op], op, args)):
            torch.testing.assert_close(a, b)
"""
    result = run(INTERPRETER + COMPARE + program, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


@needs_triton
def test_lines_longer_than_a_program_holds():
    program = """
from sdkernels.backends.triton import tiles
tiles._MOST_BYTES = 2048
assert tiles.norm_tile(1, 720, torch.float32) == (1, 512, 1)
row = "wide"
import cases
cases.ROWS[row] = (3, 720)
for norm in ("layer", "rms", "layer_2d", "layer_plain"):
    compare(Case(row, norm=norm, scale=2.0), ["compact_norm", "compact_norm_backward"])
"""
    result = run(INTERPRETER + COMPARE + program, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


@needs_triton
def test_what_traps_as_cuda_kernel_traps():
    """On the CPU the host looks at the rows first, unless it is kept from that."""
    program = """
from sdkernels.backends import checks
from test_kernel_traps import CALLS, SETUP
checks.check_index_values = checks.check_row_values = lambda *rows: None
calls = {name: call for name, call in CALLS.items() if not name.startswith("compact_mask")}
assert len(calls) >= 10
for name, call in calls.items():
    try:
        exec(SETUP.format(device="cpu") + call, {})
    except Exception as error:
        assert "AssertionError('rows" in str(error), (name, error)
    else:
        raise AssertionError(name)
"""
    result = run(INTERPRETER + program, **INTERPRETED)
    assert result.returncode == 0, result.stderr


@needs_triton
def test_every_device_has_to_be_new_enough():
    """Whichever is the current one: tensors of all of them come."""
    program = """
import torch, triton
from sdkernels.backends.triton import why_unusable
class Driver:
    def get_current_target(self):
        pass
triton.runtime.driver.set_active(Driver())
found = [(9, 0), (7, 5)]
torch.cuda.device_count = lambda: len(found)
torch.cuda.get_device_capability = lambda device=0: found[device]
assert why_unusable() == (
    "the Triton kernels need compute capability 8.0 on every device in CUDA_VISIBLE_DEVICES, "
    "got 7.5 on cuda:1"
), why_unusable()
found[1] = (8, 0)
assert why_unusable() is None
"""
    result = run(program)
    assert result.returncode == 0, result.stderr


def test_import_does_not_import_triton():
    program = """
import sys, torch
before = "triton" in sys.modules
import sdkernels
assert ("triton" in sys.modules) == before
"""
    result = run(program)
    assert result.returncode == 0, result.stderr


# What serves CUDA and CPU tensors, each op's choice once, on a machine with one CUDA device.
CHOICES = """
import torch
torch.cuda.device_count = lambda: 1
from sdkernels.backends import ops
for device in ("cuda", "cpu"):
    found = {(c.backend, c.reason) for c in ops.backend_table() if c.device == device}
    print(*sorted(f"{backend}: {reason}" for backend, reason in found), sep="; ")
"""
NO_CUDA_KERNELS = "the extension was built without CUDA kernels"


def choices(program: str = CHOICES, **environ: str) -> list[str]:
    result = run(program, **environ)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@needs_triton
@without_cuda_kernels
def test_chosen_where_there_are_no_cuda_kernels():
    cuda, cpu = choices(TRITON_INTERPRET="1")
    assert cuda == f"traceable: {NO_CUDA_KERNELS}; triton: {NO_CUDA_KERNELS}"  # compact_mask; all
    assert cpu == "cpp: native kernels"


@without_cuda_kernels
def test_triton_is_not_installed():
    missing = "import sys; sys.modules['triton'] = None" + CHOICES
    cuda, cpu = choices(missing)
    assert f"traceable: {NO_CUDA_KERNELS}, and Triton is not installed" in cuda
    assert cpu == "cpp: native kernels"
    for line in choices(missing, SDKERNELS_BACKEND="triton"):
        assert line == "none: SDKERNELS_BACKEND=triton, but Triton is not installed"


@without_cuda_kernels
def test_there_is_no_device():
    no_device = CHOICES.replace("lambda: 1", "lambda: 0")
    cuda, _ = choices(no_device)
    assert f"traceable: {NO_CUDA_KERNELS}, and there is no CUDA device for Triton" in cuda
    call = "\ntorch.ops.sdkernels.compact_rows(torch.ones(2, 3), torch.tensor([1]))"
    result = run(no_device + call, SDKERNELS_BACKEND="triton")
    assert result.stderr.splitlines()[-1] == (
        "RuntimeError: sdkernels::compact_rows: SDKERNELS_BACKEND=triton, but "
        "there is no CUDA device for Triton"
    )


# A device that only torch sees: Triton finds no driver.
BROKEN = (
    CHOICES
    + """
from sdkernels.backends import choice
x, index = torch.ones(2, 3), torch.tensor([1])
print(choice._triton("compact_rows", asked=False)(x, index).tolist())
choice._triton("compact_rows", asked=True)(x, index)
"""
)


@needs_triton
@without_cuda_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton finds the driver")
def test_triton_does_not_work():
    """Found out at the first call: chosen automatically the next backend serves."""
    result = run(BROKEN)
    cuda, _, kept = result.stdout.splitlines()
    assert f"traceable: {NO_CUDA_KERNELS}, but Triton cannot launch kernels: " in cuda
    assert kept == "[[1.0, 1.0, 1.0]]"
    message = "RuntimeError: sdkernels::compact_rows: SDKERNELS_BACKEND=triton, but Triton cannot"
    assert result.stderr.splitlines()[-1].startswith(message)
    cuda, cpu = choices(SDKERNELS_BACKEND="triton")
    assert "none: SDKERNELS_BACKEND=triton, but Triton cannot launch kernels: " in cuda
    assert cpu == "cpp: native kernels"


def test_the_interpreter_needs_to_be_asked_for():
    """TRITON_INTERPRET alone, which other packages may want, changes nothing on the CPU."""
    assert choices(TRITON_INTERPRET="1")[1] == "cpp: native kernels"
