"""The machine and the versions behind the figures."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import sdkernels


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cpu_model() -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _last_cache() -> str | None:
    """Size of the last cache of CPU 0, e.g. ``32768K``: smaller tensors are measured in cache."""
    for level in (3, 2):
        size = _read(Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size"))
        if size:
            return size
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str | None:
    """Short hash of the checkout, with ``+`` when files differ from it; None outside one."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ("git", *arguments),
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place the figures; ready for JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # other work, when taken before the run
        "last_cache": _last_cache(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "sdkernels": sdkernels.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def environment_line(env: dict[str, Any]) -> str:
    """``env`` as one line of text."""
    parts = [
        f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads",
        f"load before the run {env['load']}",
        f"last cache {env['last_cache']}" if env["last_cache"] else None,
        f"GPU {env['gpu']}, CUDA {env['cuda']}" if env["gpu"] else None,
        f"torch {env['torch']}",
        f"Python {env['python']}",
        f"sdkernels {env['sdkernels']}",
        f"commit {env['commit']}" if env["commit"] else None,
        env["date"],
    ]
    return " | ".join(part for part in parts if part)
