"""Where the time of one training step goes: its ops, one after the other, by category."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.measure.workload import Workload

# The first category with a word in the op's name is the op's.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "scatter-add": ("sdkernels::scatter_add", "index_add", "scatter_add"),
    "norm": ("sdkernels::compact_norm", "layer_norm", "batch_norm", "rms_norm"),
    "compact": (
        "sdkernels::compact",
        "sdkernels::expand",
        "index_select",
        "aten::index",
        "compact_rows",
        "expand_rows",
    ),
    "attention": ("attention", "flash", "fmha", "softmax"),
    "convolution": ("convolution", "conv", "cudnn"),
    "matmul": ("aten::addmm", "aten::mm", "aten::bmm", "gemm", "cutlass", "sgemm", "nvjet"),
    "mask": ("bernoulli", "rand", "aten::div_"),
}
_BACKWARD = "benchmark: backward"
# Of these a parent says nothing: what it calls is looked at instead.
_TRANSPARENT = ("autograd::", "Optimizer", "ProfilerStep", "benchmark:", "aten::linear")


def category(name: str) -> str | None:
    """The category of an op or a kernel by its name; None where the name says nothing.

    >>> category("aten::addmm"), category("sdkernels::scatter_add_rows"), category("aten::gelu")
    ('matmul', 'scatter-add', None)
    """
    if name.startswith(_TRANSPARENT):
        return None
    lowered = name.lower()
    for kind, words in CATEGORIES.items():
        if any(word in lowered for word in words):
            return kind
    return None


def _host_lane(events: list[Any]) -> list[Any]:
    """The outermost ops that do work: those of a known category, and the leaves of the rest."""
    lane: list[Any] = []

    def visit(event: Any) -> None:
        kind = category(event.name)
        children = [c for c in event.cpu_children if c.name.startswith(("aten::", "sdkernels::"))]
        is_op = event.name.startswith(("aten::", "sdkernels::"))
        if is_op and (kind is not None or not children):
            lane.append((event.time_range.start, event.time_range.end, kind or "elementwise"))
            return
        for child in event.cpu_children:
            visit(child)

    for event in events:
        if event.cpu_parent is None:
            visit(event)
    return lane


def record(workload: Workload, device: torch.device) -> dict[str, Any]:
    """Profiles one call of a workload that names its forward pass.

    Returns:
        ``seconds``, and ``lanes``: a list of [start, duration, category, phase], in seconds from
        the step's beginning. On CUDA the kernels of the device, on a CPU the ops of the host.
    """
    if workload.forward is None:
        raise ValueError("workload: expected one that names its forward pass")
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with workload.context():
        workload.run()  # warm
        with profile(activities=activities) as profiler, record_function("benchmark: step"):
            output = workload.forward()
            if on_gpu:
                torch.cuda.synchronize(device)  # so that time tells the phases apart
            with record_function(_BACKWARD):
                torch.autograd.grad(
                    output,
                    workload.parameters,
                    torch.ones_like(output),
                    allow_unused=True,
                )
                if on_gpu:
                    torch.cuda.synchronize(device)
    events = list(profiler.events())
    backward = min(e.time_range.start for e in events if e.name == _BACKWARD)
    if on_gpu:
        lane = [
            (e.time_range.start, e.time_range.end, category(e.name) or "elementwise")
            for e in events
            if e.device_type == torch.autograd.DeviceType.CUDA
            and not e.name.startswith(("benchmark:", "Memset", "Memcpy"))
        ]
    else:
        lane = _host_lane(events)
    if not lane:
        return {"seconds": 0.0, "lanes": []}
    lane.sort()
    origin = lane[0][0]
    merged: list[list[Any]] = []
    for start, end, kind in lane:
        phase = "backward" if start >= backward else "forward"
        previous = merged[-1] if merged else None
        begin, duration = (start - origin) * 1e-6, (end - start) * 1e-6
        # One bar for neighbours of a kind: a step has thousands of ops.
        same = previous is not None and previous[2:] == [kind, phase]
        if same and begin - (previous[0] + previous[1]) < 2e-5:
            previous[1] = begin + duration - previous[0]
            continue
        merged.append([begin, duration, kind, phase])
    end = max(end for _, end, _ in lane)
    return {"seconds": (end - origin) * 1e-6, "lanes": merged}
