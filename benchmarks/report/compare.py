"""Two runs side by side: ``python -m benchmarks compare A.json B.json``.

Of a noisy machine the seconds of two runs can't be compared, what each says of its own providers
can: by default every provider's time is taken relative to the case's baseline (naive masking,
PyTorch, ...) in the same run. ``--seconds`` compares the times themselves, for one idle machine.

A regression is a provider that became slower by more than the threshold and by more than the
spreads of both runs explain, that needs more memory by more than the threshold, or that was timed
in A and could not run in B. One that B does not have at all is named, no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.measure import command
from benchmarks.measure.ending import BadInput
from benchmarks.measure.environment import MACHINE
from benchmarks.measure.workload import matches
from benchmarks.report.page import read
from benchmarks.report.table import Table, ratio, spread, window


@dataclass(frozen=True)
class Change:
    """One figure of one provider in both runs; a ratio above 1 is worse, None: only A has it."""

    case: str
    provider: str
    figure: str  # "time", "host extra" or "memory"
    ratio: float | None  # B / A
    noise: float  # what the spreads of both runs explain
    threshold: float
    note: str = ""  # why B has none, if it was to be run there

    @property
    def verdict(self) -> str:
        """One of regression, improvement, same, gone."""
        if self.ratio is None:
            return "regression" if self.note else "gone"
        allowed = max(self.threshold, self.noise)
        if self.ratio > 1 + allowed:
            return "regression"
        return "improvement" if self.ratio < 1 / (1 + allowed) else "same"


def _figures(case: dict[str, Any], provider: str, relative: bool) -> dict[str, tuple[float, float]]:
    """What can be compared of a provider, with what its spread explains. Relative times have the
    baseline for their unit, of which nothing follows."""
    own, baseline = case["providers"][provider], case["providers"].get(case["baseline"])
    is_unit, found = relative and own is baseline, {}
    if case["kind"] == "host":
        extra = own.get("extra_of_baseline" if relative else "extra")
        if extra and extra > 0 and not is_unit:
            # A difference of two times: the error of a time weighs more in it.
            found["host extra"] = extra, own["spread"] * own["median"] / own["extra"]
    elif not relative:
        found["time"] = own["median"], own["spread"]
    elif baseline is not None and not is_unit:
        # Independent: spreads of a quotient add up as squares.
        noise = math.hypot(own["spread"], baseline["spread"])
        found["time"] = own["median"] / baseline["median"], noise
    memory = own.get("memory")
    # What draws its rows independently needs another amount in every call.
    if memory and memory["bytes"] and not provider.endswith("bernoulli"):
        found["memory"] = memory["bytes"], 0.0
    return found


def compare(
    a: dict[str, Any], b: dict[str, Any], threshold: float, relative: bool = True
) -> list[Change]:
    """Every figure that both runs have, and every provider that only A has.

    Args:
        a, b: results of two runs, the older one first.
        threshold: relative change that counts.
        relative: times as shares of the baseline in the same run, else in seconds.
    """
    after = {case["name"]: case for case in b["cases"]}
    changes = []
    for old in (case for case in a["cases"] if case["name"] in after):
        new = after[old["name"]]
        for provider in old["providers"]:
            about = old["name"], provider
            if provider not in new["providers"]:
                why = new["skipped"].get(provider) or new["skipped"].get("*") or ""
                changes.append(Change(*about, "time", None, 0.0, threshold, why))
                continue
            then, now = (_figures(case, provider, relative) for case in (old, new))
            if relative and old["baseline"] != new["baseline"]:
                then = {"memory": then["memory"]} if "memory" in then else {}
            for figure in (figure for figure in then if figure in now):
                (before, noise), (value, noise_now) = then[figure], now[figure]
                both = math.hypot(noise, noise_now)
                changes.append(Change(*about, figure, value / before, both, threshold))
    return changes


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What makes the two runs hard to compare, in words."""
    settings = ("preset", "filter", "device")
    first, second = (run["environment"] | {key: run[key] for key in settings} for run in (a, b))
    found = [
        f"{name}: {first.get(name)} and {second.get(name)}"
        for name in (*MACHINE, *settings)
        if first.get(name) != second.get(name)
    ]
    stopped = [name for run, name in ((a, "first"), (b, "second")) if not run["complete"]]
    return found + [f"the {name} run was stopped before its end" for name in stopped]


_COLUMNS: dict[str, Callable[[Change], object]] = {
    "case": lambda change: change.case,
    "provider": lambda change: change.provider,
    "figure": lambda change: change.figure,
    "B / A": lambda change: ratio(change.ratio),
    "noise": lambda change: spread(change.noise),
    "verdict": lambda change: ": ".join(filter(None, (change.verdict, change.note))),
}


def main(arguments: list[str] | None = None) -> int:
    """Prints the ratios; returns 0, or 1 where something got worse."""
    parser = command.parser("compare", __doc__)
    parser.add_argument("a", type=Path, metavar="A.json", help="the older run")
    parser.add_argument("b", type=Path, metavar="B.json", help="the newer run")
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="relative change that counts (default: 0.05)"
    )
    parser.add_argument("--seconds", action="store_true", help="times themselves, no ratios")
    parser.add_argument("--provider", default="fused", help="or all (default: fused and fused-*)")
    parser.add_argument("--filter", metavar="EXPR", help="only cases whose name matches")
    options = parser.parse_args(arguments)
    if not options.threshold >= 0:
        parser.error(f"--threshold: expected 0 or more, got {options.threshold}")
    a, b = read(options.a), read(options.b)
    for difference in differences(a, b):
        print(f"The runs differ: {difference}")
    changes = [
        change
        for change in compare(a, b, options.threshold, not options.seconds)
        if (options.provider == "all" or change.provider.startswith(options.provider))
        and (options.filter is None or matches(change.case, options.filter))
    ]
    names = [{case["name"] for case in result["cases"]} for result in (a, b)]
    for only, which in ((names[0] - names[1], "first"), (names[1] - names[0], "second")):
        alone = sorted(only)
        for name in [*alone[:5], *([f"{len(alone) - 5} more"] if alone[5:] else [])]:
            print(f"only in the {which} run: {name}")
    if not changes:
        raise BadInput("the runs share no figure")
    groups = [list(group) for _, group in groupby(changes, key=lambda change: change.case)]
    print(Table.of("B / A", _COLUMNS, groups, names=3).text(window()))
    worse = [change for change in changes if change.verdict == "regression"]
    print(f"{len(changes)} figures, {len(worse)} regressions")
    return 1 if worse else 0
