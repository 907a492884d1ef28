"""Bars: speed-ups of blocks, models and compiled blocks, and the bandwidth of ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from matplotlib.figure import Figure

from benchmarks.report.plots.style import Case, figure_of, grouped_bars, legend, panels

BLOCK_PROVIDERS = (
    *("dinov2", "dinov3", "xformers", "fused-traceable", "fused-triton"),
    *("fused", "fused-fixed", "dense"),
)


def _speedup_bars(
    cases: Sequence[Case],
    providers: Iterable[str],
    name: Callable[[Case], str],
    ideal: Callable[[Case], float | None],
    baseline: str,
    title: str,
) -> Figure:
    """A group of bars a case, and its ideal beside them."""
    providers = [p for p in providers if any(p in case["providers"] for case in cases)]
    figure, ((axes,),) = panels(1, 1, 8.4, 1.9 + 0.2 * (len(providers) + 1) * len(cases))
    speedups = {p: [figure_of(case, p, "speedup") for case in cases] for p in providers}
    grouped_bars(axes, [name(case) for case in cases], speedups)
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
    found = dict.fromkeys(p for case in cases for p in case["providers"])
    providers = [p for p in ("fused", "torch", "xformers", "flash_attn") if p in found]
    count = len({(case["op"], case["direction"]) for case in cases})
    height = 2 + 0.22 * (len(providers) + 0.4) * count
    figure, (line,) = panels(1, len(dtypes), 4.4 + 3 / len(dtypes), height)
    for axes, dtype in zip(line, dtypes, strict=True):
        shown = [case for case in cases if case["dtype"] == dtype]
        shares = {
            p: [100 * (figure_of(case, p, "of_copy_bandwidth") or 0) or None for case in shown]
            for p in providers
        }
        grouped_bars(axes, [f"{case['op']}, {case['direction']}" for case in shown], shares)
        axes.axvline(100, color="black", linewidth=1, label="plain copy")
        axes.axvline(90, color="black", linewidth=1, linestyle="--", label="target, 90 %")
        axes.set(xlabel="bandwidth (% of a plain copy's)", title=dtype)
    shape, k = cases[0]["shape"], cases[0]["k"]
    about = f"{cases[0]['rows']}, {shape}, k = {k}"
    figure.suptitle(f"Bandwidth for the bytes that have to be moved: {about}")
    legend(figure, 4)
    return figure
