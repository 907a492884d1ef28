"""The plots of a run, each drawn where its cases were run: bars, sweeps, maps and loss curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from benchmarks.report.plots import style
from benchmarks.report.plots.style import Case, figure_of, legend, log_axis, panels

# Bars: speed-ups of blocks, models and compiled blocks, and the bandwidth of ops

BLOCK_PROVIDERS = (
    *("dinov2", "dinov3", "xformers", "fused-traceable", "fused-triton"),
    *("fused", "fused-fixed", "dense"),
)


def _those_run(cases: Sequence[Case], providers: Iterable[str]) -> list[str]:
    return [p for p in providers if any(p in case["providers"] for case in cases)]


def _speedup_bars(
    cases: Sequence[Case],
    providers: Iterable[str],
    name: Callable[[Case], str],
    ideal: Callable[[Case], float | None],
    baseline: str,
    title: str,
) -> Figure:
    """A group of bars a case, and its ideal beside them."""
    providers = _those_run(cases, providers)
    figure, ((axes,),) = panels(1, 1, 8.4, 1.9 + 0.2 * (len(providers) + 1) * len(cases))
    speedups = {p: [figure_of(case, p, "speedup") for case in cases] for p in providers}
    style.grouped_bars(axes, [name(case) for case in cases], speedups)
    for y, case in enumerate(cases):
        if at := ideal(case):
            axes.vlines(at, y - 0.45, y + 0.45, "black", linestyles="--", label="ideal")
    axes.axvline(1, color="#555555", linewidth=1, label=baseline)
    axes.set(xlabel=f"speed-up over {baseline} (x)", title=title)
    legend(figure)
    return figure


def plot_blocks(cases: list[Case]) -> Figure | None:
    """At keep 0.5 and 0.75; beyond that there are sweeps."""
    shown = [case for case in cases if case["keep"] in (0.5, 0.75)]
    if not shown:
        return None
    return _speedup_bars(
        shown,
        BLOCK_PROVIDERS,
        lambda case: (
            f"{case['label']}, {case['block'].split('-', 1)[1]}\n"
            f"B {case['batch']}, keep {case['keep']:g}, {case['dtype']}"
        ),
        lambda case: 1 / float(case["keep"]),
        "naive masking",
        "Blocks, forward + backward",
    )


def plot_models(cases: list[Case]) -> Figure:
    """A training step."""
    return _speedup_bars(
        cases,
        ("dinov2", "fused-bernoulli", "fused", "fused-plan"),
        lambda case: (
            f"{case['label']}, drop {case['drop']:g}\n"
            f"B {case['batch']}, {case['image']} px, {case['dtype']}"
        ),
        lambda case: case.get("ideal_speedup"),
        "the library's own drop path",
        "Models, the same drop rate in every branch",
    )


def plot_compiled(cases: list[Case]) -> Figure:
    every = dict.fromkeys(p for case in cases for p in case["providers"])
    return _speedup_bars(
        cases,
        [p for p in every if p != cases[0]["baseline"]],
        lambda case: f"{case['label']}, {case['dtype']}\n{case['counts']} k",
        lambda case: None,
        "DINOv3 style, compiled",
        "Blocks under torch.compile, forward + backward",
    )


def plot_ops(cases: list[Case]) -> Figure:
    """Bandwidth of every op on one kind of row as a share of the copy's, one panel a dtype."""
    dtypes = sorted({case["dtype"] for case in cases}, key=("fp32", "mixed", "bf16").index)
    providers = _those_run(cases, ("fused", "torch", "xformers", "flash_attn"))
    count = len({(case["op"], case["direction"]) for case in cases})
    height = 2 + 0.22 * (len(providers) + 0.4) * count
    figure, (line,) = panels(1, len(dtypes), 4.4 + 3 / len(dtypes), height)
    for axes, dtype in zip(line, dtypes, strict=True):
        shown = [case for case in cases if case["dtype"] == dtype]
        key = "of_copy_bandwidth"
        shares = {p: [figure_of(case, p, key, 100) for case in shown] for p in providers}
        style.grouped_bars(axes, [f"{case['op']}, {case['direction']}" for case in shown], shares)
        axes.axvline(100, color="black", linewidth=1, label="plain copy")
        axes.axvline(90, color="black", linewidth=1, linestyle="--", label="target, 90 %")
        axes.set(xlabel="bandwidth (% of a plain copy's)", title=dtype)
    about = "{rows}, {shape}, k = {k}".format_map(cases[0])
    figure.suptitle(f"Bandwidth for the bytes that have to be moved: {about}")
    legend(figure, 4)
    return figure


# Lines: blocks over keep and over the batch, stacks over their number of branches

PROVIDERS = (
    *("naive", "dinov2", "dinov3", "xformers", "fused", "fused-auto"),
    *("fused-fixed", "fused-bernoulli", "dense"),
)
LAW = {"block", "batch", "keep", "dtype", "branches", "tokens", "width"}


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


def _plot(
    cases: list[Case], over: str, value: tuple[str, float], ylabel: str, xlabel: str
) -> Figure | None:
    """A row of two panels a sweep: speed-ups over naive masking, and another ``value``: a figure's
    key, and the factor to its unit. Of a time it is the part of one of ``case[over]``."""
    found = _sweeps(cases, over)
    if not found:
        return None
    key, factor = value

    def other(case: Case, provider: str) -> float | None:
        return figure_of(case, provider, key, factor / (case[over] if key == "median" else 1))

    figure, grid = panels(len(found), 2, 5.2, 4.1)
    for sweep, (speedups, others) in zip(found, grid, strict=True):
        first, at = sweep[0], [case[over] for case in sweep]
        rows = first.get("block") or f"[{first['batch']}, {first['tokens']}, {first['width']}]"
        known = [f"{key} {first[key]}" for key in ("batch", "keep") if key != over]
        ideal = [1 / case["keep"] for case in sweep]
        speedups.plot(at, ideal, "k--", linewidth=1, label="ideal, 1 / keep")
        style.lines(speedups, sweep, over, PROVIDERS, partial(figure_of, key="speedup"))
        style.lines(others, sweep, over, PROVIDERS, other)
        if over == "keep":
            log_axis(speedups, [1, 2, 5, 10, 20], "y")
        speedups.set_ylabel("speed-up over naive masking (x)")
        others.set(ylabel=ylabel, ylim=(0, None))
        for axes in (speedups, others):
            if over != "keep":
                log_axis(axes, at)
            axes.set_xlabel(xlabel)
            axes.set_title(", ".join([rows, *known, first["dtype"]]), fontsize=10)
    legend(figure)
    return figure


def plot_keep(cases: list[Case]) -> Figure | None:
    value, text = ("memory_of_baseline", 100), "memory (% of naive masking's)"
    return _plot(cases, "keep", value, text, "keep (survival probability)")


def plot_batch(cases: list[Case]) -> Figure | None:
    return _plot(cases, "batch", ("median", 1e3), "time per sample (ms)", "batch (samples)")


def plot_depth(cases: list[Case]) -> Figure | None:
    return _plot(cases, "branches", ("median", 1e6), "time per branch (us)", "branches")


# Maps: where compaction starts to pay, over the batch, the size of a row and the share of dropped
# rows

MAPS = {
    "whole": "compaction /\nthe branch on every row",
    "naive": "compaction /\nnaive masking",
}


def plot_break_even(cases: list[Case]) -> Figure | None:
    """Two rows of maps, one map a batch: the time with compaction against the branch on every row
    (what ``min_saving`` chooses between) and against naive masking. Below 1 compaction pays."""
    cases = [c for c in cases if {"compact", *MAPS} <= c["providers"].keys()]
    if not cases:
        return None
    batches = sorted({case["batch"] for case in cases})
    blocks = sorted({(case["row_elements"], case["block"]) for case in cases})
    shares = sorted({case["dropped"] for case in cases})
    height = 1.2 + 0.55 * len(blocks)
    figure, grid = panels(len(MAPS), len(batches), 4.4, height, sharex=True, sharey=True)
    for line, (other, text) in zip(grid, MAPS.items(), strict=True):
        values = {
            (case["batch"], case["block"], case["dropped"]): case["providers"]["compact"]["median"]
            / case["providers"][other]["median"]
            for case in cases
        }
        # Blue where compaction is faster, red where it is slower; white is break-even.
        norm = TwoSlopeNorm(1.0, min(*values.values(), 0.8), max(*values.values(), 1.1))
        for axes, batch in zip(line, batches, strict=True):
            cells = [[values.get((batch, b, s), math.nan) for s in shares] for _, b in blocks]
            image = axes.imshow(cells, cmap="RdBu_r", norm=norm, aspect="auto")
            for y, x in ((y, x) for y in range(len(blocks)) for x in range(len(shares))):
                if not math.isnan(value := cells[y][x]):
                    ink = "black" if 0.25 < norm(value) < 0.8 else "white"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink)
            axes.set_xticks(range(len(shares)), [f"{100 * share:.0f}" for share in shares])
            names = [f"{block}\n{elements:,} elements" for elements, block in blocks]
            axes.set_yticks(range(len(blocks)), names)
            axes.grid(visible=False)
            axes.set_title(f"batch of {batch}")
        figure.colorbar(image, ax=line, label=text)
    for axes in grid[-1]:
        axes.set_xlabel("dropped rows (%)")
    return figure


# The training on digits: loss curves, and how far they are apart


def plot_training(training: dict[str, Any]) -> Figure:
    """Naive masking as a broad band and the op as a thin line on it; differences of all pairs."""
    losses = {name: variant["losses"] for name, variant in training["variants"].items()}
    figure, ((curves, apart),) = panels(1, 2, 6, 4.4)
    curves.plot(losses["naive"], color=style.GREY, linewidth=5, label="naive masking")
    curves.plot(losses["fused"], color=style.BLUE, linewidth=1.4, label="sdkernels, the same rows")
    log_axis(curves, [0.05, 0.1, 0.2, 0.5, 1, 2], "y")
    curves.set(xlabel="step", ylabel="loss (cross entropy)", title="Handwritten digits")
    curves.legend()

    for name, other, colour, label in (
        ("naive-perturbed", "naive", style.GREY, "yardstick: naive, weights changed by 1e-7"),
        ("fused", "naive", style.BLUE, "fused, Bernoulli"),
        ("fused-fixed", "naive-fixed", style.ORANGE, "fused, fixed count"),
    ):
        pairs = zip(losses[name], losses[other], strict=True)
        apart.plot([abs(a - b) for a, b in pairs], ".", color=colour, label=label)
    # Linear around zero: many differences are exactly zero, and those are the best ones.
    apart.set_yscale("symlog", linthresh=1e-8)
    apart.set_ylim(-2e-9, max(apart.get_ylim()[1], 1e-7) * 300)  # room for the legend
    apart.set(xlabel="step", ylabel="absolute difference")
    apart.set_title("Difference of the losses from naive masking's")
    apart.legend(loc="upper left")
    return figure


# file: the kind of case, and what draws all of them
_PLOTS: dict[str, tuple[str, Callable[[list[Case]], Figure | None]]] = {
    "blocks": ("block", plot_blocks),
    "scaling-keep": ("block", plot_keep),
    "scaling-batch": ("block", plot_batch),
    "models": ("model", plot_models),
    "scaling-depth": ("depth", plot_depth),
    "compiled": ("compile", plot_compiled),
    "break-even": ("break_even", plot_break_even),
}


def save_plots(result: dict[str, Any], directory: Path) -> list[Path]:
    """Writes the plots whose cases were run; returns their paths."""
    of_kind: dict[str, list[Case]] = {}
    of_rows: dict[str, list[Case]] = {}
    for case in (case for case in result["cases"] if case["providers"]):
        of_kind.setdefault(case["kind"], []).append(case)
        if case["kind"] == "op":
            shape = "x".join(str(n) for n in case["shape"])
            of_rows.setdefault(f"ops-{shape}-k{case['k']}", []).append(case)
    drawn = {name: each for name, each in _PLOTS.items() if each[0] in of_kind}
    plots = {name: partial(plot, of_kind[kind]) for name, (kind, plot) in drawn.items()}
    plots |= {name: partial(plot_ops, cases) for name, cases in of_rows.items()}
    if result["training"]:
        plots["training"] = partial(plot_training, result["training"])
    return style.save(plots, directory)
