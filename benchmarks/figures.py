"""From samples to figures: merges the turns of every provider and forms the ratios. Plain numbers,
no PyTorch.

A *turn* is what one provider did in one repeat. The median is taken over the samples of all turns;
the spread is half the distance between the fastest and the slowest turn's median, relative to the
median. Ratios are ratios of medians.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Merged:
    """All turns of one provider in one case, in seconds."""

    median: float
    spread: float  # relative: 0.02 means +- 2 %
    low: float  # fastest sample
    high: float  # slowest sample
    samples: int
    turn_medians: tuple[float, ...]


def merge(turns: Iterable[list[float]]) -> Merged:
    """Merges the samples of several turns.

    >>> merge([[1.0, 1.0], [1.2, 1.0]]).median
    1.0
    """
    turns = [turn for turn in turns if turn]
    if not turns:
        raise ValueError("merge: expected at least one sample, got none")
    samples = sorted(sample for turn in turns for sample in turn)
    middle = median(samples)
    turn_medians = tuple(median(turn) for turn in turns)
    return Merged(
        median=middle,
        spread=(max(turn_medians) - min(turn_medians)) / 2 / middle,
        low=samples[0],
        high=samples[-1],
        samples=len(samples),
        turn_medians=turn_medians,
    )


def turn_ratios(numerator: Merged, denominator: Merged) -> tuple[float, float]:
    """Smallest and largest ratio within a repeat: how far the ratio of medians can be trusted."""
    ratios = [a / b for a, b in zip(numerator.turn_medians, denominator.turn_medians, strict=True)]
    return min(ratios), max(ratios)


def collect(benchmarks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups pytest-benchmark's records (its JSON file's ``benchmarks``) by case, and adds every
    ratio of the report.

    Each case is returned as its description plus ``providers``, a dict of figures by provider.
    """
    cases: dict[str, dict[str, Any]] = {}
    turns: dict[str, dict[str, dict[int, list[float]]]] = {}
    memory: dict[tuple[str, str], dict[str, Any]] = {}
    for record in benchmarks:
        info = record["extra_info"]
        name, provider = info["case"]["name"], info["provider"]
        cases.setdefault(
            name, info["case"] | {"baseline": info["baseline"], "floor": info["floor"]}
        )
        turns.setdefault(name, {}).setdefault(provider, {})[info["repeat"]] = record["stats"][
            "data"
        ]
        if info.get("memory"):
            memory[name, provider] = info["memory"]

    results = []
    for name, case in cases.items():
        merged = {
            provider: merge(samples for _, samples in sorted(by_repeat.items()))
            for provider, by_repeat in turns[name].items()
        }
        providers = {provider: asdict(figures) for provider, figures in merged.items()}
        for provider, figures in providers.items():
            figures["memory"] = memory.get((name, provider))
        _add_ratios(case, merged, providers)
        results.append(case | {"providers": providers})
    return results


def _add_ratios(
    case: dict[str, Any], merged: dict[str, Merged], providers: dict[str, dict[str, Any]]
) -> None:
    baseline, floor = merged.get(case["baseline"]), merged.get(case["floor"])
    for provider, figures in providers.items():
        own = merged[provider]
        if baseline is not None:
            figures["speedup"] = baseline.median / own.median
        if case["kind"] == "op" and provider not in ("copy", "empty") and "copy" in merged:
            # A backward pass is timed through the engine: its empty call is measured beside it and
            # left out here.
            net = own.median - (merged["empty"].median if "empty" in merged else 0.0)
            copy_bandwidth = case["copy_bytes"] / merged["copy"].median
            figures["net_median"] = net
            # On tiny tensors nothing but the call may be left, and then there is no bandwidth to
            # speak of.
            figures["of_copy_bandwidth"] = (
                case["traffic_bytes"] / net / copy_bandwidth if net > 0 else None
            )
        elif case["kind"] in ("block", "model", "compile"):
            if floor is not None:
                figures["over_floor"] = own.median / floor.median
                figures["over_floor_turns"] = turn_ratios(own, floor)
            reference_memory = providers.get(case["baseline"], {}).get("memory")
            if figures["memory"] and reference_memory:
                figures["memory_of_baseline"] = (
                    figures["memory"]["bytes"] / reference_memory["bytes"]
                )
        elif case["kind"] == "host" and floor is not None and provider != case["floor"]:
            figures["extra"] = own.median - floor.median
            if baseline is not None:
                figures["extra_of_baseline"] = figures["extra"] / (baseline.median - floor.median)


def disturbed(cases: Iterable[dict[str, Any]], limit: float = 0.1) -> tuple[int, int]:
    """How many figures spread by more than ``limit``, and how many there are."""
    spreads = [f["spread"] for case in cases for f in case["providers"].values()]
    return sum(spread > limit for spread in spreads), len(spreads)


def merge_training(training: dict[str, Any]) -> dict[str, Any]:
    """Adds merged step times to a training record; an epoch counts as a turn."""
    merged = {
        name: merge(variant["step_seconds"]) for name, variant in training["variants"].items()
    }
    for name, variant in training["variants"].items():
        variant["step"] = asdict(merged[name])
        variant["speedup"] = merged["naive"].median / merged[name].median
    plans = {name: merge([seconds]).median for name, seconds in training["plan_seconds"].items()}
    return training | {"plan_median": plans}
