"""Device time of every kernel on a GPU, as a share of the bandwidth of a copy.

``python -m benchmarks cuda-bandwidth`` prints one table and writes it to ``out/``. ``--backends``
measures several, each in a process of its own, and puts them side by side. Tensors are
several times the last cache, two sets of them take turns, and the launches of a measurement are
one CUDA graph, so that the host's time plays no part. Before a kernel is timed its floor is printed
(the bytes that it has to move, at the bandwidth of the copy of the same run) and its results are
compared with the same ops in PyTorch code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.ending import out_folder
from benchmarks.measure.environment import environment, environment_line, serving
from benchmarks.report.table import Table, window
from sdkernels.backends import traceable

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "out"
OPS = torch.ops.sdkernels
CACHES = 4  # the stream is at least so many times the size of the last cache
BACKENDS = ("cpp", "triton", "traceable")
LEAST_SHARE, LEAST_SPEEDUP = 0.9, 1.3

# One row of the stream, and its memory format.
ROWS: dict[str, tuple[tuple[int, ...], torch.memory_format]] = {
    "197x384": ((197, 384), torch.contiguous_format),
    "197x768": ((197, 768), torch.contiguous_format),
    "197x1024": ((197, 1024), torch.contiguous_format),
    "257x1280": ((257, 1280), torch.contiguous_format),
    "56x56x128-channels_last": ((128, 56, 56), torch.channels_last),
    "256x14x14": ((256, 14, 14), torch.contiguous_format),
}
# Rows B of the batch (None: as many as several caches hold), and the share of them that is kept.
HALF = (None, 0.5)
BATCHES: dict[str, list[tuple[int | None, float]]] = {
    "197x768": [HALF, (None, 0.25), (None, 0.75), (32, 0.5)],
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Inputs:
    """One set of tensors: B rows of the stream, k of the branch."""

    x: Tensor
    grad: Tensor
    out: Tensor  # [k, ...]
    index: Tensor
    slot: Tensor
    layer_scale: Tensor
    parameter: Tensor  # [C], of a norm over the last dimension

    @classmethod
    def make(
        cls,
        batch: int,
        row: tuple[int, ...],
        memory_format: torch.memory_format,
        dtype: torch.dtype,
        device: torch.device,
        keep: float = 0.5,
    ) -> Inputs:
        def random(rows: int) -> Tensor:
            values = torch.randn(rows, *row, device=device).to(dtype)
            return values.contiguous(memory_format=memory_format)

        k = round(batch * keep)
        index = torch.randperm(batch)[:k].sort().values
        slot = torch.full((batch,), -1)
        slot[index] = torch.arange(k)
        channels = (row[0], 1, 1) if len(row) == 3 else row[-1:]
        return cls(
            random(batch),
            random(batch),
            random(k),
            index.to(device),
            slot.to(device),
            torch.rand(channels, device=device),
            torch.rand(row[-1:], device=device),
        )


@dataclass(frozen=True)
class Kernel:
    """An op and what it moves, in rows of the stream: (multiples of B, multiples of k).

    `bits` come on top, for each element of B rows.
    """

    op: str
    arguments: Callable[[Inputs], tuple[object, ...]]
    traffic: tuple[int, int]
    bits: int = 0

    def bytes_moved(self, inputs: Inputs) -> float:
        of_batch, of_kept = self.traffic
        stream, branch = inputs.x, inputs.out
        return of_batch * stream.nbytes + of_kept * branch.nbytes + self.bits * stream.numel() / 8


def _norm_forward(t: Inputs) -> tuple[object, ...]:
    shape = list(t.parameter.shape)
    return t.x, t.index, shape, t.parameter, t.parameter, 1e-6, False, t.x.dtype, True


def _norm_backward(t: Inputs) -> tuple[object, ...]:
    kept = t.out
    lines = kept[..., 0].numel()
    mean, rstd = torch.zeros(lines, device=kept.device), torch.ones(lines, device=kept.device)
    shape = list(t.parameter.shape)
    rows = (t.index, t.slot, shape, t.parameter, False, [True] * 3)
    return (t.grad, t.out, kept, mean, rstd, *rows)


def _relu_forward(t: Inputs) -> tuple[object, ...]:
    return t.x, t.out, t.index, t.slot, None, None, 2.0


def _relu_backward(t: Inputs) -> tuple[object, ...]:
    _, positive = OPS.scatter_add_relu_rows(*_relu_forward(t))
    options = (t.out.dtype, traceable.row_format(t.x), True)
    return (t.grad, positive, t.index, t.slot, None, None, 2.0, *options)


# Reads and writes together, after the budgets of the kernels' own comments.
KERNELS: dict[str, Kernel] = {
    "compact": Kernel("compact_rows", lambda t: (t.x, t.index), (0, 2)),
    "expand": Kernel("expand_rows", lambda t: (t.out, t.index, t.slot), (1, 1)),
    "scatter-add": Kernel(
        "scatter_add_rows",
        lambda t: (t.x, t.out, t.index, t.slot, t.layer_scale.to(t.x.dtype), None, 2.0),
        (2, 1),
    ),
    "scatter-add in place": Kernel(
        "scatter_add_rows_",
        lambda t: (t.x, t.out, t.index, t.slot, t.layer_scale, None, 0.0),
        (0, 3),
    ),
    "merged gradient": Kernel(
        "scatter_add_rows", lambda t: (t.grad, t.out, t.index, t.slot, None, None, 1.0), (2, 1)
    ),
    "scatter-add backward": Kernel(
        "scatter_add_rows_backward",
        lambda t: (t.grad, None, t.index, t.layer_scale, None, 2.0, t.x.dtype, [False] * 2),
        (0, 2),
    ),
    "scatter-add backward with d_layer_scale": Kernel(
        "scatter_add_rows_backward",
        lambda t: (t.grad, t.out, t.index, t.layer_scale, None, 2.0, t.x.dtype, [True, False]),
        (0, 3),
    ),
    "scatter-add + relu": Kernel("scatter_add_relu_rows", _relu_forward, (2, 1), bits=1),
    "scatter-add + relu backward": Kernel(
        "scatter_add_relu_rows_backward", _relu_backward, (2, 1), bits=1
    ),
    "compact + layer norm": Kernel("compact_norm", _norm_forward, (0, 3)),
    "compact + layer norm backward": Kernel("compact_norm_backward", _norm_backward, (2, 2)),
}


@dataclass
class Result:
    """One line of the table. Times in seconds, shares and speed-ups as plain numbers."""

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


def check(kernel: Kernel, inputs: Inputs) -> None:
    """Raise if the kernel's results are not those of PyTorch code."""
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-4}[inputs.x.dtype]
    if kernel.op.endswith("_"):
        return  # timed with a scale of zero; what it computes is scatter_add_rows
    results = getattr(OPS, kernel.op)(*kernel.arguments(inputs))
    expected = traceable.OPS[kernel.op](*kernel.arguments(inputs))
    if kernel.op == "scatter_add_relu_rows":
        # The bits follow from y: rounding may change the sign of a sum that is next to zero.
        results, bits = results
        nothing = (inputs.out[:0], inputs.index[:0], torch.full_like(inputs.slot, -1))
        assert torch.equal(bits, traceable.OPS[kernel.op](results, *nothing, None, None, 1.0)[1])
        expected = expected[0]
    pairs = (
        zip(results, expected, strict=True) if isinstance(results, tuple) else [(results, expected)]
    )
    for actual, wanted in pairs:
        largest = wanted.abs().max().item() if wanted.numel() else 1.0
        torch.testing.assert_close(
            actual, wanted, rtol=tolerance, atol=tolerance * max(1.0, largest)
        )


def batch_of(row: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    row_bytes = torch.Size(row).numel() * dtype.itemsize
    return max(16, -(-CACHES * cache // row_bytes) // 2 * 2)


def pair(t: Inputs) -> tuple[Callable[[], object], Callable[[], object]]:
    """Gather, a branch that costs nothing, scatter-add with layer scale; forward and backward."""
    from sdkernels import KeptRows, compact_rows, scatter_add_rows

    rows = KeptRows(t.index, t.slot, 2.0)
    x = t.x.detach().requires_grad_()
    layer_scale = t.layer_scale.to(x.dtype).requires_grad_()

    def ours() -> object:
        y = scatter_add_rows(x, compact_rows(x, rows), rows, layer_scale)
        return torch.autograd.grad(y, (x, layer_scale), t.grad)

    def peers() -> object:
        y = x.index_add(0, t.index, x.index_select(0, t.index) * layer_scale, alpha=2.0)
        return torch.autograd.grad(y, (x, layer_scale), t.grad)

    return ours, peers


def measure(
    name: str, functions: list[Callable[[], object]], floor: float, device: torch.device
) -> Result:
    print(f"{name}: predicted floor {floor * 1e6:.1f} us", flush=True)
    times = seconds(functions, device)
    median = statistics.median(times)
    share = floor / median
    spread = (max(times) - min(times)) / 2 / median
    print(f"  measured {median * 1e6:.1f} us, {share:.1%} of the copy's bandwidth", flush=True)
    return Result(serving("cuda"), name, floor, median, spread, share, share >= LEAST_SHARE)


def run_shape(
    shape: str, dtype_name: str, rows: int | None, keep: float, device: torch.device
) -> list[Result]:
    row, memory_format = ROWS[shape]
    dtype = DTYPES[dtype_name]
    batch = rows or batch_of(row, dtype, device)
    sets = [Inputs.make(batch, row, memory_format, dtype, device, keep) for _ in range(2)]
    row_bytes = torch.Size(row).numel() * dtype.itemsize
    target = torch.empty_like(sets[0].x)
    copy = statistics.median(seconds([lambda t=t: target.copy_(t.x) for t in sets], device))
    bandwidth = 2 * batch * row_bytes / copy
    prefix = f"{shape} {dtype_name} B={batch} keep={keep:g}"
    print(f"{prefix}: a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    results = []
    for name, kernel in KERNELS.items():
        if "norm" in name and len(row) == 3:
            continue
        check(kernel, sets[0])
        floor = kernel.bytes_moved(sets[0]) / bandwidth
        op = getattr(OPS, kernel.op)
        arguments = [kernel.arguments(t) for t in sets]
        functions = [lambda a=a, op=op: op(*a) for a in arguments]
        results.append(measure(f"{prefix} {name}", functions, floor, device))
    if dtype == torch.bfloat16:
        ours, peers = (
            statistics.median(seconds(list(functions), device))
            for functions in zip(*(pair(t) for t in sets), strict=True)
        )
        speedup = peers / ours
        name = f"{prefix} forward + backward over index_select + index_add"
        print(f"{name}: {speedup:.2f} times as fast", flush=True)
        is_met = speedup >= LEAST_SPEEDUP
        results.append(Result(serving("cuda"), name, peers, ours, 0.0, speedup, is_met))
    return results


def run_backend(backend: str, shapes: str, folder: Path) -> dict[str, Any]:
    """The record of a run under SDKERNELS_BACKEND; without results where it came to none."""
    path = folder / f"{backend}.json"
    command = [sys.executable, "-m", "benchmarks", "cuda-bandwidth"]
    environ = {**os.environ, "SDKERNELS_BACKEND": backend}
    print(f"== {backend}", flush=True)
    # Its exit code says whether targets were met, and so do the results.
    subprocess.run([*command, "--shapes", shapes, "--out", str(path)], cwd=ROOT, env=environ)
    if not path.exists():
        return {"environment": None, "results": []}
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def side_by_side(results: Sequence[Result], backends: Sequence[str]) -> str:
    """One line a case, one column a backend; what missed its target is marked."""
    found = {(result.case, result.backend): result for result in results}
    cases = list(dict.fromkeys(result.case for result in results))
    lines = []
    for case in cases:
        line = [case]
        for backend in backends:
            result = found.get((case, backend))
            missed = "" if result is None or result.is_met else " missed"
            line.append("-" if result is None else f"{result.share:.3f}{missed}")
        lines.append(line)
    return Table("", ("", *backends), names=1, groups=[lines]).text(window())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write the table.

    The exit code is 3 if a target was missed, 1 if a backend came to no results.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks cuda-bandwidth")
    parser.add_argument("--shapes", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument(
        "--backends", help=f"of {', '.join(BACKENDS)}; default: the one that serves CUDA tensors"
    )
    parser.add_argument("--out", type=Path, default=OUT / "cuda_bandwidth.json", help="JSON file")
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
        env = next((record["environment"] for record in records if record["results"]), None)
        results = [Result(**fields) for record in records for fields in record["results"]]
    else:
        env, results = measure_here(options.shapes)
        backends = [serving("cuda")]
    print("\nshare of the copy's bandwidth, or times as fast")
    print(side_by_side(results, backends))
    missed = [result for result in results if not result.is_met]
    for result in missed:
        print(f"  missed: {result.backend}: {result.case}: {result.share:.3f}")
    silent = [b for b in backends if all(result.backend != b for result in results)]
    for backend in silent:
        print(f"  no results: {backend}")
    print(f"{len(results) - len(missed)} of {len(results)} targets met")
    record = {"environment": env, "results": [asdict(result) for result in results]}
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if silent else 3 if missed else 0


def measure_here(shapes: str) -> tuple[dict[str, Any], list[Result]]:
    """The environment of this process and the results of its backend."""
    device = torch.device("cuda", torch.cuda.current_device())
    env = environment(device)
    print(environment_line(env), flush=True)
    results = []
    for shape in shapes.split(","):
        for dtype_name in DTYPES:
            for rows, keep in BATCHES.get(shape, [HALF]):
                results += run_shape(shape, dtype_name, rows, keep, device)
                torch.cuda.empty_cache()
    return env, results
