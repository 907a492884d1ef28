"""Several processes, gloo, on the CPU: DistributedDataParallel, FSDP2, and who keeps which rows.

The checks stand in distributed_worker.py. Starting a process takes longer than most of them, so one
launch runs them all, on Linux in processes forked from one that has imported what they need.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import distributed_worker
import pytest
import torch

HERE = Path(__file__).parent
TIMEOUT = 240  # seconds for a launch; idle, it takes about ten

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


def launch(world_size: int, folder: Path) -> list[dict[str, str]]:
    """Every rank's report: check -> "passed" or a traceback; the output of all without one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "distributed_worker.py"), str(world_size), str(folder)]
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        pass  # the reports say what is missing
    finally:
        # All ranks. Where all have ended, macOS denies the permission.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reports = []
    for rank in range(world_size):
        report = folder / f"report-{rank}.json"
        output = (folder / "output.txt").read_text()
        reports.append(json.loads(report.read_text()) if report.exists() else {"output": output})
    return reports


@pytest.fixture(scope="module")
def reports_of(tmp_path_factory):
    return cache(lambda world_size: launch(world_size, tmp_path_factory.mktemp("processes")))


@pytest.mark.parametrize(
    ("world_size", "name"),
    [(world, name) for world in (2, 4) for name in distributed_worker.checks_of(world)],
)
def test_processes(world_size, name, reports_of):
    for rank, report in enumerate(reports_of(world_size)):
        outcome = report.get(name, f"did not run; the report: {report}")
        assert outcome == "passed", f"rank {rank}: {outcome}"
