"""sdkernels._C: its sources, flags and architectures, and the commands that build it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from setuptools import Command, Extension
from setuptools.command.build_py import build_py

from .decision import ROOT, Decision, Environment

RECORD = "_build.json"  # beside the extension: what it was built for


class ExtensionFailed(Exception):
    """The compiler or the linker failed; what they said has been printed."""


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


def cxx_flags() -> list[str]:
    # -g0 undoes the -g that many Pythons are configured with: a third of the compile time.
    # pybind11's own symbols are hidden, and it warns about classes that are not.
    # gcc tells that passing wide vectors changed in gcc 4.6; the kernels pass them inlined only.
    # Without contraction of a * b + c the sums have the same bits on every instruction set.
    # No -fopenmp: see csrc/cpu/parallel.h.
    return ["-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", "-ffp-contract=off"]


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

    flags = cxx_flags()
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


def build_commands(record: dict[str, Any]) -> dict[str, type[Command]]:
    """The build_ext that leaves `record` beside the extension, and the build_py before it."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildAndRecord(BuildExtension):
        def run(self) -> None:
            # Objects of another torch, compiler or set of flags lie in a folder of their own:
            # their time stamps do not tell that they do not fit.
            digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
            self.build_temp = str(Path(self.build_temp) / digest[:12])
            (built,) = self.extensions
            path = Path(self.get_ext_fullpath(built.name)).with_name(RECORD)
            self.force = self.force or read_record(path) != record
            path.unlink(missing_ok=True)  # what is not finished has none
            try:
                super().run()
            except Exception as error:
                raise ExtensionFailed(f"{type(error).__name__}: {error}") from error
            path.write_text(json.dumps(record, indent=2) + "\n")

    return {"build_ext": BuildAndRecord, "build_py": CleanBuildPy}


def read_record(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


class CleanBuildPy(build_py):
    """Starts from nothing: a module deleted since the last build would go into the wheel again."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "sdkernels", ignore_errors=True)
        super().run()


def pure_commands(reason: str) -> dict[str, type[Command]]:
    """The build_py that leaves in the package why it has no extension."""

    class BuildPyAndRecord(CleanBuildPy):
        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                path = Path(self.build_lib) / "sdkernels" / RECORD
                record = {"torch": None, "cuda": None, "reason": reason}
                path.write_text(json.dumps(record, indent=2) + "\n")

    return {"build_py": BuildPyAndRecord}


def configure(environment: Environment, decision: Decision) -> dict[str, Any]:
    """The arguments of setup() that build what was decided."""
    if decision.target == "none":
        return {"cmdclass": pure_commands(decision.reason)}
    cuda_version = arch_list = ""
    if decision.target == "cuda":
        import torch

        cuda_version = environment.toolkit.version
        devices = range(torch.cuda.device_count())
        capabilities = [torch.cuda.get_device_capability(device) for device in devices]
        arch_list = cuda_arch_list(os.environ, cuda_version, capabilities)
        # Without a GPU and without a list, torch's build fails with an IndexError.
        os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list
    record = {
        "torch": environment.torch,
        "cuda": cuda_version or None,
        "python": sys.implementation.cache_tag,
        "compiler": environment.compiler,
        "arch_list": arch_list,
        "flags": cxx_flags() + [os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS")],
    }
    return {
        "ext_modules": [extension(decision.target, cuda_version, arch_list)],
        "cmdclass": build_commands(record),
    }
