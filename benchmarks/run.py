"""A run of a preset: checks, times, trains and reports."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import COMMANDS
from benchmarks.cases.presets import PRESETS, SelectionError, get_preset, select
from benchmarks.cases.training import train
from benchmarks.measure import memory
from benchmarks.measure.command import command_line
from benchmarks.measure.ending import out_folder
from benchmarks.measure.environment import environment
from benchmarks.measure.store import Store, write_json
from benchmarks.report import figures, rebuild, targets

HERE = Path(__file__).parent


class RunFailed(RuntimeError):
    """The timed part did not finish; the message says why."""


EPILOG = """\
commands:
  python -m benchmarks [options]         run a preset
{commands}
  python -m benchmarks.paper COMMAND     the paper's claims
  (each with --help)

presets:
{presets}

filter:
  comma-separated shell patterns, matched anywhere in a case's name (see --list)
  block             all blocks                 op-*-bwd         backward passes
  scatter_add,host  two kinds                  train            the training alone

A run that was stopped goes on where it was when it is started again with the same
arguments, versions and commit on the same machine.

exit code:
  0    everything ran
  1    a provider computes something else, or a case failed
  2    a bad argument
  3    with --targets: one was missed
  130  interrupted; what was measured is reported and kept"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line arguments; ``--help`` documents the presets and the filter."""
    commands = [f"  python -m benchmarks {name:17} {text}" for name, (text, _) in COMMANDS.items()]
    presets = [f"  {preset}, {len(preset.names())} cases" for preset in PRESETS.values()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Checks that all providers compute the same, times them in turns, trains on "
        "digits, and reports.",
        epilog=EPILOG.format(commands="\n".join(commands), presets="\n".join(presets)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, ", ".join(PRESETS)
    add("--preset", default="quick", metavar="NAME", help=f"{names} (default: quick)")
    add("--filter", metavar="EXPR", help="run only the cases whose name matches")
    add("--device", default="cpu", help="cpu (default) or cuda")
    text = "for JSON, plots, report (default: benchmarks/out)"
    add("--out", type=Path, default=HERE / "out", metavar="DIR", help=text)
    add("--fresh", action="store_true", help="start over where an unfinished run lies in DIR")
    add("--targets", action="store_true", help="print them; exit code 3 where one is missed")
    add("--list", action="store_true", help="list the selected cases and stop")
    options = parser.parse_args(arguments)
    try:
        options.preset = get_preset(options.preset)
        options.selected = select(options.preset, options.filter)
        options.device = torch.device(options.device)
    except (SelectionError, RuntimeError) as error:
        parser.error(str(error))
    if options.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {options.device}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device")
    return options


class RunProgress:
    """What is being timed: a bar on a terminal, elsewhere a line a case.

    Also a pytest plugin, which hears of every turn.
    """

    def __init__(self, console: Console, todo: list[str]) -> None:
        self.console, self.todo = console, todo
        self.bars = Progress(
            *(BarColumn(12), MofNCompleteColumn(), TimeRemainingColumn()),
            TextColumn("{task.description}"),
            console=console,
            redirect_stdout=False,  # pytest's output is caught by run_cases, the bars go past it
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self.task = self.bars.add_task("", total=len(self.todo))
        self.doing = ""

    def say(self, doing: str) -> None:
        """Names what is being done, once."""
        if doing == self.doing:
            return
        self.doing, number = doing, self.todo.index(doing)
        self.bars.update(self.task, completed=number, description=doing)
        if self.console.is_terminal:
            return
        line = f"timing {number + 1}/{len(self.todo)}: {doing}"
        try:
            print(line, file=self.console.file, flush=True)
        except BrokenPipeError:
            raise KeyboardInterrupt from None  # what was measured is kept; see main

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say(nodeid.partition("[")[2].rpartition("-repeat")[0])


def run_cases(options: argparse.Namespace, store: Store, plugin: RunProgress) -> None:
    """Checks and times the selected cases under pytest-benchmark, into the store.

    Raises:
        RunFailed: with pytest's own account of what went wrong.
        KeyboardInterrupt: when interrupted.
    """
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
        # Unused, but it would make a folder here.
        f"--benchmark-storage=file://{store.folder.resolve()}",
        f"--bench-store={store.folder.resolve()}",
        f"--bench-preset={options.preset.name}",
        f"--bench-device={options.device}",
        *([f"--bench-filter={options.filter}"] if options.filter else []),
    ]
    account = io.StringIO()
    with contextlib.redirect_stdout(account), contextlib.redirect_stderr(account):
        code = pytest.main(arguments, plugins=[plugin])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    # With every case in the store already there is no test left.
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RunFailed(account.getvalue().strip())


def measure(options: argparse.Namespace, store: Store, progress: RunProgress) -> None:
    """Everything that the store does not hold yet."""
    training = options.preset.training
    with progress.bars:
        if any(case.name in progress.todo for case in options.preset.cases):
            with memory.host_memory_limit():
                run_cases(options, store, progress)
        if training is not None and training.name in progress.todo:
            say = partial(progress.say, training.name)
            store.save(training.name, train(training, options.device, say))


def assemble(options: argparse.Namespace, store: Store, **about: Any) -> dict[str, Any]:
    """The results of what the store holds, as ``SCHEMA.md`` describes them."""
    preset = options.preset
    records = (store.load(case.name) for case in preset.cases if case.name in options.selected)
    cases = figures.collect(record for record in records if record is not None)
    training = None if preset.training is None else store.load(preset.training.name)
    reach = [asdict(each) | {"met": each.met, "gap": each.gap} for each in targets.outcomes(cases)]
    return {
        "schema": figures.SCHEMA,
        **about,
        "cases": cases,
        "training": None if training is None else figures.merge_training(training),
        "reach": reach,
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs a preset, reports, and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    preset = options.preset
    if options.list:
        print("\n".join(options.selected))
        return 0
    # The file is named because pytest takes sys.stdout away while the bars are drawn.
    console = Console(file=sys.stdout)
    env = environment(options.device) | {"keeps_memory": memory.keep_freed_memory()}
    settings = {"preset": preset.name, "filter": options.filter, "device": str(options.device)}
    store = Store.open(out_folder(options.out), settings, env, options.fresh)
    todo = [name for name in options.selected if store.load(name) is None]
    done = len(options.selected) - len(todo)
    print(
        f"preset {preset.name}: {len(options.selected)} cases, {preset.duration}"
        + (f"; {done} of them measured before the run was stopped" if done else ""),
        flush=True,
    )

    start = time.perf_counter() - (store.load("seconds") or 0.0)
    complete = True
    progress = RunProgress(console, todo)
    try:
        measure(options, store, progress)
    except RunFailed as error:
        store.discard()
        print(f"The run failed; no figures are reported.\n{error}")
        return 1
    except KeyboardInterrupt:
        complete = False

    seconds = time.perf_counter() - start
    store.save("seconds", seconds)
    about = settings | {"command": command_line("", arguments), "complete": complete}
    result = assemble(options, store, **about, environment=env, seconds=seconds)
    code = 0
    if result["cases"] or result["training"]:
        write_json(options.out / "results.json", result)
        if not complete:
            # Where nobody reads what is printed, this is the end.
            print("\nInterrupted; what was measured until then:", flush=True)
        code = rebuild.write(result, options.out, options.targets and complete)
    if not complete:
        return 130
    store.discard()
    return code
