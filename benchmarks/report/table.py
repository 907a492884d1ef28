"""The one table of the benchmarks, as text that fits its window and as Markdown; the report that
tables stand in; and how figures are written."""

from __future__ import annotations

import io
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

from benchmarks.measure.environment import environment_line

T = TypeVar("T")
NARROWEST = 10  # of a column of words


def window() -> int:
    """Columns to print to: the terminal's or those that COLUMNS asks for, 100 where nobody says."""
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
    """Rows in groups, divided by lines; a title above and notes below."""

    title: str
    columns: Sequence[object]
    notes: Sequence[str] = ()
    names: int = 2  # so many columns at the left are words, the others figures
    groups: list[list[Sequence[object]]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        title: str,
        columns: Mapping[str, Callable[[T], object]],
        groups: Iterable[Iterable[T]],
        notes: Sequence[str] = (),
        names: int = 2,
    ) -> Table:
        """What every column, under its head, shows of every row."""
        cells = [[[cell(row) for cell in columns.values()] for row in rows] for rows in groups]
        return cls(title, list(columns), notes, names, cells)

    def markdown(self) -> str:
        align = ["---" if i < self.names else "---:" for i in range(len(self.columns))]
        rows = [row for group in self.groups for row in group]
        lines = [f"## {self.title}"] if self.title else []
        return "\n\n".join([*lines, markdown(self.columns, rows, align), *self.notes])

    def text(self, width: int) -> str:
        """For a window of that width: words are wrapped, figures are not, nothing is left out.

        What the rows of a group begin with is said once, on a line above them.
        """
        # Here, so that Markdown needs nothing but the standard library.
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table as Drawn
        from rich.text import Text

        groups = [[[str(cell) for cell in row] for row in group] for group in self.groups if group]
        above = self.names > 1 and {len({row[0] for row in group}) for group in groups} == {1}
        made = Drawn(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        least = 0
        for i, name in list(enumerate(map(str, self.columns)))[above:]:
            cells = [row[i] for group in groups for row in group]
            need = max(map(len, [*name.split(), *cells]), default=1)
            words = i < self.names or i == len(self.columns) - 1  # verdicts and reasons come last
            least += 2 + (min(need, NARROWEST) if words else need)
            look: Any = {"justify": "left" if i < self.names else "right", "overflow": "fold"}
            made.add_column(Text(name), **look, width=None if words else need)
        for group in groups:
            for row in group:
                made.add_row(*map(Text, row[above:]))
            made.add_section()
        output = io.StringIO()
        Console(file=output, width=max(width, least), force_terminal=False).print(made)
        lines, heads = [self.title, ""] if self.title else [], iter(groups)
        for line in map(str.rstrip, output.getvalue().splitlines()):
            ruled = line.startswith("\u2500")
            lines.append("-" * len(line) if ruled else line)  # which every terminal can show
            if above and (not line or ruled):
                lines += textwrap.wrap(next(heads)[0][0], width)
        return "\n".join([*lines, *(textwrap.fill(note, width) for note in self.notes)])


def markdown(
    head: Sequence[object], rows: Iterable[Sequence[object]], align: Sequence[str] | None = None
) -> str:
    """A table of whatever can be written.

    >>> print(markdown(["a", "b"], [[1, "x|y"]]))
    | a | b |
    | --- | --- |
    | 1 | x\\|y |
    """

    def cell(value: object) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    lines = [head, align or ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def by_column(rows: Iterable[T], columns: Mapping[str, Callable[[T], object]]) -> str:
    """A table of a line a row: what every column, under its head, shows of it.

    >>> print(by_column([2, 3], {"n": lambda n: n, "square": lambda n: n * n}))
    | n | square |
    | --- | --- |
    | 2 | 4 |
    | 3 | 9 |
    """
    return Table.of("", columns, [rows], names=len(columns)).markdown()


def document(title: str, result: Mapping[str, Any], sections: Iterable[str]) -> str:
    """A report: its title, the command and the machine of the run, and its parts.

    Args:
        result: holds ``command``, ``seconds`` and ``environment``.
    """
    about = f"`{result['command']}`, {result['seconds']:.0f} s"
    head = [f"# {title}", about, environment_line(result["environment"])]
    return "\n\n".join([*head, *sections]) + "\n"


def printed(page: str, width: int) -> str:
    """A Markdown page for a window of that width: its tables drawn, its sentences wrapped.

    >>> print(printed("## Times\\n\\n| case | s |\\n| --- | ---: |\\n| a | 1 |", 80))
    Times
    <BLANKLINE>
    case  s
    -------
    a     1
    """
    lines: list[str] = []
    for is_table, part in groupby(page.splitlines(), lambda text: text.startswith("|")):
        if is_table:
            head, align, *rows = (
                [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", text)[1:-1]]
                for text in part
            )
            names = next((i for i, cell in enumerate(align) if cell.endswith(":")), 1)
            lines.append(Table("", head, names=names, groups=[rows]).text(width))
        else:
            for text in part:
                text = text.lstrip("#").strip() if text.startswith("#") else text
                indent = "  " if text.startswith("- ") else ""
                lines += textwrap.wrap(text, width, subsequent_indent=indent) or [""]
    return "\n".join(lines)
