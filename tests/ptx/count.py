"""Counts what the GPU kernels ask of memory, from their PTX as it is executed on the CPU.

    python -m tests.ptx.count [FILE]

writes a table for each backend that can be compiled here. Counts are exact; what follows from them
for a GPU (bytes in flight on a multiprocessor, and how many would be needed) is an estimate.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
from torch import Tensor

from . import build
from .translate import Entry, without_sources

F32, BF16 = torch.float32, torch.bfloat16
NAMES = {F32: "f32", BF16: "bf16"}
BATCH, KEPT = 8, 4
SECTOR = 32

# A multiprocessor's share of what has to be in flight: bandwidth times latency (600 to 800 ns).
MULTIPROCESSORS = 132
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
LATENCY = 700e-9


@dataclass
class Count:
    """One op call. Streams are the tensors with a row for each sample; sectors have 32 bytes."""

    backend: str
    op: str
    dtypes: str
    shape: str
    budget: float  # sectors of the streams by the design's table
    touched: int  # sectors of the streams, read and written ones
    again: int  # accesses of a warp to a sector of the streams that it or another has read before
    other: int  # sectors of parameters, statistics, row numbers and partial sums
    loads: int  # instructions of a warp
    stores: int
    asked: int  # bytes
    bank_conflicts: int
    launches: int
    blocks: int  # of the first launch, and all that follows
    threads: int  # of a block
    registers: int
    shared: int
    wait_bytes: float  # of the streams that a thread loads before it waits for some of them

    @property
    def warps(self) -> int:
        """Warps on a multiprocessor of compute capability 9.0, if the blocks suffice."""
        of_block = -(-self.threads // 32)
        registers = -(-self.registers * 32 // 256) * 256 * of_block
        blocks = min(32, 64 // of_block, 65536 // registers, 227 * 1024 // (self.shared + 1024))
        return blocks * of_block

    @property
    def in_flight(self) -> float:
        """Bytes on a multiprocessor: an estimate."""
        return self.warps * 32 * self.wait_bytes


class _Counts(ctypes.Structure):
    """ptx::Counts."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "launches", "blocks", "threads", "loads", "stores", "shared_accesses",
            "bank_conflicts", "stream_bytes", "waits", "first_blocks", "first_threads", "shared",
        )
    ]  # fmt: skip


@dataclass
class Call:
    """An op's arguments, and by the design's table how often it reads and writes each stream."""

    arguments: tuple[object, ...]
    reads: list[tuple[Tensor, int]]  # tensor, rows
    writes: list[tuple[int | Tensor, int]]  # number of the result, rows


def calls(f: torch.dtype, b: torch.dtype, row: tuple[int, ...]) -> dict[str, Call]:
    index = torch.arange(0, BATCH, BATCH // KEPT)
    slot = torch.full((BATCH,), -1)
    slot[index] = torch.arange(KEPT)
    x, grad = torch.randn(BATCH, *row).to(f), torch.randn(BATCH, *row).to(f)
    kept, out = torch.randn(KEPT, *row).to(f), torch.randn(KEPT, *row).to(b)
    written, d_out = torch.empty(KEPT, *row, dtype=f), torch.empty(KEPT, *row, dtype=b)
    is_image = len(row) == 3
    gamma = torch.randn(row[0], 1, 1) if is_image else torch.randn(row[-1])
    gamma = gamma.to(f)
    length = row[-1]
    statistics = (
        torch.randn(KEPT * x[0].numel() // length),
        torch.rand(KEPT * x[0].numel() // length),
    )
    bits = torch.zeros(BATCH, x[0].numel() // 8, dtype=torch.uint8)
    layout = torch.contiguous_format
    k, whole = KEPT, BATCH
    found = {
        "compact_rows": Call((x, index), [(x, k)], [(0, k)]),
        "compact_rows_into": Call((written, x, index), [(x, k)], [(written, k)]),
        "expand_rows": Call((kept, index, slot), [(kept, k)], [(0, whole)]),
        "scatter_rows": Call((x, kept, index, slot), [(x, whole - k), (kept, k)], [(0, whole)]),
        "scatter_rows_": Call((x, kept, index, slot), [(kept, k)], [(x, k)]),
        "scatter_add_rows": Call(
            (x, out, index, slot, gamma, None, 2.0), [(x, whole), (out, k)], [(0, whole)]
        ),
        "scatter_add_rows_": Call(
            (x, out, index, slot, gamma, None, 2.0), [(x, k), (out, k)], [(x, k)]
        ),
        "scatter_add_rows_backward": Call(
            (grad, None, index, gamma, None, 2.0, b, [False, False]), [(grad, k)], [(0, k)]
        ),
        "scatter_add_rows_backward (sums)": Call(
            (grad, out, index, gamma, None, 2.0, b, [True, False]),
            [(grad, k), (out, k)],
            [(0, k)],
        ),
        "scatter_add_rows_backward_into (sums)": Call(
            (d_out, grad, out, index, gamma, None, 2.0, [True, False]),
            [(grad, k), (out, k)],
            [(d_out, k)],
        ),
        "scatter_add_relu_rows": Call(
            (x, out, index, slot, None, None, 2.0),
            [(x, whole), (out, k)],
            [(0, whole), (1, whole)],
        ),
        "scatter_add_relu_rows_backward": Call(
            (grad, bits, index, slot, None, None, 2.0, b, layout, True),
            [(grad, whole), (bits, whole)],
            [(0, whole), (1, k)],
        ),
        "compact_norm": Call(
            (x, index, [length], gamma, gamma, 1e-5, False, b, True), [(x, k)], [(0, k), (1, k)]
        ),
        "compact_norm_into": Call(
            (d_out, x, index, [length], gamma, gamma, 1e-5, False, True),
            [(x, k)],
            [(d_out, k), (0, k)],
        ),
        "compact_norm_backward": Call(
            (grad, out, kept, *statistics, index, slot, [length], gamma, False, [True] * 3),
            [(grad, whole), (out, k), (kept, k)],
            [(0, whole)],
        ),
    }  # fmt: skip
    # Of images, the ops to which a layer scale of [C, 1, 1] makes a difference.
    return {n: c for n, c in found.items() if not is_image or n.startswith("scatter_add_rows")}


def count(
    machine: ctypes.CDLL, call: Call, op: Callable[..., object]
) -> tuple[_Counts, dict[str, float]]:
    """What one call of the op did."""
    ranges = [span for tensor, _ in call.reads for span in span_of(tensor)]
    machine.ptx_count(True, (ctypes.c_uint64 * len(ranges))(*ranges), len(call.reads))
    result = op(*call.arguments)
    results = result if isinstance(result, tuple) else (result,)
    machine.ptx_counts.restype = ctypes.POINTER(_Counts)
    counts = _Counts.from_buffer_copy(machine.ptx_counts().contents)
    machine.ptx_sector_count.restype = ctypes.c_uint64
    sectors = np.zeros((machine.ptx_sector_count(), 5), dtype=np.uint64)
    machine.ptx_sectors(sectors.ctypes.data_as(ctypes.c_void_p))
    machine.ptx_count(False, None, 0)

    written = [(results[t] if isinstance(t, int) else t, rows) for t, rows in call.writes]
    budget = sum(rows * t[0].numel() * t.itemsize / SECTOR for t, rows in call.reads + written)
    at = sectors[:, 0].astype(np.int64)
    streams = np.zeros(len(at), dtype=bool)
    for tensor, _ in call.reads + written:
        begin, end = span_of(tensor)
        streams |= (at >= begin // SECTOR) & (at < -(-end // SECTOR))
    loads, stores = sectors[streams, 1], sectors[streams, 2]
    touched = np.count_nonzero(loads) + np.count_nonzero(stores)
    return counts, {
        "budget": budget,
        "touched": int(touched),
        "again": int(loads.sum() + stores.sum()) - int(touched),
        "other": int(np.count_nonzero(sectors[~streams, 1:3])),
        "asked": int(sectors[:, 3:].sum()),
    }


def span_of(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.itemsize


def registers(entry: Entry, head: str, ptxas: Path) -> int:
    with NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(f"{head}\n{entry.outside}\n{without_sources(entry.text)}\n")
        file.flush()
        target = head.split(".target ")[1].split()[0]
        command = [str(ptxas), "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Used (\d+) registers", result.stdout + result.stderr)
    assert found, result.stderr
    return int(found[1])


def counted(backend: str, few: bool, shapes: dict[str, tuple[int, ...]]) -> list[Count]:
    """Every op, for each pair of dtypes and each shape of a row."""
    import sdkernels  # noqa: F401  # defines the ops

    ops: dict[str, Callable[..., object]]
    if backend == "cuda":
        library, ptx = build.cuda_ops(few)
        torch.ops.load_library(str(library))
        machine, kernels = build.load_machine(), build.Kernels(ptx, counting=True)
        build.load(library, kernels)
        names = {op: getattr(torch.ops.sdkernels, op) for op in torch.ops.sdkernels}
        ops = names
        ptxas = build.toolkit() / "bin/ptxas"
    else:
        import triton

        from . import triton_plugin

        machine = build.load_machine()
        kernels = triton_plugin.serve(counting=True).kernels
        ops = {op: getattr(torch.ops.sdkernels, op) for op in triton_plugin.OPS}
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    pairs = [(F32, F32), (F32, BF16)] + ([] if few else [(BF16, BF16)])
    found = []
    for f, b in pairs:
        for shape, row in shapes.items():
            torch.manual_seed(0)
            for name, call in calls(f, b, row).items():
                kernels.asked.clear()
                counts, numbers = count(machine, call, ops[name.split()[0]])
                entry, head = kernels.entry(kernels.asked[0])
                found.append(
                    Count(
                        backend, name, "+".join(dict.fromkeys((NAMES[f], NAMES[b]))), shape,
                        **numbers, loads=counts.loads, stores=counts.stores,
                        bank_conflicts=counts.bank_conflicts, launches=counts.launches,
                        blocks=counts.first_blocks, threads=counts.first_threads,
                        registers=registers(entry, head, ptxas), shared=counts.shared,
                        wait_bytes=counts.stream_bytes / max(1, counts.waits),
                    )
                )  # fmt: skip
    return found


SHAPES = {"64x768": (64, 768), "64x1280": (64, 1280), "256x7x7": (256, 7, 7)}

HEAD = """# What the GPU kernels ask of memory

Counted from the PTX of nvcc and of Triton for compute capability 9.0, executed on the CPU with
{batch} rows of which {kept} are kept; written by `python -m tests.ptx.count`. No GPU has run for
it. Parameters are of the stream's type; the layer scale of 256x7x7 is a [256, 1, 1].

Budget, touched, again and other are sectors of 32 bytes: what the op has to read and write of
the tensors with a row for each sample, what it touches of them, accesses to one that a warp has
touched before (served by a cache), and parameters, statistics, row numbers and partial sums. Loads
and stores are instructions of a warp, conflicts further passes over banks of shared memory.

The last two columns are **estimates**: bytes of those tensors in flight on a multiprocessor (what a
thread loads before it waits, in the order of the PTX, times the threads that fit), and their share
of what Little's law asks for on an H200 ({needed:.0f} KB at 4.8 TB/s and 700 ns; an H100 asks for
{less:.0f} KB). They leave out how many blocks there are, how ptxas orders loads, and that a thread
waits less for a cache.
"""


def table(found: list[Count]) -> str:
    needed = {name: rate * LATENCY / MULTIPROCESSORS for name, rate in BANDWIDTH.items()}
    head = HEAD.format(
        batch=BATCH, kept=KEPT, needed=needed["H200"] / 1024, less=needed["H100"] / 1024
    )
    columns = (
        "op", "dtypes", "row", "budget", "touched", "again", "other", "loads", "stores",
        "bytes asked", "conflicts", "launches", "blocks", "threads", "registers", "warps",
        "bytes before a wait", "in flight, KB", "of H200's need",
    )  # fmt: skip
    lines = [head]
    for backend in dict.fromkeys(c.backend for c in found):
        lines += [f"\n## {backend}\n", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
        for c in found:
            if c.backend != backend:
                continue
            numbers = (
                c.op, c.dtypes, c.shape, f"{c.budget:.0f}", c.touched, c.again, c.other, c.loads,
                c.stores, c.asked, c.bank_conflicts, c.launches, c.blocks, c.threads, c.registers,
                c.warps, f"{c.wait_bytes:.0f}", f"{c.in_flight / 1024:.0f}",
                f"{min(9.99, c.in_flight / needed['H200']):.2f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--json"]:  # one backend: each needs a process of its own
        backend, few = sys.argv[2], sys.argv[3] == "few"
        shapes = {"64x768": SHAPES["64x768"]} if few else SHAPES
        print(json.dumps([asdict(c) for c in counted(backend, few, shapes)]))
        return
    found = []
    for backend in ["cuda"] * bool(build.nvcc()) + ["triton"] * bool(find_spec("triton")):
        path = os.pathsep.join([str(build.ROOT), str(build.ROOT / "tests")])
        command = [sys.executable, "-m", "tests.ptx.count", "--json", backend, "all"]
        environment = {**os.environ, "PYTHONPATH": path}
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        found += [Count(**c) for c in json.loads(result.stdout)]
    target = Path(sys.argv[1] if sys.argv[1:] else build.ROOT / "docs/gpu-memory-counts.md")
    target.write_text(table(found))


if __name__ == "__main__":
    main()
