"""Clocks: several steps that take turns, and what their times say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["LEAST", "Timed", "quartiles", "time_in_turns"]

LEAST = 5  # turns, however long they take


@dataclass
class Timed:
    """Seconds of every call, by the name of what was called."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # until the device was done
    host: dict[str, list[float]] = field(default_factory=dict)  # until the call had returned


def time_in_turns(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    turns: int,
    *,
    budget: float = float("inf"),
    warm_up: int = 1,
    say: Callable[[int, int, str], None] = lambda turn, turns, name: None,
) -> Timed:
    """Time every step once a turn; each turn starts with another one.

    What the machine does besides falls on all of them alike.

    Args:
        turns: how many, or fewer once `budget` seconds have passed, but no fewer than LEAST.
        warm_up: turns before these whose times are not kept.
        say: is told the turn (negative ones warm up), their number and the step before each call.
    """
    timed = Timed({name: [] for name in steps}, {name: [] for name in steps})
    order = list(steps)
    begin = time.perf_counter()
    for turn in range(-warm_up, turns):
        if turn >= min(LEAST, turns) and time.perf_counter() - begin > budget:
            break
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            say(turn, turns, name)
            _synchronize(device)
            start = time.perf_counter()
            steps[name]()
            returned = time.perf_counter()
            _synchronize(device)
            if turn >= 0:
                timed.seconds[name].append(time.perf_counter() - start)
                timed.host[name].append(returned - start)
    return timed


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """
    >>> quartiles([3.0, 1.0, 2.0])
    (1.5, 2.0, 2.5)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
