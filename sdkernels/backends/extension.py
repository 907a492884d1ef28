"""Loads ``_C``, where it was built, is whole, and fits the torch that is running.

``module`` is the extension, or None: the package then works without it, and ``absence`` says why.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import os
import shlex
import struct
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_RECORD = _PACKAGE / "_build.json"  # written by setup.py, last of all
_NAME = f"{__name__.rpartition('.backends.')[0]}._C"


class ExtensionError(ImportError):
    """The extension cannot serve; `short` says why in a few words."""

    short = "the extension does not load"


class ExtensionMissingError(ExtensionError):
    """The extension was not built for this Python, or is not wanted."""

    short = "the extension was not built"


class ExtensionMismatchError(ExtensionError):
    """The extension was built for another torch than the one that is running."""

    short = "the extension was built for another torch"


class TorchBuild(NamedTuple):
    """What decides whether an extension fits a torch."""

    version: str
    cuda: str | None

    def __str__(self) -> str:
        return f"torch {self.version}" + (f" with CUDA {self.cuda}" if self.cuda else "")


def load() -> ModuleType:
    """Return the extension.

    Raises:
        ExtensionMissingError: it was not built for this Python, or SDKERNELS_EXTENSION is "off".
        ExtensionMismatchError: it was built for another release of torch, or for another CUDA.
        ExtensionError: its file or the record of its build is damaged, or it fails to load.
    """
    wanted = os.environ.get("SDKERNELS_EXTENSION") or "auto"
    if wanted not in ("auto", "off"):
        raise ValueError(f"SDKERNELS_EXTENSION: expected auto or off, got {wanted!r}")
    if wanted == "off":
        off = ExtensionMissingError("unset SDKERNELS_EXTENSION to load the extension")
        off.short = "SDKERNELS_EXTENSION=off"
        raise off
    # In this folder only: an editable installation's finder knows of another copy's, too.
    spec = importlib.machinery.PathFinder.find_spec(_NAME, [str(_PACKAGE)])
    file = None if spec is None or spec.origin is None else Path(spec.origin)
    # First of all: importing a library that does not fit ends in an undefined symbol, or a crash.
    check(_RECORD, TorchBuild(torch.__version__, torch.version.cuda), file)
    if file is None:
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        raise ExtensionMissingError(
            f"sdkernels was not built for {python}; build it with: {build_command()}"
        )
    if not is_whole(file):
        raise ExtensionError(f"{file} is cut off; rebuild with: {build_command()}")
    try:
        return importlib.import_module(_NAME)
    except Exception as error:
        raise ExtensionError(
            f"{file} does not load ({type(error).__name__}: {error}); "
            f"rebuild with: {build_command()}"
        ) from error


def check(record: Path, running: TorchBuild, file: Path | None = None) -> None:
    """Raise if `record` (``_build.json``) is not there or does not fit the `running` torch.

    `file` is the extension, where there is one: a build that was stopped leaves it without record.
    """
    try:
        fields = json.loads(record.read_text())
        if fields["torch"] is None:
            raise ExtensionMissingError(f"sdkernels was built without it: {fields['reason']}")
        built = TorchBuild(fields["torch"], fields["cuda"])
        same_release = _release(built.version) == _release(running.version)
        # An extension without CUDA code fits the CUDA build of its torch as well.
        same_cuda = built.cuda is None or _major(built.cuda) == _major(running.cuda)
    except FileNotFoundError:
        if file is not None:
            raise ExtensionError(
                f"sdkernels was built halfway: {record} is missing; rebuild with: {build_command()}"
            ) from None
        raise ExtensionMissingError(
            f"sdkernels was not built: {record} is missing; build it with: {build_command()}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExtensionError(
            f"{record} cannot be read ({type(error).__name__}: {error}); "
            f"rebuild with: {build_command()}"
        ) from error
    if not (same_release and same_cuda):
        raise ExtensionMismatchError(
            f"sdkernels was built for {built}, this is {running}; rebuild with: {build_command()}"
        )


def _release(version: str) -> str:
    return version.partition("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 are one release


def _major(version: str | None) -> str | None:
    return None if version is None else version.partition(".")[0]


def is_whole(file: Path) -> bool:
    """Whether an ELF file goes up to its last table; other files are whole.

    A linker that was stopped, or a full disk, leaves one that the dynamic loader maps past its end:
    the process dies of that.
    """
    with file.open("rb") as stream:
        header = stream.read(64)
    if header[:4] != b"\x7fELF":
        return len(header) > 0
    if len(header) < 64:
        return False
    if header[4] != 2:  # not of 64 bits
        return True
    order = "<" if header[5] == 1 else ">"
    program_headers, section_headers = struct.unpack_from(order + "QQ", header, 32)
    entry, entries, section, sections = struct.unpack_from(order + "HHHH", header, 54)
    tables = program_headers + entry * entries, section_headers + section * sections
    return bool(max(tables) <= file.stat().st_size)


def build_command() -> str:
    """What rebuilds the extension, for messages."""
    tree = _PACKAGE.parent
    # A wheel that pip built earlier, for the other torch, must not come out of its cache.
    again = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir"
    if (tree / "setup.py").is_file():
        return f"{again} -e {shlex.quote(str(tree))}"
    origin = _origin()
    if origin is None:
        return "the command you installed it with, plus --force-reinstall --no-cache-dir"
    return f"{again} {origin}"


def _origin() -> str | None:
    """Where the running package was installed from; None where that is not known.

    No name: whoever owns it on an index need not be who wrote this package.
    """
    try:
        distribution = importlib.metadata.distribution("sdkernels")
        if Path(str(distribution.locate_file("sdkernels"))).resolve() != _PACKAGE:
            return None  # another copy than the one that runs
        record = json.loads(distribution.read_text("direct_url.json") or "")
        url = record["url"]
        if "vcs_info" in record:
            vcs = record["vcs_info"]
            return shlex.quote(f"{vcs['vcs']}+{url}@{vcs['commit_id']}")
        if url.endswith(".whl"):
            return None  # installing it again would change nothing
        parts = urlsplit(url)
        return shlex.quote(url2pathname(parts.path) if parts.scheme == "file" else url)
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def _load_if_fit() -> tuple[ModuleType | None, ExtensionError | None]:
    try:
        return load(), None
    except ExtensionMissingError as error:
        return None, error
    except ExtensionError as error:
        # Something was built and does not serve: worth a line, and no failing import.
        warnings.warn(f"{error} (until then it runs without its extension)", stacklevel=2)
        return None, error


module, absence = _load_if_fit()
