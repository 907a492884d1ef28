"""One line on stderr that says what is being done."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

__all__ = ["Progress"]


class Progress:
    """A bar where stderr is a terminal, elsewhere a line for each thing that is done.

    Attributes:
        text: what is being done.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.text = "starting"
        self.begun = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.shown and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        self.text = text
        self._show(text)

    def turn(self, turn: int, turns: int, name: str) -> None:
        """Timing: the turn (negative ones warm up), of how many, and whose step it is."""
        is_new = not self.text.startswith("timing")
        self.text = f"timing the {name} model"
        if turn < 0:
            self.begun = time.perf_counter()
            if is_new:
                self._show("timing both in turns, warming up")
            return
        if not sys.stderr.isatty():
            if turn == 0 and name == "unpatched":
                self._show(f"timing both in turns, {turns} at most")
            return
        left = (time.perf_counter() - self.begun) / max(turn, 1) * (turns - turn)
        about = f", at most {left:.0f} s left" if turn else ""
        bar = ("#" * round(20 * turn / turns)).ljust(20, ".")
        self._show(f"[{bar}] timing both in turns, {turn + 1} of {turns}{about}")

    def _show(self, text: str) -> None:
        if not self.shown:
            return
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
