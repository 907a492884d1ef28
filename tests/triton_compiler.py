"""Compiles the Triton kernels without a GPU and prints what came out, as JSON.

    python tests/triton_compiler.py <capability> ...

The ops run on CPU tensors with a `launch` that only remembers: what is compiled is what they would
launch, specialized as Triton's launcher specializes it.
"""

import json
import multiprocessing
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sdkernels.backends.triton import norm_ops, row_ops
from sdkernels.backends.triton.launching import options

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# Stream and branch; a float32 stream with a branch in half precision is what autocast makes.
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (F32, F16)]
RARE_PAIRS = [(BF16, F32), (F64, BF16)]
NAMES = {
    F32: "fp32",
    F64: "fp64",
    F16: "fp16",
    BF16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# What a program reads and writes of each tensor, one tile a mention; then parameters, a line each.
READ = {
    "copy_rows_kernel": ("x", "base"),
    "place_rows_kernel": ("x",),
    "scatter_add_kernel": ("residual", "out"),
    "scatter_add_backward_kernel": ("grad", "out"),
    "scatter_add_relu_kernel": ("residual", "out"),
    "scatter_add_relu_backward_kernel": ("grad",),
    "compact_norm_kernel": ("x",),
    "compact_norm_backward_kernel": ("d_normed", "kept", "d_stream"),
    "norm_parameter_sums_kernel": ("d_normed", "kept"),
}
WRITTEN = {
    "copy_rows_kernel": ("y",),
    "place_rows_kernel": ("y",),
    "scatter_add_kernel": ("y",),
    "scatter_add_backward_kernel": ("d_out",),
    "scatter_add_relu_kernel": ("y",),
    "scatter_add_relu_backward_kernel": ("d_residual", "d_out"),
    "compact_norm_kernel": ("normed", "kept"),
    "compact_norm_backward_kernel": ("d_x", "d_x"),  # of kept rows and of dropped ones
    "norm_parameter_sums_kernel": (),
}
# What is written as it was read, without a rounding.
COPIED = {
    ("copy_rows_kernel", "y"),
    ("place_rows_kernel", "y"),
    ("scatter_add_relu_backward_kernel", "d_residual"),
}
PARAMETERS = ("layer_scale", "weight", "bias")


@dataclass
class Launch:
    """A launch that was asked for, and after `compiled` what became of it."""

    name: str
    kernel: Any = field(repr=False)
    arguments: dict[str, Any] = field(repr=False)
    tile: Any
    again: bool = False  # whether other numbers of rows have it compiled again

    def signature(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int], Any] = {}
        for parameter in self.kernel.params:
            name, value = parameter.name, self.arguments[parameter.name]
            specialized = not parameter.do_not_specialize
            aligned = False
            if parameter.is_constexpr or value is None:
                types[name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                types[name] = "*" + NAMES[value.dtype]
                aligned = value.data_ptr() % 16 == 0
            elif isinstance(value, int) and value == 1 and not parameter.annotation_type:
                types[name] = "constexpr"
            else:
                types[name] = parameter.annotation_type or "i32"
                aligned = isinstance(value, int) and value % 16 == 0
            if types[name] == "constexpr":
                constants[name] = value
            elif aligned and specialized:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        return types, constants, attributes

    def sixteen_bytes(self, names: tuple[str, ...], lines: int) -> int:
        """Accesses of 16 bytes that a thread needs for a tile with `lines` of each tensor."""
        length = self.arguments["BLOCK_LENGTH"]
        tensors = [self.arguments.get(name) for name in names]
        sizes = [tensor.itemsize for tensor in tensors if tensor is not None]
        return sum(max(1, lines * length * size // (16 * 32 * self.tile.warps)) for size in sizes)

    def compiled(self, capability: int) -> dict[str, Any]:
        target = GPUTarget("cuda", capability, 32)
        source = ASTSource(self.kernel, *self.signature())
        binary = triton.compile(source, target, options(self.tile))
        ptx = binary.asm["ptx"]
        kernel = self.kernel.__name__
        lines = self.arguments.get("BLOCK_LINES", 1)
        return {
            "name": f"{self.name}-sm{capability}",
            "kernel": kernel,
            "again": self.again,
            "blocks": self.arguments.get("BLOCKS", 1),
            "reads": self.sixteen_bytes(READ[kernel], lines),
            "parameter_reads": self.sixteen_bytes(PARAMETERS, 1),
            "writes": self.sixteen_bytes(WRITTEN[kernel], lines),
            "wide_loads": wide_accesses(ptx, "ld"),
            "wide_stores": wide_accesses(ptx, "st"),
            # "rn" in cvt.rn.bf16x2.f32; in cvt.f32.bf16, which is exact, there is none.
            "approximate_roots": re.findall(r"\br?sqrt\.approx\S*", ptx),
            "roundings": sorted(set(re.findall(r"\bcvt\.(r\w+)\.(?:satfinite\.)?b?f16", ptx))),
            "rounds": any(
                self.arguments[name] is not None and self.arguments[name].itemsize == 2
                for name in WRITTEN[kernel]
                if (kernel, name) not in COPIED
            ),
            "shared": binary.metadata.shared,
            **resources(binary.asm["cubin"]),
        }


def wide_accesses(ptx: str, kind: str) -> int:
    """Accesses to global memory of 16 bytes; wider ones count as several."""
    found = re.findall(rf"\b{kind}\.global[.\w:]*\.v(\d)\.[bfus](\d+)", ptx)
    widths = [int(count) * int(bits) // 8 for count, bits in found]
    return sum(width // 16 for width in widths if width >= 16)


def resources(cubin: bytes) -> dict[str, int]:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {name.lower(): int(usage[name]) for name in ("REG", "STACK", "LOCAL")}


class Recorder:
    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.name = ""
        for module in (row_ops, norm_ops):
            module.launch = self.launch

    def launch(
        self, kernel: Any, tiles: int, rows: int, tile: Any, device: torch.device, *arguments: Any
    ) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=True))
        self.launches.append(Launch(self.name, kernel, named, tile))


def record(batch: int = 4, k: int = 2) -> list[Launch]:
    recorder = Recorder()
    index = torch.arange(k)
    slot = torch.full((batch,), -1)
    slot[:k] = index

    def rows(count: int, dtype: torch.dtype, *row: int) -> torch.Tensor:
        return torch.zeros(count, *(row or (64, 384)), dtype=dtype)

    for dtype in (torch.int8, BF16, F32, F64):
        recorder.name = f"compact-{dtype.itemsize}"
        row_ops.compact_rows(rows(batch, dtype), index)
        recorder.name = f"expand-{dtype.itemsize}"
        row_ops.expand_rows(rows(k, dtype), index, slot)
        recorder.name = f"scatter-{dtype.itemsize}"
        row_ops.scatter_rows(rows(batch, dtype), rows(k, dtype), index, slot)
        recorder.name = f"scatter_-{dtype.itemsize}"
        row_ops.scatter_rows_(rows(batch, dtype), rows(k, dtype), index, slot)
    for stream, branch in PAIRS + RARE_PAIRS:
        pair = NAMES[stream] if stream == branch else f"{NAMES[stream]}+{NAMES[branch]}"
        x, out = rows(batch, stream), rows(k, branch)
        gamma, weight = torch.zeros(384, dtype=stream), torch.zeros(k, dtype=F32)
        recorder.name = f"scatter_add-{pair}"
        row_ops.scatter_add_rows(x, out, index, slot, gamma, weight, 2.0)
        recorder.name = f"scatter_add_-{pair}"
        row_ops.scatter_add_rows_(x, out, index, slot, gamma, None, 2.0)
        recorder.name = f"scatter_add_backward-{pair}"
        row_ops.scatter_add_rows_backward(x, None, index, gamma, None, 2.0, branch, [False, False])
        recorder.name = f"scatter_add_backward_sums-{pair}"
        row_ops.scatter_add_rows_backward(x, out, index, gamma, weight, 2.0, branch, [True, True])
        recorder.name = f"scatter_add_relu-{pair}"
        y, bits = row_ops.scatter_add_relu_rows(x, out, index, slot, gamma, weight, 2.0)
        given = index, slot, gamma, weight, 2.0, branch, torch.contiguous_format
        recorder.name = f"scatter_add_relu_backward-{pair}"
        row_ops.scatter_add_relu_rows_backward(y, bits, *given, True)
        recorder.name = f"scatter_add_relu_backward_residual-{pair}"
        row_ops.scatter_add_relu_rows_backward(y, bits, *given, False)
    for stream, branch in PAIRS:
        pair = NAMES[stream] if stream == branch else f"{NAMES[stream]}+{NAMES[branch]}"
        for length in (384, 6144):  # held in registers, and not
            x, normed = rows(batch, stream, 64, length), rows(k, branch, 64, length)
            gamma = torch.zeros(length, dtype=stream)
            recorder.name = f"norm{length}-{pair}"
            _, kept, mean, rstd = norm_ops.compact_norm(
                x, index, [length], gamma, gamma, 1e-5, False, branch, True
            )
            recorder.name = f"norm{length}_backward-{pair}"
            norm_ops.compact_norm_backward(
                x, normed, kept, mean, rstd, index, slot, [length], gamma, False, [True] * 3
            )
    return recorder.launches


LAUNCHES: list[Launch] = []


def compile_one(job: tuple[int, int]) -> dict[str, Any]:
    launch, capability = job
    return LAUNCHES[launch].compiled(capability)


if __name__ == "__main__":
    LAUNCHES += record()
    for counts in ((4, 1), (16, 16), (33, 17)):
        for launch, other in zip(LAUNCHES, record(*counts), strict=True):
            same = launch.signature() == other.signature() and launch.tile == other.tile
            launch.again = launch.again or not same
    jobs = [(i, int(capability)) for i in range(len(LAUNCHES)) for capability in sys.argv[1:]]
    # A fork knows LAUNCHES.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(json.dumps(pool.map(compile_one, jobs, chunksize=1)))
