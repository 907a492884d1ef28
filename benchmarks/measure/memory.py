"""What a forward pass keeps for the backward pass (CPU), or the peak over both (CUDA); and the
memory that a run may take."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from benchmarks.measure.workload import Workload
from sdkernels.measure.memory import host_memory_limit as host_memory_limit
from sdkernels.measure.memory import is_out_of_memory as is_out_of_memory
from sdkernels.measure.memory import peak_allocated_bytes, saved_activation_bytes

SAVED = "saved activations"
PEAK = "peak allocated"


def measure(workload: Workload, device: torch.device) -> dict[str, Any] | None:
    """``{"kind": ..., "bytes": ...}`` for a workload that names its forward pass, else None."""
    if workload.forward is None:
        return None
    if device.type == "cuda":
        return {"kind": PEAK, "bytes": peak_allocated_bytes(workload.run, device)}
    return {"kind": SAVED, "bytes": saved_activation_bytes(workload.forward, workload.parameters)}


# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed for the rest of the process; returns whether it does.

    By default glibc maps a block past 32 MiB anew in every call and gives back the end of its heap,
    and every page is zeroed at its first touch. That takes longer than most ops, for one provider
    and not for another whose tensors are a little smaller. The allocators that PyTorch's tuning
    guide recommends for CPUs, and the one for CUDA, keep memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 * 2**20}
    return all(mallopt(option, value) == 1 for option, value in settings.items())
