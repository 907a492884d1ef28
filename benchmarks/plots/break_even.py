"""Where compaction starts to pay: over the batch, the size of a row and the share of dropped
rows."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from benchmarks.plots.style import Case


def plot_break_even(cases: list[Case]) -> Figure | None:
    """A map for every batch: compaction against the branch on every row, below 1 it pays."""
    cases = [c for c in cases if {"compact", "whole"} <= c["providers"].keys()]
    if not cases:
        return None
    batches = sorted({case["batch"] for case in cases})
    blocks = sorted({(case["row_elements"], case["block"]) for case in cases})
    shares = sorted({case["dropped"] for case in cases})
    values = {
        (case["batch"], case["block"], case["dropped"]): case["providers"]["compact"]["median"]
        / case["providers"]["whole"]["median"]
        for case in cases
    }
    figure, panels = plt.subplots(
        1,
        len(batches),
        figsize=(2.6 + 3.6 * len(batches), 1.9 + 0.55 * len(blocks)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    # Blue where compaction is faster, red where it is slower; white is break-even.
    norm = TwoSlopeNorm(1.0, min(*values.values(), 0.8), max(*values.values(), 1.05))
    image = None
    for axes, batch in zip(panels[0], batches, strict=True):
        grid = [
            [values.get((batch, block, share), float("nan")) for share in shares]
            for _, block in blocks
        ]
        image = axes.imshow(grid, cmap="RdBu_r", norm=norm, aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value == value:
                    ink = "black" if 0.3 < norm(value) < 0.8 else "white"
                    text = f"{value:.2f}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=ink)
        axes.set_xticks(range(len(shares)), [f"{100 * share:.0f}" for share in shares])
        axes.set_yticks(
            range(len(blocks)), [f"{block}\n{elements:,} elements" for elements, block in blocks]
        )
        axes.set(xlabel="dropped rows (%)", title=f"batch of {batch}")
        axes.grid(visible=False)
    if image is not None:
        figure.colorbar(
            image, ax=panels[0], label="time with compaction /\ntime of the whole branch"
        )
    return figure
