"""Report and plots of a run, from its results: ``python -m benchmarks report DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import plots, report


def write(result: dict[str, Any], directory: Path) -> list[Path]:
    """Plots and ``report.md``; returns the paths."""
    drawn = plots.save_plots(result, directory)
    page = directory / "report.md"
    page.write_text(report.markdown(result, drawn))
    return [page, *drawn]


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds results.json")
    options = parser.parse_args(arguments)
    try:
        result = report.read(options.directory / "results.json")
    except report.BadResults as error:
        print(f"python -m benchmarks report: {error}", file=sys.stderr)
        return 2
    for path in write(result, options.directory):
        print(path)
    return 0
