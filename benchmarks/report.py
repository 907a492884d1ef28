"""The tables that end a run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment_line
from benchmarks.figures import disturbed
from benchmarks.memory import PEAK, SAVED
from benchmarks.targets import Outcome

SHORT_NAMES = {
    "copy": "plain copy",
    "empty": "empty backward",
    "torch": "PyTorch",
    "dense": "dense on k (floor)",
}

MEMORY_NOTES = {
    SAVED: "saved activations: distinct storages that autograd keeps for the backward pass, "
    "parameters left out;\nwhat is freed on the way is not in it, so it is no peak of the process.",
    PEAK: "peak allocated: the allocator's highest mark over both passes, above that before them.",
}


def seconds(value: float) -> str:
    """A time with the unit that suits it.

    >>> seconds(0.00123)
    '1.23 ms'
    """
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    return f"{value * factor:#.3g}".rstrip(".") + f" {unit}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spread(value: float) -> str:
    return f"\u00b1{100 * value:.1f} %"


def _mebibytes(memory: dict[str, Any] | None) -> str:
    return "-" if memory is None else f"{memory['bytes'] / 2**20:.1f} MiB"


def _table(title: str, caption: str, *columns: str) -> Table:
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=i < 2)
    return table


def op_table(cases: list[dict[str, Any]]) -> Table:
    """One line per op case and provider."""
    table = _table(
        "Ops",
        "of copy: bandwidth for the bytes the op has to move, against a clone of [B, ...] in the "
        "same turns; backward passes net of the engine's empty call.",
        "case",
        "provider",
        "median",
        "spread",
        "speed-up over PyTorch",
        "of copy",
    )
    for case in cases:
        for provider, f in case["providers"].items():
            own = provider not in ("copy", "empty")
            table.add_row(
                case["name"].removeprefix("op-"),
                SHORT_NAMES.get(provider, provider),
                seconds(f["median"]),
                _spread(f["spread"]),
                _ratio(f.get("speedup") if own else None),
                _percent(f.get("of_copy_bandwidth")),
            )
        table.add_section()
    return table


def block_table(cases: list[dict[str, Any]], title: str = "Blocks, forward + backward") -> Table:
    """One line per block (or model) case and provider."""
    kinds = {
        f["memory"]["kind"] for case in cases for f in case["providers"].values() if f["memory"]
    }
    kind = kinds.pop() if len(kinds) == 1 else "memory"
    table = _table(
        title,
        MEMORY_NOTES.get(kind, ""),
        "case",
        "provider",
        "median",
        "spread",
        "naive / this",
        "this / dense",
        kind,
        "of naive's",
    )
    for case in cases:
        for provider, f in case["providers"].items():
            table.add_row(
                case["name"].removeprefix("block-").removeprefix("model-"),
                SHORT_NAMES.get(provider, provider),
                seconds(f["median"]),
                _spread(f["spread"]),
                _ratio(f.get("speedup")),
                _ratio(f.get("over_floor")),
                _mebibytes(f["memory"]),
                _percent(f.get("memory_of_baseline")),
            )
        table.add_section()
    return table


def model_table(cases: list[dict[str, Any]]) -> Table:
    """One line per model case and provider."""
    return block_table(cases, "Models of timm, forward + loss + backward")


def compile_table(cases: list[dict[str, Any]]) -> Table:
    """One line per compiled block and provider."""
    table = _table(
        "Blocks under torch.compile, forward + backward",
        "static: k never changes; dynamic: it does, rows given; bernoulli: drawn inside.\n"
        "eager: the fused op without torch.compile. -fullgraph: one graph, k depends on data.",
        "case",
        "provider",
        "median",
        "spread",
        "dinov3 / this",
        "this / dense",
    )
    for case in cases:
        for provider, f in case["providers"].items():
            table.add_row(
                case["name"].removeprefix("compile-"),
                SHORT_NAMES.get(provider, provider),
                seconds(f["median"]),
                _spread(f["spread"]),
                _ratio(f.get("speedup")),
                _ratio(f.get("over_floor")),
            )
        table.add_section()
    return table


def host_table(cases: list[dict[str, Any]]) -> Table:
    """One line per way of calling."""
    table = _table(
        "Host cost of one call, forward + backward, tiny tensor",
        "extra: over x + branch(x), the identity for a branch. -rows: kept rows drawn beforehand.",
        "case",
        "provider",
        "median",
        "spread",
        "extra",
        "extra / naive's",
    )
    for case in cases:
        for provider, f in case["providers"].items():
            table.add_row(
                case["name"].removeprefix("host-"),
                provider,
                seconds(f["median"]),
                _spread(f["spread"]),
                seconds(f["extra"]) if "extra" in f else "-",
                _ratio(f.get("extra_of_baseline")),
            )
    return table


def training_table(training: dict[str, Any]) -> Table:
    """One line per variant."""
    shares = ", ".join(
        f"{name} {100 * share:.1f} %" for name, share in training["kept_share"].items()
    )
    plans = ", ".join(f"{name} {seconds(value)}" for name, value in training["plan_median"].items())
    table = _table(
        f"Training a small ViT on handwritten digits: {training['train_samples']} images, "
        f"{training['validation_samples']} held out, {training['steps']} steps",
        f"rows kept, over all branches: {shares}. Drawing a plan, not in the step: {plans}.\n"
        "loss difference: largest over all steps, against naive masking with the same kept rows;\n"
        "the last line is the yardstick: naive masking itself from weights changed by 1e-7.",
        "variant",
        "sampler",
        "step",
        "spread",
        "naive / this",
        "final loss",
        "loss difference",
        "validation accuracy",
    )
    for name, variant in training["variants"].items():
        difference = training["largest_loss_difference"].get(name)
        table.add_row(
            name,
            variant["sampler"],
            seconds(variant["step"]["median"]),
            _spread(variant["step"]["spread"]),
            _ratio(variant["speedup"]),
            f"{variant['losses'][-1]:.4f}",
            "-" if difference is None else f"{difference:.2e}",
            _percent(variant["validation_accuracy"][-1]),
        )
    return table


def _figure(value: float | None, unit: str) -> str:
    return _percent(value) if unit == "%" else _ratio(value)


def reach_table(outcomes: list[Outcome]) -> Table:
    """Each target whose case was run beside what was measured."""
    missing = sum(outcome.measured is None for outcome in outcomes)
    table = _table(
        "Reach",
        "medians of this run; in brackets the smallest and largest ratio of a single repeat."
        + (f" Not measured, their cases were not run: {missing} targets." if missing else ""),
        "target",
        "case",
        "bound",
        "measured",
        "verdict",
    )
    for outcome in outcomes:
        if outcome.met is None or outcome.gap is None:
            continue
        measured = _figure(outcome.measured, outcome.unit)
        if outcome.low is not None and outcome.high is not None:
            measured += (
                f" [{_figure(outcome.low, outcome.unit)} to {_figure(outcome.high, outcome.unit)}]"
            )
        verdict = "[green]met[/]" if outcome.met else f"[red]missed by {100 * outcome.gap:.1f} %[/]"
        table.add_row(
            outcome.target,
            outcome.case,
            f"{'<=' if outcome.at_most else '>='} {_figure(outcome.bound, outcome.unit)}",
            measured.replace("[", r"\["),
            verdict,
        )
    return table


def print_report(console: Console, results: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Environment line, one table per kind that was run, and the targets."""
    console.print(environment_line(results["environment"]), highlight=False, soft_wrap=True)
    tables = {
        "op": op_table,
        "block": block_table,
        "model": model_table,
        "compile": compile_table,
        "host": host_table,
    }
    for kind, table in tables.items():
        cases = [case for case in results["cases"] if case["kind"] == kind]
        if cases:
            console.print()
            console.print(table(cases))
    if results["training"]:
        console.print()
        console.print(training_table(results["training"]))
    if any(outcome.measured is not None for outcome in outcomes):
        console.print()
        console.print(reach_table(outcomes))
    unsteady, total = disturbed(results["cases"])
    if unsteady:
        console.print(
            f"\n[yellow]{unsteady} of {total} medians spread by more than 10 % between repeats.[/] "
            "The machine did other work: run again before believing a ratio of theirs.",
            highlight=False,
        )
