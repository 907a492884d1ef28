"""Command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import sdkernels  # noqa: F401
except ImportError as error:
    sys.exit(
        f"python -m benchmarks: sdkernels is not importable ({error}); `make bench` builds it first"
    )

import pytest
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks import figures, plots, report, targets
from benchmarks.environment import environment
from benchmarks.models import Case
from benchmarks.presets import PRESETS, Preset, SelectionError, get_preset, select
from benchmarks.training import steps_per_epoch, train

HERE = Path(__file__).parent
RAW_SAMPLES = "pytest-benchmark.json"


class RunFailed(RuntimeError):
    """The timed part did not finish; the message says why."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line arguments; ``--help`` documents the presets and the filter."""
    presets = "\n".join(
        f"  {p.name:10} {p.summary}; {p.duration}, {len(p.names())} cases" for p in PRESETS.values()
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(
            "Checks that all providers compute the same, times them in turns, trains on digits, "
            "and reports."
        ),
        epilog=(
            f"presets:\n{presets}\n\n"
            "filter:\n"
            "  comma-separated shell patterns, matched anywhere in a case's name (see --list)\n"
            "  block             all blocks                 op-*-bwd         backward passes\n"
            "  scatter_add,host  two kinds                  train            the training alone\n\n"
            "exit code:\n"
            "  0    everything ran; a missed target is reported, it is no failure\n"
            "  1    a provider computes something else, or a case failed\n"
            "  2    a bad argument\n"
            "  130  interrupted"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", default="quick", metavar="NAME", help=f"{', '.join(PRESETS)} (default: quick)"
    )
    parser.add_argument("--filter", metavar="EXPR", help="run only the cases whose name matches")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "out",
        metavar="DIR",
        help="for JSON, plots, report (default: benchmarks/out)",
    )
    parser.add_argument("--list", action="store_true", help="list the selected cases and stop")
    options = parser.parse_args(arguments)
    try:
        options.preset = get_preset(options.preset)
        options.selected = select(options.preset, options.filter)
        options.device = torch.device(options.device)
    except (SelectionError, RuntimeError) as error:
        parser.error(str(error))
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device")
    return options


class RunProgress:
    """The progress bars; also a pytest plugin, which hears of every check and finished turn."""

    def __init__(self, console: Console, checks: int, steps: int) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[doing]}"),
            console=console,
            redirect_stdout=False,  # pytest's output is caught by run_cases, the bars go past it
            redirect_stderr=False,
        )
        self.checking = self.bars.add_task(
            "checking", total=checks or None, visible=checks > 0, doing="", start=False
        )
        self.timing = self.bars.add_task(
            "timing", total=None, visible=checks > 0, doing="", start=False
        )
        self.training = self.bars.add_task(
            "training", total=steps or None, visible=steps > 0, doing="", start=False
        )
        self._doing: str | None = None

    def _say(self, task: TaskID, doing: str) -> None:
        """Names what is being done: in the bar, or without a terminal on a line of its own."""
        self.bars.start_task(task)
        self.bars.update(task, doing=doing)
        if not self.console.is_terminal and doing != self._doing:
            self.console.print(f"{self.bars.tasks[task].description}: {doing}", highlight=False)
        self._doing = doing

    def pytest_providers_checked(self, case: Case) -> None:
        self._say(self.checking, case.name)
        self.bars.advance(self.checking)

    def trained(self) -> None:
        """One training step of all variants is done."""
        self._say(self.training, "handwritten digits, all variants in turn")
        self.bars.advance(self.training)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.bars.update(self.timing, total=len(session.items))

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self._say(self.timing, item.callspec.params["turn"].case.name)  # type: ignore[attr-defined]

    def pytest_runtest_logfinish(self) -> None:
        self.bars.advance(self.timing)


def run_cases(
    preset: Preset, expression: str | None, device: torch.device, out: Path, plugin: RunProgress
) -> list[Any]:
    """Checks and times the selected cases under pytest-benchmark; returns its records.

    Raises:
        RunFailed: with pytest's own account of what went wrong.
        KeyboardInterrupt: when interrupted.
    """
    raw = out / RAW_SAMPLES
    raw.unlink(missing_ok=True)
    arguments = [
        str(HERE / "test_speed.py"),
        f"--rootdir={HERE.parent}",
        "--override-ini=addopts=",  # the options of the project's tests are not ours
        "--override-ini=filterwarnings=default",
        "--capture=sys",  # a captured descriptor would swallow the progress bar
        "-p",
        "no:cacheprovider",
        "--exitfirst",
        "--benchmark-only",
        "--benchmark-disable-gc",
        "--benchmark-quiet",
        f"--benchmark-json={raw}",
        f"--benchmark-storage=file://{out.resolve()}",  # unused, but it would make a folder here
        f"--bench-preset={preset.name}",
        f"--bench-device={device}",
        *([f"--bench-filter={expression}"] if expression else []),
    ]
    account = io.StringIO()
    with contextlib.redirect_stdout(account), contextlib.redirect_stderr(account):
        code = pytest.main(arguments, plugins=[plugin])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code != pytest.ExitCode.OK:
        raise RunFailed(account.getvalue().strip())
    return json.loads(raw.read_text())["benchmarks"]


def main(arguments: list[str] | None = None) -> int:
    """Runs, reports, and returns the exit code."""
    options = parse_arguments(arguments)
    preset: Preset = options.preset
    if options.list:
        print("\n".join(options.selected))
        return 0
    # The file is named because sys.stdout belongs to pytest while the bars are drawn. In a log file
    # the width is unknown: lines too long for a reader's window are better than broken tables.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150, record=True)
    options.out.mkdir(parents=True, exist_ok=True)
    env = environment(options.device)
    console.print(
        f"preset {preset.name} ({preset.duration}), {len(options.selected)} cases", highlight=False
    )

    case = preset.training
    trains = case is not None and case.name in options.selected
    steps = steps_per_epoch(case) * case.epochs if case is not None and trains else 0
    start = time.perf_counter()
    progress = RunProgress(console, checks=len(options.selected) - trains, steps=steps)
    records, training = [], None
    try:
        with progress.bars:
            if len(options.selected) > trains:
                records = run_cases(preset, options.filter, options.device, options.out, progress)
            if case is not None and trains:
                training = figures.merge_training(train(case, options.device, progress.trained))
    except RunFailed as error:
        console.print(
            f"[bold red]The run failed; no figures are reported.[/]\n{escape(str(error))}",
            highlight=False,
        )
        return 1
    except KeyboardInterrupt:
        console.print(
            f"Interrupted; the samples taken until then are in {options.out / RAW_SAMPLES}",
            highlight=False,
        )
        return 130

    cases = figures.collect(records)
    outcomes = targets.outcomes(cases)
    result = {
        "schema": figures.SCHEMA,
        "preset": preset.name,
        "filter": options.filter,
        "device": str(options.device),
        "environment": env,
        "seconds": time.perf_counter() - start,
        "cases": cases,
        "training": training,
        "reach": [
            asdict(outcome) | {"met": outcome.met, "gap": outcome.gap} for outcome in outcomes
        ],
    }
    console.print()
    report.print_report(console, result, outcomes)
    (options.out / "results.json").write_text(json.dumps(result, indent=1))
    written = [
        options.out / "results.json",
        *plots.save_plots(result, options.out),
        options.out / "report.txt",
    ]
    console.print(
        f"\n{result['seconds']:.0f} s. Written: {', '.join(str(path) for path in written)}",
        highlight=False,
    )
    (options.out / "report.txt").write_text(console.export_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
