"""Tables and plots of the claims, with the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.measure.environment import environment_line
from benchmarks.paper.timing import CONSTANT, FLOOR
from benchmarks.report.plots.style import BLUE, GREEN, GREY, ORANGE, RED, STYLE
from benchmarks.report.table import markdown, percent

Record = dict[str, Any]
COLOURS = {
    "constant depth": GREY,
    "per mini-batch": ORANGE,
    "per sample": BLUE,
    "per sample, masking": RED,
    "linear": BLUE,
    "uniform": ORANGE,
}

# By the end of a variant's name; the op's own are blue.
BARS = {CONSTANT: GREY, FLOOR: GREY, "naive": RED}


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms"


def _share(row: Record) -> str:
    """Of constant depth, with the range of the repeats."""
    return f"{percent(row['of_constant'])} ({percent(row['low'], 0)} to {percent(row['high'], 0)})"


def _over_floor(row: Record) -> str:
    return "-" if row["over_floor"] is None else f"{row['over_floor']:.3f}"


FLOOR_TEXT = (
    "The ideal takes all blocks for equally dear, and a block for proportional to its samples. A "
    "floor is measured in the same run: the step without branches, and the branches beside it for "
    "as many samples as were kept, with nothing gathered or added; a branch of none is left out. "
    "Over its floor: the median over the repeats, step by step with the same numbers of samples."
)


def _time_table(record: Record) -> str:
    paper = {float(key): value for key, value in record.get("paper", {}).items()}

    def of_paper(variant: str) -> str:
        found = [share for p, share in paper.items() if f"p_L = {p:g}," in variant]
        is_paper = found and "mini-batch" in variant and "fused" in variant
        return f"about {percent(found[0], 0)}" if is_paper else "-"

    rows = [
        (
            row["variant"],
            _seconds(row["seconds"]),
            _share(row),
            percent(row["ideal"]),
            _over_floor(row),
            of_paper(row["variant"]),
        )
        for row in record["rows"]
    ]
    text = markdown(
        ("variant", "median step", "of constant depth", "ideal", "over its floor", "the paper"),
        rows,
    )
    depth = record["expected_depth"]
    return (
        f"{text}\n\n{FLOOR_TEXT}\n\nExpected depth at p_L = 0.5 with linear decay: (3L - 1) / 4 = "
        f"{depth['formula']:.2f} of {depth['blocks']} blocks; mean of {depth['draws']} plans: "
        f"{depth['plan']:.2f}."
    )


def _error_table(record: Record) -> str:
    rows = [
        (
            row["variant"],
            percent(row["test_error"], 2),
            percent(row["deviation"], 2),
            ", ".join(percent(value, 2) for value in row["errors"]),
        )
        for row in record["rows"]
    ]
    bn = record["batch_norm"]
    table = markdown(("variant", "test error, mean", "standard deviation", "of each seed"), rows)
    return (
        f"{table}\n\nBatchNorm over the kept rows only against BatchNorm over all rows, the same "
        f"kept rows and seeds: error differs by {_points(bn['mean'])} on average, standard "
        f"deviation {100 * bn['deviation']:.2f} points, over {len(bn['differences'])} seeds."
    )


def _points(value: float) -> str:
    return f"{100 * value:+.2f} points"


def _gradient_table(record: Record) -> str:
    constant = record["rows"][0]
    rows = [
        (
            row["variant"],
            f"{row['before']:.3g}",
            f"{row['after']:.3g}",
            f"{row['before'] / constant['before']:.2f}",
            f"{row['after'] / constant['after']:.2f}",
        )
        for row in record["rows"]
    ]
    header = ("variant", "before the first drop of the rate", "after it")
    return markdown((*header, "before, of constant", "after, of constant"), rows)


def _decay_table(record: Record) -> str:
    rows = [
        (
            row["schedule"],
            f"{row['p_last']:g}",
            percent(row["keep"], 0),
            f"{percent(row['test_error'], 2)} ± {percent(row['deviation'], 2)}",
        )
        for row in record["rows"]
    ]
    return markdown(("survival", "p_L", "blocks computed", "test error"), rows)


def _deep_table(record: Record) -> str:
    def memory(row: Record) -> str:
        used = row["memory"]
        if not used:
            return "-"
        share = percent(row["memory_of_constant"], 0)
        return f"{used['bytes'] / 2**20:.0f} MiB of {used['kind']} ({share})"

    def losses(row: Record) -> str:
        if row["variant"].endswith(FLOOR):  # it learns nothing
            return "-"
        return " -> ".join(f"{row['losses'][i]:.2f}" for i in (0, -1))

    rows = [
        (
            row["variant"],
            _seconds(row["seconds"]),
            _share(row),
            percent(row["ideal"]),
            _over_floor(row),
            memory(row),
            losses(row),
        )
        for row in record["rows"]
    ]
    header = (
        "variant",
        "median step",
        "of constant depth",
        "ideal",
        "over its floor",
        "memory",
        "loss, first to last",
    )
    return f"{markdown(header, rows)}\n\n{FLOOR_TEXT}"


def _budget_table(record: Record) -> str:
    rows = [
        (
            row["variant"],
            _seconds(row["seconds"]),
            _share(row),
            percent(row["ideal"]),
            f"{row['epochs_for_90']:.0f}",
            f"about {record['paper']}" if "mini-batch" in row["variant"] else "-",
        )
        for row in record["rows"]
    ]
    header = ("variant", "median step", "of constant depth", "ideal, all of it in blocks")
    return markdown((*header, "epochs in the time of 90", "the paper"), rows)


TABLES: dict[str, Callable[[Record], str]] = {
    "time": _time_table,
    "error": _error_table,
    "gradient": _gradient_table,
    "decay": _decay_table,
    "deep": _deep_table,
    "budget": _budget_table,
}


def _bars(axes: Axes, record: Record, paper: dict[str, float]) -> None:
    rows = record["rows"]
    places = range(len(rows))
    values = [100 * row["of_constant"] for row in rows]
    ranges = [
        [max(100 * (row["of_constant"] - row["low"]), 0) for row in rows],
        [max(100 * (row["high"] - row["of_constant"]), 0) for row in rows],
    ]
    colours = [
        next((c for end, c in BARS.items() if row["variant"].endswith(end)), BLUE) for row in rows
    ]
    bars = axes.barh(places, values, 0.62, color=colours, xerr=ranges, ecolor="#333333")
    axes.bar_label(bars, fmt="%.0f", padding=4, fontsize=9)
    for place, row in zip(places, rows, strict=True):
        label = "ideal" if place == 1 else "_nolegend_"
        ideal = 100 * row["ideal"]
        axes.vlines(ideal, place - 0.4, place + 0.4, "black", linestyles="--", label=label)
        if row["variant"] in paper:
            label = "the paper" if row["variant"] == min(paper) else "_nolegend_"
            axes.plot(100 * paper[row["variant"]], place, "D", color=GREEN, label=label)
    axes.set_yticks(places, [row["variant"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="time of a training step (% of constant depth)", title=record["title"])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _plot_time(record: Record) -> Figure:
    figure, axes = plt.subplots(figsize=(8.4, 6.4), layout="constrained")
    paper = {
        f"p_L = {float(p):g}, per mini-batch, fused": share for p, share in record["paper"].items()
    }
    _bars(axes, record, paper)
    return figure


def _plot_budget(record: Record) -> Figure:
    figure, axes = plt.subplots(figsize=(8.4, 3), layout="constrained")
    _bars(axes, record, {"per mini-batch, fused": 90 / record["paper"]})
    return figure


def _plot_deep(record: Record) -> Figure:
    figure, axes = plt.subplots(figsize=(8.4, 3.8), layout="constrained")
    _bars(axes, record, {})
    return figure


def _curves(axes: Axes, rows: list[Record], factor: float) -> None:
    """The mean over the seeds, and every seed as a faint line."""
    for row in rows:
        colour = COLOURS[row["variant"]]
        epochs = range(1, len(row["curves"][0]) + 1)
        for curve in row["curves"]:
            axes.plot(epochs, [factor * y for y in curve], color=colour, alpha=0.25, linewidth=1)
        middle = [factor * sum(values) / len(values) for values in zip(*row["curves"], strict=True)]
        axes.plot(epochs, middle, color=colour, linewidth=2, label=row["variant"])
    axes.set(xlabel="epoch")
    axes.legend(frameon=False)


def _plain_percents(axes: Axes) -> None:
    """1, 2, 5, 10 and so on: all the digits of a logarithmic axis would touch each other."""
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")


def _plot_error(record: Record) -> Figure:
    figure, axes = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
    _curves(axes, record["rows"], 100)
    axes.set(ylabel="test error (%)", yscale="log", title=record["title"])
    _plain_percents(axes)
    return figure


def _plot_gradient(record: Record) -> Figure:
    figure, axes = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    _curves(axes, record["rows"], 1)
    for i, epoch in enumerate(record["drops_after"]):
        label = "rate divided by 10" if i == 0 else "_nolegend_"
        axes.axvline(epoch + 0.5, color="black", linestyle="--", linewidth=1, label=label)
    axes.legend(frameon=False)
    axes.set(ylabel="mean absolute gradient", yscale="log")
    axes.set_title(record["title"], fontsize=10)
    return figure


def _plot_decay(record: Record) -> Figure:
    figure, axes = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
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
    axes.legend(frameon=False)
    return figure


PLOTS: dict[str, Callable[[Record], Figure]] = {
    "time": _plot_time,
    "error": _plot_error,
    "gradient": _plot_gradient,
    "decay": _plot_decay,
    "deep": _plot_deep,
    "budget": _plot_budget,
}


def write(result: Record, directory: Path) -> list[Path]:
    """Plots and ``report.md`` of the claims in ``result``; returns the paths."""
    written = []
    sections = [
        "# The paper's claims",
        f"`{result['command']}`, preset {result['preset']}, {result['seconds']:.0f} s, data: "
        f"{result['data']}",
        environment_line(result["environment"]),
    ]
    with plt.rc_context(STYLE):
        for name, record in result["claims"].items():
            figure = PLOTS[name](record)
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=130)
            plt.close(figure)
            written.append(path)
            sections += [f"## {record['title']}", TABLES[name](record), f"![{name}]({path.name})"]
    report = directory / "report.md"
    report.write_text("\n\n".join(sections) + "\n")
    return [report, *written]
