"""The ten lines that a measurement prints as."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch

from ..backends import ops

if TYPE_CHECKING:
    from .measurement import Measurement

__all__ = ["lines_of"]


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _mib(value: int) -> str:
    return f"{value / 2**20:.0f} MiB" if value < 2**34 else f"{value / 2**30:.1f} GiB"


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.0f} %" if before else "-"


def _pair(values: tuple[int, int]) -> str:
    before, after = values
    return f"{_mib(before)} unpatched, {_mib(after)} patched ({_change(before, after)})"


def _setting(found: Measurement) -> str:
    device = torch.device(found.device)
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda" and torch.cuda.is_available()
        else f"{torch.get_num_threads()} threads"
    )
    serving = next(
        (
            choice.backend
            for choice in ops.backend_table()
            if (choice.op, choice.device) == ("scatter_add_rows", device.type)
        ),
        "PyTorch",
    )
    how = [str(found.amp).removeprefix("torch.") if found.amp else "no autocast"]
    how += ["compiled"] if found.compiled else []
    return (
        f"{found.model}, {found.batch} samples, {found.device} ({machine}), {', '.join(how)}, "
        f"backend {serving}"
    )


def _blocks(found: Measurement) -> str:
    idle = f", {found.idle} of them with p = 0" if found.idle else ""
    average = sum(found.drop_probs) / len(found.drop_probs)
    text = f"{found.patched} patched{idle}, {len(found.left)} left alone"
    if found.left:
        first = found.left[0]
        text += f" ({first.name or 'the model'}: {first.reason})"
    return f"{text}; drop probability {average:.2f} on average"


def _compared(found: Measurement) -> str:
    if found.not_compared:
        return f"not compared: {found.not_compared}"
    return (
        f"{found.compared} outputs and gradients as unpatched with the same rows "
        f"(largest error {found.largest_error:.0e})"
    )


def _host(found: Measurement) -> str:
    if found.host_share is None:
        return "does the work itself: there is no GPU that could wait for it"
    share = f"issued a patched step in {found.host_share:.0%} of its time".replace("%", " %")
    return f"the GPU waits for it: {share}" if found.host_bound else f"no bottleneck: {share}"


def lines_of(found: Measurement) -> list[str]:
    """Ten, each with its name in front."""
    middle = {name: statistics.median(each) for name, each in found.seconds.items()}
    count = len(found.seconds["patched"])
    by = "time" if found.outside_is_timed else "operations"
    named = [
        ("measured", _setting(found)),
        ("blocks", _blocks(found)),
        ("values", _compared(found)),
        (
            "speed-up",
            f"{found.speedup:.2f} ({found.speedup_low:.2f} to {found.speedup_high:.2f} in the "
            f"middle half of {count} turns); expected {found.expected_speedup:.2f} by operations",
        ),
        (
            "a step",
            f"{_seconds(middle['unpatched'])} unpatched, {_seconds(middle['patched'])} patched",
        ),
        ("activations", _pair(found.saved_bytes)),
        (
            "peak memory",
            "known on CUDA only" if found.peak_bytes is None else _pair(found.peak_bytes),
        ),
        ("elsewhere", f"{100 * found.outside:.0f} % of the step's {by} is not in branches"),
        ("host", _host(found)),
        ("to gain more", "; ".join(found.advice[:2]) or "nothing in particular"),
    ]
    return [f"{name:12} {text}" for name, text in named]
