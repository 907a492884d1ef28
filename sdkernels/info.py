"""Versions, build and the backend of every op: ``python -m sdkernels.info``."""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_VARIABLES = (
    "SDKERNELS_BACKEND",
    "SDKERNELS_EXTENSION",
    "SDKERNELS_BUILD",
    "SDKERNELS_CPU_CAPABILITY",
    "SDKERNELS_MIN_SAVING",
)


@dataclass
class Info:
    """What a bug report needs to say."""

    versions: dict[str, str]
    environment: dict[str, str | None]
    build: dict[str, str] = field(default_factory=dict)
    devices: list[dict[str, str]] = field(default_factory=list)
    backends: list[dict[str, str]] = field(default_factory=list)
    min_saving: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def collect() -> Info:
    """Gather the information; a package or an extension that does not load is part of it."""
    info = Info(
        versions={
            "sdkernels": _installed_version("sdkernels"),
            "torch": _imported_version("torch"),
            "triton": _imported_version("triton"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        environment={name: os.environ.get(name) for name in _VARIABLES},
    )
    try:
        from .backends import extension

        if extension.module is None:
            # What serves instead, and why, is in the table of backends.
            info.build = {"extension": f"not used; {extension.absence}"}
            if hidden := _hidden_installation(Path(__file__).resolve().parent):
                info.build["hidden"] = (
                    f"the installed {hidden} has an extension, but {Path(__file__).parent} comes "
                    "before it on sys.path; start Python in another folder, or install with -e"
                )
        else:
            info.build = extension.module.build_config()
        info.devices = devices(info.build.get("cuda_arch_list", ""))

        from . import break_even
        from .backends import ops

        info.backends = [asdict(choice) for choice in ops.backend_table()]
        info.min_saving = [asdict(each) for each in break_even.min_saving_table()]
    except Exception as error:  # whatever it is, printing it is what this command is for
        info.error = f"{type(error).__name__}: {error}"
    return info


def _hidden_installation(package: Path) -> Path | None:
    """Another sdkernels on sys.path, with an extension, behind the one that runs.

    Python looks into the folder it was started in first: that may be a source tree.
    """
    for entry in sys.path:
        other = Path(entry).resolve() / "sdkernels"
        if other != package and any(
            (other / f"_C{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES
        ):
            return other
    return None


def is_covered(arch_list: str, capability: tuple[int, int]) -> bool | None:
    """Whether code built for TORCH_CUDA_ARCH_LIST runs on a GPU; None if it cannot be told.

    A GPU runs the code of its own major version up to its minor version, and compiles PTX of any
    version up to its own. Architectures with an "a" run on themselves only, those with an "f"
    within their major version.

    >>> is_covered("8.0;9.0+PTX", (8, 6)), is_covered("8.0;9.0", (12, 0))
    (True, False)
    """
    unknown = False
    for entry in re.split(r"[; ]+", arch_list):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if not found:
            unknown = unknown or bool(entry)
            continue
        built = int(found[1]), int(found[2])
        if found[3] == "a":
            runs = built == capability
        else:
            runs = built[0] == capability[0] and built <= capability
        if runs or (found[4] and not found[3] and built <= capability):
            return True
    return None if unknown else False


def devices(arch_list: str) -> list[dict[str, str]]:
    """Every CUDA device that PyTorch sees, and whether the kernels run on it."""
    import torch

    from .backends import extension

    found = []
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        version = "{}.{}".format(*capability)
        covered = {
            True: "yes",
            None: f"perhaps, built for {arch_list}",
            False: f"no, built for {arch_list}; set TORCH_CUDA_ARCH_LIST={version} and rebuild "
            f"with: {extension.build_command()}",
        }[is_covered(arch_list, capability)]
        found.append(
            {
                "device": f"cuda:{device}",
                "name": torch.cuda.get_device_name(device),
                "capability": version,
                "covered": covered if arch_list else "no, built without CUDA",
            }
        )
    return found


def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _imported_version(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:
        return f"cannot be imported: {error}"


def format_text(info: Info) -> str:
    """Lay the information out for people."""
    environment = {name: value for name, value in info.environment.items() if value}
    # The extension has kernels for several; which of them run is decided where they do.
    chosen = info.build.get("cpu_capability")
    build = {name: value or "-" for name, value in info.build.items() if name != "cpu_capability"}
    sections = [
        _section("versions", info.versions),
        _section("processor", {"instruction set of the kernels": chosen} if chosen else {}),
        _section("build", build),
        _section("environment", environment),
        _records("devices", ["device", "name", "capability", "covered"], info.devices),
        _records("backends", ["device", "backend", "ops", "reason"], _grouped(info.backends)),
        _records('min_saving="auto"', ["device", "min_saving", "reason"], info.min_saving),
    ]
    if info.error:
        sections.append(f"error\n  {info.error}")
    return "\n\n".join(section for section in sections if section)


def _grouped(backends: list[dict[str, str]]) -> list[dict[str, str]]:
    """One record for all ops that the same backend serves on a device, for the same reason."""
    ops: dict[tuple[str, str, str], list[str]] = {}
    for choice in backends:
        key = choice["device"], choice["backend"], choice["reason"]
        ops.setdefault(key, []).append(choice["op"])
    count = {device: sum(len(v) for k, v in ops.items() if k[0] == device) for device, *_ in ops}
    return [
        {
            "device": device,
            "backend": backend,
            "ops": f"all {len(names)}" if len(names) == count[device] else ", ".join(names),
            "reason": reason,
        }
        for (device, backend, reason), names in ops.items()
    ]


def _section(title: str, items: dict[str, str]) -> str:
    return _table(title, [[name, value] for name, value in items.items()])


def _records(title: str, columns: list[str], records: list[dict[str, Any]]) -> str:
    rows = [[str(record[column]) for column in columns] for record in records]
    return _table(title, [columns, *rows] if rows else [])


def _table(title: str, rows: list[list[str]]) -> str:
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the information; the exit code is 1 if sdkernels does not load."""
    parser = argparse.ArgumentParser(prog="python -m sdkernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    info = collect()
    try:
        print(json.dumps(asdict(info), indent=2) if options.json else format_text(info), flush=True)
    except BrokenPipeError:  # `| head` has read what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if info.error else 0


if __name__ == "__main__":
    sys.exit(main())
