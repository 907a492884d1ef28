"""Fixtures that several test files share."""

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Memory is poisoned under deterministic algorithms, for which cuBLAS needs a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Inductor starts processes that compile for Triton, which nothing here does: each imports torch.
os.environ.setdefault("TORCH_WARM_POOL", "0")

# Convolutions in fp32 are compared as such: cuDNN takes TF32 by default.
torch.backends.cudnn.allow_tf32 = False

# Derandomized: CI runs the same examples every time. `--hypothesis-profile=brief` is for the runs
# of whole files in a subprocess, under another backend or instruction set; "thorough" looks for new
# ones.
_COMMON = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("repeatable", max_examples=60, **_COMMON)
settings.register_profile("brief", max_examples=12, **_COMMON)
settings.register_profile("thorough", max_examples=2000, **{**_COMMON, "derandomize": False})
settings.load_profile("repeatable")

# Programs that tests run, which import Triton (it need not be there); tests of other libraries.
collect_ignore = ["triton_compiler.py", "triton_interpreter.py", "ptx", "peers"]

# Workers of pytest-xdist, and what their tests start, share the processors: with more threads than
# those they only wait for each other. test_determinism.py has several at all times.
if "OMP_NUM_THREADS" not in os.environ and "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)

# A shell starts what runs in its background with interruptions ignored, and that is inherited;
# tests interrupt programs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests start is no worker of pytest-xdist; in one, pytest-benchmark times nothing.
for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
    os.environ.pop(name, None)

# Files that take a quarter of a minute or more start first, the longest before the others, so that
# no process is left with one of them alone; their tests are marked `slow`.
LONGEST = [
    "test_ptx.py",
    "test_benchmark_runs.py",
    "test_paper.py",
    "test_compile_graphs.py",
    "test_compile.py",
    "test_cuda_emulation.py",
    "test_distributed.py",
    "test_without_extension.py",
    "test_backends.py",
    "test_triton_compiled.py",
    "test_compiled_models.py",
    "test_packed_compiled.py",
    "test_layer_dropout_compiled.py",
    "test_cuda_compile.py",
    "test_benchmarks.py",
    "test_patched_training.py",
    "test_triton.py",
    "test_scaling.py",
    "test_dino.py",
    "test_examples.py",
    "test_extension.py",
    "test_install.py",
    "test_models.py",
    "test_patch_inplace.py",
    "test_benchmark_outputs.py",
    "test_patch_layers.py",
    "test_measure.py",
    "test_empty.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))  # stable
    for item in items:
        if item.path.name in rank:
            item.add_marker(pytest.mark.slow)


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers alone and after others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device on which the ops run here."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Every allocation starts as NaN: an element that an op does not write shows."""
    # With deterministic algorithms ATen fills what at::empty returns, on every device.
    assert torch.utils.deterministic.fill_uninitialized_memory
    # By this name no Inductor is told, whose import takes seconds of every process.
    torch._C._set_deterministic_algorithms(True)
    # Allocations that go past the dispatcher are filled by the CPU allocator (in half precision
    # only every second element becomes NaN).
    libc10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    junk_fill = ctypes.c_bool.in_dll(libc10, "FLAGS_caffe2_cpu_allocator_do_junk_fill")
    junk_fill.value = True
    assert torch.empty(4).isnan().all()
    yield
    junk_fill.value = False
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Puts the number of threads back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
