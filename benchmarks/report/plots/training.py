"""The training on digits: loss curves, and how far they are apart."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmarks.report.plots.style import BLUE, GREY, ORANGE, log_axis, panels


def plot_training(training: dict[str, Any]) -> Figure:
    """Naive masking as a broad band and the op as a thin line on it; differences of all pairs."""
    losses = {name: variant["losses"] for name, variant in training["variants"].items()}
    figure, ((curves, apart),) = panels(1, 2, 6, 4.4)
    curves.plot(losses["naive"], color=GREY, linewidth=5, label="naive masking")
    curves.plot(losses["fused"], color=BLUE, linewidth=1.4, label="sdkernels, the same rows")
    log_axis(curves, [0.05, 0.1, 0.2, 0.5, 1, 2], "y")
    curves.set(xlabel="step", ylabel="loss (cross entropy)", title="Handwritten digits")
    curves.legend()

    yardstick = "yardstick: naive, weights changed by 1e-7"
    for name, other, colour, label in (
        ("naive-perturbed", "naive", GREY, yardstick),
        ("fused", "naive", BLUE, "fused, Bernoulli"),
        ("fused-fixed", "naive-fixed", ORANGE, "fused, fixed count"),
    ):
        pairs = zip(losses[name], losses[other], strict=True)
        apart.plot([abs(a - b) for a, b in pairs], ".", color=colour, label=label)
    # Linear around zero: many differences are exactly zero, and those are the best ones.
    apart.set_yscale("symlog", linthresh=1e-8)
    apart.set_ylim(-2e-9, max(apart.get_ylim()[1], 1e-7) * 300)  # room for the legend
    title = "Difference of the losses from naive masking's"
    apart.set(xlabel="step", ylabel="absolute difference", title=title)
    apart.legend(loc="upper left")
    return figure
