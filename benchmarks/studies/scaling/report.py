"""The report of the scaling study: every sentence with a figure takes it from the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.report.table import by_column, document, markdown, percent
from benchmarks.studies.scaling.simulation import SCHEDULES, SYNCS, Layers, rule_of_thumb

# What a step may cost above the ideal before another sampler is worth its law.
WORTH = 0.05
WHERE = {"step": "once a step (DDP)", "block": "once a block (every parameter sharded)"}
SAMPLER_TEXT = {
    "bernoulli": 'every sample by itself: `sampler="bernoulli"`, the default',
    "fixed": 'the rounded count, always: `sampler="fixed"`',
    "rounded": "a fixed count rounded up or down at random, alike on all ranks",
    "dealt": "Bernoulli's count of the batch of all ranks together, dealt in equal shares",
    "total": "every sample by itself, with a rank's kept samples of all branches fixed in sum",
}


def shown_ranks(ranks: Sequence[int]) -> list[int]:
    """Few enough for a table.

    >>> shown_ranks([1, 2, 4, 8, 16, 64, 256, 1024, 4096])
    [1, 8, 64, 1024, 4096]
    """
    wanted = [r for r in ranks if r in (1, 8, 64, 1024)]
    return [*wanted, ranks[-1]] if ranks[-1] not in wanted else wanted


def hardest(cases: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """The case of a batch whose ranks Bernoulli makes most unequal."""
    return max(
        (case for case in cases if case["batch"] == batch),
        key=lambda case: case["samplers"]["bernoulli"]["step"]["over_ideal"][-1],
    )


def first_above(case: dict[str, Any], sync: str, ranks: Sequence[int]) -> int | None:
    """The smallest number of ranks at which Bernoulli costs more than WORTH."""
    over = case["samplers"]["bernoulli"][sync]["over_ideal"]
    return next((r for r, value in zip(ranks, over, strict=True) if value > WORTH), None)


def saving_left(case: dict[str, Any], sync: str) -> float:
    """Of the seconds between naive masking and the ideal, the share that Bernoulli leaves on the
    most ranks."""
    slowest = case["samplers"]["bernoulli"][sync]["seconds"][-1]
    share: float = (case["naive_seconds"] - slowest) / (
        case["naive_seconds"] - case["ideal_seconds"]
    )
    return share


def batches_of(results: dict[str, Any]) -> list[int]:
    return sorted({case["batch"] for case in results["cases"]})


def measured_section(results: dict[str, Any]) -> list[str]:
    shape = results["shape"]

    def half(branch: dict[str, Any], name: str) -> str:
        return f"{1e3 * branch['at_half'][name]:.1f} ms"

    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "B": lambda branch: branch["batch"],
        "branch": lambda branch: branch["kind"],
        "a": lambda branch: f"{1e3 * branch['line']['fixed']:.2f} ms",
        "b": lambda branch: f"{1e3 * branch['line']['per_row']:.3f} ms",
        "largest residual": lambda branch: percent(
            max(abs(r) for r in branch["residuals"] if r is not None)
        ),
        "largest spread": lambda branch: percent(max(branch["spread"][1:])),
        "naive masking": lambda branch: half(branch, "naive"),
        "gather + index_add": lambda branch: half(branch, "index_add"),
        "sdkernels": lambda branch: half(branch, "fused"),
        "ours / dense": lambda branch: (
            f"{branch['at_half']['fused'] / branch['at_half']['dense']:.2f}"
        ),
        "saved a sample": lambda branch: f"{branch['saved_line']['per_row'] / 2**20:.2f} MiB",
    }
    measured = results["measured"]
    rest = ", ".join(
        f"{1e3 * (m['ends_seconds'] + m['optimizer_seconds']):.1f} ms at B = {batch}"
        for batch, m in measured.items()
    )
    return [
        "## Measured: a branch by number of kept samples",
        f"ViT, D = {shape['width']}, N = {shape['tokens']}, {shape['depth']} blocks of two "
        f"branches; forward + backward, fp32, inside training steps; {results['clock']}, one "
        "thread. The line a + b k is fitted to relative errors; the simulation uses the measured "
        "values themselves, with straight lines between them. The other columns are for half of "
        "the samples kept.",
        by_column([branch for each in measured.values() for branch in each["branches"]], columns),
        f"Outside the branches (stem, head, loss, AdamW): {rest}. Communication is not in it: "
        "where a step also waits for the network, every percentage below shrinks.",
    ]


def simulated_section(results: dict[str, Any]) -> list[str]:
    return [
        "## Simulated: what the slowest rank adds",
        "Expected time of a step on R ranks over the ideal, in which every branch of every rank "
        "keeps exactly `B (1 - p)` samples. Below zero, the rounded count keeps fewer than that, "
        "or the measured times bend. p is that of the last branch (linear) or of all (uniform). "
        "The JSON has every sampler in every case. Sharded ranks that fetch the next block's "
        "parameters ahead can be a block apart: they lie between the two tables.",
        "\n".join(f"- **{name}**: {text}." for name, text in SAMPLER_TEXT.items()),
        *(
            part
            for sync in SYNCS
            for part in (
                f"Ranks that wait for each other {WHERE[sync]}:",
                _over_ideal(results, sync),
            )
        ),
        _errors(results["cases"]),
    ]


def _over_ideal(results: dict[str, Any], sync: str) -> str:
    ranks, rows = results["ranks"], []
    shown = shown_ranks(ranks)
    for case in results["cases"]:
        # All samplers where it is hardest; elsewhere the others do as they do there.
        others = case is hardest(results["cases"], case["batch"])
        for sampler in case["samplers"] if others else ("bernoulli",):
            result = case["samplers"][sampler][sync]
            over = (percent(result["over_ideal"][ranks.index(r)]) for r in shown)
            speedup = case["naive_seconds"] / result["seconds"][-1]
            schedule = f"{case['schedule']} {case['p']:g}"
            rows.append([case["batch"], schedule, sampler, *over, f"{speedup:.2f}"])
    head = ["B", "p", "sampler", *(f"R = {r}" for r in shown), f"naive / this at {shown[-1]}"]
    return markdown(head, rows)


def _errors(cases: Sequence[dict[str, Any]]) -> str:
    """How far the simulation can be trusted."""
    error = max(
        max(result[sync]["errors"])
        for case in cases
        for result in case["samplers"].values()
        for sync in SYNCS
    )
    of_line, of_exact = [], []
    for result in (case["samplers"]["bernoulli"] for case in cases):
        three = (
            result["line_over_ideal"],
            result["exact_over_ideal"],
            result["step"]["over_ideal"],
        )
        for line, exact, simulated in zip(*three, strict=True):
            of_line.append(abs(line - simulated))
            of_exact.append(abs(exact - line))
    return (
        f"Standard error of the simulation: at most {percent(error, 2)} of a step. With the "
        "fitted lines in place of the measured values Bernoulli's figures move by at most "
        f"{percent(max(of_line), 2)} of a step; against the exact law of the largest, for those "
        f"lines, the simulation is off by at most {percent(max(of_exact), 2)}."
    )


def law_section(results: dict[str, Any]) -> list[str]:
    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "B": lambda law: law["batch"],
        "p of every branch": lambda law: f"{law['p']:g}",
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
        "Variances as shares of Bernoulli's, from drawn counts. Every sampler but "
        "`dealt` and `total` decides for the branches of one sample independently, so that for one "
        "sample `rounded` is Bernoulli's law itself: only samples of one batch are coupled.",
        by_column(results["laws"], columns),
    ]


def memory_section(results: dict[str, Any]) -> list[str]:
    ranks, rows = results["ranks"], []
    shown = shown_ranks(ranks)
    for batch in batches_of(results):
        case = hardest(results["cases"], batch)
        result = case["samplers"]["bernoulli"]
        for label, key in (("a step", "memory_over_ideal"), ("a run", "run_memory_over_ideal")):
            over = (percent(result[key][ranks.index(r)]) for r in shown)
            rows.append([batch, f"{case['schedule']} {case['p']:g}", label, *over])
    return [
        "## Memory",
        "Saved activations of the fullest rank over those of the mean rank, under Bernoulli: "
        f"expected in a step (simulated), and the largest of a run of {results['run_steps']:,} "
        "steps (exact), for which the memory has to be there. Under `fixed` and `total` every step "
        "needs the same on every rank; under `rounded` and `dealt` a step needs at most one sample "
        "a branch more than the mean.",
        markdown(["B", "p", "largest of", *(f"R = {r}" for r in shown)], rows),
    ]


def validation_section(results: dict[str, Any]) -> list[str]:
    outcomes = results["validation"]
    case = outcomes[0]["case"]
    shape = case["shape"]
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
    furthest = max(
        abs(excess["counts_and_noise"] - excess["measured"])
        for _, sampler, _, excess in found
        if sampler == "bernoulli"
    )
    columns: dict[str, Callable[[Any], object]] = {
        "ranks": lambda row: row[0],
        "sampler": lambda row: row[1],
        "ranks wait": lambda row: WHERE[row[2]].partition(" (")[0],
        "measured (90 % interval)": lambda row: (
            f"{percent(row[3]['measured'])} "
            f"({' to '.join(percent(bound) for bound in row[3]['interval'])})"
        ),
        "simulated, counts alone": lambda row: percent(row[3]["counts"]),
        "simulated, counts and machine noise": lambda row: percent(row[3]["counts_and_noise"]),
    }
    correlations = ", ".join(
        f"{each['correlation']:.2f} on {outcome['ranks']} ranks"
        for outcome in outcomes
        for each in outcome["samplers"].values()
        if each["correlation"] is not None
    )
    slower = ", ".join(
        f"{o['samplers']['fixed']['mean_seconds'] / o['samplers']['fixed']['alone_seconds']:.2f} "
        f"times on {o['ranks']}"
        for o in outcomes
    )
    walls = ", ".join(
        f"{o['ranks']} ranks {1e3 * o['samplers']['bernoulli']['wall_seconds']:.0f} and "
        f"{1e3 * o['samplers']['fixed']['wall_seconds']:.0f} ms"
        for o in outcomes
    )
    return [
        "## Held against real processes",
        f"DDP over gloo, ViT with D = {shape['width']}, N = {shape['tokens']}, {shape['depth']} "
        f"blocks, B = {case['batch']} a rank, p = {case['p']:g}, {case['steps']} steps of each "
        "sampler in turn. The slowest rank's time over the mean rank's, in CPU time of each rank's "
        "thread: that clock stands still while a rank waits, so that more ranks than cores can be "
        "compared, and what the network does is left out. `once a block` sums up the slowest rank "
        "of every block, forward and backward apart, of the same steps. The seconds by kept "
        "samples are those of one process alone; the machine's noise is taken from the steps with "
        "the fixed count.",
        by_column(found, columns),
        f"Simulated and measured differ by at most {percent(furthest)} of a step under Bernoulli; "
        f"{inside} of all {len(found)} simulated figures lie in the interval of the measured one. "
        "Correlation of the simulated and the measured time of a rank's step under Bernoulli, both "
        f"less the mean of the step's ranks: {correlations}. "
        f"Beside each other, ranks are slower than one alone: {slower}. Wall time of a step, "
        f"Bernoulli and fixed, waiting for cores and for gloo included: {walls}.",
    ]


def conclusions(results: dict[str, Any]) -> list[str]:
    """What to use when, from this run's figures."""
    ranks, cases = results["ranks"], results["cases"]
    rows = []
    for batch in batches_of(results):
        case = hardest(cases, batch)
        layers = Layers(batch, tuple(SCHEDULES[case["schedule"]](case["branches"], case["p"])))
        thumb = {"step": percent(rule_of_thumb(layers, ranks[-1])), "block": "-"}
        for sync in SYNCS:
            first = first_above(case, sync, ranks)
            since = f"from {first} ranks on" if first else "never here"
            over = percent(case["samplers"]["bernoulli"][sync]["over_ideal"][-1])
            schedule = f"{case['schedule']} {case['p']:g}"
            rows.append([batch, schedule, WHERE[sync], since, over, thumb[sync]])
    head = ["B a rank", "hardest p", "ranks wait", f"Bernoulli costs over {percent(WORTH, 0)}"]

    def worst(sampler: str, sync: str, ranks: slice) -> float:
        return max(max(c["samplers"][sampler][sync]["over_ideal"][ranks]) for c in cases)

    every, last, several = slice(None), slice(-1, None), slice(1, None)
    left = {}
    for sync in SYNCS:
        shares = [saving_left(case, sync) for case in cases if case["p"] > 0]
        left[sync] = f"{percent(min(shares), 0)} to {percent(max(shares), 0)}"
    rounded = max(worst("rounded", sync, last) for sync in SYNCS)
    points = [
        "1. **One process, or ranks that meet once a step with few ranks or large batches** (the "
        "table says from where on it costs more than that): Bernoulli, the default. It is the law "
        "that others train with.",
        "2. **Many ranks and small batches, or ranks that meet in every block** (parameters "
        "sharded): a count that is the same on all ranks. `fixed` where `B (1 - p)` is near a "
        "whole number, or for static shapes; `rounded` where it is not: it keeps every sample "
        f"with exactly 1 - p and costs at most {percent(rounded)} over the ideal in all of these "
        "cases, whatever the number of ranks.",
        "3. **Counts that have to vary as Bernoulli's do**, branch by branch: `total`, at most "
        f"{percent(worst('total', 'step', every))} over the ideal with one meeting a step; not "
        f"where ranks meet in every block ({percent(worst('total', 'block', last))} at {ranks[-1]} "
        "ranks). `dealt` draws Bernoulli's count of the whole batch and costs at most "
        f"{percent(worst('dealt', 'step', several))} and "
        f"{percent(worst('dealt', 'block', several))} from two ranks on; `rounded` is simpler and "
        "no worse.",
        "4. **What is left of the saving** over naive masking, which costs the same on every rank: "
        f"under Bernoulli at {ranks[-1]} ranks {left['step']} where they meet once a step, "
        f"{left['block']} where they meet once a block; least for small batches and small p, where "
        "some rank keeps all of its samples, and where the whole saving is a few per cent of a "
        "step, not far above this measurement's noise. `fixed` and `rounded` leave all of it.",
    ]
    return [
        "## What to use when",
        markdown([*head, f"at {ranks[-1]} ranks", "rule of thumb"], rows),
        "Rule of thumb for ranks that meet once a step, outside of which nothing is counted: "
        "`sqrt(2 ln R) * sqrt(B sum p (1 - p)) / (B sum (1 - p))`, from above.",
        "\n".join(points),
    ]


def report(results: dict[str, Any]) -> str:
    """Markdown."""
    command = f"python -m benchmarks scaling --preset {results['preset']}"
    parts = (
        *(conclusions, simulated_section, law_section),
        *(memory_section, measured_section, validation_section),
    )
    sections = [section for part in parts for section in part(results)]
    return document("The slowest rank", {"command": command, **results}, sections)
