"""What a forward pass keeps for the backward pass (CPU), or the peak over both (CUDA)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers import Workload

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
        return tensor

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
