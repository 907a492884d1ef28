"""The CUDA kernels compiled by nvcc, and what came out of it: no GPU is needed for that."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc/cuda"
KERNELS = sorted(path.stem for path in (CUDA / "kernels").glob("*.cu"))
GLUE = sorted(path.stem for path in CUDA.glob("*.cpp"))
ARCHITECTURES = ("80", "90", "100")

# Registers that a kernel may take. With 128 two blocks of 256 threads fit on a multiprocessor, or
# one of 512. The kernels that add up columns hold their sums in registers as well.
MOST_REGISTERS = {"compact_norm_backward": 232}
MOST_REGISTERS_ELSEWHERE = 128

# Narrow accesses to memory in the code of a kernel of the widest vectors, at most: what it reads
# once for a row (index, slot, weight, statistics), a byte of bits or a line's layer scale (of
# either type) beside each vector, and the statistics and sums that it writes.
MOST_NARROW_READS = {"scatter_add": 11, "scale_rows": 10}
MOST_NARROW_READS_ELSEWHERE = 6
MOST_NARROW_WRITES = {
    "compact_norm": 2,
    "compact_long_norm": 2,
    "compact_norm_backward": 32,
    "sum_columns": 6,
    "scale_rows_and_sum": 10,
    "scatter_add_relu": 2,
}

# The kernels of each source that exist for vectors of every width: of 16-bit data 1, 2, 4 and 8
# elements, but where eight would take too many registers.
WIDTHS = {1, 2, 4, 8}
FEWER_WIDTHS = {"scale_rows_and_sum": {1, 2, 4}}
KERNELS_OF_WIDTHS = {
    "scatter_add": {"scatter_add"},
    "scatter_add_backward": {"scale_rows", "scale_rows_and_sum"},
    "scatter_add_relu": {"scatter_add_relu", "scatter_add_relu_backward"},
    "compact_norm": {"compact_norm", "compact_long_norm"},
    "compact_norm_backward": {
        "compact_norm_backward",
        "compact_long_norm_backward",
        "sum_columns",
    },
}

FLAGS = [
    "-std=c++17",
    "-O3",
    "-Werror=all-warnings",
    "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC",
    "-Xptxas=-Werror,-warn-spills,-warn-lmem-usage",
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES),
]


def run(*command: object) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def nvcc() -> Path:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if not found:
        pytest.skip("nvcc is not installed here")
    return Path(found)


@pytest.fixture(scope="module")
def cuobjdump() -> Path:
    """From the toolkit, or from the triton wheel."""
    triton = find_spec("triton")
    folders = [os.environ.get("PATH", "")]
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if not found:
        pytest.skip("neither the CUDA toolkit nor triton brings cuobjdump here")
    return Path(found)


@pytest.fixture(scope="module")
def objects(nvcc: Path) -> dict[str, Path]:
    """The object file of every kernel source, compiled anew when a source has changed."""
    folder = ROOT / "build/cuda_compile"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(repr((FLAGS, run(nvcc, "--version"))).encode())
    for path in sorted((ROOT / "csrc").glob("**/*.*h")):
        digest.update(path.read_bytes())

    def compile_one(name: str) -> Path:
        source = CUDA / f"kernels/{name}.cu"
        own = digest.copy()
        own.update(source.read_bytes())
        target = folder / f"{name}-{own.hexdigest()[:16]}.o"
        if not target.exists():
            for outdated in folder.glob(f"{name}-*.o"):
                outdated.unlink()
            run(nvcc, *FLAGS, "-c", source, "-o", target.with_suffix(".part"))
            target.with_suffix(".part").rename(target)
        return target

    # The slowest first.
    names = sorted(KERNELS, key=lambda name: -(CUDA / f"kernels/{name}.cu").stat().st_size)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(compile_one, names), strict=True))


@dataclass(frozen=True)
class Kernel:
    """One instantiation for one architecture."""

    architecture: str
    name: str
    arguments: tuple[str, ...]  # of the template

    @property
    def vectors(self) -> list[int]:
        """The bytes of its vectors, of each type; none where it has no vectors."""
        sizes = {"double": 8, "float": 4, "unsigned int": 4, "__nv_bfloat16": 2, "__half": 2}
        types = [sizes[a] for a in self.arguments if a in sizes]
        numbers = [int(a) for a in self.arguments if a.isdigit()]
        return [numbers[0] * size for size in types] if numbers else []

    @property
    def is_widest(self) -> bool:
        """Whether its vectors take 16 bytes of the widest type."""
        return max(self.vectors, default=0) >= 16

    def is_narrow(self, access: str) -> bool:
        """Whether an instruction takes less than a vector."""
        wide = [".128"] + [".64"] * (min(self.vectors) == 8)
        return not any(width in access for width in wide)


def parse(architecture: str, mangled: str) -> Kernel:
    demangled = demangle(mangled)
    name, _, rest = demangled.partition("<") if "<" in demangled else demangled.partition("(")
    arguments = []
    if "<" in demangled:
        arguments = [a.strip().removeprefix("(int)") for a in rest.split(">(")[0].split(",")]
    return Kernel(architecture, name.rsplit("::", 1)[-1].split()[-1], tuple(arguments))


def demangle(name: str) -> str:
    return run("c++filt", name).strip().replace("(anonymous namespace)::", "")


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    local: int


def usages(cuobjdump: Path, path: Path) -> Iterator[tuple[Kernel, Usage]]:
    architecture, function = "", ""
    for line in run(cuobjdump, "-res-usage", path).splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            function = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            yield parse(architecture, function), Usage(*map(int, found.groups()))


@pytest.mark.whole
@pytest.mark.parametrize("name", KERNELS)
def test_registers(name, objects, cuobjdump):
    """Nothing spills, nothing lives on a stack, and enough threads fit on a multiprocessor."""
    architectures = set()
    for kernel, usage in usages(cuobjdump, objects[name]):
        architectures.add(kernel.architecture)
        assert usage.stack == usage.local == 0, kernel
        assert usage.registers <= MOST_REGISTERS.get(kernel.name, MOST_REGISTERS_ELSEWHERE), kernel
    assert architectures == set(ARCHITECTURES)


@pytest.mark.whole
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "compact_mask"])
def test_wide_accesses(name, objects, cuobjdump):
    """The widest vectors are read and written 16 bytes at a time, whatever else a kernel does; a
    16-bit type beside float32 8 bytes at a time."""
    widest = set()
    for architecture in ARCHITECTURES:
        sass = run(cuobjdump, "--dump-sass", "-arch", f"sm_{architecture}", objects[name])
        for function in re.split(r"Function : ", sass)[1:]:
            kernel = parse(architecture, function.split(None, 1)[0])
            if not kernel.is_widest:
                continue
            widest.add(kernel)
            reads = re.findall(r"\bLDG?\.\S*", function)
            writes = re.findall(r"\bSTG?\.\S*", function)
            narrow_reads, narrow_writes = (
                [access for access in accesses if kernel.is_narrow(access)]
                for accesses in (reads, writes)
            )
            assert len(narrow_reads) < len(reads), kernel
            most = MOST_NARROW_READS.get(kernel.name, MOST_NARROW_READS_ELSEWHERE)
            assert len(narrow_reads) <= most, (kernel, narrow_reads)
            # The sums of columns are read that way and written one by one.
            assert kernel.name == "sum_columns" or len(narrow_writes) < len(writes), kernel
            most = MOST_NARROW_WRITES.get(kernel.name, 0)
            assert len(narrow_writes) <= most, (kernel, narrow_writes)
    assert {kernel.architecture for kernel in widest} == set(ARCHITECTURES)


@pytest.mark.whole
@pytest.mark.parametrize("name", KERNELS_OF_WIDTHS)
def test_widths(name, objects, cuobjdump):
    """Rows that do not allow the widest vectors still get wider ones than single elements."""
    widths: dict[str, set[int]] = {}
    for kernel, _ in usages(cuobjdump, objects[name]):
        if "__nv_bfloat16" in kernel.arguments:
            width = next(int(a) for a in kernel.arguments if a.isdigit())
            widths.setdefault(kernel.name, set()).add(width)
    assert widths == {
        kernel: FEWER_WIDTHS.get(kernel, WIDTHS) for kernel in KERNELS_OF_WIDTHS[name]
    }


@pytest.fixture(scope="module")
def toolkit_headers(nvcc: Path) -> Path:
    """Where nvcc itself finds them: it may be a wrapper that stands somewhere else."""
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    found = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)
    headers = Path(found[1]).resolve() / "include" if found else Path("none")
    if not (headers / "cuda_runtime_api.h").is_file():
        pytest.skip(f"{nvcc} has no headers beside it")
    return headers


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(GLUE, id="together"),
        *(pytest.param([name], id=name, marks=pytest.mark.whole) for name in GLUE),
    ],
)
def test_glue(names, toolkit_headers, tmp_path):
    """Against PyTorch's headers, of a CPU build too. They take most of the time: all files as one
    first, with `make test-whole` each alone."""
    include = Path(torch.__file__).parent / "include"
    if not (include / "c10/cuda/CUDAGuard.h").is_file():
        pytest.skip("this PyTorch comes without the headers of c10/cuda")
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if not compiler:
        pytest.skip("no C++ compiler is installed here")
    source = tmp_path / "glue.cpp"
    source.write_text("".join(f'#include "{CUDA / name}.cpp"\n' for name in names))
    run(
        compiler,
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        # What a CUDA build of PyTorch has generated.
        "-DC10_USING_CUSTOM_GENERATED_MACROS",
        "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
        '-DSDKERNELS_CUDA_ARCH_LIST="9.0"',
        *(f"-isystem{path}" for path in (include, include / "torch/csrc/api/include")),
        f"-isystem{toolkit_headers}",
        source,
    )
