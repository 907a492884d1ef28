"""Command line of the paper's experiments: ``python -m benchmarks.paper --help``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.measure.ending import in_one_sentence, out_folder
from benchmarks.measure.environment import environment
from benchmarks.measure.store import read_json, write_json
from benchmarks.paper import report
from benchmarks.paper.claims import CLAIMS, EFFORTS, Lab
from benchmarks.paper.data import SETS, load
from benchmarks.paper.training import Recipe, Trainer
from benchmarks.report.table import percent, printed, window

SCHEMA = 2
OUT = Path(__file__).parent / "out"


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line arguments; ``--help`` of each command documents them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "--dataset",
        choices=("digits", *SETS),
        default="digits",
        help="scikit-learn's, or from --data",
    )
    data.add_argument("--data", type=Path, metavar="DIR", help="where torchvision keeps CIFAR")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    data.add_argument("--device", type=_device, default=default)

    train = commands.add_parser(
        "train",
        parents=[data],
        help="train one network; started again it goes on from its checkpoint",
        description="Defaults are the paper's for ResNet-110. Under torchrun all processes train "
        "one network, the batch shared among them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for each in fields(Recipe):
        option = {"implementation": "impl"}.get(each.name, each.name.replace("_", "-"))
        how: dict[str, Any] = {"choices": each.metadata["choices"]}
        if isinstance(each.default, bool):
            how = {"action": "store_true"}
        elif isinstance(each.default, tuple):
            how = {"type": float, "nargs": "*"}
        elif isinstance(each.default, (int, float)):
            how["type"] = type(each.default)
        text = each.metadata["help"]
        train.add_argument(f"--{option}", dest=each.name, default=each.default, help=text, **how)
    train.add_argument("--out", type=Path, default=OUT / "run", metavar="DIR")
    train.add_argument(
        "--checkpoint-every", type=int, default=0, metavar="STEPS", help="0: every epoch"
    )

    presets = "\n".join(f"  {name:9} {effort.duration}" for name, effort in EFFORTS.items())
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


def _train(options: argparse.Namespace) -> int:
    values = {each.name: getattr(options, each.name) for each in fields(Recipe)}
    recipe = Recipe(**values | {"milestones": tuple(options.milestones)})
    data = load(options.dataset, options.data, recipe.seed)
    trainer = Trainer(recipe, data, options.device, options.out, options.checkpoint_every)
    is_first = trainer.rank == 0
    with Progress(disable=not is_first) as bars:
        task = bars.add_task("", total=recipe.epochs * trainer.steps_per_epoch)

        def advance(loss: float) -> None:
            state = f"epoch {len(trainer.epochs) + 1}/{recipe.epochs}, loss {loss:.3f}"
            if trainer.epochs:
                state += f", validation error {percent(trainer.epochs[-1]['validation_error'], 2)}"
            bars.update(task, completed=trainer.step, description=state)

        trainer.advance = advance
        error = percent(trainer.run()["test_error"], 2)
    if is_first:
        where = f"checkpoint and run.json in {options.out}"
        print(f"test error at the best validation epoch: {error}; {where}")
    return 0


def _claim(options: argparse.Namespace) -> int:
    names = list(CLAIMS) if "all" in options.names else list(dict.fromkeys(options.names))
    env = environment(options.device)
    data = load(options.dataset, options.data)
    start = time.perf_counter()
    out_folder(options.out)

    def advance(doing: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {doing}", flush=True)

    lab = Lab(EFFORTS[options.preset], data, options.device, options.out / "runs", advance)
    result = {
        "schema": SCHEMA,
        "command": options.called,
        "preset": options.preset,
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


def _report(options: argparse.Namespace) -> int:
    path = options.directory / "claims.json"
    result = read_json(path)
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {result.get('schema')!r}")
    print(*report.write(result, options.directory), sep="\n")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns 0, 2 for bad input, 130 where it was interrupted, or 141 where nobody
    reads what it prints."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    options.called = shlex.join(["python", "-m", "benchmarks.paper", *arguments])
    run = {"train": _train, "claim": _claim, "report": _report}[options.command]
    try:
        return in_one_sentence(
            "python -m benchmarks.paper", partial(run, options), ValueError, OSError
        )
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
