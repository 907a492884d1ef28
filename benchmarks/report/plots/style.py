"""How every plot looks: dark ink on opaque white, which reads the same on light and dark pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display where benchmarks run

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart also by colour-blind readers; one colour per provider in every
# plot.
GREY, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    *("#999999", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)
COLOURS = {
    "naive": GREY,
    "naive-timm": "#555555",
    "index_add-rows": ORANGE,
    "dinov2": ORANGE,
    "torch": ORANGE,
    "dinov3": RED,
    "dinov3-fullgraph": "#a04800",
    "xformers": PINK,
    "flash_attn": YELLOW,
    "fused": BLUE,
    "fused-rows": SKY,
    "fused-fixed": SKY,
    "fused-plan": "#003f66",
    "fused-bernoulli": "#3d9bd6",
    "fused-auto": "#7fd0ff",
    "fused-fullgraph": SKY,
    "eager": "#7f3c8d",
    "fused-triton": "#4b4b8f",
    "fused-traceable": "#8c564b",
    "dense": GREEN,
    "beside": "#00543d",
    "plain": "#bbbbbb",
}
LABELS = {
    "naive": "naive masking",
    "dinov2": "DINOv2 style",
    "dinov3": "DINOv3 style",
    "torch": "PyTorch",
    "fused": "sdkernels",
    "fused-fixed": "sdkernels, drawing a fixed count",
    "fused-bernoulli": "sdkernels, drawing Bernoulli rows",
    "fused-plan": "sdkernels, rows from a plan",
    "fused-auto": 'sdkernels, min_saving="auto"',
    "dense": "dense on k samples (floor)",
    "beside": "branches on k samples beside the stream (floor)",
    "eager": "sdkernels, not compiled",
    "dinov3-fullgraph": "DINOv3 style, one graph",
    "fused-fullgraph": "sdkernels, one graph",
}
# Keeps the figures readable where a reference line runs behind them.
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
STYLE: Any = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}

Case = dict[str, Any]


def colour(provider: str) -> str:
    """One for every provider; one that is not known gets a shade of its own by its name."""
    if provider in COLOURS:
        return COLOURS[provider]
    others = ("#8c564b", "#17becf", "#bcbd22", "#7f3c8d", "#4b4b8f")
    return others[sum(map(ord, provider)) % len(others)]


def label(provider: str) -> str:
    return LABELS.get(provider, provider)


def figure_of(case: Case, provider: str, key: str) -> Any:
    """A figure of a provider; None where it has none."""
    return case["providers"].get(provider, {}).get(key)


def legend(figure: Figure, columns: int = 3) -> None:
    """Below the figure, of all its panels, every name once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        for handle, name in zip(handles, names, strict=True):
            entries.setdefault(name, handle)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )


def grouped_bars(
    axes: Axes, names: Sequence[str], series: Iterable[tuple[str, Sequence[float | None]]]
) -> None:
    """Horizontal bars: one group a name, one bar a provider, its value beside it."""
    series = list(series)
    height = 0.84 / len(series)
    for i, (provider, values) in enumerate(series):
        places = [y + (i - (len(series) - 1) / 2) * height for y in range(len(names))]
        shown = [(y, v) for y, v in zip(places, values, strict=True) if v is not None]
        if not shown:
            continue
        bars = axes.barh(
            [y for y, _ in shown],
            [v for _, v in shown],
            height * 0.92,
            color=colour(provider),
            label=label(provider),
        )
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8, bbox=LABEL_BOX)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
