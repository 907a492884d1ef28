"""The plots of ``python -m benchmarks scaling``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.report.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    ideal_line,
    legend,
    panels,
    save,
)
from benchmarks.studies.scaling.report import WHERE, batches_of, hardest
from benchmarks.studies.scaling.simulation import (
    KINDS,
    SCHEDULES,
    SYNCS,
    Layers,
    bernoulli_distribution,
    largest_of,
)

# The markers tell curves apart that lie on each other.
LOOKS = {
    "bernoulli": (RED, "o"),
    "total": (ORANGE, "v"),
    "dealt": (GREEN, "s"),
    "rounded": (BLUE, "D"),
    "fixed": (GREY, "x"),
}


def plot_ranks(results: dict[str, Any]) -> Figure:
    """Step time over the ideal by number of ranks: a column a batch, a row a way to wait."""
    ranks, batches = results["ranks"], batches_of(results)
    width = 3.6 + 2 / len(batches)
    figure, grid = panels(len(SYNCS), len(batches), width, 3.7, sharex=True, sharey="row")
    for column, batch in enumerate(batches):
        case = hardest(results["cases"], batch)
        for row, sync in enumerate(SYNCS):
            axes = grid[row][column]
            for sampler, (colour, marker) in LOOKS.items():
                over = np.array(case["samplers"][sampler][sync]["over_ideal"])
                look = {"color": colour, "marker": marker, "markerfacecolor": "none"}
                axes.plot(ranks, 1 + over, label=sampler, **look)
            ideal_line(axes, 1, "ideal")
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks[:: 2 if len(ranks) > 6 else 1])
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            if row == 0:
                p = f"p = {case['p']:g}, {case['schedule']}"
                axes.set_title(f"B = {batch} a rank, {p}")
            if row == len(SYNCS) - 1:
                axes.set_xlabel("data-parallel ranks")
            if column == 0:
                axes.set_ylabel(f"step time / ideal\n(ranks wait once a {sync})")
    legend(figure, 6)
    shape = results["shape"]
    figure.suptitle(
        f"What the slowest rank adds: simulated from measured times, ViT D={shape['width']}, "
        f"N={shape['tokens']}, {results['cases'][0]['branches']} branches"
    )
    return figure


def plot_distribution(results: dict[str, Any]) -> Figure:
    """The slowest rank's step under Bernoulli, exactly, for the fitted lines."""
    ranks, batches = results["ranks"], batches_of(results)
    batch = batches[len(batches) // 2]
    case = hardest(results["cases"], batch)
    layers = Layers(batch, tuple(SCHEDULES[case["schedule"]](case["branches"], case["p"])))
    measured = results["measured"][str(batch)]
    lines = [branch["line"] for branch in measured["branches"]]
    values, probabilities = bernoulli_distribution(layers, [line["per_row"] for line in lines])
    fixed = case["branches"] / KINDS * sum(line["fixed"] for line in lines)
    values = values + fixed + measured["ends_seconds"] + measured["optimizer_seconds"]
    mean = float(values @ probabilities)
    figure, axes = plt.subplots(figsize=(8, 4.6))
    chosen = [r for r in ranks if r in (1, 8, 64, 512, 1024, 4096)]
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(chosen)))
    first, last = np.interp(
        [1e-4, 1 - 1e-4], np.cumsum(largest_of(values, probabilities, 1)), values
    )
    last = max(last, float(values @ largest_of(values, probabilities, chosen[-1])) * 1.05)
    grid = np.linspace(first, last, 400)
    window = 0.01 * mean  # wide enough to smooth the single counts
    for number, colour in zip(chosen, colours, strict=True):
        largest = largest_of(values, probabilities, number)
        below = np.cumsum(largest)
        inside = np.interp(grid + window / 2, values, below) - np.interp(
            grid - window / 2, values, below
        )
        label = "a single rank" if number == 1 else f"slowest of {number}"
        axes.plot(grid / mean, 100 * inside, color=colour, label=label)
        axes.fill_between(grid / mean, 100 * inside, color=colour, alpha=0.15)
    axes.axvline(1, color="black", linewidth=1, linestyle="--", label="mean rank")
    axes.set(
        xlabel="step time / mean rank's",
        ylabel="steps within 0.5 % of it (%)",
        title=f"Bernoulli, B = {batch} a rank, p = {case['p']:g} ({case['schedule']}), "
        f"{case['branches']} branches",
    )
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_branches(results: dict[str, Any]) -> Figure:
    """Seconds by kept rows with the fitted lines, and how far off the lines are."""
    batches = list(results["measured"])
    shared = {"sharex": "col", "sharey": "row", "height_ratios": (2, 1)}
    figure, grid = panels(2, len(batches), 3.6 + 2 / len(batches), 3, **shared)
    for column, batch in enumerate(batches):
        above, below = grid[0][column], grid[1][column]
        for branch, colour, marker in zip(
            results["measured"][batch]["branches"], (BLUE, RED), "os", strict=True
        ):
            first = int(branch["counts"][0] == 0)  # a logarithm has no place for none
            counts, seconds, residuals = (
                np.array(branch[key][first:]) for key in ("counts", "seconds", "residuals")
            )
            line = branch["line"]["fixed"] + branch["line"]["per_row"] * counts
            above.plot(counts, 1e3 * seconds, marker, color=colour, label=branch["kind"])
            above.plot(counts, 1e3 * line, color=colour, label=f"{branch['kind']}, a + b k")
            below.plot(counts, residuals, marker + "-", color=colour, linewidth=0.8)
        above.set_xscale("log", base=2)
        above.set_yscale("log")
        above.set_title(f"B = {batch}")
        below.axhline(0, color="black", linewidth=1)
        below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        below.xaxis.set_major_formatter("{x:g}")
        below.minorticks_off()
        below.set_xlabel("kept samples k")
    grid[0][0].set_ylabel("branch, forward + backward (ms)")
    grid[0][0].yaxis.set_major_formatter("{x:g}")
    grid[1][0].set_ylabel("measured / line - 1")
    legend(figure, 4)
    shape = results["shape"]
    figure.suptitle(
        f"A branch by number of kept samples, ViT D={shape['width']}, N={shape['tokens']}, "
        "one thread"
    )
    return figure


def plot_validation(results: dict[str, Any]) -> Figure:
    """Measured excess of the slowest rank beside the simulated one."""
    figure, (line,) = panels(1, len(SYNCS), 5.5, 4.6)
    groups = [
        (f"{sampler}\n{outcome['ranks']} ranks", found["excess"])
        for outcome in results["validation"]
        for sampler, found in outcome["samplers"].items()
    ]
    places = np.arange(len(groups))
    bars = (
        ("counts", "simulated, counts alone", ORANGE),
        ("counts_and_noise", "simulated, counts and machine noise", BLUE),
    )
    for axes, sync in zip(line, SYNCS, strict=True):
        measured = 100 * np.array([excess[sync]["measured"] for _, excess in groups])
        interval = 100 * np.array([excess[sync]["interval"] for _, excess in groups]).T
        axes.bar(places - 0.27, measured, 0.25, color=GREY, label="measured, 90 % interval")
        errors = np.abs(interval - measured)
        axes.errorbar(places - 0.27, measured, errors, fmt="none", color="black", capsize=3)
        for i, (key, label, colour) in enumerate(bars):
            heights = [100 * excess[sync][key] for _, excess in groups]
            axes.bar(places + 0.27 * i, heights, 0.25, color=colour, label=label)
        axes.set_xticks(places, [name for name, _ in groups], fontsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"ranks wait {WHERE[sync].partition(' (')[0]}")
        axes.grid(axis="x", visible=False)
    line[0].set_ylabel("slowest rank's time over the mean rank's (%)")
    legend(figure, 3)
    case = results["validation"][0]["case"]
    figure.suptitle(
        f"Real DDP processes and the simulation, B = {case['batch']} a rank, p = {case['p']:g}"
    )
    return figure


PLOTS = {
    "ranks": plot_ranks,
    "slowest-rank": plot_distribution,
    "branches": plot_branches,
    "processes": plot_validation,
}


def save_plots(results: dict[str, Any], directory: Path) -> list[Path]:
    """Writes all plots; returns their paths."""
    return save({name: partial(plot, results) for name, plot in PLOTS.items()}, directory)
