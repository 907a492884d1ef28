"""Whole models, stacks of branches, compiled blocks and host time."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.report.plots.style import Case, colour, figure_of, grouped_bars, label, legend


def plot_models(cases: list[Case]) -> Figure:
    """Speed-up of a training step over the library's own model, with the ideal."""
    providers = ("dinov2", "fused-bernoulli", "fused", "fused-plan")
    figure, axes = plt.subplots(
        figsize=(8.4, 1.9 + 0.2 * (len(providers) + 1) * len(cases)), layout="constrained"
    )
    names = [
        f"{case['label']}, drop {case['drop']:g}\nB {case['batch']}, {case['image']} px, "
        f"{case['dtype']}"
        for case in cases
    ]
    series = [(p, [figure_of(case, p, "speedup") for case in cases]) for p in providers]
    grouped_bars(axes, names, series)
    for y, case in enumerate(cases):
        if case.get("ideal_speedup"):
            ideal = case["ideal_speedup"]
            axes.vlines(ideal, y - 0.45, y + 0.45, "black", linestyles="--", label="ideal")
    axes.axvline(1, color="#555555", linewidth=1, label="the library's own drop path")
    axes.set(
        xlabel="speed-up of a training step (x)",
        title="Models, the same drop rate in every branch",
    )
    legend(figure)
    return figure


def plot_depth(cases: list[Case]) -> Figure | None:
    """Time of a branch and speed-up from few branches to many."""
    law = ("batch", "tokens", "width", "keep")
    cases = [case for case in cases if all(case[key] == cases[0][key] for key in law)]
    cases = sorted(cases, key=lambda case: case["branches"])
    if len(cases) < 3:
        return None
    figure, (times, speedups) = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained")
    providers = ("naive", "dinov2", "fused", "fused-fixed", "fused-bernoulli", "dense")
    for provider in providers:
        shown = [case for case in cases if provider in case["providers"]]
        if not shown:
            continue
        depths = [case["branches"] for case in shown]
        medians = [case["providers"][provider]["median"] for case in shown]
        style = {"linestyle": ":" if provider == "dense" else "-", "marker": "o", "markersize": 4}
        times.plot(
            depths,
            [1e6 * m / d for m, d in zip(medians, depths, strict=True)],
            color=colour(provider),
            label=label(provider),
            **style,
        )
        gains = [figure_of(case, provider, "speedup") for case in shown]
        speedups.plot(depths, gains, color=colour(provider), **style)
    times.set(ylabel="time per branch, forward + backward (us)")
    times.set_ylim(bottom=0)
    speedups.set(ylabel="speed-up over naive masking (x)")
    ideal = 1 / cases[0]["keep"]
    speedups.axhline(ideal, color="black", linestyle="--", linewidth=1)
    speedups.annotate(
        "ideal, 1 / keep",
        (cases[0]["branches"], ideal),
        (0, 4),
        "data",
        "offset points",
        fontsize=9,
    )
    for axes in (times, speedups):
        axes.set(xlabel="branches", xscale="log")
        axes.set_xticks([c["branches"] for c in cases], [c["branches"] for c in cases])
        axes.xaxis.set_minor_formatter(NullFormatter())
    first = cases[0]
    figure.suptitle(
        f"Stacks of small branches on [{first['batch']}, {first['tokens']}, {first['width']}], "
        f"keep {first['keep']:g}"
    )
    legend(figure)
    return figure


def plot_host(cases: list[Case]) -> Figure:
    """What a call costs on the host over ``x + branch(x)``."""
    case = cases[0]  # the presets have one
    providers = [p for p in case["providers"] if "extra" in case["providers"][p]]
    figure, axes = plt.subplots(figsize=(7, 1.4 + 0.5 * len(providers)), layout="constrained")
    texts = {
        "naive": "naive masking",
        "index_add-rows": "gather + index_add, rows given",
        "fused-rows": "sdkernels, rows given",
        "fused": "sdkernels, drawing Bernoulli rows",
    }
    values = [1e6 * case["providers"][p]["extra"] for p in providers]
    bars = axes.barh(range(len(providers)), values, 0.6, color=[colour(p) for p in providers])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(providers)), [texts.get(p, p) for p in providers])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set(
        xlabel="host time of a call over x + branch(x), forward + backward (us)",
        title="Host time, tiny tensor",
    )
    return figure


def plot_compiled(cases: list[Case]) -> Figure:
    """Blocks under torch.compile against the code that DINOv3 compiles."""
    providers = list(
        dict.fromkeys(
            p for case in cases for p in case["providers"] if p not in (case["baseline"],)
        )
    )
    figure, axes = plt.subplots(
        figsize=(8.4, 1.9 + 0.2 * (len(providers) + 1) * len(cases)), layout="constrained"
    )
    names = [f"{case['label']}, {case['dtype']}\n{case['counts']} k" for case in cases]
    series = [(p, [figure_of(case, p, "speedup") for case in cases]) for p in providers]
    grouped_bars(axes, names, series)
    axes.axvline(1, color="#555555", linewidth=1, label="DINOv3 style, compiled")
    axes.set(
        xlabel="speed-up over the compiled DINOv3 style (x)",
        title="Blocks under torch.compile, forward + backward",
    )
    legend(figure)
    return figure
