"""Sets what real processes took beside what the simulation says of them.

Between ranks, time differs because the counts do, and because computers do. The second part is
taken from the steps with a fixed count, where the counts are equal: each simulated step gets the
deviations that one of those steps had, on all its ranks. Nothing is taken from the steps that are
predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.studies.scaling.processes import SWEEP, ProcessCase
from benchmarks.studies.scaling.simulation import KINDS, SAMPLERS, Counts, Floats, Layers, costs_of

DRAWS = 2000  # simulated steps, and resamples of the measured ones


Records = Sequence[Sequence[dict[str, Any]]]  # of every rank, as scaling_processes.work writes them


def field(records: Records, sampler: str, name: str) -> Any:
    """[steps, ranks, ...]: a field of all records of a sampler."""
    chosen = [[each[name] for each in rank if each["sampler"] == sampler] for rank in records]
    return np.array(chosen).swapaxes(0, 1)


def pairs(branches: Floats) -> Floats:
    """[..., branches] to [..., blocks]: a block is its branches together."""
    blocks: Floats = branches.reshape(*branches.shape[:-1], -1, KINDS).sum(-1)
    return blocks


def blocks_of(records: Records, sampler: str) -> Floats:
    """[steps, ranks, 2, blocks]: seconds of every block, forward and backward."""
    return np.stack([pairs(field(records, sampler, name)) for name in ("forward", "backward")], 2)


def table_of_sweep(records: Records, batch: int) -> tuple[Floats, float]:
    """[kinds, batch + 1] seconds of a branch by kept rows, and the seconds outside the branches,
    from a single process that swept through them."""
    counts = field(records, SWEEP, "counts")[:, 0, 0]
    branches = (field(records, SWEEP, "forward") + field(records, SWEEP, "backward"))[:, 0]
    timed = np.unique(counts)
    table = [
        np.interp(
            np.arange(batch + 1),
            timed,
            [np.median(branches[counts == k][:, kind::KINDS]) for k in timed],
        )
        for kind in range(KINDS)
    ]
    rest = np.median(field(records, SWEEP, "cpu")[:, 0] - branches.sum(1))
    return np.array(table), float(rest)


def over_mean(step: Floats, blocks: Floats) -> dict[str, Floats]:
    """[steps]: the slowest rank's time over the mean rank's, by ``sync``.

    Args:
        step: [steps, ranks] seconds.
        blocks: [steps, ranks, 2, blocks], the part of them that is spent in blocks.
    """
    outside = step - blocks.sum((2, 3))
    mean = step.mean()
    return {
        "step": step.max(1) / mean - step.mean(1) / mean,
        "block": (blocks.max(1).sum((1, 2)) + outside.mean(1)) / mean - step.mean(1) / mean,
    }


def interval(values: Floats, generator: np.random.Generator) -> list[float]:
    """Where 90 % of the means of as many steps drawn from these lie."""
    means = generator.choice(values, (DRAWS, len(values))).mean(1)
    return [float(each) for each in np.quantile(means, (0.05, 0.95))]


def compare(
    case: ProcessCase,
    records: Records,
    table: Floats,
    rest: float,
) -> dict[str, Any]:
    """By sampler: measured and simulated excess of the slowest rank, ready for JSON.

    Args:
        case: what the processes trained.
        records: of all samplers.
        table, rest: seconds of the branches and of what is outside, from a process alone.
    """
    generator = np.random.default_rng(0)
    ranks = len(records)
    layers = Layers(case.batch, tuple(case.drop_probs))

    def predicted_blocks(counts: Counts) -> Floats:
        return pairs(costs_of(counts, table))

    fixed_step, fixed_blocks = field(records, "fixed", "cpu"), blocks_of(records, "fixed")
    fixed_alone = predicted_blocks(field(records, "fixed", "counts"))
    # Beside other processes everything takes longer than alone: one factor for all blocks.
    slower = fixed_blocks.sum() / fixed_alone.sum()
    outside = (fixed_step - fixed_blocks.sum((2, 3))).mean()
    of_passes = fixed_blocks.mean((0, 1, 3)) / fixed_blocks.mean((0, 1, 3)).sum()
    noise_of_blocks = fixed_blocks / fixed_blocks.mean((0, 1))
    noise_outside = fixed_step - fixed_blocks.sum((2, 3)) - outside

    outcomes: dict[str, Any] = {}
    for sampler in case.samplers:
        step, blocks = field(records, sampler, "cpu"), blocks_of(records, sampler)
        counts = field(records, sampler, "counts")
        measured = over_mean(step, blocks)

        drawn = predicted_blocks(SAMPLERS[sampler](layers, DRAWS, ranks, generator))
        quiet = slower * drawn[:, :, None] * of_passes[:, None]
        like = generator.integers(len(fixed_step), size=DRAWS)
        noisy = quiet * noise_of_blocks[like]
        simulated = over_mean(quiet.sum((2, 3)) + outside, quiet)
        with_noise = over_mean(noisy.sum((2, 3)) + outside + noise_outside[like], noisy)

        alone = predicted_blocks(counts).sum(2)
        predicted = slower * alone + outside
        # Between the ranks of a step: what slows a step as a whole is not at issue.
        apart = [each - each.mean(1, keepdims=True) for each in (predicted, step)]
        outcomes[sampler] = {
            "steps": len(step),
            "mean_seconds": float(step.mean()),
            "alone_seconds": float((alone + rest).mean()),
            "wall_seconds": float(field(records, sampler, "wall").max(1).mean()),
            "correlation": float(np.corrcoef(apart[0].ravel(), apart[1].ravel())[0, 1])
            if sampler == "bernoulli"
            else None,
            "excess": {
                sync: {
                    "measured": float(measured[sync].mean()),
                    "interval": interval(measured[sync], generator),
                    "counts": float(simulated[sync].mean()),
                    "counts_and_noise": float(with_noise[sync].mean()),
                }
                for sync in measured
            },
        }
    return outcomes
