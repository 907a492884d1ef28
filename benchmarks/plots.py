"""The plots of a run: dark ink on opaque white, which reads the same on a light and a dark page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display where benchmarks run

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's palette, told apart also by colour-blind readers; one colour per provider in every
# plot.
COLOURS = {
    "naive": "#999999",
    "index_add": "#E69F00",
    "torch": "#E69F00",
    "fused": "#0072B2",
    "dense": "#009E73",
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


def _plot_curves(axes: Axes, variants: dict[str, Any], names: tuple[str, str], title: str) -> None:
    """Naive masking as a broad band, the fused op as a thin line on it."""
    looks = (("#999999", 5.0), ("#0072B2", 1.4))
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
    figure, ((bernoulli, fixed), (apart, cost)) = plt.subplots(
        2, 2, figsize=(12, 8.4), layout="constrained"
    )
    _plot_curves(bernoulli, variants, ("naive", "fused"), "Handwritten digits, Bernoulli rows")
    _plot_curves(fixed, variants, ("naive-fixed", "fused-fixed"), "Handwritten digits, fixed count")

    for name, other, colour, label in (
        (
            "naive-perturbed",
            "naive",
            "#999999",
            "yardstick: naive from weights changed by 1e-7 - naive",
        ),
        ("fused", "naive", "#0072B2", "fused - naive, Bernoulli"),
        ("fused-fixed", "naive-fixed", "#E69F00", "fused - naive, fixed count"),
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


def plot_blocks(cases: list[dict[str, Any]]) -> Figure:
    """Speed-up of each provider over naive masking, with the ideal 1 / keep."""
    figure, axes = plt.subplots(figsize=(2.8 + 2.4 * len(cases), 4.8), layout="constrained")
    providers = ("index_add", "fused", "dense")
    labels = {
        "index_add": "gather + index_add",
        "fused": "fused",
        "dense": "dense on k samples (floor)",
    }
    width = 0.26
    for i, provider in enumerate(providers):
        places = [x + (i - 1) * width for x in range(len(cases))]
        heights = [case["providers"][provider]["speedup"] for case in cases]
        bars = axes.bar(
            places, heights, width * 0.92, color=COLOURS[provider], label=labels[provider]
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9, bbox=LABEL_BOX)
    for x, case in enumerate(cases):
        label = "ideal, 1 / keep" if x == 0 else "_nolegend_"
        axes.hlines(
            1 / case["keep"], x - 0.45, x + 0.45, colors="black", linestyles="--", label=label
        )
    axes.axhline(1, color="#555555", linewidth=1, label="naive masking")
    axes.set_xticks(
        range(len(cases)),
        [
            f"D={case['width']}, N={case['tokens']}, B={case['batch']}\nkeep {case['keep']:g}"
            for case in cases
        ],
    )
    axes.set(ylabel="speed-up over naive masking (x)")
    axes.margins(y=0.1)
    axes.grid(axis="x", visible=False)
    axes.set_title("ViT block, forward + backward")
    figure.legend(loc="outside lower center", ncols=5 if len(cases) > 2 else 2, frameon=False)
    return figure


def plot_ops(cases: list[dict[str, Any]]) -> Figure:
    """Bandwidth of every op as a share of the plain copy's, one panel for each dtype."""
    dtypes = sorted({case["dtype"] for case in cases}, reverse=True)
    names = list(dict.fromkeys(f"{case['op']}, {case['direction']}" for case in cases))
    figure, panels = plt.subplots(
        1,
        len(dtypes),
        figsize=(3 + 4.5 * len(dtypes), 1.8 + 0.42 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    height = 0.38
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        shown = [case for case in cases if case["dtype"] == dtype]
        places = [names.index(f"{case['op']}, {case['direction']}") for case in shown]
        for i, (provider, label) in enumerate((("fused", "sdkernels"), ("torch", "PyTorch"))):
            shares = [100 * (c["providers"][provider]["of_copy_bandwidth"] or 0) for c in shown]
            offsets = [y + (i - 0.5) * height for y in places]
            bars = axes.barh(offsets, shares, height * 0.92, color=COLOURS[provider], label=label)
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8, bbox=LABEL_BOX)
        axes.axvline(100, color="black", linewidth=1, label="plain copy")
        axes.axvline(90, color="black", linewidth=1, linestyle="--", label="target, 90 %")
        axes.margins(x=0.1, y=0.02)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="bandwidth (% of a plain copy's)", title=dtype)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    shape = ", ".join(str(n) for n in cases[0]["shape"])
    figure.suptitle(
        f"Bandwidth for the bytes that have to be moved, [{shape}], k = {cases[0]['k']}"
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def save_plots(results: dict[str, Any], directory: Path) -> list[Path]:
    """Writes the plots whose cases were run; returns their paths."""
    drawn = {}
    with plt.rc_context(STYLE):
        if results["training"]:
            drawn["training"] = plot_training(results["training"])
        blocks = [case for case in results["cases"] if case["kind"] == "block"]
        if blocks:
            drawn["blocks"] = plot_blocks(blocks)
        ops: dict[tuple[tuple[int, ...], int], list[dict[str, Any]]] = {}
        for case in results["cases"]:
            if case["kind"] == "op":
                ops.setdefault((tuple(case["shape"]), case["k"]), []).append(case)
        for (shape, k), cases in ops.items():
            drawn[f"ops-{'x'.join(str(n) for n in shape)}-k{k}"] = plot_ops(cases)
        paths = []
        for name, figure in drawn.items():
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            paths.append(path)
    return paths
