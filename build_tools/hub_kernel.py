"""Lays the package out as a kernel for Hugging Face's `kernels` package.

`python -m build_tools.hub_kernel FOLDER` writes what their kernel-builder takes (`build.toml`,
`torch-ext/sdkernels/`) and what it makes of that (`build/torch-cpu/`, `build/torch-cuda/`): the
Triton and PyTorch paths are Python alone, so there is nothing to compile. The package's files go in
as they are, but for the one that names the operators' namespace: a kernel's operators have one of
their own, so that several versions can be loaded into one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from .decision import ROOT
from .metadata import VERSION

BACKENDS = ("cpu", "cuda")
KERNEL_VERSION = 1  # what `get_kernel(..., version=)` asks for: raised when the interface breaks
# What the compiled extension alone needs, and what describes an installed distribution.
LEFT_OUT = shutil.ignore_patterns("__pycache__", "_C*", "_build.json", "info.py")

BUILD_TOML = f"""\
[general]
name = "sdkernels"
edition = 5
version = {KERNEL_VERSION}
license = "BSD-3-Clause"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""

README = f"""\
---
library_name: kernels
license: bsd-3-clause
tags:
- kernels
---
sdkernels {VERSION}: per-sample stochastic depth that computes a residual branch for the kept
samples only. Triton kernels for CUDA tensors, PyTorch code for all others.
"""

# Stands in for sdkernels/backends/namespace.py. kernel-builder writes _ops.py, and so does `write`.
NAMESPACE = '''\
"""The operator namespace of this kernel, in one place."""

from __future__ import annotations

from .._ops import add_op_namespace_prefix, ops

__all__ = ["NAMESPACE", "ops", "qualified"]

qualified = add_op_namespace_prefix
NAMESPACE = qualified("").removesuffix("::")
'''

INSTALLED_VERSION = 'version("sdkernels")'  # in sdkernels/__init__.py: a kernel is not installed

OPS = '''\
import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """Prefix op by namespace."""
    return f"{namespace}::{{op_name}}"
'''


def write(folder: Path) -> None:
    """Write the layout into `folder`, over an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("torch-ext", "build"):
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / "build.toml").write_text(BUILD_TOML)
    (folder / "README.md").write_text(README)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    source = folder / "torch-ext/sdkernels"
    shutil.copytree(ROOT / "sdkernels", source, ignore=LEFT_OUT)
    (source / "backends/namespace.py").write_text(NAMESPACE)
    init = (source / "__init__.py").read_text()
    if init.count(INSTALLED_VERSION) != 1:
        raise ValueError(f"sdkernels/__init__.py: expected one {INSTALLED_VERSION}")
    (source / "__init__.py").write_text(init.replace(INSTALLED_VERSION, repr(VERSION)))
    revision = digest(source)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(source, variant)
        namespace = f"_sdkernels_{backend}_{revision}"
        (variant / "_ops.py").write_text(OPS.format(namespace=namespace))
        (variant / "metadata.json").write_text(json.dumps(metadata(namespace, backend), indent=2))


def metadata(identifier: str, backend: str) -> dict[str, object]:
    return {
        "id": identifier,
        "name": "sdkernels",
        "version": KERNEL_VERSION,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": backend},
    }


def digest(folder: Path) -> str:
    """Follows from the names and contents of the files."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:10]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m build_tools.hub_kernel")
    parser.add_argument("folder", type=Path, help="where to write it, dist/hub for example")
    write(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
