"""Where compaction starts to pay: over the batch, the size of a row and the share of dropped
rows."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from benchmarks.report.plots.style import Case

MAPS = {
    "whole": "compaction /\nthe branch on every row",
    "naive": "compaction /\nnaive masking",
}


def plot_break_even(cases: list[Case]) -> Figure | None:
    """Two rows of maps, one map a batch: the time with compaction against the branch on every row
    (what ``min_saving`` chooses between) and against naive masking. Below 1 compaction pays; a
    black line runs along the border of 1."""
    cases = [c for c in cases if {"compact", *MAPS} <= c["providers"].keys()]
    if not cases:
        return None
    batches = sorted({case["batch"] for case in cases})
    blocks = sorted({(case["row_elements"], case["block"]) for case in cases})
    shares = sorted({case["dropped"] for case in cases})
    figure, panels = plt.subplots(
        len(MAPS),
        len(batches),
        figsize=(3 + 3.4 * len(batches), 2.4 + 1.1 * len(blocks)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for line, (other, text) in zip(panels, MAPS.items(), strict=True):
        values = {
            (case["batch"], case["block"], case["dropped"]): case["providers"]["compact"]["median"]
            / case["providers"][other]["median"]
            for case in cases
        }
        # Blue where compaction is faster, red where it is slower; white is break-even.
        norm = TwoSlopeNorm(1.0, min(*values.values(), 0.8), max(*values.values(), 1.1))
        for axes, batch in zip(line, batches, strict=True):
            grid = [
                [values.get((batch, block, share), math.nan) for share in shares]
                for _, block in blocks
            ]
            image = axes.imshow(grid, cmap="RdBu_r", norm=norm, aspect="auto")
            _write_values(axes, grid, norm)
            axes.set_xticks(range(len(shares)), [f"{100 * share:.0f}" for share in shares])
            names = [f"{block}\n{elements:,} elements" for elements, block in blocks]
            axes.set_yticks(range(len(blocks)), names)
            axes.grid(visible=False)
        figure.colorbar(image, ax=line, label=text)
    for axes, batch in zip(panels[0], batches, strict=True):
        axes.set_title(f"batch of {batch}")
    for axes in panels[-1]:
        axes.set_xlabel("dropped rows (%)")
    return figure


def _write_values(axes: Axes, grid: list[list[float]], norm: TwoSlopeNorm) -> None:
    """Every ratio in its cell, and a line between neighbours on either side of 1."""
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if math.isnan(value):
                continue
            ink = "black" if 0.25 < norm(value) < 0.8 else "white"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9, color=ink)
            before = line[x - 1] if x else math.nan
            if not math.isnan(before) and (before < 1) != (value < 1):
                axes.plot([x - 0.5] * 2, [y - 0.5, y + 0.5], color="black", linewidth=2.5)
