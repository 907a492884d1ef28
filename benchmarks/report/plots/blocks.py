"""Blocks: speed-up and memory over keep, scaling with the batch, and all of them as bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.report.plots.style import Case, colour, figure_of, grouped_bars, label, legend

# Lines: of the variants of naive masking and of the op one each, the others lie upon them.
PROVIDERS = ("naive", "dinov2", "dinov3", "xformers", "fused", "fused-auto", "dense")
BARS = (
    *("naive-timm", "dinov2", "dinov3", "xformers", "fused-traceable", "fused-triton"),
    *("fused", "fused-fixed", "dense"),
)


def _lines(
    axes: Axes, cases: list[Case], x: Callable[[Case], float], key: str, factor: float = 1.0
) -> None:
    for provider in PROVIDERS:
        points = [(x(case), figure_of(case, provider, key)) for case in cases]
        points = [(at, factor * value) for at, value in points if value is not None]
        if points:
            style = {"linestyle": ":", "marker": "s"} if provider == "dense" else {"marker": "o"}
            axes.plot(
                *zip(*points, strict=True),
                color=colour(provider),
                label=label(provider),
                markersize=4,
                linewidth=1.6,
                **style,
            )


def _sweeps(cases: list[Case], over: str) -> list[list[Case]]:
    """Groups of cases that differ in ``over`` only, of three members or more, in its order."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        fixed = {"block", "batch", "keep", "dtype"} - {over}
        groups.setdefault(tuple(case[key] for key in sorted(fixed)), []).append(case)
    return [
        sorted(group, key=lambda case: case[over])
        for group in groups.values()
        if len({case[over] for case in group}) > 2
    ]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns, 4.1 * rows), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_axis_off()
    return figure, flat[:count]


def _title(case: Case, over: str) -> str:
    fixed = f"B = {case['batch']}" if over == "keep" else f"keep {case['keep']:g}"
    return f"{case['label']} ({case['block']}), {fixed}, {case['dtype']}"


def plot_keep(cases: list[Case]) -> Figure | None:
    """Speed-up over naive masking at every keep, against the ideal."""
    sweeps = _sweeps(cases, "keep")
    if not sweeps:
        return None
    figure, panels = _panels(len(sweeps))
    for axes, sweep in zip(panels, sweeps, strict=True):
        keeps = [case["keep"] for case in sweep]
        ideal = [1 / keep for keep in keeps]
        axes.plot(keeps, ideal, color="black", linestyle="--", linewidth=1, label="ideal, 1 / keep")
        _lines(axes, sweep, lambda case: case["keep"], "speedup")
        axes.set(
            xlabel="keep (survival probability)",
            ylabel="speed-up over naive masking (x)",
            yscale="log",
        )
        axes.set_title(_title(sweep[0], "keep"), fontsize=10)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks([1, 2, 5, 10, 20])
    legend(figure, 3 if len(sweeps) > 1 else 2)
    return figure


def plot_memory(cases: list[Case]) -> Figure | None:
    """Memory at every keep, as a share of naive masking's."""
    sweeps = [
        sweep
        for sweep in _sweeps(cases, "keep")
        if figure_of(sweep[0], "fused", "memory_of_baseline") is not None
    ]
    if not sweeps:
        return None
    figure, panels = _panels(len(sweeps))
    for axes, sweep in zip(panels, sweeps, strict=True):
        keeps = [case["keep"] for case in sweep]
        axes.plot(
            keeps, [100 * k for k in keeps], "--", color="black", linewidth=1, label="ideal, keep"
        )
        _lines(axes, sweep, lambda case: case["keep"], "memory_of_baseline", 100)
        kind = figure_of(sweep[0], "fused", "memory")["kind"]
        axes.set(xlabel="keep (survival probability)", ylabel=f"{kind} (% of naive masking's)")
        axes.set_ylim(bottom=0)
        axes.set_title(_title(sweep[0], "keep"), fontsize=10)
    legend(figure, 3 if len(sweeps) > 1 else 2)
    return figure


def plot_batch(cases: list[Case]) -> Figure | None:
    """Time of a sample and speed-up at every batch."""
    sweeps = _sweeps(cases, "batch")
    if not sweeps:
        return None
    figure, all_panels = plt.subplots(
        len(sweeps), 2, figsize=(10.4, 4.1 * len(sweeps)), squeeze=False, layout="constrained"
    )
    for (times, speedups), sweep in zip(all_panels, sweeps, strict=True):
        for provider in PROVIDERS:
            points = [
                (case["batch"], 1e3 * case["providers"][provider]["median"] / case["batch"])
                for case in sweep
                if provider in case["providers"]
            ]
            if points:
                times.plot(
                    *zip(*points, strict=True),
                    color=colour(provider),
                    marker="o",
                    markersize=4,
                    label=label(provider),
                )
        times.set(yscale="log", ylabel="time per sample of the batch (ms)")
        _lines(speedups, sweep, lambda case: case["batch"], "speedup")
        ideal = 1 / sweep[0]["keep"]
        speedups.axhline(ideal, color="black", linestyle="--", linewidth=1, label="ideal, 1 / keep")
        speedups.set(ylabel="speed-up over naive masking (x)")
        for axes in (times, speedups):
            axes.set(xlabel="batch (samples)", xscale="log")
            axes.set_xticks([case["batch"] for case in sweep], [c["batch"] for c in sweep])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(_title(sweep[0], "batch"), fontsize=10)
        times.yaxis.set_major_formatter("{x:g}")
    legend(figure)
    return figure


def plot_blocks(cases: list[Case]) -> Figure | None:
    """Speed-up of each provider over naive masking at keep 0.5 and 0.75, with the ideal."""
    found: Figure | None = None
    shown = [case for case in cases if case["keep"] in (0.5, 0.75) and case["providers"]]
    # Of a sweep over the batch the plot above is the right one.
    swept = {case["name"] for sweep in _sweeps(cases, "batch") for case in sweep}
    shown = [case for case in shown if case["name"] not in swept]
    if not shown:
        return None
    providers = [p for p in BARS if any(p in case["providers"] for case in shown)]
    found, axes = plt.subplots(
        figsize=(8.4, 1.8 + 0.19 * (len(providers) + 1) * len(shown)), layout="constrained"
    )
    names = [
        f"{case['label']}, {case['block'].split('-', 1)[1]}\nB {case['batch']}, keep "
        f"{case['keep']:g}" + ("" if case["dtype"] == "fp32" else f", {case['dtype']}")
        for case in shown
    ]
    series = [(p, [figure_of(case, p, "speedup") for case in shown]) for p in providers]
    grouped_bars(axes, names, series)
    for y, case in enumerate(shown):
        text = "ideal, 1 / keep" if y == 0 else "_nolegend_"
        axes.vlines(1 / case["keep"], y - 0.45, y + 0.45, "black", linestyles="--", label=text)
    axes.axvline(1, color="#555555", linewidth=1, label="naive masking")
    axes.set(xlabel="speed-up over naive masking (x)", title="Blocks, forward + backward")
    legend(found)
    return found
