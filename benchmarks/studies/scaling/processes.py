"""Real data-parallel processes beside what is expected of them.

Every process trains the network under DistributedDataParallel over gloo, one thread each, one step
per sampler in turn, and writes down the rows that it kept and the CPU time of its thread: of the
step, and of every branch forward and backward. That clock stands still while the thread waits for
other ranks or for a core, so that more processes than cores can be run: the slowest rank's time is
the largest of these, not a wall time.

Between ranks, time differs because the counts do, and because computers do. What the counts do is
looked up in the branches' times of a single process. The second part is taken from the steps with a
fixed count, where all counts are equal: each step gets the deviations of each of those in turn.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.studies.scaling.law import KINDS, SAMPLERS, Floats
from benchmarks.studies.scaling.network import BranchClock, Net, Shape, make_batch
from sdkernels import DepthPlan

WARM_UP = 2  # steps of each sampler: DDP builds its buckets anew after the first
TIMEOUT = 300  # seconds that a rank waits for another


@dataclass(frozen=True)
class ProcessCase:
    """What the processes train, and for how long."""

    shape: Shape
    batch: int  # of a rank
    p: float  # of every branch
    steps: int


def train(rank: int, case: ProcessCase, ranks: int, folder: Path) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    store = f"file://{(folder / f'store-{ranks}').resolve()}"
    wait = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store, rank=rank, world_size=ranks, timeout=wait)
    torch.manual_seed(0)
    net = Net(case.shape)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters())
    torch.manual_seed(rank)
    patches, labels = make_batch(case.shape, case.batch, torch.device("cpu"))
    drop_probs = [case.p] * KINDS * case.shape.depth
    records = []
    for step in range(WARM_UP + case.steps):
        for sampler in SAMPLERS:
            kinds = KINDS if sampler == "balanced" else 1
            law: Any = {"sampler": sampler, "kinds": kinds, "rank": rank}
            plan = list(DepthPlan.for_step(1, step, case.batch, drop_probs, **law))
            clock = BranchClock(torch.device("cpu"))
            dist.barrier()
            start = time.thread_time()
            F.cross_entropy(model(patches, plan, clock=clock), labels).backward()
            optimizer.step()
            seconds = time.thread_time() - start
            optimizer.zero_grad()
            if step >= WARM_UP:
                counts = [rows.k for rows in plan]
                taken = {"cpu": seconds, **clock.passes()}
                records.append({"sampler": sampler, "counts": counts, **taken})
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"records-{ranks}-{rank}.json").write_text(json.dumps(records))


def launch(case: ProcessCase, ranks: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Every rank's records.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a process failed; the first one ends them all.
        torch.multiprocessing.ProcessExitedException: one was killed.
    """
    torch.multiprocessing.spawn(train, (case, ranks, folder), nprocs=ranks)
    return [json.loads((folder / f"records-{ranks}-{r}.json").read_text()) for r in range(ranks)]


def pairs(branches: Floats) -> Floats:
    """[..., branches] to [..., blocks]: a block is its branches together."""
    return branches.reshape(*branches.shape[:-1], -1, KINDS).sum(-1)


def over_mean(step: Floats, blocks: Floats) -> dict[str, Floats]:
    """[steps]: the slowest rank's time over the mean rank's, by how often ranks wait.

    Args:
        step: [steps, ranks] seconds.
        blocks: [steps, ranks, 2, blocks], the part of them that is spent in blocks.
    """
    outside = step - blocks.sum((2, 3))
    waited = {"step": step.max(1), "block": blocks.max(1).sum((1, 2)) + outside.mean(1)}
    return {sync: (each - step.mean(1)) / step.mean() for sync, each in waited.items()}


def interval(values: Floats) -> list[float]:
    """Where 90 % of the means of as many steps drawn from these lie."""
    means = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    return [float(each) for each in np.quantile(means, (0.05, 0.95))]


def compare(records: Sequence[Sequence[dict[str, Any]]], table: Floats) -> dict[str, Any]:
    """By sampler: measured and expected excess of the slowest rank, ready for JSON.

    Args:
        records: of every rank.
        table: [kinds, B + 1] seconds of a branch by kept rows, from a process alone.
    """

    def field(sampler: str, name: str) -> Any:
        chosen = [[each[name] for each in rank if each["sampler"] == sampler] for rank in records]
        return np.array(chosen).swapaxes(0, 1)  # [steps, ranks, ...]

    def measured(sampler: str) -> tuple[Floats, Floats, Floats]:
        """Steps, their blocks, and what the table says of the blocks' counts."""
        passes = [pairs(field(sampler, name)) for name in ("forward", "backward")]
        counts = field(sampler, "counts")
        alone = pairs(table[np.arange(counts.shape[2]) % KINDS, counts])
        return field(sampler, "cpu"), np.stack(passes, 2), alone

    step, blocks, alone = measured("fixed")
    # Beside other processes everything takes longer than alone: one factor for all blocks.
    slower = blocks.sum() / alone.sum()
    of_passes = blocks.sum((0, 1, 3)) / blocks.sum()
    outside = step - blocks.sum((2, 3))
    noise = blocks / blocks.mean((0, 1))

    outcomes: dict[str, Any] = {}
    for sampler in SAMPLERS:
        step, blocks, alone = measured(sampler)
        quiet = slower * alone[:, :, None] * of_passes[:, None]
        expected = quiet.sum((2, 3)) + outside.mean()
        # Every step with the noise of every step of the fixed count.
        noisy = (quiet[:, None] * noise).reshape(-1, *quiet.shape[1:])
        around = np.tile(outside, (len(quiet), 1))
        found = over_mean(step, blocks)
        counts = over_mean(expected, quiet)
        both = over_mean(noisy.sum((2, 3)) + around, noisy)
        # Between the ranks of a step: what slows a step as a whole is not at issue.
        apart = [(each - each.mean(1, keepdims=True)).ravel() for each in (expected, step)]
        outcomes[sampler] = {
            "correlation": float(np.corrcoef(*apart)[0, 1]) if sampler == "bernoulli" else None,
            "excess": {
                sync: {
                    "measured": float(found[sync].mean()),
                    "interval": interval(found[sync]),
                    "counts": float(counts[sync].mean()),
                    "counts_and_noise": float(both[sync].mean()),
                }
                for sync in found
            },
        }
    return outcomes


def validate(case: ProcessCase, ranks: int, table: Floats) -> dict[str, Any]:
    """The outcome on so many processes; on the CPU, wherever the branches are timed."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = compare(launch(case, ranks, Path(folder)), table)
    print(f"trained: {ranks} processes", flush=True)
    return {"case": asdict(case), "ranks": ranks, "samplers": outcome}
