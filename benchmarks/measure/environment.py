"""The machine and the versions behind the figures."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sdkernels
from sdkernels.backends import extension, ops

# What figures depend on: runs that differ in it are not to be compared, nor continued.
MACHINE = ("cpu", "instruction_set", "cores", "threads", "gpu", "driver", "torch", "cuda", "triton")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _of_cpu(field: str) -> str | None:
    """A line about core 0, where the system tells."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith(field):
            return line.partition(":")[2].strip()
    return None


def last_cache_bytes(device: torch.device) -> int:
    """Size of the last cache of CPU 0, or of a GPU's L2. Where nothing tells: 32 MiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    for level in (3, 2):
        size = _read(Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size"))
        if size and size.endswith("K"):
            return int(size[:-1]) * 2**10
    return 32 * 2**20


def _gpu(device: torch.device) -> dict[str, Any]:
    """Name, driver and clocks of a GPU, as far as nvidia-smi tells them."""
    if device.type != "cuda":
        return {"gpu": None, "driver": None, "gpu_clocks": None}
    clocks = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    told = _output(
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}",
        f"--query-gpu={','.join(('name', 'driver_version', *clocks))}",
        "--format=csv,noheader",
    )
    if not told:
        return {"gpu": torch.cuda.get_device_name(device), "driver": None, "gpu_clocks": None}
    name, driver, *shown = [part.strip() for part in told.split(",")]
    pairs = [f"{clock} {value}" for clock, value in zip(clocks, shown, strict=True)]
    return {"gpu": name, "driver": driver, "gpu_clocks": ", ".join(pairs)}


def _output(*command: str) -> str | None:
    """What a command prints, run in this folder; None where it fails."""
    told: dict[str, Any] = {"cwd": Path(__file__).parent, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.check_output(command, text=True, timeout=10, **told).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> str | None:
    """Short hash of the checkout, with ``+`` when files differ from it; None outside one."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def instruction_set() -> str | None:
    """What the CPU kernels run on here: AVX2, AVX512, ...; None without the extension."""
    try:
        return extension.load().build_config()["cpu_capability"]
    except ImportError:
        return None


def serving(device_type: str) -> str:
    """The backend that runs the ops on tensors of that device type in this process."""
    return next(
        choice.backend
        for choice in ops.backend_table()
        if (choice.op, choice.device) == ("scatter_add_rows", device_type)
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place the figures; ready for JSON."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return {
        "cpu": _of_cpu("model name") or platform.processor() or platform.machine(),
        "instruction_set": instruction_set(),
        "backend": serving(device.type),
        "cores": len(allowed) or os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # other work, when taken before the run
        "last_cache": f"{last_cache_bytes(device) / 2**20:g} MiB",
        "clock_mhz": round(float(_of_cpu("cpu MHz") or 0)) or None,  # at this moment
        **_gpu(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{package: _version(package) for package in ("triton", "timm", "torchvision")},
        "python": platform.python_version(),
        "sdkernels": sdkernels.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def environment_line(env: dict[str, Any]) -> str:
    """``env`` as one line of text."""
    parts = [
        f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads",
        # Runs of old do not say.
        f"CPU kernels for {env['instruction_set']}" if env.get("instruction_set") else None,
        f"{env['clock_mhz']} MHz" if env.get("clock_mhz") else None,
        f"load before the run {env['load']}",
        f"last cache {env['last_cache']}",
        f"GPU {env['gpu']} ({env['gpu_clocks']}), driver {env['driver']}, CUDA {env['cuda']}"
        if env["gpu"]
        else None,
        f"torch {env['torch']}",
        f"Python {env['python']}",
        f"sdkernels {env['sdkernels']}",
        f"commit {env['commit']}" if env["commit"] else None,
        env["date"],
    ]
    return " | ".join(part for part in parts if part)
