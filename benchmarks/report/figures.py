"""From samples to figures: merges the turns of every provider and forms the ratios.

A *turn* is what one provider did in one repeat. The median is taken over the samples of all turns;
the spread is half the distance between the fastest and the slowest turn's median, relative to the
median. Ratios are ratios of medians.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
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


def _quantile(ordered: list[float], share: float) -> float:
    """Between the two nearest samples, on a straight line."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


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
        p20=_quantile(samples, 0.2),
        p80=_quantile(samples, 0.8),
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


def turn_ratios(numerator: Merged, denominator: Merged) -> tuple[float, float]:
    """Smallest and largest ratio within a repeat: how far the ratio of medians can be trusted."""
    ratios = [a / b for a, b in zip(numerator.turn_medians, denominator.turn_medians, strict=True)]
    return min(ratios), max(ratios)


def collect(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges the turns of every case's record, as ``conftest.py`` keeps it, and adds every ratio of
    the report.

    Each case is returned as its description plus ``skipped`` (reasons by provider) and
    ``providers``, a dict of figures by provider.
    """
    results = []
    for record in records:
        case = dict(record["case"])
        merged = {
            provider: merge(turn["wall"] for turn in turns)
            for provider, turns in record["turns"].items()
            if turns
        }
        providers: dict[str, dict[str, Any]] = {}
        for provider, own in merged.items():
            extras = record["extras"].get(provider) or {"memory": None, "flops": None}
            clocks = {
                clock: _median_of(turn[clock] for turn in record["turns"][provider])
                for clock in ("host", "device")
            }
            providers[provider] = asdict(own) | clocks | extras
        _add_ratios(case, merged, providers)
        results.append(case | {"skipped": record["skipped"], "providers": providers})
    return results


def _median_of(turns: Iterable[list[float]]) -> float | None:
    samples = [sample for turn in turns for sample in turn]
    return median(samples) if samples else None


def _add_ratios(
    case: dict[str, Any], merged: dict[str, Merged], providers: dict[str, dict[str, Any]]
) -> None:
    baseline, floor = merged.get(case["baseline"]), merged.get(case["floor"])
    _add_ideal(case, merged)
    for provider, figures in providers.items():
        own = merged[provider]
        if baseline is not None:
            figures["speedup"] = baseline.median / own.median
        if case["kind"] in ("op", "kernel"):
            if provider not in ("copy", "empty") and "copy" in merged:
                _add_bandwidth(case, merged, figures)
            continue
        if case["kind"] == "host":
            if floor is not None and provider != case["floor"]:
                figures["extra"] = own.median - floor.median
                if baseline is not None:
                    extra = baseline.median - floor.median
                    figures["extra_of_baseline"] = figures["extra"] / extra
            continue
        if floor is not None:
            figures["over_floor"] = own.median / floor.median
            figures["over_floor_turns"] = turn_ratios(own, floor)
        if case.get("ideal_seconds"):
            figures["of_ideal"] = case["ideal_seconds"] / own.median
        reference_memory = providers.get(case["baseline"], {}).get("memory")
        if figures["memory"] and reference_memory:
            figures["memory_of_baseline"] = figures["memory"]["bytes"] / reference_memory["bytes"]


def _add_bandwidth(
    case: dict[str, Any], merged: dict[str, Merged], figures: dict[str, Any]
) -> None:
    # A backward pass is timed through the engine: its empty call is measured beside it and left out
    # here.
    net = figures["median"] - (merged["empty"].median if "empty" in merged else 0.0)
    copy_bandwidth = case["copy_bytes"] / merged["copy"].median
    figures["net_median"] = net
    # On tiny tensors nothing but the call may be left, and then there is no bandwidth to speak of.
    figures["of_copy_bandwidth"] = case["traffic_bytes"] / net / copy_bandwidth if net > 0 else None


def _add_ideal(case: dict[str, Any], merged: dict[str, Merged]) -> None:
    """Of a model: what is not in a branch is paid for in full, a branch for its kept rows."""
    if case["kind"] != "model" or not {"undropped", "skeleton"} <= merged.keys():
        return
    whole, rest = merged["undropped"].median, merged["skeleton"].median
    p, share = 1 - case["k"] / case["batch"], 1 - rest / whole
    case["share_of_branches"] = share
    case["ideal_speedup"] = 1 / (1 - p * share)
    case["ideal_seconds"] = whole * (1 - p * share)


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
