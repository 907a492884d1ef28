"""Bandwidth of the building blocks against a plain copy."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.report.plots.style import Case, figure_of, grouped_bars, legend

PROVIDERS = ("fused", "torch", "xformers", "flash_attn")


def plot_ops(cases: list[Case]) -> Figure:
    """Bandwidth of every op on one kind of row as a share of the copy's, one panel a dtype."""
    dtypes = sorted({case["dtype"] for case in cases}, key=("fp32", "mixed", "bf16").index)
    providers = [p for p in PROVIDERS if any(p in case["providers"] for case in cases)]
    names = list(dict.fromkeys(f"{case['op']}, {case['direction']}" for case in cases))
    figure, panels = plt.subplots(
        1,
        len(dtypes),
        figsize=(3 + 4.4 * len(dtypes), 2 + 0.22 * (len(providers) + 0.4) * len(names)),
        squeeze=False,
        layout="constrained",
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        shown = [case for case in cases if case["dtype"] == dtype]
        here = [f"{case['op']}, {case['direction']}" for case in shown]
        series = []
        for provider in providers:
            shares = [figure_of(case, provider, "of_copy_bandwidth") for case in shown]
            series.append((provider, [None if s is None else 100 * s for s in shares]))
        grouped_bars(axes, here, series)
        axes.axvline(100, color="black", linewidth=1, label="plain copy")
        axes.axvline(90, color="black", linewidth=1, linestyle="--", label="target, 90 %")
        axes.set(xlabel="bandwidth (% of a plain copy's)", title=dtype)
    shape = ", ".join(str(n) for n in cases[0]["shape"])
    layout = ", channels last" if cases[0]["channels_last"] else ""
    figure.suptitle(
        f"Bandwidth for the bytes that have to be moved: {cases[0]['rows']}, [{shape}]{layout}, "
        f"k = {cases[0]['k']}"
    )
    legend(figure, 4)
    return figure
