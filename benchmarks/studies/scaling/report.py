"""What follows from the measured branches: tables, and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report.plots import style
from benchmarks.report.table import document, markdown, percent, ratio
from benchmarks.studies.scaling import law
from benchmarks.studies.scaling.law import KINDS, SAMPLERS, SYNCS, Floats, Layers
from sdkernels import linear_decay, uniform

RANKS = (1, 2, 8, 64, 1024, 4096)
SCHEDULES = {"linear": linear_decay, "uniform": uniform}
PROBABILITIES = (0.1, 0.3, 0.5)  # of the last branch if linear, of every branch if uniform
HARDEST = "uniform 0.5"  # where Bernoulli makes ranks most unequal
RUN_STEPS = 100_000  # of a training run, for the memory that has to be there all along
WHERE = {"step": "once a step (DDP)", "block": "once a block (every parameter sharded)"}
# The markers tell curves apart that lie on each other.
LOOKS = {
    "bernoulli": (style.RED, "o"),
    "balanced": (style.ORANGE, "v"),
    "rounded": (style.BLUE, "D"),
    "fixed": (style.GREY, "x"),
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
                waited = np.array(law.expected(sampler, layers, costs.seconds, RANKS, sync))
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
        rows = []
        for case, sampler in product(cases, SAMPLERS):
            if (key := (sampler, sync)) in case.over_ideal:
                figures = [*map(percent, case.over_ideal[key]), ratio(case.speedup[key], 2)]
                rows.append([case.layers.batch, case.name, sampler, *figures])
        sections += [f"Ranks that wait for each other {WHERE[sync]}:", markdown(head, rows)]
    return sections


def law_section(results: dict[str, Any]) -> list[str]:
    rows = []
    for batch, sampler in product(map(int, results["measured"]), SAMPLERS[1:]):
        layers = Layers(batch, tuple(uniform(KINDS * results["shape"]["depth"], 0.3)))
        left = law.summarise(law.draw(sampler, layers, 100, 16), layers)
        error = percent(left["keep_error"]) if sampler == "fixed" else "exact"
        shares = [percent(left[key], 0) for key in ("count_variance", "total_variance")]
        rows.append([batch, sampler, error, *shares, f"{left['row_correlation']:.3f}"])
    variances = ["variance of a branch's count", "of a rank's total"]
    head = ["B", "sampler", "error of keep", *variances, "correlation of two samples"]
    return [
        "## What is left of Bernoulli's law",
        "At p = 0.3 in every branch, variances as shares of Bernoulli's, from drawn counts. Every "
        "sampler but `balanced` decides for the branches of one sample independently, so that for "
        "one sample `rounded` is Bernoulli's law itself: only samples of one batch are coupled.",
        markdown(head, rows),
    ]


def memory_section(cases: list[Case]) -> list[str]:
    rows = []
    for case in (case for case in cases if case.name == HARDEST):
        for label, steps in (("a step", 1), ("a run", RUN_STEPS)):
            draws = [steps * r for r in RANKS]
            most = np.array(law.bernoulli(case.layers, case.costs.saved, draws, "step"))
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
    shape, measured, rows = results["shape"], results["measured"], []
    for branch in (branch for each in measured.values() for branch in each["branches"]):
        batch = branch["batch"]
        seconds = dict(zip(branch["counts"], branch["seconds"], strict=True))
        times = [branch["at_half"]["naive"], *(seconds[k] for k in (0, batch // 2, batch))]
        shown = [f"{1e3 * each:.1f} ms" for each in times]
        spread, saved = max(branch["spread"][1:]), branch["saved_bytes"][-1] / batch / 2**20
        rows.append([batch, branch["kind"], *shown, percent(spread), f"{saved:.2f} MiB"])
    kept = [f"{name} kept" for name in ("none", "half", "all")]
    head = ["B", "branch", "half kept, naive masking", *kept, "largest spread", "saved a sample"]
    rest = ", ".join(f"{1e3 * Costs(each).rest:.1f} ms at B = {b}" for b, each in measured.items())
    return [
        "## Measured: a branch by number of kept samples",
        f"ViT, D = {shape['width']}, N = {shape['tokens']}, {shape['depth']} blocks of two "
        "branches; forward + backward, fp32, inside training steps; one thread, its CPU time (on "
        "a GPU wall time, synchronised). The JSON has more numbers of kept samples.",
        markdown(head, rows),
        f"Outside the branches (stem, head, loss, AdamW): {rest}. Communication is not in it: "
        "where a step also waits for the network, every percentage above shrinks.",
    ]


def processes_section(results: dict[str, Any]) -> list[str]:
    outcomes = results["validation"]
    case = outcomes[0]["case"]
    rows, furthest, inside = [], 0.0, 0
    for outcome, sync in product(outcomes, SYNCS):
        for sampler, each in outcome["samplers"].items():
            excess = each["excess"][sync]
            measured, expected = excess["measured"], excess["counts_and_noise"]
            low, high = excess["interval"]
            inside += low <= expected <= high
            if sampler == "bernoulli":
                furthest = max(furthest, abs(expected - measured))
            shown = f"{percent(measured)} ({percent(low)} to {percent(high)})"
            told = [percent(excess["counts"]), percent(expected)]
            name = {"total": "balanced"}.get(sampler, sampler)  # as runs of old called it
            rows.append([outcome["ranks"], f"once a {sync}", name, shown, *told])
    counts = [f"expected, counts {other}" for other in ("alone", "and machine noise")]
    head = ["ranks", "they wait", "sampler", "measured (90 % interval)", *counts]
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
        markdown(head, rows),
        f"Expected and measured differ by at most {percent(furthest)} of a step under Bernoulli; "
        f"{inside} of all {len(rows)} expected figures lie in the interval of the measured one. "
        "Correlation of the expected and the measured time of a rank's step under Bernoulli, both "
        f"less the mean of the step's ranks: {correlations}.",
    ]


def plot_ranks(cases: list[Case]) -> Figure:
    """Step time over the ideal by number of ranks: a column a batch, a row a way to wait."""
    hardest = [case for case in cases if case.name == HARDEST]
    width = 3.6 + 2 / len(hardest)
    figure, grid = style.panels(len(SYNCS), len(hardest), width, 3.7, sharex=True, sharey="row")
    for line, sync in zip(grid, SYNCS, strict=True):
        for axes, case in zip(line, hardest, strict=True):
            for sampler, (colour, marker) in LOOKS.items():
                look = {"color": colour, "marker": marker, "markerfacecolor": "none"}
                axes.plot(RANKS, 1 + case.over_ideal[sampler, sync], label=sampler, **look)
            style.ideal_line(axes, 1, "ideal")
            style.log_axis(axes, RANKS, xlabel="data-parallel ranks")
            axes.set_title(f"B = {case.layers.batch} a rank, {HARDEST}")
        line[0].set_ylabel(f"step time / ideal\n(ranks wait once a {sync})")
    style.legend(figure, 5)
    return figure


def write(results: dict[str, Any], directory: Path) -> str:
    """``scaling.md``, which is returned, and its plot."""
    cases = work_out(results)
    sections = [*steps_section(cases), *law_section(results), *memory_section(cases)]
    sections += [*measured_section(results), *processes_section(results)]
    (plot,) = style.save({"ranks": lambda: plot_ranks(cases)}, directory)
    page = document("The slowest rank", results, [*sections, f"![ranks]({plot.name})"])
    (directory / "scaling.md").write_text(page)
    return page
