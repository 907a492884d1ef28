"""Two runs side by side: ``python -m benchmarks compare A.json B.json``.

Of a noisy machine the seconds of two runs can't be compared, what each says of its own providers
can: by default every provider's time is taken relative to the case's baseline (naive masking,
PyTorch, ...) in the same run. ``--seconds`` compares the times themselves, for one idle machine.

A regression is a provider that became slower by more than the threshold and by more than both runs'
spreads together, or needs more memory by more than the threshold.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.presets import matches
from benchmarks.report import BadResults, Section, read

_MACHINE = ("cpu", "cores", "threads", "gpu", "torch", "cuda", "triton")


@dataclass(frozen=True)
class Change:
    """One figure of one provider in both runs; a ratio above 1 is worse."""

    case: str
    provider: str
    figure: str  # "time" or "memory"
    ratio: float  # B / A
    noise: float  # what the spreads of both runs explain
    threshold: float

    @property
    def verdict(self) -> str:
        """Slower, faster (memory: more, less) or same."""
        allowed = self.threshold + self.noise
        if self.ratio > 1 + allowed:
            return "regression"
        return "improvement" if self.ratio < 1 / (1 + allowed) else "same"


def _time(case: dict[str, Any], provider: str, relative: bool) -> tuple[float, float] | None:
    """A provider's time, or its share of the baseline's, and the spread of that."""
    own = case["providers"].get(provider)
    if own is None:
        return None
    if not relative:
        return own["median"], own["spread"]
    baseline = case["providers"].get(case["baseline"])
    if baseline is None:
        return None
    return own["median"] / baseline["median"], own["spread"] + baseline["spread"]


def compare(
    a: dict[str, Any], b: dict[str, Any], threshold: float, relative: bool = True
) -> list[Change]:
    """Every figure that both runs have.

    Args:
        a, b: results of two runs, the older one first.
        threshold: relative change that counts.
        relative: times as shares of the baseline in the same run, else in seconds.
    """
    before = {case["name"]: case for case in a["cases"]}
    changes = []
    for case in b["cases"]:
        old = before.get(case["name"])
        for provider in case["providers"] if old else ():
            if relative and provider == case["baseline"]:
                continue
            then, now = (_time(each, provider, relative) for each in (old, case))
            if then and now:
                changes.append(
                    Change(
                        case["name"],
                        provider,
                        "time",
                        now[0] / then[0],
                        now[1] + then[1],
                        threshold,
                    )
                )
            memory = [each["providers"].get(provider, {}).get("memory") for each in (old, case)]
            # What draws its rows independently needs another amount in every call.
            if all(memory) and memory[0]["bytes"] and not provider.endswith("bernoulli"):
                ratio = memory[1]["bytes"] / memory[0]["bytes"]
                changes.append(Change(case["name"], provider, "memory", ratio, 0.0, threshold))
    return changes


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What makes the two runs hard to compare, in words."""
    found = [
        f"{name}: {a['environment'].get(name)} and {b['environment'].get(name)}"
        for name in _MACHINE
        if a["environment"].get(name) != b["environment"].get(name)
    ]
    found += [f"{key}: {a[key]} and {b[key]}" for key in ("preset", "device") if a[key] != b[key]]
    for result, name in ((a, "first"), (b, "second")):
        if not result["complete"]:
            found.append(f"the {name} run was stopped before its end")
    return found


def _section(changes: list[Change]) -> Section:
    section = Section("B / A", ("case", "provider", "figure", "B / A", "noise", "verdict"), names=3)
    groups: dict[str, list[Any]] = {}
    for change in changes:
        groups.setdefault(change.case, []).append(
            [
                change.case,
                change.provider,
                change.figure,
                f"{change.ratio:.3f}",
                f"\u00b1{100 * change.noise:.1f} %",
                change.verdict,
            ]
        )
    section.groups += groups.values()
    return section


def main(arguments: list[str] | None = None) -> int:
    """Prints the ratios; returns 0, 1 where something got worse, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    try:
        a, b = read(options.a), read(options.b)
    except BadResults as error:
        print(f"python -m benchmarks compare: {error}", file=sys.stderr)
        return 2
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150)
    for difference in differences(a, b):
        console.print(f"[bold yellow]The runs differ: {difference}[/]", highlight=False)
    changes = [
        change
        for change in compare(a, b, options.threshold, not options.seconds)
        if (options.provider == "all" or change.provider.startswith(options.provider))
        and (options.filter is None or matches(change.case, options.filter))
    ]
    names = [{case["name"] for case in result["cases"]} for result in (a, b)]
    for only, other, which in ((*names, "first"), (*names[::-1], "second")):
        for name in sorted(only - other):
            console.print(f"only in the {which} run: {name}", highlight=False)
    if not changes:
        print("python -m benchmarks compare: the runs share no figure", file=sys.stderr)
        return 2
    console.print(_section(changes).rich())
    worse = [change for change in changes if change.verdict == "regression"]
    console.print(f"{len(changes)} figures, {len(worse)} regressions", highlight=False)
    return 1 if worse else 0
