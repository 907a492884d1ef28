"""The training on digits: loss curves, how far they are apart, and what a step costs."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.report.plots.style import BLUE, COLOURS, GREY, ORANGE


def _plot_curves(axes: Axes, variants: dict[str, Any], names: tuple[str, str], title: str) -> None:
    """Naive masking as a broad band, the fused op as a thin line on it."""
    looks = ((GREY, 5.0), (BLUE, 1.4))
    for name, (colour, width) in zip(names, looks, strict=True):
        losses, accuracy = variants[name]["losses"], variants[name]["validation_accuracy"][-1]
        label = f"{name}, validation accuracy {100 * accuracy:.1f} %"
        axes.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=width, label=label)
    axes.set(xlabel="step", ylabel="training loss (cross entropy)", yscale="log", title=title)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()


def plot_training(training: dict[str, Any]) -> Figure:
    """Loss curves, how far each pair of them is apart, and what a step costs."""
    variants = training["variants"]
    figure, ((bernoulli, fixed), (apart, cost)) = plt.subplots(2, 2, figsize=(12, 8.4))
    _plot_curves(bernoulli, variants, ("naive", "fused"), "Handwritten digits, Bernoulli rows")
    _plot_curves(fixed, variants, ("naive-fixed", "fused-fixed"), "Handwritten digits, fixed count")

    for name, other, colour, label in (
        (
            "naive-perturbed",
            "naive",
            GREY,
            "yardstick: naive from weights changed by 1e-7 - naive",
        ),
        ("fused", "naive", BLUE, "fused - naive, Bernoulli"),
        ("fused-fixed", "naive-fixed", ORANGE, "fused - naive, fixed count"),
    ):
        pairs = zip(variants[name]["losses"], variants[other]["losses"], strict=True)
        differences = [abs(a - b) for a, b in pairs]
        apart.plot(
            range(1, len(differences) + 1),
            differences,
            ".",
            color=colour,
            markersize=4,
            label=label,
        )
    # Linear around zero: many differences are exactly zero, and those are the best ones.
    apart.set_yscale("symlog", linthresh=1e-8)
    low, high = apart.get_ylim()
    apart.set_ylim(min(low, -2e-9), max(high, 1e-7) * 300)  # room for the legend above the points
    apart.set(
        xlabel="step",
        ylabel="absolute difference of the losses",
        title="How far apart the curves are",
    )
    apart.legend(loc="upper left")

    names = ("naive", "fused", "naive-fixed", "fused-fixed")
    times = [1e3 * variants[name]["step"]["median"] for name in names]
    colours = [COLOURS[name.removesuffix("-fixed")] for name in names]
    bars = cost.bar(names, times, color=colours, width=0.6)
    cost.bar_label(bars, labels=[f"{time:.1f} ms" for time in times], padding=3)
    cost.set(ylabel="time of a training step, median (ms)", title="What a step costs")
    cost.margins(y=0.1)
    cost.grid(axis="x", visible=False)
    return figure
