"""Lines: blocks over keep and over the batch, stacks over their number of branches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.plots.style import Case, figure_of, legend, lines, log_axis, panels

PROVIDERS = (
    *("naive", "dinov2", "dinov3", "xformers", "fused", "fused-auto"),
    *("fused-fixed", "fused-bernoulli", "dense"),
)
LAW = {"block", "batch", "keep", "dtype", "branches", "tokens", "width"}
Value = Callable[[Case, str], float | None]


def _sweeps(cases: list[Case], over: str) -> list[list[Case]]:
    """Groups of cases that differ in ``over`` only, of three members or more, in its order."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(tuple(case.get(key) for key in sorted(LAW - {over})), []).append(case)
    return [
        sorted(group, key=lambda case: case[over])
        for group in groups.values()
        if len({case[over] for case in group}) > 2
    ]


def _plot(cases: list[Case], over: str, value: Value, text: str, xlabel: str) -> Figure | None:
    """A row of two panels a sweep: speed-ups over naive masking, and another value."""
    found = _sweeps(cases, over)
    if not found:
        return None
    figure, grid = panels(len(found), 2, 5.2, 4.1)
    for sweep, (speedups, others) in zip(found, grid, strict=True):
        at = [case[over] for case in sweep]
        ideal = [1 / case["keep"] for case in sweep]
        speedups.plot(at, ideal, "k--", linewidth=1, label="ideal, 1 / keep")
        lines(speedups, sweep, over, PROVIDERS, partial(figure_of, key="speedup"))
        lines(others, sweep, over, PROVIDERS, value)
        if over == "keep":
            log_axis(speedups, [1, 2, 5, 10, 20], "y")
        speedups.set_ylabel("speed-up over naive masking (x)")
        others.set(ylabel=text, ylim=(0, None))
        for axes in (speedups, others):
            _label(axes, sweep, over, xlabel)
    legend(figure)
    return figure


def _label(axes: Axes, sweep: list[Case], over: str, xlabel: str) -> None:
    first = sweep[0]
    if over != "keep":
        log_axis(axes, [case[over] for case in sweep])
    known = [f"{key} {first[key]}" for key in ("batch", "keep") if key != over]
    rows = first.get("block") or f"[{first['batch']}, {first['tokens']}, {first['width']}]"
    axes.set_xlabel(xlabel)
    axes.set_title(", ".join([str(rows), *known, first["dtype"]]), fontsize=10)


def plot_keep(cases: list[Case]) -> Figure | None:
    value = partial(figure_of, key="memory_of_baseline", factor=100)
    text = "memory (% of naive masking's)"
    return _plot(cases, "keep", value, text, "keep (survival probability)")


def plot_batch(cases: list[Case]) -> Figure | None:
    def value(case: Case, provider: str) -> float | None:
        return figure_of(case, provider, "median", 1e3 / case["batch"])

    return _plot(cases, "batch", value, "time per sample (ms)", "batch (samples)")


def plot_depth(cases: list[Case]) -> Figure | None:
    def value(case: Case, provider: str) -> float | None:
        return figure_of(case, provider, "median", 1e6 / case["branches"])

    return _plot(cases, "branches", value, "time per branch (us)", "branches")
