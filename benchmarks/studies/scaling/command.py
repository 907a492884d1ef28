"""What the slowest rank costs, from 1 to 4096 of them: ``python -m benchmarks scaling``.

Times a ViT's branches by number of kept rows on this machine, works out with them what a step of
data-parallel training is expected to take under each sampler, trains with a few real processes to
see whether that is right, and writes ``scaling.json`` (what was measured), ``scaling.md`` and a
plot.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from benchmarks.measure import command
from benchmarks.measure.store import read_json
from benchmarks.report.table import printed, window
from benchmarks.studies.scaling.network import Shape, measure_branches, measure_rest
from benchmarks.studies.scaling.processes import ProcessCase, validate
from benchmarks.studies.scaling.report import Costs, write
from benchmarks.studies.study import CPU, Study

SCHEMA = 1


@dataclass(frozen=True)
class Preset:
    """What is timed."""

    shape: Shape
    batches: tuple[int, ...]  # of a rank
    turns: int  # timed steps for each number of kept rows; of large batches fewer
    processes: tuple[int, ...]
    process_case: ProcessCase
    duration: str


SMALL = Shape(width=192, tokens=50, depth=12)
TINY = Shape(width=32, tokens=8, depth=2, head_width=16)
FULL = Preset(
    shape=Shape(width=384, tokens=197, depth=12),
    batches=(8, 32, 128),
    turns=9,
    processes=(2, 4),
    process_case=ProcessCase(SMALL, batch=8, p=0.5, steps=20),
    duration="about four minutes on two idle cores",
)
PRESETS = {
    "full": FULL,
    "quick": replace(
        FULL,
        shape=SMALL,
        batches=(8, 32),
        process_case=replace(FULL.process_case, steps=10),
        duration="about one minute and a half",
    ),
    "smoke": Preset(
        shape=TINY,
        batches=(4,),
        turns=3,
        processes=(2,),
        process_case=ProcessCase(TINY, batch=4, p=0.5, steps=3),
        duration="a few seconds; to see that everything runs",
    ),
}


def measure(shape: Shape, batch: int, turns: int, device: torch.device) -> dict[str, Any]:
    """Every branch and the rest of the step; ready for JSON."""
    # Long steps spread less, and take long.
    branches = measure_branches(shape, batch, max(3, min(turns, turns * 24 // batch)), device)
    print(f"timed: {shape}, B={batch}", flush=True)
    return {"branches": branches, **measure_rest(shape, batch, turns, device)}


def run(preset: Preset, device: torch.device) -> dict[str, Any]:
    """Everything that is measured; ready for JSON."""
    case = preset.process_case
    alone = Costs(measure(case.shape, case.batch, preset.turns, CPU)).seconds
    validation = [validate(case, ranks, alone) for ranks in preset.processes]
    return {
        "shape": asdict(preset.shape),
        "measured": {
            str(batch): measure(preset.shape, batch, preset.turns, device)
            for batch in preset.batches
        },
        "validation": validation,
    }


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Of a process that raised: its traceback, which ends with the error.
    return lines[-1 if isinstance(error, ProcessRaisedException) else 0]


def main(arguments: Sequence[str] | None = None) -> int:
    listed = "; ".join(f"{name}: {preset.duration}" for name, preset in PRESETS.items())
    parser = command.parser("scaling", __doc__, out=Path("benchmarks/out/scaling"))
    parser.add_argument("--preset", choices=PRESETS, default="quick", help=listed)
    parser.add_argument("--device", default="cpu", help="where branches are timed (default cpu)")
    parser.add_argument("--rebuild", action="store_true", help="report and plot of a run, again")
    options = parser.parse_args(arguments)
    written = options.out / "scaling.json"
    if options.rebuild:
        try:
            results = read_json(written)
        except OSError:
            parser.error(f"--rebuild: expected a run in --out, got no {written}")
    else:
        try:
            device = torch.device(options.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            message = f"expected a device at hand, got {options.device!r} ({error})"
            parser.error(f"--device: {message}")
        torch.set_num_threads(1)  # a rank's thread; its clock has to see all of the work
        study = Study("scaling", arguments, options.out, device)
        try:
            results = run(PRESETS[options.preset], device)
        except (RuntimeError, ProcessExitedException, ProcessRaisedException) as error:
            print(f"python -m benchmarks scaling: {_sentence(error)}", file=sys.stderr)
            return 1
        results = study.write(schema=SCHEMA, preset=options.preset, **results)
    # A run of old does not say its command.
    results.setdefault("command", f"python -m benchmarks scaling --preset {results['preset']}")
    print(printed(write(results, options.out), window()))
    return 0
