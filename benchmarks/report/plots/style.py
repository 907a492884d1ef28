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
LOOKS = {  # label and colour
    "naive": ("naive masking", GREY),
    "dinov2": ("DINOv2 style", ORANGE),
    "torch": ("PyTorch", ORANGE),
    "dinov3": ("DINOv3 style", RED),
    "dinov3-fullgraph": ("DINOv3 style, one graph", "#a04800"),
    "xformers": ("xformers", PINK),
    "flash_attn": ("flash_attn", YELLOW),
    "fused": ("sdkernels", BLUE),
    "fused-fixed": ("sdkernels, drawing a fixed count", SKY),
    "fused-plan": ("sdkernels, rows from a plan", "#003f66"),
    "fused-bernoulli": ("sdkernels, drawing Bernoulli rows", "#3d9bd6"),
    "fused-auto": ('sdkernels, min_saving="auto"', "#7fd0ff"),
    "fused-fullgraph": ("sdkernels, one graph", "#4b4b8f"),
    "eager": ("sdkernels, not compiled", "#7f3c8d"),
    "dense": ("dense on k samples (floor)", GREEN),
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


def look(provider: str) -> dict[str, str]:
    """Its colour and label in every plot."""
    text, colour = LOOKS.get(provider, (provider, "#8c564b"))
    return {"color": colour, "label": text}


def figure_of(case: Case, provider: str, key: str, factor: float = 1.0) -> float | None:
    """A figure of a provider in some unit; None where it has none."""
    figure = case["providers"].get(provider, {}).get(key)
    return None if figure is None else factor * figure


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
            style = ":s" if provider == "dense" else "-o"
            axes.plot(*zip(*points, strict=True), style, **look(provider))


def ideal_line(axes: Axes, at: float, text: str = "ideal, 1 / keep") -> None:
    axes.axhline(at, color="black", linestyle="--", linewidth=1, label=text)


def grouped_bars(
    axes: Axes, names: Sequence[str], series: Mapping[str, Sequence[float | None]]
) -> None:
    """Horizontal bars: one group a name, one bar a provider, its value beside it."""
    height = 0.84 / len(series)
    for i, (provider, values) in enumerate(series.items()):
        shown = [(y, value) for y, value in enumerate(values) if value is not None]
        if shown:
            places = [y + (i - (len(series) - 1) / 2) * height for y, _ in shown]
            bars = axes.barh(places, [value for _, value in shown], height * 0.92, **look(provider))
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8, bbox=LABEL_BOX)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
