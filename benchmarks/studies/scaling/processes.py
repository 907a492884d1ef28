"""Real data-parallel processes, to hold the simulation against.

    python -m benchmarks.studies.scaling.processes RANK WORLD_SIZE FOLDER    (started by launch())

Every process trains the network under DistributedDataParallel over gloo, one thread each, one step
per sampler in turn, and writes down the rows that it kept and the CPU time of its thread: of the
step, and of every branch forward and backward. The thread's clock stands still while it waits for
other ranks or for a core, so that more processes than cores can be run: the slowest rank's time is
the largest of these, not a wall time. Wall times are recorded too, for where cores are enough.
A single process that sweeps through the numbers of kept rows gives the simulation its table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.studies.scaling.model import BranchClock, Net, Shape, make_batch, row_counts
from benchmarks.studies.scaling.simulation import KINDS
from sdkernels import DepthPlan, uniform

SAMPLERS = ("bernoulli", "fixed", "rounded", "total")
SWEEP = "sweep"  # all branches keep 0, 1, 2, 4, ... rows, one number a step
WARM_UP = 2  # steps of each sampler: DDP builds its buckets anew after the first
TIMEOUT = 300  # seconds for a launch


@dataclass(frozen=True)
class ProcessCase:
    """What the processes train, and for how long."""

    shape: Shape
    batch: int  # of a rank
    p: float  # of every branch
    steps: int
    samplers: tuple[str, ...] = SAMPLERS
    seed: int = 1

    @property
    def drop_probs(self) -> list[float]:
        return uniform(KINDS * self.shape.depth, self.p)


def draw_plan(case: ProcessCase, sampler: str, step: int, rank: int) -> DepthPlan:
    """The rows of a rank in a step."""
    batch, drop_probs, seed = case.batch, case.drop_probs, case.seed
    if sampler == "total":
        return DepthPlan.for_step(
            seed, step, batch, drop_probs, sampler="balanced", kinds=KINDS, rank=rank
        )
    if sampler == SWEEP:
        counts = row_counts(batch)
        k = counts[step % len(counts)]
        sampler = "fixed" if k else "bernoulli"  # the fixed count is at least one
        drop_probs = [1 - k / batch] * len(drop_probs)
    return DepthPlan.for_step(seed, step, batch, drop_probs, sampler=sampler, rank=rank)


def work(case: ProcessCase, rank: int) -> list[dict[str, Any]]:
    """Trains; one record a step."""
    torch.manual_seed(0)
    net = Net(case.shape)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters())
    torch.manual_seed(rank)
    patches, labels = make_batch(case.shape, case.batch, torch.device("cpu"))
    records = []
    for step in range(WARM_UP + case.steps):
        for sampler in case.samplers:
            plan = list(draw_plan(case, sampler, step, rank))
            clock = BranchClock(time.thread_time)
            dist.barrier()
            wall, cpu = time.perf_counter(), time.thread_time()
            F.cross_entropy(model(patches, plan, clock=clock), labels).backward()
            optimizer.step()
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            optimizer.zero_grad()
            if step >= WARM_UP:
                records.append(
                    {
                        "sampler": sampler,
                        "counts": [rows.k for rows in plan],
                        "cpu": cpu,
                        "wall": wall,
                        "forward": clock.forward,
                        "backward": clock.backward,
                    }
                )
    return records


def launch(case: ProcessCase, world_size: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Every rank's records.

    Raises:
        RuntimeError: a process failed or did not finish; with what it printed last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps(asdict(case)))
    (folder / "store").unlink(missing_ok=True)
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    processes = []
    for rank in range(world_size):
        with open(folder / f"output-{rank}.txt", "w") as file:
            command = [sys.executable, "-m", __name__, str(rank), str(world_size), str(folder)]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=root)
            )
    deadline = time.monotonic() + TIMEOUT
    try:
        # A rank that failed leaves the others waiting for it: the first failure ends them all.
        while any(process.poll() is None for process in processes):
            failed = [process for process in processes if process.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        if process.returncode:
            output = (folder / f"output-{rank}.txt").read_text().strip()
            raise RuntimeError(
                f"rank {rank} of {world_size}: exit code {process.returncode}\n{output[-2000:]}"
            )
    return [json.loads((folder / f"records-{rank}.json").read_text()) for rank in range(world_size)]


def main(arguments: Sequence[str]) -> None:
    rank, world_size, folder = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    settings = json.loads((folder / "case.json").read_text())
    case = ProcessCase(**{**settings, "shape": Shape(**settings["shape"])})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{(folder / 'store').resolve()}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    records = work(case, rank)
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"records-{rank}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main(sys.argv[1:])
