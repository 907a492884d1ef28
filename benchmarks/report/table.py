"""The one table of the benchmarks, as text that fits its window and as Markdown; and how figures
are written."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

NARROWEST = 14  # of a column of words


def window() -> int:
    """Columns to print to: the terminal's, or those that COLUMNS asks for; 100 where nobody says."""
    return shutil.get_terminal_size((100, 24)).columns


def seconds(value: float | None) -> str:
    """A time with the unit that suits it.

    >>> seconds(0.00123)
    '1.23 ms'
    """
    if value is None:
        return "-"
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    return f"{value * factor:#.3g}".rstrip(".") + f" {unit}"


def percent(value: float | None, digits: int = 1) -> str:
    """
    >>> percent(0.1234), percent(-0.00001), percent(None)
    ('12.3 %', '0.0 %', '-')
    """
    return "-" if value is None else f"{100 * value + 0.0:.{digits}f} %".replace("-0.0 %", "0.0 %")


def ratio(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def spread(value: float) -> str:
    return f"\u00b1{100 * value:.1f} %"


@dataclass
class Table:
    """Rows in groups, divided by lines; a title above and notes below.

    Args:
        names: so many columns at the left are words, the others figures.
    """

    title: str
    columns: Sequence[str]
    notes: Sequence[str] = ()
    names: int = 2
    groups: list[list[Sequence[str]]] = field(default_factory=list)

    def markdown(self) -> str:
        align = ["---" if i < self.names else "---:" for i in range(len(self.columns))]
        rows = [row for group in self.groups for row in group]
        lines = [f"## {self.title}"] if self.title else []
        return "\n\n".join([*lines, markdown(self.columns, rows, align), *self.notes])

    def text(self, width: int) -> str:
        """For a window of that width: words are wrapped until it fits, and nothing is left out.

        What the rows of a group begin with is said once, on a line above them.
        """
        above = self.names > 1 and all(len({row[0] for row in group}) == 1 for group in self.groups)
        first = int(above)
        head = [str(column) for column in self.columns[first:]]
        body = [[list(map(str, row[first:])) for row in group] for group in self.groups]
        wide = [
            max([longest_word(name), *(len(row[i]) for group in body for row in group)])
            for i, name in enumerate(head)
        ]
        words = [*range(self.names - first), len(head) - 1]  # verdicts and reasons come last
        while sum(wide) + 2 * len(wide) > width:
            widest = max(words, key=lambda i: wide[i])
            if wide[widest] <= NARROWEST:
                break
            wide[widest] -= 1

        def line(cells: Sequence[str]) -> str:
            wrapped = [textwrap.wrap(c, w) or [""] for c, w in zip(cells, wide, strict=True)]
            height = max(map(len, wrapped))
            filled = [cell + [""] * (height - len(cell)) for cell in wrapped]
            aligned = [
                [part.ljust(w) if i < self.names - first else part.rjust(w) for part in cell]
                for i, (cell, w) in enumerate(zip(filled, wide, strict=True))
            ]
            return "\n".join("  ".join(parts).rstrip() for parts in zip(*aligned, strict=True))

        rule = "-" * min(sum(wide) + 2 * len(wide) - 2, width)
        lines = [line(head), rule]
        for group, cells in zip(self.groups, body, strict=True):
            if above:
                lines += textwrap.wrap(str(group[0][0]), width)
            lines += [line(row) for row in cells]
            lines.append(rule if not above else "")
        notes = [textwrap.fill(note, width) for note in self.notes]
        return "\n".join([self.title, "", *lines, *notes]).strip("\n")


def longest_word(text: str) -> int:
    return max(map(len, text.split()), default=1)


def markdown(
    head: Sequence[object], rows: Iterable[Sequence[object]], align: Sequence[str] | None = None
) -> str:
    """A table of whatever can be written.

    >>> print(markdown(["a", "b"], [[1, "x|y"]]))
    | a | b |
    | --- | --- |
    | 1 | x\\|y |
    """

    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    lines = [head, align or ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
