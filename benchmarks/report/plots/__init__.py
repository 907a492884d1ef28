"""The plots of a run, each drawn where its cases were run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report.plots.bars import plot_blocks, plot_compiled, plot_models, plot_ops
from benchmarks.report.plots.break_even import plot_break_even
from benchmarks.report.plots.style import Case, save
from benchmarks.report.plots.sweeps import plot_batch, plot_depth, plot_keep
from benchmarks.report.plots.training import plot_training

__all__ = ["save_plots"]

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
    plots = {
        name: partial(plot, of_kind[kind])
        for name, (kind, plot) in _PLOTS.items()
        if kind in of_kind
    }
    plots |= {name: partial(plot_ops, cases) for name, cases in of_rows.items()}
    if result["training"]:
        plots["training"] = partial(plot_training, result["training"])
    return save(plots, directory)
