"""The report of the scaling study: every sentence with a figure takes it from the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.measure.environment import environment_line
from benchmarks.report.table import markdown, percent
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


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [*markdown(head, rows).splitlines(), ""]


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
    lines = [
        "## Measured: a branch by number of kept samples",
        "",
        f"ViT, D = {shape['width']}, N = {shape['tokens']}, {shape['depth']} blocks of two "
        f"branches; forward + backward, fp32, inside training steps; {results['clock']}, one "
        "thread. The line a + b k is fitted to relative errors; the simulation uses the measured "
        "values themselves, with straight lines between them. The other columns are for half of "
        "the samples kept.",
        "",
    ]
    rows = []
    for batch, measured in results["measured"].items():
        for branch in measured["branches"]:
            line, half = branch["line"], branch["at_half"]
            worst = max(abs(r) for r in branch["residuals"] if r is not None)
            rows.append(
                [
                    batch,
                    branch["kind"],
                    f"{1e3 * line['fixed']:.2f} ms",
                    f"{1e3 * line['per_row']:.3f} ms",
                    percent(worst),
                    percent(max(branch["spread"][1:])),
                    *(f"{1e3 * half[name]:.1f} ms" for name in ("naive", "index_add", "fused")),
                    f"{half['fused'] / half['dense']:.2f}",
                    f"{branch['saved_line']['per_row'] / 2**20:.2f} MiB",
                ]
            )
    head = ["B", "branch", "a", "b", "largest residual", "largest spread"]
    head += ["naive masking", "gather + index_add", "sdkernels", "ours / dense", "saved a sample"]
    lines += table(head, rows)
    rest = ", ".join(
        f"{1e3 * (m['ends_seconds'] + m['optimizer_seconds']):.1f} ms at B = {batch}"
        for batch, m in results["measured"].items()
    )
    lines += [
        f"Outside the branches (stem, head, loss, AdamW): {rest}. Communication is not in it: "
        "where a step also waits for the network, every percentage below shrinks.",
        "",
    ]
    return lines


def simulated_section(results: dict[str, Any]) -> list[str]:
    ranks = results["ranks"]
    shown = shown_ranks(ranks)
    at = [ranks.index(r) for r in shown]
    lines = [
        "## Simulated: what the slowest rank adds",
        "",
        "Expected time of a step on R ranks over the ideal, in which every branch of every rank "
        "keeps exactly `B (1 - p)` samples. Below zero, the rounded count keeps fewer than that, "
        "or the measured times bend. p is that of the last branch (linear) or of all (uniform). "
        "The JSON has every sampler in every case. Sharded ranks that fetch the next block's "
        "parameters ahead can be a block apart: they lie between the two tables.",
        "",
        *(f"- **{name}**: {text}." for name, text in SAMPLER_TEXT.items()),
        "",
    ]
    for sync in SYNCS:
        lines += [f"Ranks that wait for each other {WHERE[sync]}:", ""]
        rows = []
        for case in results["cases"]:
            # All samplers where it is hardest; elsewhere the others do as they do there.
            others = case is hardest(results["cases"], case["batch"])
            for sampler in case["samplers"] if others else ("bernoulli",):
                result = case["samplers"][sampler][sync]
                over = (percent(result["over_ideal"][i]) for i in at)
                speedup = case["naive_seconds"] / result["seconds"][-1]
                schedule = f"{case['schedule']} {case['p']:g}"
                rows.append([case["batch"], schedule, sampler, *over, f"{speedup:.2f}"])
        head = ["B", "p", "sampler", *(f"R = {r}" for r in shown)]
        lines += table([*head, f"naive / this at {shown[-1]}"], rows)
    errors = [
        max(result[sync]["errors"])
        for case in results["cases"]
        for result in case["samplers"].values()
        for sync in SYNCS
    ]
    of_line, of_exact = [], []
    for case in results["cases"]:
        result = case["samplers"]["bernoulli"]
        three = zip(
            result["line_over_ideal"],
            result["exact_over_ideal"],
            result["step"]["over_ideal"],
            strict=True,
        )
        for line, exact, simulated in three:
            of_line.append(abs(line - simulated))
            of_exact.append(abs(exact - line))
    lines += [
        f"Standard error of the simulation: at most {percent(max(errors), 2)} of a step. With the "
        "fitted lines in place of the measured values Bernoulli's figures move by at most "
        f"{percent(max(of_line), 2)} of a step; against the exact law of the largest, for those "
        f"lines, the simulation is off by at most {percent(max(of_exact), 2)}.",
        "",
    ]
    return lines


def law_section(results: dict[str, Any]) -> list[str]:
    rows = [
        [
            law["batch"],
            f"{law['p']:g}",
            law["sampler"],
            percent(law["keep_error"]) if law["sampler"] == "fixed" else "exact",
            percent(law["count_variance"], 0),
            percent(law["total_variance"], 0),
            f"{law['row_correlation'] + 0.0:.3f}",
        ]
        for law in results["laws"]
    ]
    head = ["B", "p of every branch", "sampler", "error of keep"]
    head += ["variance of a branch's count", "of a rank's total", "correlation of two samples"]
    return [
        "## What is left of Bernoulli's law",
        "",
        "Variances as shares of Bernoulli's, from drawn counts. Every sampler but "
        "`dealt` and `total` decides for the branches of one sample independently, so that for one "
        "sample `rounded` is Bernoulli's law itself: only samples of one batch are coupled.",
        "",
        *table(head, rows),
    ]


def memory_section(results: dict[str, Any]) -> list[str]:
    ranks, rows = results["ranks"], []
    shown = shown_ranks(ranks)
    for batch in batches_of(results):
        case = hardest(results["cases"], batch)
        result = case["samplers"]["bernoulli"]
        name = [batch, f"{case['schedule']} {case['p']:g}"]
        for label, key in (("a step", "memory_over_ideal"), ("a run", "run_memory_over_ideal")):
            rows.append([*name, label, *(percent(result[key][ranks.index(r)]) for r in shown)])
    steps = f"{results['run_steps']:,}"
    return [
        "## Memory",
        "",
        "Saved activations of the fullest rank over those of the mean rank, under Bernoulli: "
        f"expected in a step (simulated), and the largest of a run of {steps} steps (exact), for "
        "which the memory has to be there. Under `fixed` and `total` every step needs the same on "
        "every rank; under `rounded` and `dealt` a step needs at most one sample a branch more "
        "than the mean.",
        "",
        *table(["B", "p", "largest of", *(f"R = {r}" for r in shown)], rows),
    ]


def validation_section(results: dict[str, Any]) -> list[str]:
    case = results["validation"][0]["case"]
    shape = case["shape"]
    rows, correlations = [], []
    inside = total = 0
    furthest = 0.0
    for outcome in results["validation"]:
        for sampler, found in outcome["samplers"].items():
            if found["correlation"] is not None:
                correlations.append(f"{found['correlation']:.2f} on {outcome['ranks']} ranks")
            for sync in SYNCS:
                excess = found["excess"][sync]
                low, high = excess["interval"]
                total += 1
                inside += low <= excess["counts_and_noise"] <= high
                if sampler == "bernoulli":
                    apart = abs(excess["counts_and_noise"] - excess["measured"])
                    furthest = max(furthest, apart)
                rows.append(
                    [
                        outcome["ranks"],
                        sampler,
                        WHERE[sync].partition(" (")[0],
                        f"{percent(excess['measured'])} ({percent(low)} to {percent(high)})",
                        percent(excess["counts"]),
                        percent(excess["counts_and_noise"]),
                    ]
                )
    slower = ", ".join(
        f"{o['samplers']['fixed']['mean_seconds'] / o['samplers']['fixed']['alone_seconds']:.2f} "
        f"times on {o['ranks']}"
        for o in results["validation"]
    )
    walls = ", ".join(
        f"{o['ranks']} ranks {1e3 * o['samplers']['bernoulli']['wall_seconds']:.0f} and "
        f"{1e3 * o['samplers']['fixed']['wall_seconds']:.0f} ms"
        for o in results["validation"]
    )
    head = ["ranks", "sampler", "ranks wait", "measured (90 % interval)"]
    head += ["simulated, counts alone", "simulated, counts and machine noise"]
    return [
        "## Held against real processes",
        "",
        f"DDP over gloo, ViT with D = {shape['width']}, N = {shape['tokens']}, {shape['depth']} "
        f"blocks, B = {case['batch']} a rank, p = {case['p']:g}, {case['steps']} steps of each "
        "sampler in turn. The slowest rank's time over the mean rank's, in CPU time of each rank's "
        "thread: that clock stands still while a rank waits, so that more ranks than cores can be "
        "compared, and what the network does is left out. `once a block` sums up the slowest rank "
        "of every block, forward and backward apart, of the same steps. The seconds by kept "
        "samples are those of one process alone; the machine's noise is taken from the steps with "
        "the fixed count.",
        "",
        *table(head, rows),
        f"Simulated and measured differ by at most {percent(furthest)} of a step under Bernoulli; "
        f"{inside} of all {total} simulated figures lie in the interval of the measured one. "
        "Correlation of the simulated and the measured time of a rank's step under Bernoulli, both "
        "less the mean of the step's ranks: "
        f"{', '.join(correlations)}. "
        f"Beside each other, ranks are slower than one alone: {slower}. Wall time of a step, "
        f"Bernoulli and fixed, waiting for cores and for gloo included: {walls}.",
        "",
    ]


def conclusions(results: dict[str, Any]) -> list[str]:
    """What to use when, from this run's figures."""
    ranks, cases = results["ranks"], results["cases"]
    lines = ["## What to use when", ""]
    rows = []
    for batch in batches_of(results):
        case = hardest(cases, batch)
        name = [batch, f"{case['schedule']} {case['p']:g}"]
        for sync in SYNCS:
            over = case["samplers"]["bernoulli"][sync]["over_ideal"]
            first = first_above(case, sync, ranks)
            layers = Layers(batch, tuple(SCHEDULES[case["schedule"]](case["branches"], case["p"])))
            rows.append(
                [
                    *name,
                    WHERE[sync],
                    f"from {first} ranks on" if first else "never here",
                    percent(over[-1]),
                    percent(rule_of_thumb(layers, ranks[-1])) if sync == "step" else "-",
                ]
            )
    head = ["B a rank", "hardest p", "ranks wait", f"Bernoulli costs over {percent(WORTH, 0)}"]
    lines += table([*head, f"at {ranks[-1]} ranks", "rule of thumb"], rows)
    balanced = max(
        result[sync]["over_ideal"][-1]
        for case in cases
        for sampler, result in case["samplers"].items()
        if sampler == "rounded"
        for sync in SYNCS
    )
    total = [case["samplers"]["total"] for case in cases]
    slowest_total = max(max(r["step"]["over_ideal"]) for r in total)
    blocks_total = max(r["block"]["over_ideal"][-1] for r in total)
    dealt = [case["samplers"]["dealt"] for case in cases]
    left = {}
    for sync in SYNCS:
        shares = [saving_left(case, sync) for case in cases if case["p"] > 0]
        left[sync] = f"{percent(min(shares), 0)} to {percent(max(shares), 0)}"
    lines += [
        "Rule of thumb for ranks that meet once a step, outside of which nothing is counted: "
        "`sqrt(2 ln R) * sqrt(B sum p (1 - p)) / (B sum (1 - p))`, from above.",
        "",
        "1. **One process, or ranks that meet once a step with few ranks or large batches** (the "
        "table says from where on it costs more than that): Bernoulli, the default. It is the law "
        "that others train with.",
        "2. **Many ranks and small batches, or ranks that meet in every block** (parameters "
        "sharded): a count that is the same on all ranks. `fixed` where `B (1 - p)` is near a "
        "whole number, or for static shapes; `rounded` where it is not: it keeps every sample "
        "with exactly 1 - p and costs "
        f"at most {percent(balanced)} over the ideal in all of these cases, whatever the number "
        "of ranks.",
        "3. **Counts that have to vary as Bernoulli's do**, branch by branch: `total`, at most "
        f"{percent(slowest_total)} over the ideal with one meeting a step; not where ranks meet in "
        f"every block ({percent(blocks_total)} at {ranks[-1]} ranks). `dealt` draws Bernoulli's "
        "count of the whole batch and costs at most "
        f"{percent(max(max(r['step']['over_ideal'][1:]) for r in dealt))} and "
        f"{percent(max(max(r['block']['over_ideal'][1:]) for r in dealt))} from two ranks on; "
        "`rounded` is simpler and no worse.",
        "4. **What is left of the saving** over naive masking, which costs the same on every rank: "
        f"under Bernoulli at {ranks[-1]} ranks {left['step']} where they meet once a step, "
        f"{left['block']} where they meet once a block; least for small batches and small p, where "
        "some rank keeps all of its samples, and where the whole saving is a few per cent of a "
        "step, not far above this measurement's noise. `fixed` and `rounded` leave all of it.",
        "",
    ]
    return lines


def report(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# The slowest rank",
        "",
        f"`python -m benchmarks scaling --preset {results['preset']}`, "
        f"{results['seconds']:.0f} s. {environment_line(results['environment'])}",
        "",
        *conclusions(results),
        *simulated_section(results),
        *law_section(results),
        *memory_section(results),
        *measured_section(results),
        *validation_section(results),
    ]
    return "\n".join(lines).rstrip() + "\n"
