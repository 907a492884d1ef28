"""What to build, and why: decided from what is there, before anything is compiled."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import setuptools

ROOT = Path(__file__).resolve().parent.parent
MODES = ("auto", "none", "cpu", "cuda")
OLDEST_SETUPTOOLS = 77  # the first that reads the license in pyproject.toml
OLDEST_TORCH = (2, 10)
NO_TORCH = (
    "torch is not installed where sdkernels is being built; for the compiled extension "
    "install it first, then add --no-build-isolation to the pip command"
)

# Set by the build backend once the compiler has failed.
failure: str | None = None


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
    torch: str | None  # version, None if torch cannot be imported (or need not be)
    torch_cuda: str | None  # CUDA version, None for CPU and ROCm builds of torch
    toolkit: Toolkit | None
    compiler: str | None  # the C++ compiler's command, None if it is not there
    has_kernels: bool  # the source tree contains CUDA kernels
    failure: str | None = None  # why the extension cannot be built, where that is known already


class Decision(NamedTuple):
    """`target` "none" is the package without its extension."""

    target: Literal["none", "cpu", "cuda", "stop"]
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
    if requested == "none":
        return Decision("none", "SDKERNELS_BUILD=none")
    obstacle = extension_obstacle(environment)
    if obstacle is not None:
        if requested == "auto":
            return Decision("none", obstacle)
        return Decision("stop", f"SDKERNELS_BUILD={requested} is impossible: {obstacle}")
    if requested == "cpu":
        return Decision("cpu", "SDKERNELS_BUILD=cpu")
    obstacle = cuda_obstacle(environment)
    if obstacle is None:
        return Decision("cuda", f"torch and the toolkit both have CUDA {environment.torch_cuda}")
    if requested == "cuda":
        return Decision("stop", f"SDKERNELS_BUILD=cuda is impossible: {obstacle}")
    return Decision("cpu", obstacle)


def extension_obstacle(environment: Environment) -> str | None:
    """Why no extension can be built at all, None if one can."""
    if environment.failure is not None:
        return environment.failure
    if environment.torch is None:
        return NO_TORCH
    if release(environment.torch) < OLDEST_TORCH:
        return f"torch {environment.torch} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if environment.compiler is None:
        return "no C++ compiler was found; install one, or set CXX"
    return None


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


def release(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu" and of "2.13.0a0+git1234567"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"torch: expected a version such as 2.13.0, got {version!r}")
    return int(found[1]), int(found[2])


def point_to_toolkit(environ: MutableMapping[str, str]) -> None:
    """Set CUDA_HOME where torch would take what stands around a wrapper of nvcc for the toolkit.

    To be called before torch.utils.cpp_extension is imported, which guesses once.
    """
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if environ.get("CUDA_HOME") or environ.get("CUDA_PATH") or nvcc is None:
        return
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    try:
        answer = subprocess.run(command, capture_output=True, text=True).stderr
    except OSError:
        answer = ""
    top = re.search(r"^#\$ TOP=(.+)$", answer, re.MULTILINE)
    folders = [Path(nvcc).parent.parent, *([Path(top[1])] if top else []), Path("/usr/local/cuda")]
    for number, folder in enumerate(folders):
        if (folder / "bin/nvcc").is_file() and (folder / "include/cuda_runtime.h").is_file():
            if number > 0:  # the first is torch's own guess
                environ["CUDA_HOME"] = str(folder.resolve())
            return


def inspect_environment(environ: Mapping[str, str]) -> Environment:
    """The environment that this process runs in."""
    requested = environ.get("SDKERNELS_BUILD") or "auto"
    has_kernels = any((ROOT / "csrc/cuda/kernels").glob("*.cu"))
    version = cuda = toolkit = None
    problem = failure
    if requested != "none" and problem is None:
        try:
            import torch
            from torch.utils.cpp_extension import CUDA_HOME
        except Exception as error:  # installed but broken: whatever its import says
            if not isinstance(error, ModuleNotFoundError) or error.name != "torch":
                problem = f"torch cannot be imported ({type(error).__name__}: {error})"
        else:
            version, cuda = torch.__version__, torch.version.cuda
            toolkit = inspect_toolkit(Path(CUDA_HOME)) if CUDA_HOME else None
    return Environment(
        requested,
        setuptools.__version__,
        version,
        cuda,
        toolkit,
        find_compiler(environ),
        has_kernels,
        problem,
    )


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """The command that torch's build compiles C++ with, if it can be executed."""
    command = environ.get("CXX") or "c++"
    words = shlex.split(command)
    return command if words and shutil.which(words[0], path=environ.get("PATH")) else None


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
