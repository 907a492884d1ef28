"""Report and plots of a run, from its results: ``python -m benchmarks report DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import command
from benchmarks.report import page, plots
from benchmarks.report.summary import summary
from benchmarks.report.table import window


def write(result: dict[str, Any], directory: Path, show_targets: bool = False) -> int:
    """Writes ``report.md`` and the plots, and prints the end of a run.

    Returns the exit code: 3 where targets are to be shown, and one was missed.
    """
    drawn = plots.save_plots(result, directory)
    (directory / "report.md").write_text(page.markdown(result, drawn))
    print(summary(result, directory, [path.name for path in drawn]))
    if not show_targets:
        return 0
    outcomes = page.outcomes_of(result)
    print(f"\n{page.targets_table(outcomes).text(window())}")
    missed = sum(outcome.missed for outcome in outcomes)
    print(f"\n{len(outcomes)} targets, {missed} missed")
    return 3 if missed else 0


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = command.parser("report", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds results.json")
    parser.add_argument(
        "--targets", action="store_true", help="print them; exit code 3 where one is missed"
    )
    options = parser.parse_args(arguments)
    result = page.read(options.directory / "results.json")
    return write(result, options.directory, options.targets)
