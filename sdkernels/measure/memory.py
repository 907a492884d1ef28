"""What a forward pass keeps for its backward pass, the peak over both (CUDA), and running out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "host_memory_limit",
    "is_out_of_memory",
    "peak_allocated_bytes",
    "saved_activation_bytes",
]


def saved_activation_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
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
        # Kept until the end: no saved storage may be freed and its address used again.
        output = forward()
    total = sum(sizes.values())
    del output
    return total


def peak_allocated_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Highest allocation on a CUDA device during ``run()``, above what was allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", "bad_alloc", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


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
