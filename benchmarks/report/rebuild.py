"""Report and plots of a run, from its results: ``python -m benchmarks report DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import command
from benchmarks.report import page, plots
from benchmarks.report.summary import summary
from benchmarks.report.table import window


def write(result: dict[str, Any], directory: Path) -> None:
    """Writes ``report.md`` and the plots, and prints the end of a run."""
    drawn = plots.save_plots(result, directory)
    (directory / "report.md").write_text(page.markdown(result, drawn))
    print(summary(result, directory, [path.name for path in drawn]))


def print_targets(result: dict[str, Any]) -> bool:
    """Every target beside what was measured; returns whether none was missed."""
    outcomes = page.outcomes_of(result)
    print(f"\n{page.targets_table(outcomes).text(window())}")
    missed = sum(outcome.missed for outcome in outcomes)
    print(f"\n{len(outcomes)} targets, {missed} missed")
    return not missed


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 3 where a target was missed that was asked for."""
    parser = command.parser("report", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds results.json")
    parser.add_argument(
        "--targets", action="store_true", help="print them; exit code 3 where one is missed"
    )
    options = parser.parse_args(arguments)
    result = page.read(options.directory / "results.json")
    write(result, options.directory)
    return 0 if not options.targets or print_targets(result) else 3
