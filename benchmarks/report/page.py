"""The full report of a run, ``report.md``: every table, and the plots that lie beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
Cell = Callable[[Case, str, Figures], str]


def _bytes(memory: dict[str, Any] | None) -> str:
    return "-" if memory is None else f"{memory['bytes'] / 2**20:.1f} MiB"


def _operations(count: int | None) -> str:
    return "-" if not count else f"{count / 1e9:.3g} GFLOP"


def _computes(provider: str) -> bool:
    """Whether it does what an op does, which a copy and an empty call do not."""
    return provider not in ("copy", "empty")


def _drops(provider: str) -> bool:
    """Whether it leaves out what a model drops."""
    return provider not in ("undropped", "skeleton", "dense", "naive")


def _model_floor(case: Case, provider: str, figures: Figures) -> str:
    # Runs of old had another floor.
    shown = _drops(provider) and case["floor"] == "beside"
    return ratio(figures.get("over_floor") if shown else None)


def _own_speedup(case: Case, provider: str, figures: Figures) -> str:
    return ratio(figures.get("speedup") if _computes(provider) else None)


CELLS: dict[str, Cell] = {
    "median": lambda case, provider, f: seconds(f["median"]),
    "device": lambda case, provider, f: seconds(f["device"]),
    "host": lambda case, provider, f: seconds(f["host"]),
    "p20 to p80": lambda case, provider, f: f"{seconds(f['p20'])} to {seconds(f['p80'])}",
    "spread": lambda case, provider, f: spread(f["spread"]),
    "PyTorch / this": _own_speedup,
    "naive / this": lambda case, provider, f: ratio(f.get("speedup")),
    "dinov3 / this": lambda case, provider, f: ratio(f.get("speedup")),
    "this / dense": lambda case, provider, f: ratio(f.get("over_floor")),
    "this / floor": _model_floor,
    "ideal / this": lambda case, provider, f: percent(
        f.get("of_ideal") if _drops(provider) else None
    ),
    "of copy": lambda case, provider, f: percent(f.get("of_copy_bandwidth")),
    "memory": lambda case, provider, f: _bytes(f["memory"]),
    "of naive's": lambda case, provider, f: percent(f.get("memory_of_baseline")),
    "operations": lambda case, provider, f: _operations(f.get("flops")),
    "extra": lambda case, provider, f: seconds(f.get("extra")),
    "extra / naive's": lambda case, provider, f: ratio(f.get("extra_of_baseline")),
}


@dataclass(frozen=True)
class Kind:
    """The table of the cases of a kind: its columns by name, one line a provider."""

    title: str
    columns: tuple[str, ...]
    notes: Callable[[list[Case]], list[str]]

    def table(self, cases: list[Case]) -> Table:
        columns = list(self.columns)
        if "memory" in columns and any(
            f.get("device") for case in cases for f in case["providers"].values()
        ):
            columns[1:1] = ["device", "host"]  # the clocks of a GPU
        made = Table(self.title, ("case", "provider", *columns), self.notes(cases))
        for case in cases:
            label = case["name"].removeprefix(f"{case['kind']}-")
            group: list[Sequence[str]] = [
                [
                    label,
                    SHORT_NAMES.get(provider, provider),
                    *(CELLS[column](case, provider, figures) for column in columns),
                ]
                for provider, figures in case["providers"].items()
            ]
            if "*" in case["skipped"]:
                blank = ["-"] * (len(columns) - 1)
                group.append([label, "all", f"skipped: {case['skipped']['*']}", *blank])
            if group:
                made.groups.append(group)
        return made


def _memory_notes(cases: list[Case]) -> list[str]:
    kinds = {
        f["memory"]["kind"] for case in cases for f in case["providers"].values() if f.get("memory")
    }
    return [MEMORY_NOTES[kind] for kind in sorted(kinds)]


def _model_notes(cases: list[Case]) -> list[str]:
    return [
        "Ideal: what is not in a branch (skeleton) in full, a branch (the rest of undropped) "
        "for its kept rows. Floor, measured: the stream of all rows, and every branch beside "
        "it for as many rows as it keeps, with nothing gathered or added.",
        *(
            f"{case['name']}: {percent(case['share_of_branches'])} of a step is in the branches, "
            f"ideal speed-up {case['ideal_speedup']:.3f}."
            for case in cases
            if case.get("ideal_speedup")
        ),
        *_memory_notes(cases),
    ]


_OP = ("median", "p20 to p80", "spread", "PyTorch / this", "of copy")
_BLOCK = (
    *("median", "spread", "naive / this", "this / dense"),
    *("memory", "of naive's", "operations"),
)
KINDS = {
    "op": Kind(
        "Ops",
        _OP,
        lambda cases: [
            "Of copy: bandwidth for the bytes that the op has to move, against a clone of [B, ...] "
            "in the same turns (100 % is the floor); backward passes net of the engine's empty "
            "call."
        ],
    ),
    "kernel": Kind(
        "Kernels against PyTorch's own calls, without autograd",
        _OP,
        lambda cases: [
            "PyTorch: the calls that the op replaces (index_select and native_layer_norm, "
            "native_layer_norm_backward and index_add, ...), t1 and t2 on one thread and on two. "
            "Of copy: bandwidth for the bytes that the op has to move, against a clone of the "
            "stream."
        ],
    ),
    "block": Kind("Blocks, forward + backward", _BLOCK, _memory_notes),
    "model": Kind(
        "Models, forward + loss + backward",
        (
            *("median", "spread", "naive / this", "ideal / this", "this / floor"),
            *("memory", "of naive's"),
        ),
        _model_notes,
    ),
    "depth": Kind("Stacks of many small branches, forward + backward", _BLOCK, _memory_notes),
    "compile": Kind(
        "Blocks under torch.compile, forward + backward",
        ("median", "p20 to p80", "spread", "dinov3 / this", "this / dense"),
        lambda cases: [
            "static: k never changes; dynamic: it does, rows given; bernoulli: drawn inside. "
            "eager: the fused op without torch.compile. -fullgraph: one graph, k depends on data."
        ],
    ),
    "host": Kind(
        "Host cost of one call, forward + backward, tiny tensor",
        ("median", "spread", "extra", "extra / naive's"),
        lambda cases: [
            "Extra: over x + branch(x), the identity for a branch. -rows: kept rows drawn "
            "beforehand."
        ],
    ),
}


def _break_even_table(cases: list[Case]) -> Table:
    """One line per block and share of dropped rows."""

    def time(name: str) -> Callable[[Case], str]:
        return lambda case: seconds(case["providers"][name]["median"])

    def share(case: Case) -> str:
        compact, whole = (case["providers"][name]["median"] for name in ("compact", "whole"))
        return ratio(compact / whole)

    whole = [c for c in cases if {"naive", "whole", "compact"} <= c["providers"].keys()]
    columns: dict[str, Callable[[Case], object]] = {
        "block": lambda case: case["block"],
        "batch": lambda case: case["batch"],
        "dropped": lambda case: percent(case["dropped"]),
        **{name: time(name) for name in ("naive", "whole", "compact")},
        "compact / whole": share,
    }
    notes = ["Whole: the branch on every row; compact: on the kept rows."]
    title = "Few rows dropped, forward + backward"
    return Table.of(title, columns, [[case] for case in whole], notes, names=1)


def _training_table(training: dict[str, Any]) -> Table:
    """One line per variant."""
    kept, plans = training["kept_share"].items(), training["plan_median"].items()
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in kept)
    drawing = ", ".join(f"{name} {seconds(value)}" for name, value in plans)
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
        [list(training["variants"].items())],
        [
            f"Rows kept, over all branches: {shares}. Drawing a plan, not in the step: {drawing}.",
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
    missing = sum(outcome.measured is None for outcome in outcomes)
    notes = [
        "Medians of this run; in brackets the smallest and largest ratio of a single repeat; "
        "inconclusive where they lie on both sides of the bound. "
        "Floor's: the same figure for a floor, which no provider can be far ahead of: for dense on "
        "k where naive is divided by it, else for the branches on k beside the stream.",
        *([f"Not measured, a provider was skipped: {missing} targets."] if missing else []),
    ]
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.measured is not None:
            groups.setdefault(outcome.target, []).append(outcome)
    return Table.of("Reach", _REACH, groups.values(), notes)


def _skipped_table(cases: list[Case]) -> Table:
    """Every provider that was not timed, with the reason and how many cases that is."""
    reasons = Counter(
        ("all providers" if provider == "*" else provider, reason)
        for case in cases
        for provider, reason in case["skipped"].items()
    )
    rows = [[*why, str(count)] for why, count in reasons.items()]
    return Table("Skipped", ("provider", "reason", "cases"), groups=[rows])


def tables(result: dict[str, Any], outcomes: list[Outcome]) -> list[Table]:
    """Every table of a run."""
    found = []
    for kind in (*KINDS, "break_even"):
        cases = [case for case in result["cases"] if case["kind"] == kind]
        if cases:
            found.append(KINDS[kind].table(cases) if kind in KINDS else _break_even_table(cases))
    if result["training"]:
        found.append(_training_table(result["training"]))
    if any(outcome.measured is not None for outcome in outcomes):
        found.append(targets_table(outcomes))
    if any(case["skipped"] for case in result["cases"]):
        found.append(_skipped_table(result["cases"]))
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
    return [
        Outcome(**{key: value for key, value in each.items() if key not in derived})
        for each in result["reach"]
    ]


def markdown(result: dict[str, Any], plots: Sequence[Path]) -> str:
    """The page of a run, with the plots that lie beside it."""
    sections = [
        *(f"**{warning}**" for warning in warnings(result)),
        *(f"![{path.stem}]({path.name})" for path in plots),
        *(table.markdown() for table in tables(result, outcomes_of(result))),
    ]
    return document(f"Benchmarks, preset {result['preset']}", result, sections)


class BadResults(ValueError):
    """A file that is no results.json of this schema; the message says what it is."""


_KEYS = (
    *("preset", "filter", "device", "command", "complete", "environment", "seconds", "cases"),
    *("training", "timeline", "reach"),
)


def read(path: Path) -> dict[str, Any]:
    """The results of a run.

    Raises:
        BadResults: the file cannot be read, is no JSON, has another schema, or is not whole.
    """
    try:
        result = read_json(path)
    except OSError as error:
        raise BadResults(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise BadResults(f"{path}: expected JSON, {error}") from None
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != SCHEMA:
        raise BadResults(
            f"{path}: expected results.json of schema {SCHEMA} (benchmarks/SCHEMA.md), got "
            + (f"schema {schema}" if schema else "something else")
        )
    missing = [key for key in _KEYS if key not in result]
    if missing:
        raise BadResults(f"{path}: not whole, without {', '.join(missing)}")
    return result
