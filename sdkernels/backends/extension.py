"""Loads ``sdkernels._C``, after checking that it was built for the torch that is running."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_RECORD = _PACKAGE / "_build.json"  # written by setup.py


class ExtensionMissingError(ImportError):
    """The extension was not built for this Python."""


class ExtensionMismatchError(ImportError):
    """The extension was built for another torch than the one that is running."""


class TorchBuild(NamedTuple):
    """What decides whether an extension fits a torch."""

    version: str
    cuda: str | None

    def __str__(self) -> str:
        return f"torch {self.version}" + (f" with CUDA {self.cuda}" if self.cuda else "")


def load() -> ModuleType:
    """Return ``sdkernels._C``.

    Raises:
        ExtensionMissingError: it was not built for this Python.
        ExtensionMismatchError: it was built for another release of torch, or for another CUDA.
    """
    # First of all: importing a library that does not fit ends in an undefined symbol, or a crash.
    check(_RECORD, TorchBuild(torch.__version__, torch.version.cuda))
    if importlib.util.find_spec("sdkernels._C") is None:
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        raise ExtensionMissingError(
            f"sdkernels was not built for {python}; build it with: {build_command()}"
        )
    return importlib.import_module("sdkernels._C")


def check(record: Path, running: TorchBuild) -> None:
    """Raise if `record` (``_build.json``) is not there or does not fit the `running` torch."""
    try:
        text = record.read_text()
    except FileNotFoundError:
        raise ExtensionMissingError(
            f"sdkernels was not built: {record} is missing; build it with: {build_command()}"
        ) from None
    fields = json.loads(text)
    built = TorchBuild(fields["torch"], fields["cuda"])
    same_release = _release(built.version) == _release(running.version)
    # An extension without CUDA code fits the CUDA build of its torch as well.
    same_cuda = built.cuda is None or _major(built.cuda) == _major(running.cuda)
    if not (same_release and same_cuda):
        raise ExtensionMismatchError(
            f"sdkernels was built for {built}, this is {running}; rebuild with: {build_command()}"
        )


def _release(version: str) -> str:
    return version.partition("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 are one release


def _major(version: str | None) -> str | None:
    return None if version is None else version.partition(".")[0]


def build_command() -> str:
    """What rebuilds the extension, for messages."""
    tree = _PACKAGE.parent
    in_source_tree = (tree / "setup.py").is_file()
    # A wheel that pip built earlier, for the other torch, must not come out of its cache.
    what = f"-e {tree}" if in_source_tree else "--no-cache-dir sdkernels"
    return f"pip install --no-build-isolation --force-reinstall --no-deps {what}"
