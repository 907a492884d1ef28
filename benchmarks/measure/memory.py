"""What a forward pass keeps for the backward pass (CPU), or the peak over both (CUDA); and the
memory that a run may take."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.workload import Workload

SAVED = "saved activations"
PEAK = "peak allocated"


def saved_activation_bytes(forward: Any, parameters: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves during ``forward()``, those of
    ``parameters`` left out.

    A storage counts in full and once, also when only a view of it is saved, and also when it is the
    block's input: saving it is what keeps it alive in a deeper network. Temporaries that are freed
    on the way do not count.
    """
    excluded = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            sizes[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: an op that saves its own output would hold itself, for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = (
            forward()
        )  # kept until the end: no saved storage may be freed and its address used again
    total = sum(sizes.values())
    del output
    return total


def peak_allocated_bytes(run: Any, device: torch.device) -> int:
    """Highest allocation on a CUDA device during ``run()``, above what was allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(workload: Workload, device: torch.device) -> dict[str, Any] | None:
    """``{"kind": ..., "bytes": ...}`` for a workload that names its forward pass, else None."""
    if workload.forward is None:
        return None
    if device.type == "cuda":
        return {"kind": PEAK, "bytes": peak_allocated_bytes(workload.run, device)}
    return {"kind": SAVED, "bytes": saved_activation_bytes(workload.forward, workload.parameters)}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", "bad_alloc", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


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


@contextlib.contextmanager
def host_memory_limit(share: float = 0.9) -> Iterator[None]:
    """Lets allocations fail that the machine cannot hold.

    Linux hands out more memory than there is and then kills the process; under a limit on its
    address space the allocation raises instead, and the run can go on. Elsewhere: no limit.
    """
    try:
        import resource

        available = next(
            int(line.split()[1]) * 2**10
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable")
        )
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError, StopIteration):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + int(available * share)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
