"""Builds and installs the package as users do, with nothing from the network."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # for build_tools
# What a copy of a checkout leaves out: what was built in it, environments, records of benchmarks.
LEFT_OUT = (
    ".git .venv build dist *.egg-info __pycache__ *.so _build.json .*_cache .hypothesis "
    ".benchmarks *.png"
)
# What a compiler of a test's own does: says what it was asked for, and makes an empty file of it.
COMPILER = """\
#!/bin/sh
echo "$@" >> "{log}"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


def copy_tree(folder: Path) -> Path:
    """A copy of the checkout, without what was built in it."""
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT.split())))


def script(path: Path, text: str) -> Path:
    """An executable file."""
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def environ(**changes: object) -> dict[str, str]:
    """This process' environment, but for what would lead back into the checkout, with `changes`."""
    left_out = ("PYTHONPATH", "SDKERNELS_", "CC", "CXX", "CFLAGS", "CXXFLAGS", "MAX_JOBS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**kept, **{name: str(value) for name, value in changes.items()}}


def run(*command: object, cwd: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    """Run a command, its two outputs in one."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environ(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeed(*command: object, cwd: Path, **changes: object) -> str:
    """The output of a command that must work."""
    result = run(*command, cwd=cwd, **changes)
    assert result.returncode == 0, result.stdout
    return result.stdout


def pip_wheel(tree: Path, folder: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    """`pip wheel` of a tree with this environment's torch and setuptools."""
    options = [
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--verbose",
        "--wheel-dir",
        folder,
    ]
    return run(sys.executable, "-m", "pip", "wheel", *options, tree, cwd=tree, **changes)


class Wheel:
    """What a wheel says of itself."""

    def __init__(self, folder: Path) -> None:
        (self.path,) = folder.glob("*.whl")
        _, self.version, self.python, self.abi, self.platform = self.path.stem.split("-")
        with zipfile.ZipFile(self.path) as archive:
            self.files = {name: archive.read(name) for name in archive.namelist()}

    @property
    def tag(self) -> str:
        return f"{self.python}-{self.abi}-{self.platform}"

    @property
    def metadata(self) -> Message:
        (text,) = (text for name, text in self.files.items() if name.endswith("/METADATA"))
        return Parser().parsestr(text.decode())

    @property
    def torch(self) -> str:
        """The requirement of torch."""
        requirements = self.metadata.get_all("Requires-Dist", [])
        (found,) = (each for each in requirements if each.partition(";")[0].startswith("torch"))
        return str(found)

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.files["sdkernels/_build.json"])
        return found

    @property
    def has_extension(self) -> bool:
        return any(name.startswith("sdkernels/_C.") and name[13:] != "pyi" for name in self.files)


def make_environment(folder: Path) -> Path:
    """The Python of a virtual environment that sees this one's packages, but not sdkernels."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    site = succeed(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).strip()
    packages = folder / "packages"
    packages.mkdir()
    for entry in map(Path, sys.path):
        if entry.name not in ("site-packages", "dist-packages") or not entry.is_dir():
            continue
        for package in entry.iterdir():
            if "sdkernels" not in package.name and package.suffix not in (".pth", ".egg-link"):
                (packages / package.name).symlink_to(package)
    (Path(site) / "packages.pth").write_text(f"{packages}\n")
    return python


def pip_install(python: Path, *arguments: object, **changes: object) -> str:
    """`pip install` into the environment of `python`, without dependencies."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", *options]
    return succeed(*pip, *arguments, cwd=python.parent, **changes)
