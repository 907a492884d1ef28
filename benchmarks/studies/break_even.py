"""Where compaction starts to pay: the rule behind ``min_saving="auto"``, from a run of the
``break-even`` preset.

``python -m benchmarks break-even results.json`` fits, for every block and batch, a straight line to
the ratio of two times over the share of dropped rows: with compaction, and with the branch run on
every row. Where the line crosses 1 is the break-even. What it prints is the entry for
``sdkernels/break_even.py``, from which ``min_saving="auto"`` is read.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import command
from benchmarks.measure.store import read_json

Points = tuple[tuple[float, float], ...]


def crossing(points: Sequence[tuple[float, float]]) -> float:
    """The share at which the line through (share, ratio) has fallen to 1; within [0, 1].

    >>> round(crossing([(0.0, 1.05), (0.1, 0.95), (0.2, 0.85)]), 3)
    0.05
    >>> crossing([(0.0, 0.99), (0.1, 0.9)])
    0.0
    """
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    if slope >= 0:  # dropping rows does not make it faster: noise, or a block that is all overhead
        return 0.0 if intercept <= 1 else 1.0
    return min(max((1 - intercept) / slope, 0.0), 1.0)


def ratios(cases: Sequence[dict[str, Any]]) -> dict[str, Points]:
    """Of every block and batch: (share dropped, compact / whole), by share."""
    found: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        providers = case["providers"]
        if case["kind"] != "break_even" or not {"compact", "whole"} <= providers.keys():
            continue
        # Of the turns, pair by pair: what else the machine does falls on both alike.
        turns = (providers[name]["turn_medians"] for name in ("compact", "whole"))
        ratio = statistics.median(compact / whole for compact, whole in zip(*turns, strict=True))
        name = f"{case['block']}-B{case['batch']}"
        found.setdefault(name, []).append((round(case["dropped"], 4), round(ratio, 4)))
    return {name: tuple(sorted(points)) for name, points in found.items()}


def entry(result: dict[str, Any]) -> str:
    """The entry of MEASURED in ``sdkernels/break_even.py`` for a run's device.

    Raises:
        ValueError: the run measured no block at two shares or more.
    """
    measured = {name: points for name, points in ratios(result["cases"]).items() if len(points) > 1}
    if not measured:
        raise ValueError(
            "expected a run with break_even cases (--preset break-even), this one has none"
        )
    env = result["environment"]
    machine = env["gpu"] or f"{env['threads']} threads of {env['cpu']}"
    smallest = min(crossing(points) for points in measured.values())
    lines = [
        f'    "{result["device"].partition(":")[0]}": BreakEven(',
        f"        min_saving={round(smallest, 3)},",
        f'        machine="{machine}, torch {env["torch"]}, commit {env["commit"]}",',
        "        ratios={",
    ]
    for name, points in measured.items():
        lines.append(f'            "{name}": {points!r},  # break-even {crossing(points):.3f}')
    return "\n".join([*lines, "        },", "    ),"])


def main(arguments: list[str] | None = None) -> int:
    """Prints the entry; returns the exit code."""
    parser = command.parser("break-even", __doc__)
    parser.add_argument("results", type=Path, help="results.json of a run of the preset")
    options = parser.parse_args(arguments)
    try:
        print(entry(read_json(options.results)))
    except (OSError, ValueError, KeyError) as error:
        print(f"{options.results}: {error}", file=sys.stderr)
        return 2
    return 0
