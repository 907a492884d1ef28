"""The one timed test; ``conftest.py`` makes it one test per case, repeat and provider."""

from __future__ import annotations

from typing import Any

from benchmarks.conftest import Runner, Turn


def test_speed(turn: Turn, runner: Runner, benchmark: Any) -> None:
    runner.run(turn, benchmark)
