"""What the slowest rank costs, from 1 to 4096 of them: ``python -m benchmarks scaling``.

Times a ViT's branches by number of kept rows on this machine, simulates the steps of data-parallel
training with them under each law of ``simulation.py``, holds the simulation against real processes,
and writes ``scaling.json``, ``scaling.md`` and plots.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import command
from benchmarks.measure.correctness import ProviderMismatch
from benchmarks.measure.ending import out_folder
from benchmarks.measure.environment import environment
from benchmarks.measure.store import read_json, write_json
from benchmarks.report.table import printed, window
from benchmarks.studies.scaling.model import (
    KIND_NAMES,
    Line,
    Shape,
    clock_of,
    fit_line,
    measure_branches,
    measure_rest,
)
from benchmarks.studies.scaling.plots import save_plots
from benchmarks.studies.scaling.processes import SWEEP, ProcessCase, launch
from benchmarks.studies.scaling.report import report
from benchmarks.studies.scaling.simulation import (
    KINDS,
    SAMPLERS,
    SCHEDULES,
    SYNCS,
    Floats,
    Layers,
    bernoulli_distribution,
    largest_of,
    simulate,
    summarise_law,
)
from benchmarks.studies.scaling.validation import compare, table_of_sweep
from sdkernels import uniform

SCHEMA = 1
RUN_STEPS = 100_000  # of a training run, for the memory that has to be there all along
LAW_RANKS = 16


@dataclass(frozen=True)
class Preset:
    """What is timed and how much is simulated."""

    shape: Shape
    batches: tuple[int, ...]  # of a rank
    probabilities: tuple[float, ...]  # of the last branch; of every branch if uniform
    ranks: tuple[int, ...]
    steps: int  # simulated, of the largest number of ranks
    total_steps: int  # the same for the sampler "total", which takes longest to draw
    turns: int  # timed steps for each number of kept rows; of large batches fewer
    processes: tuple[int, ...]
    process_case: ProcessCase
    duration: str


FULL = Preset(
    shape=Shape(width=384, tokens=197, depth=12),
    batches=(8, 32, 128),
    probabilities=(0.1, 0.3, 0.5),
    ranks=(1, 2, 4, 8, 16, 64, 256, 1024, 4096),
    steps=16,
    total_steps=2,
    turns=9,
    processes=(2, 4),
    process_case=ProcessCase(Shape(width=192, tokens=50, depth=12), batch=8, p=0.5, steps=20),
    duration="about four minutes on two idle cores",
)
PRESETS = {
    "full": FULL,
    "quick": replace(
        FULL,
        shape=Shape(width=192, tokens=50, depth=12),
        batches=(8, 32),
        steps=8,
        total_steps=2,
        process_case=replace(FULL.process_case, steps=10),
        duration="about one minute and a half",
    ),
    "smoke": Preset(
        shape=Shape(width=32, tokens=8, depth=2, head_width=16),
        batches=(4,),
        probabilities=(0.0, 0.5),
        ranks=(1, 2, 8),
        steps=4,
        total_steps=2,
        turns=3,
        processes=(2,),
        process_case=ProcessCase(Shape(32, 8, 2, head_width=16), batch=4, p=0.5, steps=3),
        duration="a few seconds; to see that everything runs",
    ),
}


@dataclass(frozen=True)
class Costs:
    """Seconds (or bytes) of a rank's step in a batch of a size: of a branch of each kind by number
    of kept rows, and of everything else."""

    table: Floats  # [kinds, batch + 1]
    lines: tuple[Line, ...]  # the same as straight lines, one a kind
    rest: float
    full: float  # of a branch of each kind together where nothing is compacted

    @property
    def line_table(self) -> Floats:
        counts = np.arange(self.table.shape[1])
        return np.array([line.fixed + line.per_row * counts for line in self.lines])

    def ideal(self, layers: Layers, table: Floats) -> float:
        """A step on the mean number of rows in every branch: what a perfect balance costs."""
        counts = np.arange(layers.batch + 1)
        branches = [
            np.interp(layers.batch * keep, counts, table[i % KINDS])
            for i, keep in enumerate(layers.keep)
        ]
        return self.rest + float(sum(branches))


def table_of(measured: dict[str, Any], key: str) -> Floats:
    """[batch + 1]: the measured values, with straight lines between them."""
    table: Floats = np.interp(np.arange(measured["batch"] + 1), measured["counts"], measured[key])
    return table


def measure(
    shape: Shape, batches: Sequence[int], turns: int, device: torch.device
) -> dict[int, dict[str, Any]]:
    """Every branch and the rest of the step, by batch; ready for JSON."""
    measured = {}
    for batch in batches:
        # Long steps spread less, and take long.
        fewer = max(2, min(turns, turns * 24 // batch))
        branches = measure_branches(shape, batch, fewer, device)
        for branch in branches:
            branch["line"] = asdict(fit_line(branch["counts"], branch["seconds"]))
            branch["saved_line"] = asdict(fit_line(branch["counts"], branch["saved_bytes"]))
            line = Line(**branch["line"])
            branch["residuals"] = [
                None if k == 0 else seconds / (line.fixed + line.per_row * k) - 1
                for k, seconds in zip(branch["counts"], branch["seconds"], strict=True)
            ]
        measured[batch] = {"branches": branches, **measure_rest(shape, batch, turns, device)}
        print(f"timed: {shape.name}, B={batch}", flush=True)
    return measured


def costs_from(measured: dict[str, Any]) -> tuple[Costs, Costs]:
    """Seconds and bytes of a batch."""
    branches = measured["branches"]
    seconds = Costs(
        np.array([table_of(branch, "seconds") for branch in branches]),
        tuple(Line(**branch["line"]) for branch in branches),
        measured["ends_seconds"] + measured["optimizer_seconds"],
        sum(branch["at_half"]["naive"] for branch in branches),
    )
    saved = Costs(
        np.array([table_of(branch, "saved_bytes") for branch in branches]),
        tuple(Line(**branch["saved_line"]) for branch in branches),
        0.0,
        sum(branch["saved_bytes"][-1] for branch in branches),
    )
    return seconds, saved


def simulate_case(
    preset: Preset,
    batch: int,
    p: float,
    schedule: str,
    seconds: Costs,
    saved: Costs,
) -> dict[str, Any]:
    """One batch, schedule and drop probability under every sampler; ready for JSON."""
    layers = Layers(batch, tuple(SCHEDULES[schedule](KINDS * preset.shape.depth, p)))
    ideal, ideal_bytes = seconds.ideal(layers, seconds.table), saved.ideal(layers, saved.table)
    ideal_of_line = seconds.ideal(layers, seconds.line_table)
    case: dict[str, Any] = {
        "batch": batch,
        "p": p,
        "schedule": schedule,
        "branches": len(layers.drop_probs),
        "mean_keep": float(layers.keep.mean()),
        "ideal_seconds": ideal,
        "naive_seconds": seconds.rest + preset.shape.depth * seconds.full,
        "ideal_bytes": ideal_bytes,
        "full_bytes": preset.shape.depth * saved.full,
        "samplers": {},
    }
    tables = {"seconds": seconds.table, "line": seconds.line_table, "bytes": saved.table}
    for sampler in SAMPLERS:
        steps = preset.total_steps if sampler == "total" else preset.steps
        generator = np.random.default_rng(0)
        found = simulate(sampler, layers, tables, preset.ranks, steps, generator)
        result: dict[str, Any] = {
            sync: {
                "seconds": [seconds.rest + each.mean for each in found["seconds"][sync]],
                "errors": [each.error / ideal for each in found["seconds"][sync]],
            }
            for sync in SYNCS
        }
        for each in result.values():
            each["over_ideal"] = [value / ideal - 1 for value in each["seconds"]]
        result["memory_over_ideal"] = [
            each.mean / ideal_bytes - 1 for each in found["bytes"]["step"]
        ]
        if sampler == "bernoulli":
            result["line_over_ideal"] = [
                (seconds.rest + each.mean) / ideal_of_line - 1 for each in found["line"]["step"]
            ]
            result |= exact(layers, seconds, saved, preset.ranks)
        case["samplers"][sampler] = result
    return case


def exact(
    layers: Layers, seconds: Costs, saved: Costs, ranks: Sequence[int]
) -> dict[str, list[float]]:
    """Bernoulli without simulation, for costs that are straight lines."""
    branches = len(layers.drop_probs)

    def expected(costs: Costs, draws: Sequence[float]) -> list[float]:
        values, probabilities = bernoulli_distribution(
            layers, [line.per_row for line in costs.lines]
        )
        fixed = costs.rest + branches / KINDS * sum(line.fixed for line in costs.lines)
        ideal = costs.ideal(layers, costs.line_table)
        return [
            (fixed + float(values @ largest_of(values, probabilities, n))) / ideal - 1
            for n in draws
        ]

    return {
        "exact_over_ideal": expected(seconds, ranks),
        "run_memory_over_ideal": expected(saved, [n * RUN_STEPS for n in ranks]),
    }


def laws(batches: Sequence[int], p: float, branches: int, steps: int) -> list[dict[str, Any]]:
    """What is left of Bernoulli's law under every sampler."""
    found = []
    for batch in batches:
        layers = Layers(batch, tuple(uniform(branches, p)))
        for sampler, draw in SAMPLERS.items():
            counts = draw(layers, steps, LAW_RANKS, np.random.default_rng(1))
            summary = summarise_law(counts, layers)
            found.append({"sampler": sampler, "batch": batch, "p": p, **summary})
    return found


def validate(preset: Preset, folder: Path) -> list[dict[str, Any]]:
    """Simulation beside real processes; on the CPU, wherever the branches are timed."""
    case = preset.process_case
    sweep = replace(case, samplers=(SWEEP,), steps=3 * case.steps)
    table, rest = table_of_sweep(launch(sweep, 1, folder / "alone"), case.batch)
    outcomes = []
    for world_size in preset.processes:
        records = launch(case, world_size, folder / f"ranks-{world_size}")
        outcome = compare(case, records, table, rest)
        outcomes.append({"case": asdict(case), "ranks": world_size, "samplers": outcome})
        print(f"trained: {case.shape.name}, {world_size} processes", flush=True)
    return outcomes


def run(preset: Preset, device: torch.device) -> dict[str, Any]:
    """Everything; ready for JSON."""
    start = time.perf_counter()
    machine = environment(device)
    with tempfile.TemporaryDirectory() as folder:
        validation = validate(preset, Path(folder))
    measured = measure(preset.shape, preset.batches, preset.turns, device)
    cases = []
    for batch in preset.batches:
        seconds, saved = costs_from(measured[batch])
        for schedule in SCHEDULES:
            for p in preset.probabilities:
                cases.append(simulate_case(preset, batch, p, schedule, seconds, saved))
        print(f"simulated: B={batch}", flush=True)
    branches = KINDS * preset.shape.depth
    return {
        "schema": SCHEMA,
        "environment": machine,
        "clock": clock_of(device)[1],
        "shape": asdict(preset.shape),
        "ranks": list(preset.ranks),
        "kinds": list(KIND_NAMES),
        "run_steps": RUN_STEPS,
        "measured": {str(batch): each for batch, each in measured.items()},
        "cases": cases,
        "laws": laws(preset.batches, preset.probabilities[1], branches, 50 * preset.total_steps),
        "validation": validation,
        "seconds": time.perf_counter() - start,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    listed = "; ".join(f"{name}: {preset.duration}" for name, preset in PRESETS.items())
    parser = command.parser("scaling", __doc__, out=Path("benchmarks/out/scaling"))
    parser.add_argument("--preset", choices=PRESETS, default="quick", help=listed)
    parser.add_argument("--device", default="cpu", help="where branches are timed (default cpu)")
    parser.add_argument(
        "--rebuild", action="store_true", help="report and plots of OUT/scaling.json; no run"
    )
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
        out_folder(options.out)
        torch.set_num_threads(1)  # a rank's thread; its clock has to see all of the work
        try:
            results = run(PRESETS[options.preset], device)
        except (ProviderMismatch, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 1
        called = command.command_line("scaling", arguments)
        results = {"preset": options.preset, "command": called, **results}
        write_json(written, results)
    page = report(results)
    (options.out / "scaling.md").write_text(page)
    for path in save_plots(results, options.out):
        print(f"wrote {path}")
    print(printed(page, window()))
    return 0
