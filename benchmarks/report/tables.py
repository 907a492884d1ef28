"""The tables that end a run: printed, and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.measure.environment import environment_line
from benchmarks.measure.memory import PEAK, SAVED
from benchmarks.report.figures import SCHEMA, disturbed
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


@dataclass
class Section:
    """A table with a title above and notes below; the first ``names`` columns are text."""

    title: str
    columns: Sequence[str]
    notes: Sequence[str] = ()
    names: int = 2
    groups: list[list[Sequence[str]]] = field(default_factory=list)  # rows, divided by lines

    def rich(self) -> Table:
        table = Table(
            title=self.title,
            caption="\n".join(self.notes),
            title_justify="left",
            caption_justify="left",
            title_style="bold",
        )
        for i, column in enumerate(self.columns):
            is_name = i < self.names
            table.add_column(column, justify="left" if is_name else "right", no_wrap=i == 1)
        for group in self.groups:
            for row in group:
                table.add_row(*(escape(cell) for cell in row))
            table.add_section()
        return table

    def markdown(self) -> str:
        def cell(text: str) -> str:
            return text.replace("|", "\\|").replace("\n", " ")

        align = ["---" if i < self.names else "---:" for i in range(len(self.columns))]
        lines = [self.columns, align, *(row for group in self.groups for row in group)]
        table = "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
        return "\n\n".join([f"## {self.title}", table, *self.notes])


def seconds(value: float | None) -> str:
    """A time with the unit that suits it.

    >>> seconds(0.00123)
    '1.23 ms'
    """
    if value is None:
        return "-"
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    return f"{value * factor:#.3g}".rstrip(".") + f" {unit}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spread(value: float) -> str:
    return f"\u00b1{100 * value:.1f} %"


def _range(figures: dict[str, Any]) -> str:
    """p20 to p80."""
    return f"{seconds(figures['p20'])} to {seconds(figures['p80'])}"


def _bytes(memory: dict[str, Any] | None) -> str:
    return "-" if memory is None else f"{memory['bytes'] / 2**20:.1f} MiB"


def _operations(count: int | None) -> str:
    return "-" if not count else f"{count / 1e9:.3g} GFLOP"


def _name(provider: str) -> str:
    return SHORT_NAMES.get(provider, provider)


def _fill(
    section: Section, cases: Iterable[Case], row: Callable[[Case, str, dict[str, Any]], list[str]]
) -> Section:
    """One group a case, one row a provider, skipped ones with their reason."""
    for case in cases:
        label = case["name"].removeprefix(f"{case['kind']}-")
        group: list[Sequence[str]] = [
            [label, _name(provider), *row(case, provider, figures)]
            for provider, figures in case["providers"].items()
        ]
        if "*" in case["skipped"]:
            blank = ["-"] * (len(section.columns) - 3)
            group.append([label, "all", f"skipped: {case['skipped']['*']}", *blank])
        section.groups.append(group)
    return section


def op_section(cases: list[Case]) -> Section:
    """One line per op case and provider."""

    def row(case: Case, provider: str, f: dict[str, Any]) -> list[str]:
        own = provider not in ("copy", "empty")
        return [
            seconds(f["median"]),
            _range(f),
            _spread(f["spread"]),
            _ratio(f.get("speedup") if own else None),
            _percent(f.get("of_copy_bandwidth")),
        ]

    section = Section(
        "Ops",
        ("case", "provider", "median", "p20 to p80", "spread", "PyTorch / this", "of copy"),
        [
            "Of copy: bandwidth for the bytes that the op has to move, against a clone of [B, ...] "
            "in the same turns (100 % is the floor); backward passes net of the engine's empty "
            "call."
        ],
    )
    return _fill(section, cases, row)


def kernel_section(cases: list[Case]) -> Section:
    """One line per op of the dispatcher and provider."""

    def row(case: Case, provider: str, f: dict[str, Any]) -> list[str]:
        is_copy = provider == "copy"
        return [
            seconds(f["median"]),
            _range(f),
            _spread(f["spread"]),
            "-" if is_copy else _ratio(f.get("speedup")),
            _percent(f.get("of_copy_bandwidth")),
        ]

    section = Section(
        "Kernels against PyTorch's own calls, without autograd",
        ("case", "provider", "median", "p20 to p80", "spread", "PyTorch / this", "of copy"),
        [
            "PyTorch: the calls that the op replaces (index_select and native_layer_norm, "
            "native_layer_norm_backward and index_add, ...), t1 and t2 on one thread and on two. "
            "Of copy: bandwidth for the bytes that the op has to move, against a clone of the "
            "stream."
        ],
    )
    return _fill(section, cases, row)


def _memory_notes(cases: list[Case]) -> list[str]:
    kinds = {
        f["memory"]["kind"] for case in cases for f in case["providers"].values() if f.get("memory")
    }
    return [MEMORY_NOTES[kind] for kind in sorted(kinds)]


def _clocks(cases: list[Case]) -> bool:
    """Whether the run has the clocks of a GPU."""
    return any(f.get("device") for case in cases for f in case["providers"].values())


def block_section(cases: list[Case], title: str = "Blocks, forward + backward") -> Section:
    """One line per block and provider."""
    on_gpu = _clocks(cases)

    def row(case: Case, provider: str, f: dict[str, Any]) -> list[str]:
        return [
            seconds(f["median"]),
            *([seconds(f["device"]), seconds(f["host"])] if on_gpu else []),
            _spread(f["spread"]),
            _ratio(f.get("speedup")),
            _ratio(f.get("over_floor")),
            _bytes(f["memory"]),
            _percent(f.get("memory_of_baseline")),
            _operations(f.get("flops")),
        ]

    clocks = ("device", "host") if on_gpu else ()
    columns = (
        *("case", "provider", "median", *clocks, "spread", "naive / this", "this / dense"),
        *("memory", "of naive's", "operations"),
    )
    return _fill(Section(title, columns, _memory_notes(cases)), cases, row)


def depth_section(cases: list[Case]) -> Section:
    """One line per depth and provider."""
    title = "Stacks of many small branches, forward + backward"
    return block_section(cases, title)


def model_section(cases: list[Case]) -> Section:
    """One line per model case and provider."""
    on_gpu = _clocks(cases)

    def row(case: Case, provider: str, f: dict[str, Any]) -> list[str]:
        drops = provider not in ("undropped", "skeleton", "dense", "naive")
        return [
            seconds(f["median"]),
            *([seconds(f["device"]), seconds(f["host"])] if on_gpu else []),
            _spread(f["spread"]),
            _ratio(f.get("speedup")),
            _percent(f.get("of_ideal") if drops else None),
            # Runs of old had another floor.
            _ratio(f.get("over_floor") if drops and case["floor"] == "beside" else None),
            _bytes(f["memory"]),
            _percent(f.get("memory_of_baseline")),
        ]

    clocks = ("device", "host") if on_gpu else ()
    ideals = [
        f"{case['name']}: {_percent(case['share_of_branches'])} of a step is in the branches, "
        f"ideal speed-up {case['ideal_speedup']:.3f}."
        for case in cases
        if case.get("ideal_speedup")
    ]
    columns = (
        *("case", "provider", "median", *clocks, "spread", "naive / this"),
        *("ideal / this", "this / floor", "memory", "of naive's"),
    )
    section = Section(
        "Models, forward + loss + backward",
        columns,
        [
            "Ideal: what is not in a branch (skeleton) in full, a branch (the rest of undropped) "
            "for its kept rows. Floor, measured: the stream of all rows, and every branch beside "
            "it for as many rows as it keeps, with nothing gathered or added.",
            *ideals,
            *_memory_notes(cases),
        ],
    )
    return _fill(section, cases, row)


def compile_section(cases: list[Case]) -> Section:
    """One line per compiled block and provider."""

    def row(case: Case, provider: str, f: dict[str, Any]) -> list[str]:
        return [
            seconds(f["median"]),
            _range(f),
            _spread(f["spread"]),
            _ratio(f.get("speedup")),
            _ratio(f.get("over_floor")),
        ]

    section = Section(
        "Blocks under torch.compile, forward + backward",
        ("case", "provider", "median", "p20 to p80", "spread", "dinov3 / this", "this / dense"),
        [
            "static: k never changes; dynamic: it does, rows given; bernoulli: drawn inside. "
            "eager: the fused op without torch.compile. -fullgraph: one graph, k depends on data."
        ],
    )
    return _fill(section, cases, row)


def host_section(cases: list[Case]) -> Section:
    """One line per way of calling."""

    def row(case: Case, provider: str, f: dict[str, Any]) -> list[str]:
        extra = seconds(f["extra"]) if "extra" in f else "-"
        return [
            seconds(f["median"]),
            _spread(f["spread"]),
            extra,
            _ratio(f.get("extra_of_baseline")),
        ]

    section = Section(
        "Host cost of one call, forward + backward, tiny tensor",
        ("case", "provider", "median", "spread", "extra", "extra / naive's"),
        [
            "Extra: over x + branch(x), the identity for a branch. -rows: kept rows drawn "
            "beforehand."
        ],
    )
    return _fill(section, cases, row)


def break_even_section(cases: list[Case]) -> Section:
    """One line per block and share of dropped rows."""
    section = Section(
        "Few rows dropped, forward + backward",
        ("block", "batch", "dropped", "naive", "whole", "compact", "compact / whole"),
        ["Whole: the branch on every row; compact: on the kept rows."],
        names=1,
    )
    for case in cases:
        providers = case["providers"]
        if not {"naive", "whole", "compact"} <= providers.keys():
            continue
        medians = {name: providers[name]["median"] for name in ("naive", "whole", "compact")}
        ratio = medians["compact"] / medians["whole"]
        times = [seconds(value) for value in medians.values()]
        dropped = _percent(case["dropped"])
        section.groups.append([[case["block"], str(case["batch"]), dropped, *times, _ratio(ratio)]])
    return section


def training_section(training: dict[str, Any]) -> Section:
    """One line per variant."""
    shares = ", ".join(
        f"{name} {100 * share:.1f} %" for name, share in training["kept_share"].items()
    )
    plans = ", ".join(f"{name} {seconds(value)}" for name, value in training["plan_median"].items())
    section = Section(
        f"Training a small ViT on handwritten digits: {training['train_samples']} images, "
        f"{training['validation_samples']} held out, {training['steps']} steps",
        (
            *("variant", "sampler", "step", "spread", "naive / this", "final loss"),
            *("loss difference", "validation accuracy"),
        ),
        [
            f"Rows kept, over all branches: {shares}. Drawing a plan, not in the step: {plans}.",
            "Loss difference: largest over all steps, against naive masking with the same kept "
            "rows; the last line is the yardstick: naive masking itself from weights changed by "
            "1e-7.",
        ],
    )
    rows = []
    for name, variant in training["variants"].items():
        difference = training["largest_loss_difference"].get(name)
        rows.append(
            [
                name,
                variant["sampler"],
                seconds(variant["step"]["median"]),
                _spread(variant["step"]["spread"]),
                _ratio(variant["speedup"]),
                f"{variant['losses'][-1]:.4f}",
                "-" if difference is None else f"{difference:.2e}",
                _percent(variant["validation_accuracy"][-1]),
            ]
        )
    section.groups.append(rows)
    return section


def reach_section(outcomes: list[Outcome]) -> Section:
    """Each target whose case was run beside what was measured."""

    def figure(value: float | None, unit: str) -> str:
        return _percent(value) if unit == "%" else _ratio(value)

    missing = sum(outcome.measured is None for outcome in outcomes)
    notes = [
        "Medians of this run; in brackets the smallest and largest ratio of a single repeat. "
        "Floor's: the same figure for a floor, which no provider can be far ahead of: for dense on "
        "k where naive is divided by it, else for the branches on k beside the stream."
    ]
    if missing:
        notes.append(f"Not measured, a provider was skipped: {missing} targets.")
    section = Section("Reach", ("target", "case", "bound", "measured", "floor's", "verdict"), notes)
    groups: dict[str, list[Sequence[str]]] = {}
    for outcome in outcomes:
        if outcome.met is None or outcome.gap is None:
            continue
        measured = figure(outcome.measured, outcome.unit)
        if outcome.low is not None and outcome.high is not None:
            low, high = figure(outcome.low, outcome.unit), figure(outcome.high, outcome.unit)
            measured += f" [{low} to {high}]"
        missed = f"missed by {100 * outcome.gap:.1f} %"
        noise = "met within the spread" if outcome.met and outcome.gap > 0 else "met"
        bound = f"{'<=' if outcome.at_most else '>='} {figure(outcome.bound, outcome.unit)}"
        verdict = noise if outcome.met else missed
        groups.setdefault(outcome.target, []).append(
            [
                *(outcome.target, outcome.case, bound, measured),
                *(figure(outcome.floor, outcome.unit), verdict),
            ]
        )
    section.groups += groups.values()
    return section


def skipped_section(cases: list[Case]) -> Section:
    """Every provider that was not timed, with the reason and how many cases that is."""
    reasons: dict[tuple[str, str], int] = {}
    for case in cases:
        for provider, reason in case["skipped"].items():
            key = ("all providers" if provider == "*" else provider, reason)
            reasons[key] = reasons.get(key, 0) + 1
    section = Section("Skipped", ("provider", "reason", "cases"))
    section.groups.append(
        [[provider, reason, str(count)] for (provider, reason), count in reasons.items()]
    )
    return section


_KINDS: dict[str, Callable[[list[Case]], Section]] = {
    "op": op_section,
    "kernel": kernel_section,
    "block": block_section,
    "model": model_section,
    "depth": depth_section,
    "compile": compile_section,
    "host": host_section,
    "break_even": break_even_section,
}


def sections(result: dict[str, Any], outcomes: list[Outcome]) -> list[Section]:
    """Every table of a run."""
    found = []
    for kind, make in _KINDS.items():
        cases = [case for case in result["cases"] if case["kind"] == kind]
        if cases:
            found.append(make(cases))
    if result["training"]:
        found.append(training_section(result["training"]))
    if any(outcome.measured is not None for outcome in outcomes):
        found.append(reach_section(outcomes))
    if any(case["skipped"] for case in result["cases"]):
        found.append(skipped_section(result["cases"]))
    return found


def _warnings(result: dict[str, Any]) -> list[str]:
    found = []
    if not result["complete"]:
        found.append("Incomplete: the run was stopped, and holds what it had measured until then.")
    unsteady, total = disturbed(result["cases"])
    if unsteady:
        found.append(
            f"{unsteady} of {total} medians spread by more than 10 % between repeats: the machine "
            "did other work; run again before believing a ratio of theirs."
        )
    return found


def print_report(console: Console, result: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Environment line, one table per kind that was run, and the targets."""
    console.print(environment_line(result["environment"]), highlight=False, soft_wrap=True)
    for section in sections(result, outcomes):
        console.print()
        console.print(section.rich())
    for warning in _warnings(result):
        console.print(f"\n[yellow]{warning}[/]", highlight=False)


def outcomes_of(result: dict[str, Any]) -> list[Outcome]:
    """The targets as the run has recorded them."""
    derived = ("met", "gap")
    return [
        Outcome(**{key: value for key, value in each.items() if key not in derived})
        for each in result["reach"]
    ]


def markdown(result: dict[str, Any], plots: Sequence[Path]) -> str:
    """The same as a page, with the plots that lie beside it."""
    minutes = result["seconds"] / 60
    head = [
        f"# Benchmarks, preset {result['preset']}",
        f"`{result['command']}`: {minutes:.0f} minutes.",
        environment_line(result["environment"]),
        *(f"**{warning}**" for warning in _warnings(result)),
    ]
    tables = [section.markdown() for section in sections(result, outcomes_of(result))]
    images = [f"![{path.stem}]({path.name})" for path in plots]
    return "\n\n".join([*head, *images, *tables]) + "\n"


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
        result = json.loads(path.read_text())
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
