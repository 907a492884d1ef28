"""Where compaction starts to pay: over the batch, the size of a row and the share of dropped
rows."""

from __future__ import annotations

import math

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from benchmarks.report.plots.style import Case, panels

MAPS = {
    "whole": "compaction /\nthe branch on every row",
    "naive": "compaction /\nnaive masking",
}


def plot_break_even(cases: list[Case]) -> Figure | None:
    """Two rows of maps, one map a batch: the time with compaction against the branch on every row
    (what ``min_saving`` chooses between) and against naive masking. Below 1 compaction pays."""
    cases = [c for c in cases if {"compact", *MAPS} <= c["providers"].keys()]
    if not cases:
        return None
    batches = sorted({case["batch"] for case in cases})
    blocks = sorted({(case["row_elements"], case["block"]) for case in cases})
    shares = sorted({case["dropped"] for case in cases})
    height = 1.2 + 0.55 * len(blocks)
    figure, grid = panels(len(MAPS), len(batches), 4.4, height, sharex=True, sharey=True)
    for line, (other, text) in zip(grid, MAPS.items(), strict=True):
        values = {
            (case["batch"], case["block"], case["dropped"]): case["providers"]["compact"]["median"]
            / case["providers"][other]["median"]
            for case in cases
        }
        # Blue where compaction is faster, red where it is slower; white is break-even.
        norm = TwoSlopeNorm(1.0, min(*values.values(), 0.8), max(*values.values(), 1.1))
        for axes, batch in zip(line, batches, strict=True):
            cells = [[values.get((batch, b, s), math.nan) for s in shares] for _, b in blocks]
            image = axes.imshow(cells, cmap="RdBu_r", norm=norm, aspect="auto")
            for y, x in ((y, x) for y in range(len(blocks)) for x in range(len(shares))):
                if not math.isnan(value := cells[y][x]):
                    ink = "black" if 0.25 < norm(value) < 0.8 else "white"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink)
            axes.set_xticks(range(len(shares)), [f"{100 * share:.0f}" for share in shares])
            names = [f"{block}\n{elements:,} elements" for elements, block in blocks]
            axes.set_yticks(range(len(blocks)), names)
            axes.grid(visible=False)
            axes.set_title(f"batch of {batch}")
        figure.colorbar(image, ax=line, label=text)
    for axes in grid[-1]:
        axes.set_xlabel("dropped rows (%)")
    return figure
