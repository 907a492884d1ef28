"""The one timed test; ``conftest.py`` makes it one test per case, repeat and provider."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.conftest import Turn


def test_speed(turn: Turn, time_turn: Callable[[Turn], None]) -> None:
    time_turn(turn)
