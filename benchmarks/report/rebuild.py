"""Report and plots of a run, from its results: ``python -m benchmarks report DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import plots, tables


def write(result: dict[str, Any], directory: Path, console: Console) -> list[Path]:
    """Prints the report; writes it as ``report.txt`` and ``report.md``, and the plots.

    Args:
        console: one that records what it prints.
    """
    tables.print_report(console, result, tables.outcomes_of(result))
    drawn = plots.save_plots(result, directory)
    text, page = directory / "report.txt", directory / "report.md"
    text.write_text(console.export_text(clear=False))
    page.write_text(tables.markdown(result, drawn))
    return [text, page, *drawn]


def make_console() -> Console:
    """In a log file the width is unknown: lines too long for a reader's window are better than
    broken tables."""
    # The file is named because pytest takes sys.stdout away while the progress bars are drawn.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150, record=True)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds results.json")
    options = parser.parse_args(arguments)
    try:
        result = tables.read(options.directory / "results.json")
    except tables.BadResults as error:
        print(f"python -m benchmarks report: {error}", file=sys.stderr)
        return 2
    written = write(result, options.directory, make_console())
    print(f"\nWritten: {', '.join(map(str, written))}")
    return 0
