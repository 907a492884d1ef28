"""Lines: blocks over keep and over the batch, stacks over their number of branches."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmarks.report.plots.style import (
    Case,
    figure_of,
    ideal_line,
    legend,
    lines,
    log_axis,
    panels,
)

# Of the variants of naive masking and of the op one each, the others lie upon them.
PROVIDERS = ("naive", "dinov2", "dinov3", "xformers", "fused", "fused-auto", "dense")
STACK_PROVIDERS = ("naive", "dinov2", "fused", "fused-fixed", "fused-bernoulli", "dense")
OVER_NAIVE = "speed-up over naive masking (x)"


def sweeps(cases: list[Case], over: str) -> list[list[Case]]:
    """Groups of blocks that differ in ``over`` only, of three members or more, in its order."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        fixed = sorted({"block", "batch", "keep", "dtype"} - {over})
        groups.setdefault(tuple(case[key] for key in fixed), []).append(case)
    return [
        sorted(group, key=lambda case: case[over])
        for group in groups.values()
        if len({case[over] for case in group}) > 2
    ]


def _title(case: Case, over: str) -> str:
    fixed = f"B = {case['batch']}" if over == "keep" else f"keep {case['keep']:g}"
    return f"{case['label']} ({case['block']}), {fixed}, {case['dtype']}"


def _speedup(case: Case, provider: str) -> float | None:
    return figure_of(case, provider, "speedup")  # type: ignore[no-any-return]


def _memory(case: Case, provider: str) -> float | None:
    share = figure_of(case, provider, "memory_of_baseline")
    return None if share is None else 100 * share


def _over_keep(found: list[list[Case]], memory: bool) -> Figure | None:
    """A panel a sweep over keep: speed-up, or memory as a share of naive masking's."""
    if not found:
        return None
    columns = min(len(found), 3)
    figure, grid = panels(-(-len(found) // columns), columns, 5.2, 4.1)
    for spare in grid.flat[len(found) :]:
        spare.set_axis_off()
    for axes, sweep in zip(grid.flat, found, strict=False):
        keeps = [case["keep"] for case in sweep]
        ideal, text = ([100 * k for k in keeps], "keep") if memory else ([1 / k for k in keeps], "")
        look = {"color": "black", "linestyle": "--", "linewidth": 1}
        axes.plot(keeps, ideal, label=f"ideal, {text or '1 / keep'}", **look)
        lines(axes, sweep, "keep", PROVIDERS, _memory if memory else _speedup)
        if memory:
            kind = figure_of(sweep[0], "fused", "memory")["kind"]
            axes.set(ylabel=f"{kind} (% of naive masking's)", ylim=(0, None))
        else:
            log_axis(axes, [1, 2, 5, 10, 20], "y", ylabel=OVER_NAIVE)
        axes.set_xlabel("keep (survival probability)")
        axes.set_title(_title(sweep[0], "keep"), fontsize=10)
    legend(figure, 3 if len(found) > 1 else 2)
    return figure


def plot_keep(cases: list[Case]) -> Figure | None:
    """Speed-up over naive masking at every keep, against the ideal."""
    return _over_keep(sweeps(cases, "keep"), memory=False)


def plot_memory(cases: list[Case]) -> Figure | None:
    """Memory at every keep, as a share of naive masking's."""
    found = sweeps(cases, "keep")
    return _over_keep([sweep for sweep in found if _memory(sweep[0], "fused")], memory=True)


def _time_and_speedup(
    line: Any, sweep: list[Case], over: str, providers: tuple[str, ...], unit: float
) -> None:
    """Two panels: the time for each of ``case[over]``, and the speed-up."""

    def time(case: Case, provider: str) -> float | None:
        median = figure_of(case, provider, "median")
        return None if median is None else unit * median / case[over]

    times, speedups = line
    lines(times, sweep, over, providers, time)
    lines(speedups, sweep, over, providers, _speedup)
    ideal_line(speedups, 1 / sweep[0]["keep"])
    speedups.set_ylabel(OVER_NAIVE)
    for axes in line:
        log_axis(axes, [case[over] for case in sweep])


def plot_batch(cases: list[Case]) -> Figure | None:
    """Time of a sample and speed-up at every batch."""
    found = sweeps(cases, "batch")
    if not found:
        return None
    figure, grid = panels(len(found), 2, 5.2, 4.1)
    for line, sweep in zip(grid, found, strict=True):
        _time_and_speedup(line, sweep, "batch", PROVIDERS, 1e3)
        line[0].set(yscale="log", ylabel="time per sample of the batch (ms)")
        line[0].yaxis.set_major_formatter("{x:g}")
        for axes in line:
            axes.set_xlabel("batch (samples)")
            axes.set_title(_title(sweep[0], "batch"), fontsize=10)
    legend(figure)
    return figure


def plot_depth(cases: list[Case]) -> Figure | None:
    """Time of a branch and speed-up from few branches to many."""
    law = ("batch", "tokens", "width", "keep")
    cases = [case for case in cases if all(case[key] == cases[0][key] for key in law)]
    if len(cases) < 3:
        return None
    cases = sorted(cases, key=lambda case: case["branches"])
    figure, (line,) = panels(1, 2, 5.2, 4.4)
    _time_and_speedup(line, cases, "branches", STACK_PROVIDERS, 1e6)
    line[0].set(ylabel="time per branch, forward + backward (us)", ylim=(0, None))
    for axes in line:
        axes.set_xlabel("branches")
    first = cases[0]
    figure.suptitle(
        f"Stacks of small branches on [{first['batch']}, {first['tokens']}, {first['width']}], "
        f"keep {first['keep']:g}"
    )
    legend(figure)
    return figure
