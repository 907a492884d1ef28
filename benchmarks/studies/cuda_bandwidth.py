"""Device time of every kernel on a GPU, as a share of the bandwidth of a copy.

``python -m benchmarks cuda-bandwidth`` prints one table and writes it to ``out/``. ``--backends``
measures several, each in a process of its own, and puts them side by side. Tensors are
several times the last cache, two sets of them take turns, and the launches of a measurement are
one CUDA graph, so that the host's time plays no part. Before a kernel is timed its floor is printed
(the bytes that it has to move, at the bandwidth of the copy of the same run) and its results are
compared with PyTorch's calls in float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cases.kernels import KERNELS, KernelCase, takes_tokens
from benchmarks.measure import command, correctness
from benchmarks.measure.ending import out_folder
from benchmarks.measure.environment import environment, environment_line, last_cache_bytes, serving
from benchmarks.measure.store import read_json, write_json
from benchmarks.measure.workload import DTYPES
from benchmarks.report.figures import merge
from benchmarks.report.table import Table

ROOT = Path(__file__).resolve().parents[2]
CACHES = 4  # the stream is at least so many times the size of the last cache
BACKENDS = ("cpp", "triton", "traceable")
LEAST_SHARE = 0.9

# One row of the stream, and whether its channels are last.
ROWS: dict[str, tuple[tuple[int, ...], bool]] = {
    "197x384": ((197, 384), False),
    "197x768": ((197, 768), False),
    "197x1024": ((197, 1024), False),
    "257x1280": ((257, 1280), False),
    "56x56x128-channels_last": ((128, 56, 56), True),
    "256x14x14": ((256, 14, 14), False),
}
# Rows B of the batch (None: as many as several caches hold), and the share of them that is kept.
BATCHES: dict[str, list[tuple[int | None, float]]] = {
    "197x768": [(None, 0.5), (None, 0.25), (None, 0.75), (32, 0.5)],
}


@dataclass(frozen=True)
class GpuCase(KernelCase):
    """A kernel with another share of kept rows, or on images as PyTorch lays them out."""

    keep: float = 0.5
    channels_last: bool = True

    @property
    def k(self) -> int:  # type: ignore[override]
        return round(self.shape[0] * self.keep)


@dataclass
class Result:
    """One line of the table. Times in seconds, shares as plain numbers."""

    backend: str
    case: str
    floor: float
    median: float
    spread: float
    share: float
    is_met: bool


def seconds(functions: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Device time of one call, for each of several replays of a graph of them all."""
    rounds = 10
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for function in functions:
                function()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / rounds / len(functions))
    return times[2:]


def batch_of(row: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    row_bytes = torch.Size(row).numel() * dtype.itemsize
    return max(16, -(-CACHES * last_cache_bytes(device) // row_bytes) // 2 * 2)


def cases(shape: str, dtype: str, batch: int, keep: float) -> list[GpuCase]:
    """Every kernel on such rows; norms, and what writes into packed tensors, on tokens only."""
    row, channels_last = ROWS[shape]
    return [
        GpuCase(op, dtype, (batch, *row), keep=keep, channels_last=channels_last)
        for op in KERNELS
        if not (takes_tokens(op) and len(row) == 3)
    ]


def run_shape(
    shape: str, dtype: str, rows: int | None, keep: float, device: torch.device
) -> list[Result]:
    batch = rows or batch_of(ROWS[shape][0], DTYPES[dtype], device)
    kernels = cases(shape, dtype, batch, keep)
    first = kernels[0].tensors(device)
    sets, target = (first, first.copy()), torch.empty_like(first.x)
    copied = median(seconds([lambda t=t: target.copy_(t.x) for t in sets], device))
    bandwidth = kernels[0].describe()["copy_bytes"] / copied
    prefix = f"{shape} {dtype} B={batch} keep={keep:g}"
    print(f"{prefix}: a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    results = []
    for case in kernels:
        correctness.check(case, device)
        floor = case.describe()["traffic_bytes"] / bandwidth
        name = f"{prefix} {case.op}"
        print(f"{name}: predicted floor {floor * 1e6:.1f} us", flush=True)
        with torch.no_grad():
            of_replays = seconds([KERNELS[case.op].op(t) for t in sets], device)
        took = merge([time] for time in of_replays)
        share = floor / took.median
        print(f"  measured {took.median * 1e6:.1f} us, {share:.1%} of the copy's bandwidth")
        is_met = share >= LEAST_SHARE
        results.append(
            Result(serving("cuda"), name, floor, took.median, took.spread, share, is_met)
        )
    return results


def run_backend(backend: str, shapes: str, folder: Path) -> dict[str, Any]:
    """The record of a run under SDKERNELS_BACKEND; without results where it came to none."""
    path = folder / f"{backend}.json"
    program = [sys.executable, "-m", "benchmarks", "cuda-bandwidth"]
    environ = {**os.environ, "SDKERNELS_BACKEND": backend}
    print(f"== {backend}", flush=True)
    # Its exit code says whether targets were met, and so do the results.
    subprocess.run([*program, "--shapes", shapes, "--out", str(path)], cwd=ROOT, env=environ)
    return read_json(path) if path.exists() else {"environment": None, "results": []}


def run_here(shapes: str) -> dict[str, Any]:
    """The same of this process and its backend."""
    device = torch.device("cuda", torch.cuda.current_device())
    env = environment(device)
    print(environment_line(env), flush=True)
    results = []
    for shape in shapes.split(","):
        for dtype in ("bf16", "fp32"):
            for rows, keep in BATCHES.get(shape, [(None, 0.5)]):
                results += run_shape(shape, dtype, rows, keep, device)
                torch.cuda.empty_cache()
    return {"environment": env, "results": [asdict(result) for result in results]}


def side_by_side(results: Sequence[Result], backends: Sequence[str]) -> str:
    """One line a case, one column a backend; what missed its target is marked."""
    cells: dict[str, dict[str, str]] = {}
    for result in results:
        mark = "" if result.is_met else " missed"
        cells.setdefault(result.case, {})[result.backend] = f"{result.share:.3f}{mark}"
    lines = [[case, *(of.get(each, "-") for each in backends)] for case, of in cells.items()]
    return Table("", ("", *backends), names=1, groups=[lines]).markdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write the table.

    The exit code is 3 if a target was missed, 1 if a backend came to no results.
    """
    parser = command.parser("cuda-bandwidth", __doc__)
    add = parser.add_argument
    add("--shapes", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    add("--backends", help=f"of {', '.join(BACKENDS)}; default: the one that serves CUDA tensors")
    add("--out", type=Path, default=ROOT / "benchmarks/out/cuda_bandwidth.json", help="JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    out_folder(options.out.parent)
    if options.backends:
        backends = options.backends.split(",")
        if not set(backends) <= set(BACKENDS):
            parser.error(f"--backends: expected some of {', '.join(BACKENDS)}, got {backends}")
        with tempfile.TemporaryDirectory() as folder:
            records = [run_backend(backend, options.shapes, Path(folder)) for backend in backends]
    else:
        backends, records = [serving("cuda")], [run_here(options.shapes)]
    env = next((record["environment"] for record in records if record["results"]), None)
    results = [Result(**fields) for record in records for fields in record["results"]]
    print("\nshare of the copy's bandwidth")
    print(side_by_side(results, backends))
    missed = [result for result in results if not result.is_met]
    for result in missed:
        print(f"  missed: {result.backend}: {result.case}: {result.share:.3f}")
    silent = [b for b in backends if all(result.backend != b for result in results)]
    for backend in silent:
        print(f"  no results: {backend}")
    print(f"{len(results) - len(missed)} of {len(results)} targets met")
    record = {
        "command": command.command_line("cuda-bandwidth", arguments),
        "environment": env,
        "results": [asdict(result) for result in results],
    }
    write_json(options.out, record)
    return 1 if silent else 3 if missed else 0
