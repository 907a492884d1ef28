"""What follows from the measured branches: tables, and a plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report.plots.style import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    ideal_line,
    legend,
    log_axis,
    panels,
    save,
)
from benchmarks.report.table import by_column, document, markdown, percent, ratio
from benchmarks.studies.scaling.law import (
    KINDS,
    SAMPLERS,
    SYNCS,
    Floats,
    Layers,
    bernoulli,
    draw,
    expected,
    summarise,
)
from sdkernels import linear_decay, uniform

RANKS = (1, 2, 8, 64, 1024, 4096)
SCHEDULES = {"linear": linear_decay, "uniform": uniform}
PROBABILITIES = (0.1, 0.3, 0.5)  # of the last branch if linear, of every branch if uniform
HARDEST = "uniform 0.5"  # where Bernoulli makes ranks most unequal
RUN_STEPS = 100_000  # of a training run, for the memory that has to be there all along
WHERE = {"step": "once a step (DDP)", "block": "once a block (every parameter sharded)"}
# The markers tell curves apart that lie on each other.
LOOKS = {
    "bernoulli": (RED, "o"),
    "balanced": (ORANGE, "v"),
    "rounded": (BLUE, "D"),
    "fixed": (GREY, "x"),
}


class Costs:
    """What was measured of a rank's step with a batch of some size.

    Attributes:
        seconds, saved: [kinds, B + 1], seconds and saved bytes of a branch by kept rows: the
            measured values, with straight lines between them.
        rest: seconds outside the branches.
        naive: seconds of a block under naive masking.
    """

    def __init__(self, measured: dict[str, Any]) -> None:
        branches = measured["branches"]
        rows = np.arange(branches[0]["batch"] + 1)

        def table(key: str) -> Floats:
            return np.array([np.interp(rows, each["counts"], each[key]) for each in branches])

        self.seconds, self.saved = table("seconds"), table("saved_bytes")
        self.rest = measured["ends_seconds"] + measured["optimizer_seconds"]
        self.naive = sum(each["at_half"]["naive"] for each in branches)


@dataclass
class Case:
    """A batch, a schedule and a drop probability."""

    layers: Layers
    name: str
    costs: Costs
    over_ideal: dict[tuple[str, str], Floats]  # by sampler and sync, for every number of ranks
    speedup: dict[tuple[str, str], float]  # over naive masking, on the most ranks


def work_out(results: dict[str, Any]) -> list[Case]:
    """All samplers where ranks are most unequal; elsewhere the others do as they do there."""
    cases, branches = [], KINDS * results["shape"]["depth"]
    for batch, measured in results["measured"].items():
        costs = Costs(measured)
        naive = costs.rest + costs.naive * results["shape"]["depth"]
        for schedule, p in product(SCHEDULES, PROBABILITIES):
            layers = Layers(int(batch), tuple(SCHEDULES[schedule](branches, p)))
            case = Case(layers, f"{schedule} {p:g}", costs, {}, {})
            ideal = costs.rest + layers.ideal(costs.seconds)
            samplers = SAMPLERS if case.name == HARDEST else SAMPLERS[:1]
            for sampler, sync in product(samplers, SYNCS):
                waited = np.array(expected(sampler, layers, costs.seconds, RANKS, sync))
                case.over_ideal[sampler, sync] = (costs.rest + waited) / ideal - 1
                case.speedup[sampler, sync] = naive / (costs.rest + waited[-1])
            cases.append(case)
    return cases


def steps_section(cases: list[Case]) -> list[str]:
    head = ["B", "p", "sampler", *(f"R = {r}" for r in RANKS), f"naive / this at {RANKS[-1]}"]
    sections = [
        "Expected time of a step on R ranks over the ideal, in which every branch of every rank "
        "keeps exactly `B (1 - p)` samples. Below zero, the rounded count keeps fewer than that, "
        "or the measured times bend. p is that of the last branch (linear) or of all (uniform). "
        "Sharded ranks that fetch the next block's parameters ahead can be a block apart: they lie "
        "between the two tables.",
    ]
    for sync in SYNCS:
        rows = [
            [
                c.layers.batch,
                c.name,
                sampler,
                *map(percent, over),
                ratio(c.speedup[sampler, own], 2),
            ]
            for c in cases
            for (sampler, own), over in c.over_ideal.items()
            if own == sync
        ]
        sections += [f"Ranks that wait for each other {WHERE[sync]}:", markdown(head, rows)]
    return sections


def law_section(results: dict[str, Any]) -> list[str]:
    found = []
    for batch in map(int, results["measured"]):
        layers = Layers(batch, tuple(uniform(KINDS * results["shape"]["depth"], 0.3)))
        found += [
            {"batch": batch, "sampler": name, **summarise(draw(name, layers, 100, 16), layers)}
            for name in SAMPLERS[1:]
        ]
    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "B": lambda law: law["batch"],
        "sampler": lambda law: law["sampler"],
        "error of keep": lambda law: (
            percent(law["keep_error"]) if law["sampler"] == "fixed" else "exact"
        ),
        "variance of a branch's count": lambda law: percent(law["count_variance"], 0),
        "of a rank's total": lambda law: percent(law["total_variance"], 0),
        "correlation of two samples": lambda law: f"{law['row_correlation'] + 0.0:.3f}",
    }
    return [
        "## What is left of Bernoulli's law",
        "At p = 0.3 in every branch, variances as shares of Bernoulli's, from drawn counts. Every "
        "sampler but `balanced` decides for the branches of one sample independently, so that for "
        "one sample `rounded` is Bernoulli's law itself: only samples of one batch are coupled.",
        by_column(found, columns),
    ]


def memory_section(cases: list[Case]) -> list[str]:
    rows = []
    for case in (case for case in cases if case.name == HARDEST):
        for label, steps in (("a step", 1), ("a run", RUN_STEPS)):
            draws = [steps * r for r in RANKS]
            most = np.array(bernoulli(case.layers, case.costs.saved, draws, "step"))
            over = most / case.layers.ideal(case.costs.saved) - 1
            rows.append([case.layers.batch, label, *map(percent, over)])
    return [
        "## Memory",
        "Saved activations of the fullest rank over those of the mean rank, under Bernoulli "
        f"({HARDEST}): of a step, and of a run of {RUN_STEPS:,} steps, for which the memory has "
        "to be there. Under `fixed` and `balanced` every step needs the same "
        "on every rank; under `rounded` at most one sample a branch more than the mean.",
        markdown(["B", "largest of", *(f"R = {r}" for r in RANKS)], rows),
    ]


def measured_section(results: dict[str, Any]) -> list[str]:
    shape, measured = results["shape"], results["measured"]

    def at(share: float) -> Callable[[dict[str, Any]], object]:
        def cell(branch: dict[str, Any]) -> str:
            place = branch["counts"].index(int(share * branch["batch"]))
            return f"{1e3 * branch['seconds'][place]:.1f} ms"

        return cell

    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "B": lambda branch: branch["batch"],
        "branch": lambda branch: branch["kind"],
        "half kept, naive masking": lambda branch: f"{1e3 * branch['at_half']['naive']:.1f} ms",
        **{f"{name} kept": at(s) for name, s in (("none", 0), ("half", 0.5), ("all", 1))},
        "largest spread": lambda branch: percent(max(branch["spread"][1:])),
        "saved a sample": lambda branch: (
            f"{branch['saved_bytes'][-1] / branch['batch'] / 2**20:.2f} MiB"
        ),
    }
    rest = ", ".join(f"{1e3 * Costs(each).rest:.1f} ms at B = {b}" for b, each in measured.items())
    return [
        "## Measured: a branch by number of kept samples",
        f"ViT, D = {shape['width']}, N = {shape['tokens']}, {shape['depth']} blocks of two "
        "branches; forward + backward, fp32, inside training steps; one thread, its CPU time (on "
        "a GPU wall time, synchronised). The JSON has more numbers of kept samples.",
        by_column([branch for each in measured.values() for branch in each["branches"]], columns),
        f"Outside the branches (stem, head, loss, AdamW): {rest}. Communication is not in it: "
        "where a step also waits for the network, every percentage above shrinks.",
    ]


def processes_section(results: dict[str, Any]) -> list[str]:
    outcomes = results["validation"]
    case = outcomes[0]["case"]
    found = [
        (outcome["ranks"], sampler, sync, each["excess"][sync])
        for outcome in outcomes
        for sampler, each in outcome["samplers"].items()
        for sync in SYNCS
    ]
    inside = sum(
        excess["interval"][0] <= excess["counts_and_noise"] <= excess["interval"][1]
        for *_, excess in found
    )
    columns: dict[str, Callable[[Any], object]] = {
        "ranks": lambda row: row[0],
        "sampler": lambda row: row[1],
        "ranks wait": lambda row: f"once a {row[2]}",
        "measured (90 % interval)": lambda row: (
            f"{percent(row[3]['measured'])} "
            f"({' to '.join(percent(bound) for bound in row[3]['interval'])})"
        ),
        "expected, counts alone": lambda row: percent(row[3]["counts"]),
        "expected, counts and machine noise": lambda row: percent(row[3]["counts_and_noise"]),
    }
    furthest = max(
        abs(excess["counts_and_noise"] - excess["measured"])
        for _, sampler, _, excess in found
        if sampler == "bernoulli"
    )
    correlations = ", ".join(
        f"{outcome['samplers']['bernoulli']['correlation']:.2f} on {outcome['ranks']} ranks"
        for outcome in outcomes
    )
    return [
        "## Held against real processes",
        f"DDP over gloo, ViT with D = {case['shape']['width']}, N = {case['shape']['tokens']}, "
        f"{case['shape']['depth']} blocks, B = {case['batch']} a rank, p = {case['p']:g}, "
        f"{case['steps']} steps of each sampler in turn. The slowest rank's time over the mean "
        "rank's, in CPU time of each rank's thread: that clock stands still while a rank waits, so "
        "that more ranks than cores can be compared, and what the network does is left out. `once "
        "a block` sums up the slowest rank of every block, forward and backward apart, of the same "
        "steps. The seconds by kept samples are those of one process alone; the machine's noise is "
        "taken from the steps with the fixed count.",
        by_column(found, columns),
        f"Expected and measured differ by at most {percent(furthest)} of a step under Bernoulli; "
        f"{inside} of all {len(found)} expected figures lie in the interval of the measured one. "
        "Correlation of the expected and the measured time of a rank's step under Bernoulli, both "
        f"less the mean of the step's ranks: {correlations}.",
    ]


def plot_ranks(cases: list[Case]) -> Figure:
    """Step time over the ideal by number of ranks: a column a batch, a row a way to wait."""
    hardest = [case for case in cases if case.name == HARDEST]
    width = 3.6 + 2 / len(hardest)
    figure, grid = panels(len(SYNCS), len(hardest), width, 3.7, sharex=True, sharey="row")
    for line, sync in zip(grid, SYNCS, strict=True):
        for axes, case in zip(line, hardest, strict=True):
            for sampler, (colour, marker) in LOOKS.items():
                look = {"color": colour, "marker": marker, "markerfacecolor": "none"}
                axes.plot(RANKS, 1 + case.over_ideal[sampler, sync], label=sampler, **look)
            ideal_line(axes, 1, "ideal")
            log_axis(axes, RANKS, xlabel="data-parallel ranks")
            axes.set_title(f"B = {case.layers.batch} a rank, {HARDEST}")
        line[0].set_ylabel(f"step time / ideal\n(ranks wait once a {sync})")
    legend(figure, 5)
    return figure


def write(results: dict[str, Any], directory: Path) -> str:
    """``scaling.md``, which is returned, and its plot."""
    cases = work_out(results)
    sections = [*steps_section(cases), *law_section(results), *memory_section(cases)]
    sections += [*measured_section(results), *processes_section(results)]
    (plot,) = save({"ranks": lambda: plot_ranks(cases)}, directory)
    page = document("The slowest rank", results, [*sections, f"![ranks]({plot.name})"])
    (directory / "scaling.md").write_text(page)
    return page
