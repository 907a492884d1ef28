"""Compiles what runs kernels from their PTX: nvcc's objects with the stand-in for the CUDA runtime,
and each kernel translated, at its first launch. All of it is kept under build/ptx, by content.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from .translate import Entry, entries, header, translate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILT = ROOT / "build/ptx"
KERNELS = ROOT / "csrc/cuda/kernels"
EMULATION = ROOT / "tests/cuda_emulation"

# What is run. nvcc makes the same of the kernels for all architectures before 10.0, but for one
# conversion (`test_compute_80_differs_in_one_conversion`).
ARCHITECTURE = os.environ.get("SDKERNELS_PTX_ARCH", "90")


def clean() -> dict[str, str]:
    """The sanitizers are for this process: compilers do not live through them."""
    return {n: v for n, v in os.environ.items() if n not in ("LD_PRELOAD", "ASAN_OPTIONS")}


def run(*command: object) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, env=clean(), capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++")


def why_not() -> str | None:
    """Why nothing can be translated here; None where it can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return "fibers are for Linux on x86-64"
    return None if compiler() else "no C++ compiler is installed here"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


@functools.cache
def toolkit() -> Path:
    """Where nvcc itself is: the one on the path may be a wrapper that stands somewhere else."""
    dry_run = [str(nvcc()), "--dryrun", "-x", "cu", "-c", os.devnull]
    text = subprocess.run(dry_run, env=clean(), capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", text, re.MULTILINE)
    assert found, text
    return Path(found[1]).resolve()


def digest(*parts: object) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return sha.hexdigest()[:16]


def compiled(target: Path, *command: object) -> Path:
    """The file, made by a command that ends with its path, if it is not there yet: by one process,
    for which others that need it wait.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_suffix(f".unfinished{target.suffix}")
            run(*command, "-o", unfinished)
            unfinished.rename(target)
    return target


# ---- the host's side -----------------------------------------------------------------------------


def nvcc_object(source: Path, *flags: str, architecture: str = ARCHITECTURE) -> Path:
    """With its PTX beside it."""
    code = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    command = [str(nvcc()), "-std=c++17", "-O3", "-Xcompiler=-fPIC", code, *flags]
    headers = sorted([*(ROOT / "csrc").glob("**/*.*h"), *HERE.glob("*.cuh")])
    name = f"{source.stem}-{digest(command, run(str(nvcc()), '--version'), source, *headers)}"
    kept = BUILT / "objects" / name
    kept.mkdir(parents=True, exist_ok=True)
    return compiled(kept / "kernels.o", *command, "--keep", f"--keep-dir={kept}", "-c", source)


def ptx_beside(objects: Sequence[Path]) -> list[str]:
    return [next(path.parent.glob("*.ptx")).read_text() for path in objects]


def torch_folder() -> Path:
    """Found without loading it: what runs a few kernels alone does not need it."""
    spec = find_spec("torch")
    assert spec is not None
    return Path(spec.origin or "").parent


def glue_flags() -> list[str]:
    """What the ops' own host code needs to be compiled against a CPU build of PyTorch."""
    import torch

    include = torch_folder() / "include"
    return [
        f"-I{EMULATION / 'include'}",
        f"-isystem{include}",
        f"-isystem{include / 'torch/csrc/api/include'}",
        '-DSDKERNELS_CUDA_ARCH_LIST="9.0"',
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DSDKERNELS_PTX_TORCH={torch.__version__}",
    ]


def host_object(source: Path, *flags: str) -> Path:
    command = [compiler(), "-std=c++20", "-fPIC", "-O1", "-g0", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{toolkit() / 'include'}"] if nvcc() else []
    command += [*flags, "-c", source]
    included = [HERE / "device.h", HERE / "machine.h", *(ROOT / "csrc").glob("**/*.*h")]
    included += [*EMULATION.glob("include/**/*.h"), *(ROOT / "csrc/cuda").glob("*.cpp")]
    name = f"{source.stem}-{digest(*command, source, *sorted(included))}.o"
    return compiled(BUILT / "host" / name, *command)


def machine() -> Path:
    """The library that runs translated kernels."""
    part = host_object(HERE / "machine.cpp")
    name = f"machine-{digest(part)}.so"
    return compiled(BUILT / name, compiler(), "-shared", part, "-pthread")


def shared_library(name: str, parts: Sequence[Path], *libraries: object) -> Path:
    own = [host_object(HERE / "cudart.cpp"), machine(), f"-Wl,-rpath,{BUILT}", *libraries]
    target = BUILT / f"{name}-{digest(*parts, *own)}.so"
    return compiled(target, compiler(), "-shared", *parts, *own)


def side_by_side() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))


def kernel_objects(few: bool = False, architecture: str = ARCHITECTURE) -> list[Path]:
    """Of all kernel sources. `few` leaves out most pairs of dtypes."""
    flags = [f"-include={HERE / 'few_dtypes.cuh'}"] if few else []
    # The slowest first.
    sources = sorted(KERNELS.glob("*.cu"), key=lambda path: -path.stat().st_size)
    with side_by_side() as pool:
        made = pool.map(lambda s: nvcc_object(s, *flags, architecture=architecture), sources)
        return list(made)


def cuda_ops(few: bool) -> tuple[Path, list[str]]:
    """The library of the CUDA ops, registered for the CPU, and the PTX of its kernels."""
    objects = kernel_objects(few)
    glue = host_object(EMULATION / "ops.cpp", *glue_flags())
    libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu", "-lc10"]
    library = shared_library("ops", [*objects, glue], *libraries)
    return library, ptx_beside(objects)


def faults() -> tuple[Path, list[str]]:
    """The library of the faults that have to be noticed, and its PTX."""
    part = nvcc_object(HERE / "faults.cu")
    return shared_library("faults", [part]), ptx_beside([part])


# ---- kernels -------------------------------------------------------------------------------------


class Kernels:
    """Translates and loads kernels of some PTX files when they are asked for."""

    def __init__(self, ptx: Sequence[str] = (), counting: bool = False) -> None:
        self.entries: dict[str, tuple[Entry, str]] = {}
        self.counting = counting
        self.loaded: dict[str, ctypes.CDLL] = {}
        self.asked: list[str] = []  # with repetitions
        for text in ptx:
            self.add(text)

    def add(self, ptx: str, prefix: str = "") -> None:
        head = header(ptx)
        self.entries.update({prefix + name: (entry, head) for name, entry in entries(ptx).items()})

    def entry(self, name: str) -> tuple[Entry, str]:
        """With the head that makes it a file of its own."""
        return self.entries[name]

    def __getitem__(self, name: str) -> int:
        """The address of the kernel's description."""
        self.asked.append(name)
        if name not in self.loaded:
            self.loaded[name] = ctypes.CDLL(str(library(self.entries[name][0], self.counting)))
        return ctypes.addressof(ctypes.c_char.in_dll(self.loaded[name], "kernel"))


def library(entry: Entry, counting: bool) -> Path:
    flags = ["-std=c++20", "-O1", "-g0", "-w", "-fPIC", "-shared", "-fwrapv", "-ffp-contract=off"]
    flags += ["-mfma"] if " fma " in Path("/proc/cpuinfo").read_text() else []
    flags += ["-DPTX_COUNT"] if counting else []
    made_of = [entry.neutral, entry.outside, flags, HERE / "translate.py", HERE / "device.h"]
    target = BUILT / "kernels" / f"{digest(*made_of)}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".ptx").write_text(entry.text)  # for who looks for a line of it
        code = target.with_suffix(f".{os.getpid()}.cpp")
        code.write_text(translate(entry))
        compiled(target, compiler(), *flags, f"-I{HERE}", code)
        code.rename(target.with_suffix(".cpp"))
    return target


# Memory starts as NaN, and every tensor has a wide zone around it that nothing may touch.
ASAN_OPTIONS = "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255:redzone=512"

# What a process prints at its end whose kernels were translated ones.
SERVED = "launches of translated kernels"

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


def load_machine() -> ctypes.CDLL:
    library = ctypes.CDLL(str(machine()), mode=ctypes.RTLD_GLOBAL)
    library.ptx_launch.restype = ctypes.c_char_p
    library.ptx_launches.restype = ctypes.c_uint64
    library.ptx_order(ORDERS[os.environ.get("SDKERNELS_PTX_ORDER", "forward")])
    return library


def report() -> None:
    """A pytest plugin's last words; fails where nothing was launched."""
    launches = load_machine().ptx_launches()
    assert launches
    print(f"{launches} {SERVED}")


_kept: list[object] = []


def keep(loaded: object) -> None:
    """What C++ points to must not be collected."""
    _kept.append(loaded)


def load(library: Path, kernels: Kernels) -> ctypes.CDLL:
    """A library whose launches run these kernels."""
    load_machine()
    loaded = ctypes.CDLL(str(library))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)
    def resolve(name: bytes) -> int:
        return kernels[name.decode()]

    loaded.ptx_resolver(resolve)
    keep((resolve, kernels))
    return loaded
