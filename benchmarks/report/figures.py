"""From samples to figures: merges the turns of every provider and forms the ratios.

A *turn* is what one provider did in one repeat. The median is taken over the samples of all turns;
the spread is half the distance between the fastest and the slowest turn's median, relative to the
median. Ratios are ratios of medians.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from sdkernels.measure.turns import quartiles

SCHEMA = 2


@dataclass(frozen=True)
class Merged:
    """All turns of one provider in one case, in seconds."""

    median: float
    p20: float
    p80: float
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
    middle, turn_medians = median(samples), tuple(map(median, turns))
    fifths = quantiles(samples * 2 if len(samples) == 1 else samples, n=5, method="inclusive")
    return Merged(
        median=middle,
        p20=fifths[0],
        p80=fifths[-1],
        spread=(max(turn_medians) - min(turn_medians)) / 2 / middle,
        low=samples[0],
        high=samples[-1],
        samples=len(samples),
        turn_medians=turn_medians,
    )


def quartile_spread(values: Sequence[float]) -> float:
    """Of single calls: half the distance between their quartiles, relative to the median.

    >>> quartile_spread([1.0, 2.0, 3.0, 2.0])
    0.125
    """
    low, middle, high = quartiles(values)
    return (high - low) / 2 / middle


def collect(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges the turns of every case's record, as ``conftest.py`` keeps it, and adds every ratio of
    the report.

    Each case is returned as its description plus ``skipped`` (reasons by provider) and
    ``providers``, a dict of figures by provider.
    """
    results = []
    for record in records:
        providers = {
            name: _figures(turns) | (record["extras"].get(name) or {"memory": None, "flops": None})
            for name, turns in record["turns"].items()
            if turns
        }
        case = record["case"] | {"skipped": record["skipped"], "providers": providers}
        _add_ratios(case, providers)
        results.append(case)
    return results


def _figures(turns: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Of the three clocks."""
    figures = asdict(merge(turn["wall"] for turn in turns))
    for clock in ("host", "device"):
        samples = [sample for turn in turns for sample in turn[clock]]
        figures[clock] = median(samples) if samples else None
    return figures


def _add_ratios(case: dict[str, Any], providers: dict[str, dict[str, Any]]) -> None:
    times = {name: figures["median"] for name, figures in providers.items()}
    baseline, floor = times.get(case["baseline"]), times.get(case["floor"])
    if case["kind"] == "model" and {"undropped", "skeleton"} <= times.keys():
        # What is not in a branch is paid for in full, a branch for its kept rows.
        p, share = 1 - case["k"] / case["batch"], 1 - times["skeleton"] / times["undropped"]
        case["share_of_branches"], case["ideal_speedup"] = share, 1 / (1 - p * share)
        case["ideal_seconds"] = times["undropped"] * (1 - p * share)
    for provider, figures in providers.items():
        own = figures["median"]
        if baseline is not None:
            figures["speedup"] = baseline / own
        if case["kind"] in ("op", "kernel"):
            if provider not in ("copy", "empty") and "copy" in times:
                # A backward pass is timed through the engine, whose empty call is left out here.
                # On tiny tensors nothing but that may be left.
                net = figures["net_median"] = own - times.get("empty", 0.0)
                copied = case["copy_bytes"] / times["copy"]
                share = case["traffic_bytes"] / net / copied if net > 0 else None
                figures["of_copy_bandwidth"] = share
        elif case["kind"] == "host":
            if floor is not None and provider != case["floor"]:
                figures["extra"] = own - floor
                if baseline is not None:
                    figures["extra_of_baseline"] = (own - floor) / (baseline - floor)
        else:
            if floor is not None:
                figures["over_floor"] = own / floor
                floors = providers[case["floor"]]["turn_medians"]
                ratios = [a / b for a, b in zip(figures["turn_medians"], floors, strict=True)]
                figures["over_floor_turns"] = min(ratios), max(ratios)
            if case.get("ideal_seconds"):
                figures["of_ideal"] = case["ideal_seconds"] / own
            of_baseline = providers[case["baseline"]]["memory"] if baseline is not None else None
            if figures["memory"] and of_baseline:
                figures["memory_of_baseline"] = figures["memory"]["bytes"] / of_baseline["bytes"]


def disturbed(cases: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """How many figures spread by more than 10 %, and how many there are."""
    spreads = [f["spread"] for case in cases for f in case["providers"].values()]
    return sum(spread > 0.1 for spread in spreads), len(spreads)


def merge_training(training: dict[str, Any]) -> dict[str, Any]:
    """Adds merged step times to a training record; an epoch counts as a turn."""
    variants, plans = training["variants"], training["plan_seconds"]
    for variant in variants.values():
        variant["step"] = asdict(merge(variant["step_seconds"]))
        variant["speedup"] = variants["naive"]["step"]["median"] / variant["step"]["median"]
    return training | {"plan_median": {name: median(times) for name, times in plans.items()}}
