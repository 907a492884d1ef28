"""The extension from gcc and clang, without <omp.h>, on the threads of PyTorch's own library."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from installing import ROOT, Wheel, copy_tree, make_environment, pip_install, pip_wheel, succeed
from torch.utils.cpp_extension import include_paths

pytestmark = pytest.mark.install

CLANGS = ["clang++", *(f"clang++-{version}" for version in range(14, 25))]
THREADS = """
import os, torch, sdkernels
torch.set_num_threads({threads})
x = torch.randn(64, 197, 384)
rows = sdkernels.KeptRows.from_index(torch.arange(0, 64, 2), batch=64, scale=2.0)
before = len(os.listdir("/proc/self/task"))
y = sdkernels.compact_rows(x, rows)
assert torch.equal(y, x[::2])
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.fixture(scope="module", params=["g++", "clang++"])
def compiler(request):
    names = CLANGS if request.param == "clang++" else ["g++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{request.param} is not installed")
    return found


def undefined_symbols(library: Path) -> set[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = succeed("nm", "-u", "-C", library, cwd=library.parent)
    return {line.split()[-1] for line in listing.splitlines() if line.strip()}


def test_extension(compiler, tmp_path):
    """A wheel, installed and run elsewhere; whoever looks for <omp.h> finds an error."""
    tree = copy_tree(tmp_path / "checkout")
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison/omp.h").write_text("#error omp.h need not be there\n")
    environ = {"CXX": compiler, "CC": compiler.replace("clang++", "clang").replace("g++", "gcc")}
    flags = f"-I{tmp_path / 'poison'}"
    result = pip_wheel(tree, tmp_path, SDKERNELS_BUILD="cpu", CFLAGS=flags, **environ)
    assert result.returncode == 0, result.stdout
    python = make_environment(tmp_path / "venv")
    pip_install(python, Wheel(tmp_path).path)
    check = ROOT / ".ci/check_installation.py"
    output = succeed(python, check, "--extension", cwd=tmp_path)
    assert output.strip() == f"{torch.__version__} the extension"
    (library,) = (tmp_path / "venv").rglob("sdkernels/_C.*.so")
    symbols = undefined_symbols(library)
    assert any(symbol.startswith("GOMP_parallel") for symbol in symbols)
    assert not any(symbol.startswith("__kmpc") for symbol in symbols)
    # Two threads, one of which is the caller, and none where one was asked for.
    for threads, more in ((1, 0), (2, 1)):
        code = THREADS.format(threads=threads)
        assert int(succeed(python, "-c", code, cwd=tmp_path, OMP_NUM_THREADS=2)) == more


def test_with_the_compilers_own_openmp(compiler, tmp_path):
    """-fopenmp changes nothing: no pragma of ours or of ATen's is compiled."""
    source = ROOT / "csrc/cpu/norm_ops_cpu.cpp"
    includes = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-fopenmp", *includes, "-c", str(source)]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "object.o")], capture_output=True, text=True
    )
    if "'omp.h' file not found" in result.stderr:
        pytest.skip(f"{compiler} has no omp.h")
    assert result.returncode == 0, result.stderr
    symbols = undefined_symbols(tmp_path / "object.o")
    assert "GOMP_parallel" in symbols
    assert not any(symbol.startswith("__kmpc") for symbol in symbols)


def test_in_place_and_by_make(tmp_path):
    """`make build VENV=none` in a tree that was never built, without a compiler."""
    tree = copy_tree(tmp_path / "a checkout")
    python = Path(sys.executable)
    environ = {"CXX": tmp_path / "none", "PATH": os.environ["PATH"]}
    output = succeed("make", "build", "VENV=none", f"PYTHON={python}", cwd=tree, **environ)
    assert "pure Python build (no C++ compiler was found" in output
    again = succeed("make", "build", "VENV=none", f"PYTHON={python}", cwd=tree, **environ)
    assert "setup.py" not in again
    check = tree / ".ci/check_installation.py"
    output = succeed(python, check, "--in-place", cwd=tree, PYTHONPATH=tree)
    assert output.strip() == f"{torch.__version__} PyTorch code"
