"""Command line of the paper's experiments: ``python -m benchmarks.paper --help``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.measure.ending import BadFolder, in_one_sentence, out_folder
from benchmarks.measure.environment import environment
from benchmarks.measure.store import read_json, write_json
from benchmarks.paper import report
from benchmarks.paper.claims import CLAIMS, EFFORTS, Lab
from benchmarks.paper.data import SETS, DataError, load
from benchmarks.paper.training import Recipe, Trainer
from benchmarks.report.table import printed, window

SCHEMA = 2
OUT = Path(__file__).parent / "out"
CHOICES: dict[str, tuple[Any, ...]] = {
    "schedule": ("linear", "uniform"),
    "mode": ("row", "batch"),
    "rescale": ("eval", "train"),
    "impl": ("fused", "naive", "constant"),
    "amp": ("bf16", "fp16"),
}
HELP = {
    "depth": "layers, 6n + 2",
    "schedule": "survival of the blocks: falls linearly, or the same for all",
    "p-last": "survival probability of the last block",
    "mode": "a gate for the mini-batch (the paper's) or for each sample",
    "rescale": "eval: evaluation multiplies by the survival probability (the paper's rule)",
    "impl": "fused; naive masking; constant depth",
    "projection": "1x1 convolutions in shortcuts that change shape",
    "milestones": "shares of the epochs after which the rate is divided by 10",
    "warmup": "epochs at a tenth of the rate first",
    "amp": "autocast",
}


def _option(field: str) -> str:
    return {"implementation": "impl"}.get(field, field.replace("_", "-"))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line arguments; ``--help`` of each command documents them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "--dataset", choices=("digits", *SETS), default="digits", help="(default: digits)"
    )
    data.add_argument("--data", type=Path, metavar="DIR", help="folder of CIFAR's binary version")
    data.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    train = commands.add_parser(
        "train",
        parents=[data],
        help="train one network; started again it goes on from its checkpoint",
        description="Defaults are the paper's for ResNet-110. Under torchrun all processes train "
        "one network, the batch shared among them.",
    )
    for field in fields(Recipe):
        name, default = _option(field.name), field.default
        text = f"{HELP.get(name, '')} (default: {default})".strip()
        if isinstance(default, bool):
            train.add_argument(f"--{name}", action="store_true", help=HELP.get(name))
        elif isinstance(default, tuple):
            train.add_argument(f"--{name}", type=float, nargs="*", default=default, help=text)
        else:
            kind, choices = str if default is None else type(default), CHOICES.get(name)
            train.add_argument(f"--{name}", type=kind, default=default, choices=choices, help=text)
    train.add_argument("--out", type=Path, default=OUT / "run", metavar="DIR", help="logs")
    train.add_argument(
        "--checkpoint-every", type=int, default=0, metavar="STEPS", help="0: every epoch (default)"
    )

    presets = "\n".join(f"  {effort.name:9} {effort.duration}" for effort in EFFORTS.values())
    claim = commands.add_parser(
        "claim",
        parents=[data],
        help="run experiments; started again they reuse the networks that are trained",
        epilog=f"presets:\n{presets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    claim.add_argument("names", nargs="+", choices=("all", *CLAIMS), metavar="NAME")
    claim.add_argument("--preset", choices=tuple(EFFORTS), default="quick")
    claim.add_argument("--out", type=Path, default=OUT, metavar="DIR")

    again = commands.add_parser(
        "report", help="rebuild the report and the plots of DIR/claims.json"
    )
    again.add_argument("directory", type=Path, metavar="DIR")
    return parser.parse_args(arguments)


def _train(options: argparse.Namespace, device: torch.device) -> int:
    values = {f.name: getattr(options, _option(f.name).replace("-", "_")) for f in fields(Recipe)}
    values["milestones"] = tuple(values["milestones"])
    recipe = Recipe(**values)
    data = load(options.dataset, options.data, recipe.seed)
    trainer = Trainer(recipe, data, device, options.out, options.checkpoint_every)
    is_first = trainer.rank == 0
    bars = Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        disable=not is_first,
    )
    with bars:
        total = recipe.epochs * trainer.steps_per_epoch
        task = bars.add_task("", total=total, completed=trainer.step, epoch=0, state="")

        def advance(loss: float) -> None:
            state = f"loss {loss:.3f}"
            if trainer.epochs:
                state += f", validation error {100 * trainer.epochs[-1]['validation_error']:.2f} %"
            epoch = f"{len(trainer.epochs) + 1}/{recipe.epochs}"
            bars.update(task, completed=trainer.step, epoch=epoch, state=state)

        trainer.advance = advance
        record = trainer.run()
    if is_first:
        print(
            f"test error at the best validation epoch: {100 * record['test_error']:.2f} %; "
            f"checkpoint and logs in {options.out}"
        )
    return 0


def _claim(options: argparse.Namespace, device: torch.device, command: str) -> int:
    effort = EFFORTS[options.preset]
    names = list(CLAIMS) if "all" in options.names else list(dict.fromkeys(options.names))
    console = Console(file=sys.stdout)
    env = environment(device)
    data = load(options.dataset, options.data)
    start = time.perf_counter()
    out_folder(options.out)

    def advance(doing: str) -> None:
        passed = time.perf_counter() - start
        console.print(f"{passed:6.0f} s  {doing}", highlight=False)

    lab = Lab(effort, data, device, options.out / "runs", advance)
    result = {
        "schema": SCHEMA,
        "command": command,
        "preset": effort.name,
        "data": data.name,
        "environment": env,
        "claims": {},
    }
    for name in names:
        advance(f"claim {name}")
        result["claims"][name] = CLAIMS[name](lab)  # type: ignore[index]
        result["seconds"] = time.perf_counter() - start
        write_json(options.out / "claims.json", result)
    written = report.write(result, options.out)
    print(printed((options.out / "report.md").read_text(), window()))
    print(f"Written: {', '.join(map(str, written))}")
    return 0


def _report(directory: Path) -> int:
    path = directory / "claims.json"
    result = read_json(path)
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {result.get('schema')!r}")
    for written in report.write(result, directory):
        print(written)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns 0, 2 for bad input, 130 where it was interrupted, or 141 where nobody
    reads what it prints."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return in_one_sentence("python -m benchmarks.paper", lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        if options.command == "report":
            return _report(options.directory)
        device = torch.device(options.device)
        if options.command == "train":
            return _train(options, device)
        return _claim(options, device, shlex.join(["python", "-m", "benchmarks.paper", *arguments]))
    except (BadFolder, BrokenPipeError):
        raise
    except (DataError, ValueError, OSError) as error:
        print(f"python -m benchmarks.paper: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
