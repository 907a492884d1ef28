"""Compiles the CUDA kernels and their glue for the CPU, with the sanitizers, into one library."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc/cuda/kernels"
EMULATOR = HERE / "emulator.cpp"
BUILT = ROOT / "build/cuda_emulation"
FEW_DTYPES = HERE.parent / "ptx/few_dtypes.cuh"
TORCH_INCLUDE = Path(torch.__file__).parent / "include"

SANITIZERS = ["-fsanitize=address,undefined"]
FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-O1",
    "-g0",
    *SANITIZERS,
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    f"-I{HERE / 'include'}",
    f"-isystem{TORCH_INCLUDE}",
    f"-isystem{TORCH_INCLUDE / 'torch/csrc/api/include'}",
    '-DSDKERNELS_CUDA_ARCH_LIST="9.0"',
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    # Grids of at most this many blocks: kernels must loop over the rest.
    "-DSDKERNELS_MOST_BLOCKS=7",
]


def compiler() -> str | None:
    """g++, None where there is none: clang has no library to preload for a Python of gcc's."""
    return shutil.which(os.environ.get("CXX") or "g++")


def runtimes() -> list[str]:
    """The sanitizers' libraries, which have to be loaded before Python's own."""
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if not Path(path).is_absolute():  # gcc answers with the bare name
            raise FileNotFoundError(f"{name} is not installed beside {compiler()}")
        paths.append(str(Path(path).resolve()))
    return paths


def objects(folder: Path, sources: list[Path], *flags: str) -> list[Path]:
    """Each source compiled, if something that may go into it has changed since the last time."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [*FLAGS, *flags]
    digest = hashlib.sha256(repr((torch.__version__, command)).encode())
    included = [ROOT.glob("csrc/**/*.*h"), ROOT.glob("csrc/cuda/*.cpp"), HERE.glob("**/*.h")]
    for path in sorted(path for paths in (*included, [FEW_DTYPES]) for path in paths):
        digest.update(path.read_bytes())

    def compile_one(source: Path) -> Path:
        own = digest.copy()
        own.update(source.read_bytes())
        target = folder / f"{source.stem}-{own.hexdigest()[:16]}.o"
        if not target.exists():
            for outdated in folder.glob(f"{source.stem}-*.o"):
                outdated.unlink()
            unfinished = target.with_suffix(f".{os.getpid()}")
            run([compiler(), *command, "-x", "c++", "-c", source, "-o", unfinished])
            unfinished.rename(target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, sources))


def link(target: Path, parts: list[Path], *options: str) -> Path:
    unfinished = target.with_suffix(f".{os.getpid()}")
    run([compiler(), *SANITIZERS, *parts, *options, "-o", unfinished])
    unfinished.rename(target)
    return target


def emulated_ops(few: bool = False) -> Path:
    """The library of the CUDA ops, registered for the CPU. `few`: of few pairs of dtypes."""
    folder = BUILT / ("few" if few else "ops")
    flags = ["-include", str(FEW_DTYPES)] if few else []
    parts = objects(folder, sorted(KERNELS.glob("*.cu")), *flags)
    parts += objects(BUILT, [HERE / "ops.cpp", EMULATOR])
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    return link(folder / "emulated.so", parts, "-shared", *libraries)


def faults() -> Path:
    """The program of the faults that the emulation has to notice."""
    return link(BUILT / "faults", objects(BUILT, [HERE / "faults.cu", EMULATOR]))


def run(command: list[object]) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


if __name__ == "__main__":
    print(emulated_ops())
