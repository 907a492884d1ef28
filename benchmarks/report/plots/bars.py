"""Bars: blocks, models and compiled blocks over their baselines, bandwidth of ops, host time."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.report.plots.style import (
    Case,
    colour,
    figure_of,
    grouped_bars,
    legend,
    panels,
    speedup_bars,
)

BLOCK_PROVIDERS = (
    *("naive-timm", "dinov2", "dinov3", "xformers", "fused-traceable", "fused-triton"),
    *("fused", "fused-fixed", "dense"),
)
MODEL_PROVIDERS = ("dinov2", "fused-bernoulli", "fused", "fused-plan")
OP_PROVIDERS = ("fused", "torch", "xformers", "flash_attn")
HOST_TEXTS = {
    "naive": "naive masking",
    "index_add-rows": "gather + index_add, rows given",
    "fused-rows": "sdkernels, rows given",
    "fused": "sdkernels, drawing Bernoulli rows",
}


def plot_blocks(cases: list[Case], swept: set[str]) -> Figure | None:
    """Blocks at keep 0.5 and 0.75, without those of which a sweep over the batch is drawn."""
    shown = [case for case in cases if case["keep"] in (0.5, 0.75) and case["name"] not in swept]
    if not shown:
        return None
    names = [
        f"{case['label']}, {case['block'].split('-', 1)[1]}\nB {case['batch']}, keep "
        f"{case['keep']:g}" + ("" if case["dtype"] == "fp32" else f", {case['dtype']}")
        for case in shown
    ]
    return speedup_bars(
        shown,
        BLOCK_PROVIDERS,
        names,
        ideals=[1 / case["keep"] for case in shown],
        ideal="ideal, 1 / keep",
        baseline="naive masking",
        xlabel="speed-up over naive masking (x)",
        title="Blocks, forward + backward",
    )


def plot_models(cases: list[Case]) -> Figure:
    """A training step against the library's own model."""
    names = [
        f"{case['label']}, drop {case['drop']:g}\nB {case['batch']}, {case['image']} px, "
        f"{case['dtype']}"
        for case in cases
    ]
    return speedup_bars(
        cases,
        MODEL_PROVIDERS,
        names,
        ideals=[case.get("ideal_speedup") for case in cases],
        ideal="ideal",
        baseline="the library's own drop path",
        xlabel="speed-up of a training step (x)",
        title="Models, the same drop rate in every branch",
    )


def plot_compiled(cases: list[Case]) -> Figure:
    """Blocks under torch.compile against the code that DINOv3 compiles."""
    every = dict.fromkeys(p for case in cases for p in case["providers"])
    return speedup_bars(
        cases,
        [p for p in every if p != cases[0]["baseline"]],
        [f"{case['label']}, {case['dtype']}\n{case['counts']} k" for case in cases],
        ideals=(),
        ideal="",
        baseline="DINOv3 style, compiled",
        xlabel="speed-up over the compiled DINOv3 style (x)",
        title="Blocks under torch.compile, forward + backward",
    )


def plot_ops(cases: list[Case]) -> Figure:
    """Bandwidth of every op on one kind of row as a share of the copy's, one panel a dtype."""
    dtypes = sorted({case["dtype"] for case in cases}, key=("fp32", "mixed", "bf16").index)
    providers = [p for p in OP_PROVIDERS if any(p in case["providers"] for case in cases)]
    names = list(dict.fromkeys(f"{case['op']}, {case['direction']}" for case in cases))
    height = 2 + 0.22 * (len(providers) + 0.4) * len(names)
    figure, (line,) = panels(1, len(dtypes), 4.4 + 3 / len(dtypes), height)
    for axes, dtype in zip(line, dtypes, strict=True):
        shown = [case for case in cases if case["dtype"] == dtype]
        series = []
        for provider in providers:
            shares = [figure_of(case, provider, "of_copy_bandwidth") for case in shown]
            series.append((provider, [None if s is None else 100 * s for s in shares]))
        grouped_bars(axes, [f"{case['op']}, {case['direction']}" for case in shown], series)
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


def plot_host(cases: list[Case]) -> Figure:
    """What a call costs on the host over ``x + branch(x)``."""
    case = cases[0]  # the presets have one
    providers = [p for p in case["providers"] if "extra" in case["providers"][p]]
    figure, axes = plt.subplots(figsize=(7, 1.4 + 0.5 * len(providers)))
    values = [1e6 * case["providers"][p]["extra"] for p in providers]
    bars = axes.barh(range(len(providers)), values, 0.6, color=[colour(p) for p in providers])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(providers)), [HOST_TEXTS.get(p, p) for p in providers])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set(
        xlabel="host time of a call over x + branch(x), forward + backward (us)",
        title="Host time, tiny tensor",
    )
    return figure
