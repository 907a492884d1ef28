"""How every plot looks: dark ink on opaque white, which reads the same on light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display where benchmarks run

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

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
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "lines.markersize": 4,
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


def save(plots: Mapping[str, Callable[[], Figure | None]], directory: Path) -> list[Path]:
    """Draws every plot for which there is something to draw; returns the files' paths."""
    paths = []
    with plt.rc_context(STYLE):
        for name, plot in plots.items():
            figure = plot()
            if figure is not None:
                paths.append(directory / f"{name}.png")
                figure.savefig(paths[-1], dpi=130)
                plt.close(figure)
    return paths


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> Any:
    """A figure, and its axes as [rows][columns], each so large in inches."""
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, **options)


def legend(figure: Figure, columns: int = 3) -> None:
    """Below the figure, of all its panels, every name once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    place = "outside lower center"
    figure.legend(entries.values(), entries.keys(), loc=place, ncols=columns)


def log_axis(axes: Axes, ticks: Sequence[float], which: str = "x", **labels: str) -> None:
    """A logarithmic axis whose ticks are these plain numbers."""
    axis = getattr(axes, f"{which}axis")
    axes.set(**{f"{which}scale": "log"}, **labels)
    axis.set_ticks(ticks)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def lines(
    axes: Axes,
    cases: Sequence[Case],
    over: str,
    providers: Iterable[str],
    value: Callable[[Case, str], float | None],
) -> None:
    """A line a provider: ``value(case, provider)`` at ``case[over]``; the floor's is dotted."""
    for provider in providers:
        points = [(case[over], value(case, provider)) for case in cases]
        points = [point for point in points if point[1] is not None]
        if points:
            look = {"linestyle": ":", "marker": "s"} if provider == "dense" else {"marker": "o"}
            look |= {"color": colour(provider), "label": label(provider)}
            axes.plot(*zip(*points, strict=True), **look)


def ideal_line(axes: Axes, at: float, text: str = "ideal, 1 / keep") -> None:
    axes.axhline(at, color="black", linestyle="--", linewidth=1, label=text)


def speedup_bars(
    cases: Sequence[Case],
    providers: Iterable[str],
    names: Sequence[str],
    ideals: Sequence[float | None],
    ideal: str,
    baseline: str,
    **text: str,
) -> Figure:
    """Speed-ups over the baseline: a group of bars a case, and its ideal beside them."""
    providers = [p for p in providers if any(p in case["providers"] for case in cases)]
    figure, axes = plt.subplots(figsize=(8.4, 1.9 + 0.2 * (len(providers) + 1) * len(cases)))
    of_all = [(p, [figure_of(case, p, "speedup") for case in cases]) for p in providers]
    grouped_bars(axes, names, of_all)
    for y, at in enumerate(ideals):
        if at:
            axes.vlines(at, y - 0.45, y + 0.45, "black", linestyles="--", label=ideal)
    axes.axvline(1, color="#555555", linewidth=1, label=baseline)
    axes.set(**text)
    legend(figure)
    return figure


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
        ys, widths = zip(*shown, strict=True)
        look = {"color": colour(provider), "label": label(provider)}
        bars = axes.barh(ys, widths, height * 0.92, **look)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8, bbox=LABEL_BOX)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
