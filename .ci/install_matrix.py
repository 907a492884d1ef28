"""A line of docs/install-matrix.md: builds, installs and runs the package, prints what came of it.

    .ci/install_matrix.py --python python3.12 --torch 2.11.0 --build cpu --compiler clang++-14

Everything happens in a folder whose name has a space, and the package is run outside of the source
tree, by check_installation.py. `--environment FOLDER` keeps the environment (torch takes gigabytes)
for the next cell; `--tree FOLDER` keeps the copy of the sources, so that the next cell finds what
another torch left there.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build.json", "*.png")
)
COLUMNS = (
    "Python",
    "torch",
    "compiler",
    "ninja",
    "installed as",
    "what serves",
    "checked",
    "seconds",
)
CHECK = ROOT / ".ci/check_installation.py"


def run(*command: object, cwd: Path, **changes: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{result.stdout}")
    return result.stdout


def make_environment(folder: Path, python: str, torch: str) -> Path:
    """The Python of a virtual environment with a release of torch."""
    inside = folder / "bin/python"
    if not inside.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run(python, "-m", "venv", folder, cwd=folder.parent)
    packages = [f"torch=={torch}", "setuptools>=77", "numpy"]
    run(inside, "-m", "pip", "install", "--quiet", *packages, cwd=folder)
    return inside


def without_ninja(folder: Path) -> str:
    """A PATH on which ninja does not work."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (folder / "ninja").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def cell(options: argparse.Namespace, work: Path) -> list[str]:
    start = time.monotonic()
    python = make_environment(
        options.environment or work / "an environment", options.python, options.torch
    )
    tree = options.tree or work / "a checkout"
    if not tree.exists():
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    changes = {"SDKERNELS_BUILD": options.build, "PATH": os.environ["PATH"]}
    compiler = "-"
    if options.build != "none":
        changes["CXX"] = options.compiler
        changes["CC"] = options.compiler.replace("clang++", "clang").replace("g++", "gcc")
        compiler = run(options.compiler, "--version", cwd=work).splitlines()[0]
        if options.no_ninja:
            changes["PATH"] = without_ninja(work / "no ninja")
    pip = [python, "-m", "pip"]
    arguments = ["--no-build-isolation", "--no-deps"]
    if options.isolated:
        arguments = ["--no-deps"]
    if options.editable:
        run(*pip, "install", *arguments, "-e", tree, cwd=work, **changes)
        kind = "editable"
    else:
        wheels = work / "wheels"
        run(*pip, "wheel", *arguments, "--wheel-dir", wheels, tree, cwd=work, **changes)
        (wheel,) = wheels.glob("*.whl")
        run(*pip, "install", "--force-reinstall", "--no-deps", wheel, cwd=work)
        kind = wheel.name
    run(*pip, "check", cwd=work)
    wants = [] if options.build == "none" else ["--extension"]
    torch, what = run(python, CHECK, *wants, cwd=work).splitlines()[-1].split(maxsplit=1)
    run(python, "-m", "sdkernels.info", cwd=work)
    run(*pip, "uninstall", "--yes", "--quiet", "sdkernels", cwd=work)
    version = run(python, "-c", "import platform; print(platform.python_version())", cwd=work)
    ninja = "-" if options.build == "none" else "no" if options.no_ninja else "yes"
    seconds = f"{time.monotonic() - start:.0f}"
    return [version.strip(), torch, compiler, ninja, kind, what, "yes", seconds]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--torch", help="a release, 2.13.0 for example")
    parser.add_argument("--build", choices=["none", "cpu"], default="none")
    parser.add_argument("--compiler", default="g++", help="its command, clang++-14 for example")
    parser.add_argument("--no-ninja", action="store_true")
    parser.add_argument("--isolated", action="store_true", help="let pip isolate the build")
    parser.add_argument("--editable", action="store_true")
    parser.add_argument("--environment", type=Path)
    parser.add_argument("--tree", type=Path)
    parser.add_argument("--header", action="store_true", help="print the table's head and stop")
    options = parser.parse_args(arguments)
    if options.header:
        print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
        return
    if options.torch is None:
        parser.error("--torch: expected a release, 2.13.0 for example")
    if platform.system() != "Linux":
        parser.error("written for Linux")
    with tempfile.TemporaryDirectory(prefix="install matrix ") as folder:
        print(f"| {' | '.join(cell(options, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main()
