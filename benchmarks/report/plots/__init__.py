"""The plots of a run, each drawn where its cases were run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.report.plots.blocks import plot_batch, plot_blocks, plot_keep, plot_memory
from benchmarks.report.plots.break_even import plot_break_even
from benchmarks.report.plots.models import plot_compiled, plot_depth, plot_host, plot_models
from benchmarks.report.plots.ops import plot_ops
from benchmarks.report.plots.style import STYLE, Case
from benchmarks.report.plots.timeline import plot_timeline
from benchmarks.report.plots.training import plot_training

__all__ = ["save_plots"]

_PLOTS = {
    "blocks": ("block", plot_blocks),
    "speedup-keep": ("block", plot_keep),
    "memory-keep": ("block", plot_memory),
    "scaling-batch": ("block", plot_batch),
    "models": ("model", plot_models),
    "scaling-depth": ("depth", plot_depth),
    "compiled": ("compile", plot_compiled),
    "break-even": ("break_even", plot_break_even),
    "host": ("host", plot_host),
}


def _figures(result: dict[str, Any]) -> dict[str, Figure]:
    drawn: dict[str, Figure] = {}
    measured = [case for case in result["cases"] if case["providers"]]
    for name, (kind, plot) in _PLOTS.items():
        cases = [case for case in measured if case["kind"] == kind]
        figure = plot(cases) if cases else None
        if figure is not None:
            drawn[name] = figure
    ops: dict[tuple[Any, ...], list[Case]] = {}
    for case in measured:
        if case["kind"] == "op":
            ops.setdefault((tuple(case["shape"]), case["k"]), []).append(case)
    for (shape, k), cases in ops.items():
        drawn[f"ops-{'x'.join(str(n) for n in shape)}-k{k}"] = plot_ops(cases)
    if result["timeline"]:
        drawn["timeline"] = plot_timeline(result["timeline"])
    if result["training"]:
        drawn["training"] = plot_training(result["training"])
    return drawn


def save_plots(result: dict[str, Any], directory: Path) -> list[Path]:
    """Writes the plots whose cases were run; returns their paths."""
    paths = []
    with plt.rc_context(STYLE):
        for name, figure in _figures(result).items():
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=130)
            plt.close(figure)
            paths.append(path)
    return paths
