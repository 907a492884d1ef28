"""Tables and plots of the claims, with the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.paper.timing import FLOOR
from benchmarks.report.plots.style import BLUE, GREY, ORANGE, RED, panels, save
from benchmarks.report.table import by_column, document, percent, ratio, seconds

Record = dict[str, Any]
Columns = dict[str, Callable[[Record], object]]
COLOURS = {
    "constant depth": GREY,
    "per mini-batch": ORANGE,
    "per sample": BLUE,
    "per sample, masking": RED,
    "linear": BLUE,
    "uniform": ORANGE,
}
FLOOR_TEXT = (
    "The ideal takes all blocks for equally dear, and a block for proportional to its samples. A "
    "floor is measured in the same run: the step without branches, and the branches beside it for "
    "as many samples as were kept, with nothing gathered or added; a branch of none is left out. "
    "Over its floor: the median over the repeats, step by step with the same numbers of samples."
)


def _share(row: Record) -> str:
    """Of constant depth, with the range of the repeats."""
    return f"{percent(row['of_constant'])} ({percent(row['low'], 0)} to {percent(row['high'], 0)})"


def _share_of_paper(record: Record, row: Record) -> str:
    """What the paper says of a variant: its gate is one for a mini-batch."""
    for p, share in record["paper"].items():
        if row["variant"] == f"p_L = {float(p):g}, per mini-batch, fused":
            return f"about {percent(share, 0)}"
    return "-"


def _memory(row: Record) -> str:
    used, share = row["memory"], percent(row["memory_of_constant"], 0)
    return f"{used['bytes'] / 2**20:.0f} MiB of {used['kind']} ({share})" if used else "-"


def _losses(row: Record) -> str:
    is_floor = row["variant"].endswith(FLOOR)  # it learns nothing
    return "-" if is_floor else " -> ".join(f"{row['losses'][i]:.2f}" for i in (0, -1))


VARIANT: Columns = {"variant": lambda row: row["variant"]}
STEP: Columns = VARIANT | {
    "median step": lambda row: seconds(row["seconds"]),
    "of constant depth": _share,
    "ideal": lambda row: percent(row["ideal"]),
}
OVER_FLOOR: Columns = {"over its floor": lambda row: ratio(row["over_floor"])}


def _time_table(record: Record) -> list[str]:
    depth = record["expected_depth"]
    paper: Columns = {"the paper": lambda row: _share_of_paper(record, row)}
    return [
        by_column(record["rows"], STEP | OVER_FLOOR | paper),
        FLOOR_TEXT,
        "Expected depth at p_L = 0.5 with linear decay: (3L - 1) / 4 = "
        f"{depth['formula']:.2f} of {depth['blocks']} blocks; mean of {depth['draws']} plans: "
        f"{depth['plan']:.2f}.",
    ]


def _error_table(record: Record) -> list[str]:
    columns: Columns = {
        "test error, mean": lambda row: percent(row["test_error"], 2),
        "standard deviation": lambda row: percent(row["deviation"], 2),
        "of each seed": lambda row: ", ".join(percent(value, 2) for value in row["errors"]),
    }
    bn = record["batch_norm"]
    return [
        by_column(record["rows"], VARIANT | columns),
        "BatchNorm over the kept rows only against BatchNorm over all rows, the same kept rows and "
        f"seeds: error differs by {100 * bn['mean']:+.2f} points on average, standard deviation "
        f"{100 * bn['deviation']:.2f} points, over {len(bn['differences'])} seeds.",
    ]


def _gradient_table(record: Record) -> list[str]:
    constant = record["rows"][0]
    columns: Columns = {
        "before the first drop of the rate": lambda row: f"{row['before']:.3g}",
        "after it": lambda row: f"{row['after']:.3g}",
        "before, of constant": lambda row: f"{row['before'] / constant['before']:.2f}",
        "after, of constant": lambda row: f"{row['after'] / constant['after']:.2f}",
    }
    return [by_column(record["rows"], VARIANT | columns)]


def _decay_table(record: Record) -> list[str]:
    columns: Columns = {
        "survival": lambda row: row["schedule"],
        "p_L": lambda row: f"{row['p_last']:g}",
        "blocks computed": lambda row: percent(row["keep"], 0),
        "test error": lambda row: (
            f"{percent(row['test_error'], 2)} ± {percent(row['deviation'], 2)}"
        ),
    }
    return [by_column(record["rows"], columns)]


def _deep_table(record: Record) -> list[str]:
    columns: Columns = {"memory": _memory, "loss, first to last": _losses}
    return [by_column(record["rows"], STEP | OVER_FLOOR | columns), FLOOR_TEXT]


def _budget_table(record: Record) -> list[str]:
    columns: Columns = {
        "epochs in the time of 90": lambda row: f"{row['epochs_for_90']:.0f}",
        "the paper": lambda row: (
            f"about {record['paper']}" if "mini-batch" in row["variant"] else "-"
        ),
    }
    text = "The ideal takes all of a step to be in the blocks."
    return [by_column(record["rows"], STEP | columns), text]


def _plot_curves(record: Record, ylabel: str, factor: float = 1.0) -> Figure:
    """The mean over the seeds, and every seed as a faint line; dashed, where the rate drops."""
    figure, ((axes,),) = panels(1, 1, 8.4, 4.8)
    for row in record["rows"]:
        colour = COLOURS[row["variant"]]
        epochs = range(1, len(row["curves"][0]) + 1)
        for curve in row["curves"]:
            axes.plot(epochs, [factor * y for y in curve], color=colour, alpha=0.25, linewidth=1)
        middle = [factor * mean(values) for values in zip(*row["curves"], strict=True)]
        axes.plot(epochs, middle, color=colour, linewidth=2, label=row["variant"])
    for i, epoch in enumerate(record.get("drops_after", [])):
        label = None if i else "rate divided by 10"
        axes.axvline(epoch + 0.5, color="black", linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="epoch", ylabel=ylabel, yscale="log")
    axes.set_title(record["title"], fontsize=10)
    axes.legend()
    return figure


def _plain_percents(axes: Axes) -> None:
    """1, 2, 5, 10 and so on: all the digits of a logarithmic axis would touch each other."""
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")


def _plot_error(record: Record) -> Figure:
    figure = _plot_curves(record, "test error (%)", factor=100)
    _plain_percents(figure.axes[0])
    return figure


def _plot_decay(record: Record) -> Figure:
    figure, ((axes,),) = panels(1, 1, 7.6, 4.8)
    for schedule in ("linear", "uniform"):
        rows = [row for row in record["rows"] if row["schedule"] == schedule]
        axes.errorbar(
            [row["p_last"] for row in rows],
            [100 * row["test_error"] for row in rows],
            [100 * row["deviation"] for row in rows],
            color=COLOURS[schedule],
            marker="o",
            capsize=3,
            label=f"{schedule} survival",
        )
    axes.set(
        xlabel="survival probability of the last block, p_L (1: constant depth)",
        ylabel="test error (%)",
        title=record["title"],
        yscale="log",
    )
    _plain_percents(axes)
    axes.legend()
    return figure


TABLES: dict[str, Callable[[Record], list[str]]] = {
    "time": _time_table,
    "error": _error_table,
    "gradient": _gradient_table,
    "decay": _decay_table,
    "deep": _deep_table,
    "budget": _budget_table,
}
# Curves; what the other claims found is in their tables.
PLOTS: dict[str, Callable[[Record], Figure]] = {
    "error": _plot_error,
    "gradient": partial(_plot_curves, ylabel="mean absolute gradient"),
    "decay": _plot_decay,
}


def write(result: Record, directory: Path) -> list[Path]:
    """Plots and ``report.md`` of the claims in ``result``; returns the paths."""
    claims = result["claims"]
    drawn = save({n: partial(PLOTS[n], claims[n]) for n in claims if n in PLOTS}, directory)
    sections = [f"Preset {result['preset']}, data: {result['data']}"]
    for name, record in claims.items():
        sections += [f"## {record['title']}", *TABLES[name](record)]
        sections += [f"![{name}]({path.name})" for path in drawn if path.stem == name]
    report = directory / "report.md"
    report.write_text(document("The paper's claims", result, sections))
    return [report, *drawn]
