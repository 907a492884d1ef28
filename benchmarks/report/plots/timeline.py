"""One training step, op after op: what naive masking and the op spend their time on."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.report.plots.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, YELLOW, label

COLOURS = {
    "matmul": SKY,
    "attention": BLUE,
    "convolution": GREEN,
    "norm": PINK,
    "compact": RED,
    "scatter-add": ORANGE,
    "mask": YELLOW,
    "elementwise": GREY,
}


def plot_timeline(timeline: dict[str, Any]) -> Figure:
    """A lane for every provider; a line where its backward begins."""
    providers = timeline["providers"]
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.9 * len(providers)))
    seen = []
    for y, record in enumerate(providers.values()):
        for kind, colour in COLOURS.items():
            bars = [(1e3 * s, 1e3 * d) for s, d, own, _ in record["lanes"] if own == kind]
            if bars:
                axes.broken_barh(bars, (y - 0.32, 0.64), facecolors=colour, linewidth=0)
                seen.append(kind)
        backward = [start for start, _, _, phase in record["lanes"] if phase == "backward"]
        if backward:
            at = 1e3 * backward[0]
            axes.vlines(at, y - 0.42, y + 0.42, "black", linewidth=1.5)
            axes.annotate("backward", (at, y - 0.42), (3, 1), "data", "offset points", fontsize=8)
        total = 1e3 * record["seconds"]
        text = f"{total:,.0f} ms" if total >= 10 else f"{total:.3g} ms"
        axes.annotate(text, (total, y), (4, -3), "data", "offset points", fontsize=9)
    axes.set_yticks(range(len(providers)), [label(name) for name in providers])
    axes.set_ylim(len(providers) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="time (ms), one profiled step", title=timeline["case"])
    handles = [Patch(color=COLOURS[kind], label=kind) for kind in COLOURS if kind in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=8)
    return figure
