"""Builds sdkernels._C. Metadata is in pyproject.toml; what to build is decided in `decide`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import setuptools
from setuptools import Command, Extension, setup

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda")
OLDEST_SETUPTOOLS = 77  # the first that reads the license in pyproject.toml


@dataclass(frozen=True)
class Toolkit:
    """What stands under CUDA_HOME.

    Where that is not set, torch guesses it from the nvcc on PATH. That one may be a wrapper script,
    with no toolkit around it: hence the look at a header.
    """

    root: str
    has_nvcc: bool
    has_cuda_runtime_h: bool
    version: str | None  # None if nvcc is missing or does not run


@dataclass(frozen=True)
class Environment:
    """All that the decision depends on."""

    requested: str  # SDKERNELS_BUILD
    setuptools: str
    torch: str | None  # version, None if torch is not installed
    torch_cuda: str | None  # CUDA version, None for CPU and ROCm builds of torch
    toolkit: Toolkit | None
    has_kernels: bool  # the source tree contains CUDA kernels


class Decision(NamedTuple):
    target: Literal["cpu", "cuda", "stop"]
    reason: str


def decide(environment: Environment) -> Decision:
    """What to build, with the reason in one line."""
    requested = environment.requested
    if requested not in MODES:
        return Decision("stop", f"SDKERNELS_BUILD should be {', '.join(MODES)}; got {requested!r}")
    if major(environment.setuptools) < OLDEST_SETUPTOOLS:
        return Decision(
            "stop",
            f"setuptools {environment.setuptools} is too old, install {OLDEST_SETUPTOOLS} or later",
        )
    if environment.torch is None:
        return Decision(
            "stop",
            "torch is not installed where sdkernels is being built: install it first, "
            "then add --no-build-isolation to the pip command",
        )
    if requested == "cpu":
        return Decision("cpu", "SDKERNELS_BUILD=cpu")
    obstacle = cuda_obstacle(environment)
    if obstacle is None:
        return Decision("cuda", f"torch and the toolkit both have CUDA {environment.torch_cuda}")
    if requested == "cuda":
        return Decision("stop", f"SDKERNELS_BUILD=cuda is impossible: {obstacle}")
    return Decision("cpu", obstacle)


def cuda_obstacle(environment: Environment) -> str | None:
    """Why a CUDA build would fail, None if it would not."""
    torch, torch_cuda, toolkit = environment.torch, environment.torch_cuda, environment.toolkit
    if not environment.has_kernels:
        return "this version has no CUDA kernels"
    if torch_cuda is None:
        return f"torch {torch} was built without CUDA"
    if toolkit is None:
        return "no CUDA toolkit was found; set CUDA_HOME"
    needed = {
        "bin/nvcc": toolkit.has_nvcc,
        "include/cuda_runtime.h": toolkit.has_cuda_runtime_h,
    }
    for file, there in needed.items():
        if not there:
            return f"{toolkit.root}/{file} is missing; set CUDA_HOME to a complete toolkit"
    if toolkit.version is None:
        return f"{toolkit.root}/bin/nvcc --version does not work"
    if major(toolkit.version) != major(torch_cuda):
        return (
            f"torch {torch} was built for CUDA {torch_cuda}, but {toolkit.root} is CUDA "
            f"{toolkit.version}; set CUDA_HOME to a toolkit of the same major version"
        )
    return None


def major(version: str) -> int:
    return int(version.split(".")[0])


def inspect_environment(environ: Mapping[str, str]) -> Environment:
    """The environment that this process runs in."""
    requested = environ.get("SDKERNELS_BUILD") or "auto"
    has_kernels = any((ROOT / "csrc/cuda/kernels").glob("*.cu"))
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ModuleNotFoundError as error:
        if error.name != "torch":  # installed but broken: torch's own message says more
            raise
        version = cuda = toolkit = None
    else:
        version, cuda = torch.__version__, torch.version.cuda
        toolkit = inspect_toolkit(Path(CUDA_HOME)) if CUDA_HOME else None
    return Environment(requested, setuptools.__version__, version, cuda, toolkit, has_kernels)


def inspect_toolkit(root: Path) -> Toolkit:
    nvcc = root / "bin/nvcc"
    version = None
    if nvcc.is_file():
        try:
            answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        except OSError:
            answer = ""
        if found := re.search(r"release (\d+\.\d+)", answer):
            version = found[1]
    header = root / "include/cuda_runtime.h"
    return Toolkit(str(root), nvcc.is_file(), header.is_file(), version)


def cuda_arch_list(
    environ: Mapping[str, str], toolkit_version: str, capabilities: Sequence[tuple[int, int]]
) -> str:
    """The value for TORCH_CUDA_ARCH_LIST: what is set, else this machine's GPUs, else the usual."""
    if chosen := environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    if capabilities:
        return ";".join(f"{major}.{minor}" for major, minor in sorted(set(capabilities)))
    major_version, minor_version = map(int, toolkit_version.split("."))
    has_blackwell = (major_version, minor_version) >= (12, 8)
    return "8.0;8.6;8.9;9.0+PTX" + (";10.0;12.0+PTX" if has_blackwell else "")


def cxx_flags(platform: str) -> list[str]:
    # -g0 undoes the -g that many Pythons are configured with: a third of the compile time.
    # pybind11's own symbols are hidden, and it warns about classes that are not.
    # gcc tells that passing wide vectors changed in gcc 4.6; the kernels pass them inlined only.
    # Without contraction of a * b + c the sums have the same bits on every instruction set.
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", "-ffp-contract=off"]
    if platform.startswith("linux"):
        # at::parallel_for is an OpenMP pragma in ATen's headers, so files that use it are compiled
        # with -fopenmp. The flag is not given to the linker: the symbols then come from the OpenMP
        # library that torch has loaded, never from a second one with a thread pool of its own.
        flags.append("-fopenmp")
    return flags


def sources(target: str) -> list[str]:
    patterns = ["*.cpp", "cpu/*.cpp"]
    if target == "cuda":
        patterns += ["cuda/*.cpp", "cuda/kernels/*.cu"]
    return relative_files(patterns)


def headers() -> list[str]:
    return relative_files(["**/*.h", "**/*.cuh"])


def relative_files(patterns: list[str]) -> list[str]:
    """Files below csrc, sorted so that two builds link their objects in the same order."""
    paths = {path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)}
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def extension(target: str, cuda_version: str, arch_list: str) -> Extension:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    flags = cxx_flags(sys.platform)
    strings = {
        "SDKERNELS_CXX_FLAGS": " ".join(flags),
        "SDKERNELS_CUDA_VERSION": cuda_version,
        "SDKERNELS_CUDA_ARCH_LIST": arch_list,
    }
    # Flags for the C++ compiler only, not define_macros: nvcc would need another level of quoting.
    definitions = [f'-D{name}="{value}"' for name, value in strings.items()]
    kind = CUDAExtension if target == "cuda" else CppExtension
    return kind(
        "sdkernels._C",
        sources(target),
        depends=headers(),
        extra_compile_args={"cxx": flags + definitions, "nvcc": ["-O3"]},
    )


def build_command(decision: Decision, record: dict[str, str | None]) -> type[Command]:
    """The build_ext that says what it builds and leaves _build.json beside the extension."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildAndRecord(BuildExtension):
        def run(self) -> None:
            print(f"sdkernels: {decision.target} build ({decision.reason})", flush=True)
            super().run()
            (built,) = self.extensions
            path = Path(self.get_ext_fullpath(built.name)).with_name("_build.json")
            path.write_text(json.dumps(record, indent=2) + "\n")

    return BuildAndRecord


def main() -> None:
    environment = inspect_environment(os.environ)
    decision = decide(environment)
    if decision.target == "stop":
        raise SystemExit(f"sdkernels: {decision.reason}")
    cuda_version = arch_list = ""
    if decision.target == "cuda":
        import torch

        cuda_version = environment.toolkit.version
        devices = range(torch.cuda.device_count())
        capabilities = [torch.cuda.get_device_capability(device) for device in devices]
        arch_list = cuda_arch_list(os.environ, cuda_version, capabilities)
        # Without a GPU and without a list, torch's build fails with an IndexError.
        os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list
    record = {"torch": environment.torch, "cuda": cuda_version or None}
    setup(
        ext_modules=[extension(decision.target, cuda_version, arch_list)],
        cmdclass={"build_ext": build_command(decision, record)},
    )


if __name__ == "__main__":
    main()
