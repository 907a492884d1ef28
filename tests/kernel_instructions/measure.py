"""Instructions per element of every AVX2 kernel, counted by callgrind: no clock, no noise."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from build_tools.extension import cxx_flags

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def why_impossible() -> str | None:
    """Why nothing can be counted here; None where it can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return "counts the instructions of AVX2 code: needs Linux on x86-64"
    if " avx2 " not in Path("/proc/cpuinfo").read_text():
        return "this processor has no AVX2"
    for tool in ("valgrind", _compiler()):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return None


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _run(*command: object, cwd: Path) -> str:
    result = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]}: {result.stdout}{result.stderr}")
    return result.stdout


def count(folder: Path, sources: Path = ROOT / "csrc/cpu") -> dict[str, float]:
    """Instructions per element by case, as ``cases.cpp`` names them: kernel-types-length.

    The kernels of `sources` are compiled into `folder` with the flags of the build.
    """
    kernels = sources / "row_kernels_avx2.cpp"
    flags = cxx_flags()
    _run(_compiler(), "-std=c++17", *flags, "-c", kernels, "-o", "kernels.o", cwd=folder)
    driver = HERE / "cases.cpp"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    include = f"-I{sources}"
    _run(
        *(_compiler(), "-std=c++17", "-O1", *warnings, include, driver),
        *("kernels.o", "-o", "cases"),
        cwd=folder,
    )
    # Counts inside of `measured` only, and writes them down each time that it is left.
    printed = _run(
        *("valgrind", "--tool=callgrind", "--toggle-collect=measured", "--dump-after=measured"),
        *("--callgrind-out-file=counts", "./cases"),
        cwd=folder,
    )
    found = {}
    for number, line in enumerate(printed.splitlines(), 1):
        name, elements = line.split()
        text = (folder / f"counts.{number}").read_text()
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        assert total is not None
        found[name] = int(total[1]) / int(elements)
    return found
