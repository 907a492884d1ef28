"""The full report of a run, ``report.md``: every table, and the plots that lie beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.measure.ending import BadInput
from benchmarks.measure.memory import PEAK, SAVED
from benchmarks.measure.store import read_json
from benchmarks.report.figures import SCHEMA, disturbed
from benchmarks.report.table import Table, document, percent, ratio, seconds, spread
from benchmarks.report.targets import Outcome

SHORT_NAMES = {
    "copy": "plain copy",
    "empty": "empty backward",
    "torch": "PyTorch",
    "dense": "dense on k (floor)",
    "beside": "branches on k beside the stream",
}

MEMORY_NOTES = {
    SAVED: "Saved activations: distinct storages that autograd keeps for the backward pass, "
    "parameters left out; what is freed on the way is not in it, so it is no peak of the process.",
    PEAK: "Peak allocated: the allocator's highest mark over both passes, above that before them.",
}

Case = dict[str, Any]
Figures = dict[str, Any]
Cell = Callable[[Case, str, Figures], str]  # from a case, a provider and its figures


def _shown(key: str, write: Callable[[Any], str], *, hidden: Sequence[str] = ()) -> Cell:
    """A figure as ``write`` writes it, but for providers that it says nothing about."""
    return lambda case, provider, f: write(None if provider in hidden else f.get(key))


def _mebibytes(memory: dict[str, Any] | None) -> str:
    return "-" if memory is None else f"{memory['bytes'] / 2**20:.1f} MiB"


def _operations(count: int | None) -> str:
    return f"{count / 1e9:.3g} GFLOP" if count else "-"


def _of_whole(case: Case, provider: str, f: Figures) -> str:
    """What min_saving decides by."""
    whole = case["providers"].get("whole") if provider == "compact" else None
    return ratio(f["median"] / whole["median"] if whole else None)


SPEEDUP = _shown("speedup", ratio, hidden=("copy", "empty"))
DROP_NOTHING = ("undropped", "skeleton", "dense", "naive")  # or leave out more than a model drops
CELLS: dict[str, Cell] = {
    "case": lambda case, provider, f: case["name"].removeprefix(f"{case['kind']}-"),
    "provider": lambda case, provider, f: SHORT_NAMES.get(provider, provider),
    "median": _shown("median", seconds),
    "device": _shown("device", seconds),
    "host": _shown("host", seconds),
    "p20 to p80": lambda case, provider, f: f"{seconds(f['p20'])} to {seconds(f['p80'])}",
    "spread": _shown("spread", spread),
    "PyTorch / this": SPEEDUP,
    "naive / this": SPEEDUP,
    "dinov3 / this": SPEEDUP,
    "this / dense": _shown("over_floor", ratio),
    "this / floor": _shown("over_floor", ratio, hidden=DROP_NOTHING),
    "compact / whole": _of_whole,
    "ideal / this": _shown("of_ideal", percent, hidden=DROP_NOTHING),
    "of copy": _shown("of_copy_bandwidth", percent),
    "memory": _shown("memory", _mebibytes),
    "of naive's": _shown("memory_of_baseline", percent),
    "operations": _shown("flops", _operations),
    "extra": _shown("extra", seconds),
    "extra / naive's": _shown("extra_of_baseline", ratio),
}


@dataclass(frozen=True)
class Kind:
    """The table of the cases of a kind: its columns by name, one line a provider."""

    title: str
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def table(self, cases: list[Case]) -> Table:
        columns = ["case", "provider", *self.columns]
        figures = [f for case in cases for f in case["providers"].values()]
        memory = "memory" in columns
        if memory and any(f.get("device") for f in figures):
            columns[3:3] = ["device", "host"]  # the clocks of a GPU
        kinds = {f["memory"]["kind"] for f in figures if memory and f.get("memory")}
        ideals = [
            f"{case['name']}: {percent(case['share_of_branches'])} of a step is in the branches, "
            f"ideal speed-up {case['ideal_speedup']:.3f}."
            for case in cases
            if case.get("ideal_speedup")
        ]
        notes = [*self.notes, *ideals, *(MEMORY_NOTES[kind] for kind in sorted(kinds))]
        made = Table(self.title, columns, notes)
        for case in cases:
            group = [
                [CELLS[column](case, provider, f) for column in columns]
                for provider, f in case["providers"].items()
            ]
            if "*" in case["skipped"]:
                why = [f"skipped: {case['skipped']['*']}", *["-"] * (len(columns) - 3)]
                group.append([CELLS["case"](case, "", {}), "all", *why])
            if group:
                made.groups.append(group)
        return made


_OP = ("median", "p20 to p80", "spread", "PyTorch / this", "of copy")
_BLOCK = (
    *("median", "spread", "naive / this", "this / dense"),
    *("memory", "of naive's", "operations"),
)
KINDS = {
    "op": Kind(
        "Ops",
        _OP,
        (
            "Of copy: bandwidth for the bytes that the op has to move, against a clone of [B, ...] "
            "in the same turns (100 % is the floor); backward passes net of the engine's empty "
            "call.",
        ),
    ),
    "kernel": Kind(
        "Kernels against PyTorch's own calls, without autograd",
        _OP,
        (
            "PyTorch: the calls that the op replaces (index_select and native_layer_norm, "
            "native_layer_norm_backward and index_add, ...), t1 and t2 on one thread and on two. "
            "Of copy: as above.",
        ),
    ),
    "block": Kind("Blocks, forward + backward", _BLOCK),
    "model": Kind(
        "Models, forward + loss + backward",
        (
            *("median", "spread", "naive / this", "ideal / this", "this / floor"),
            *("memory", "of naive's"),
        ),
        (
            "Ideal: what is not in a branch (skeleton) in full, a branch (the rest of undropped) "
            "for its kept rows. Floor, measured: the stream of all rows, and every branch beside "
            "it for as many rows as it keeps, with nothing gathered or added.",
        ),
    ),
    "depth": Kind("Stacks of many small branches, forward + backward", _BLOCK),
    "compile": Kind(
        "Blocks under torch.compile, forward + backward",
        ("median", "p20 to p80", "spread", "dinov3 / this", "this / dense"),
        (
            "static: k never changes; dynamic: it does, rows given; bernoulli: drawn inside. "
            "eager: the fused op without torch.compile. -fullgraph: one graph, k depends on data.",
        ),
    ),
    "host": Kind(
        "Host cost of one call, forward + backward, tiny tensor",
        ("median", "spread", "extra", "extra / naive's"),
        (
            "Extra: over x + branch(x), the identity for a branch. -rows: kept rows drawn "
            "beforehand.",
        ),
    ),
    "break_even": Kind(
        "Few rows dropped, forward + backward",
        ("median", "spread", "naive / this", "compact / whole"),
        ("Whole: the branch on every row; compact: on the kept rows.",),
    ),
}


def _training_table(training: dict[str, Any]) -> Table:
    """One line per variant."""
    shares = ", ".join(f"{name} {percent(share)}" for name, share in training["kept_share"].items())
    plans = ", ".join(f"{name} {seconds(time)}" for name, time in training["plan_median"].items())
    apart = training["largest_loss_difference"]
    columns: dict[str, Callable[[tuple[str, Figures]], object]] = {
        "variant": lambda row: row[0],
        "sampler": lambda row: row[1]["sampler"],
        "step": lambda row: seconds(row[1]["step"]["median"]),
        "spread": lambda row: spread(row[1]["step"]["spread"]),
        "naive / this": lambda row: ratio(row[1]["speedup"]),
        "final loss": lambda row: f"{row[1]['losses'][-1]:.4f}",
        "loss difference": lambda row: f"{apart[row[0]]:.2e}" if row[0] in apart else "-",
        "validation accuracy": lambda row: percent(row[1]["validation_accuracy"][-1]),
    }
    return Table.of(
        f"Training a small ViT on handwritten digits: {training['train_samples']} images, "
        f"{training['validation_samples']} held out, {training['steps']} steps",
        columns,
        [training["variants"].items()],
        [
            f"Rows kept, over all branches: {shares}. Drawing a plan, not in the step: {plans}.",
            "Loss difference: largest over all steps, against naive masking with the same kept "
            "rows; the last line is the yardstick: naive masking itself from weights changed by "
            "1e-7.",
        ],
    )


def _in_unit(value: float | None, outcome: Outcome) -> str:
    return percent(value) if outcome.unit == "%" else ratio(value)


def _measured(outcome: Outcome) -> str:
    """With the range of the repeats, where it is known."""
    text = _in_unit(outcome.measured, outcome)
    if outcome.low is None or outcome.high is None:
        return text
    return f"{text} [{_in_unit(outcome.low, outcome)} to {_in_unit(outcome.high, outcome)}]"


_REACH: dict[str, Callable[[Outcome], object]] = {
    "target": lambda outcome: outcome.target,
    "case": lambda outcome: outcome.case,
    "bound": lambda o: f"{'<=' if o.at_most else '>='} {_in_unit(o.bound, o)}",
    "measured": _measured,
    "floor's": lambda outcome: _in_unit(outcome.floor, outcome),
    "verdict": lambda outcome: outcome.verdict,
}


def targets_table(outcomes: list[Outcome]) -> Table:
    """Each target whose case was run beside what was measured."""
    measured = [outcome for outcome in outcomes if outcome.measured is not None]
    missing = len(outcomes) - len(measured)
    notes = [
        "Medians of this run; in brackets the smallest and largest ratio of a single repeat; "
        "inconclusive where they lie on both sides of the bound. "
        "Floor's: the same figure for a floor, which no provider can be far ahead of: for dense on "
        "k where naive is divided by it, else for the branches on k beside the stream.",
        *([f"Not measured, a provider was skipped: {missing} targets."] if missing else []),
    ]
    groups = [list(group) for _, group in groupby(measured, key=lambda outcome: outcome.target)]
    return Table.of("Reach", _REACH, groups, notes)


def _skipped_table(cases: list[Case]) -> Table:
    """Every provider that was not timed, with the reason and how many cases that is."""
    reasons = Counter(
        ("all providers" if provider == "*" else provider, reason)
        for case in cases
        for provider, reason in case["skipped"].items()
    )
    rows = [[*why, count] for why, count in reasons.items()]
    return Table("Skipped", ("provider", "reason", "cases"), groups=[rows])


def tables(result: dict[str, Any], outcomes: list[Outcome]) -> list[Table]:
    """Every table of a run."""
    cases = result["cases"]
    of_kind = {kind: [case for case in cases if case["kind"] == kind] for kind in KINDS}
    found = [KINDS[kind].table(those) for kind, those in of_kind.items() if those]
    if result["training"]:
        found.append(_training_table(result["training"]))
    if any(outcome.measured is not None for outcome in outcomes):
        found.append(targets_table(outcomes))
    if any(case["skipped"] for case in cases):
        found.append(_skipped_table(cases))
    return found


def warnings(result: dict[str, Any]) -> list[str]:
    """What a reader has to know before any figure; a noisy machine is said here, once."""
    found = []
    if not result["complete"]:
        found.append("Incomplete: the run was stopped, and holds what it had measured until then.")
    unsteady, total = disturbed(result["cases"])
    if unsteady:
        found.append(
            f"Noisy: {unsteady} of {total} medians spread by more than 10 % between repeats, the "
            "machine did other work."
        )
    return found


def outcomes_of(result: dict[str, Any]) -> list[Outcome]:
    """The targets as the run has recorded them."""
    derived = ("met", "gap")
    given = ({key: each[key] for key in each if key not in derived} for each in result["reach"])
    return [Outcome(**each) for each in given]


def markdown(result: dict[str, Any], plots: Sequence[Path]) -> str:
    """The page of a run, with the plots that lie beside it."""
    sections = [
        *(f"**{warning}**" for warning in warnings(result)),
        *(f"![{path.stem}]({path.name})" for path in plots),
        *(table.markdown() for table in tables(result, outcomes_of(result))),
    ]
    return document(f"Benchmarks, preset {result['preset']}", result, sections)


def read(path: Path) -> dict[str, Any]:
    """The results of a run.

    Raises:
        BadInput: the file cannot be read, is no JSON, or has another schema.
    """
    try:
        result = read_json(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise BadInput(f"{path}: expected JSON, {error}") from None
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != SCHEMA:
        raise BadInput(
            f"{path}: expected results.json of schema {SCHEMA} (benchmarks/SCHEMA.md), got "
            + (f"schema {schema}" if schema else "something else")
        )
    return result  # type: ignore[no-any-return]
