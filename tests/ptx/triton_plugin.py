"""A pytest plugin: the Triton ops serve the CPU in this process.

Their kernels run from the PTX that Triton's compiler makes of them, with the grids, blocks and
arguments of their launchers.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_compiler import Launch

from sdkernels.backends import contract
from sdkernels.backends.checks import checked
from sdkernels.backends.choice import override
from sdkernels.backends.triton import OPS, launching, norm_ops, row_ops

from . import build

# Triton's compiler starts programs, which do not live through the sanitizers.
for variable in ("LD_PRELOAD", "ASAN_OPTIONS"):
    os.environ.pop(variable, None)

FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}


class Started(ctypes.Structure):
    """ptx::Launch."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("large_shared", ctypes.c_int),
        ("parameters", ctypes.c_char_p),
    ]


class Launcher:
    def __init__(self, counting: bool = False) -> None:
        self.machine = build.load_machine()
        self.kernels = build.Kernels(counting=counting)
        self.compiled: dict[object, Any] = {}

    def kernel(self, asked: Launch) -> tuple[Any, int]:
        """What Triton compiled, and the address of the translated kernel."""
        source = ASTSource(asked.kernel, *asked.signature())
        options = launching.options(asked.tile)
        key = f"{source.hash()}-{options}-"
        if key not in self.compiled:
            target = GPUTarget("cuda", int(build.ARCHITECTURE), 32)
            self.compiled[key] = triton.compile(source, target, options)
            self.kernels.add(self.compiled[key].asm["ptx"], key)
        return self.compiled[key], self.kernels[key + asked.kernel.__name__]

    def __call__(
        self, kernel: Any, tiles: int, rows: int, tile: Any, device: torch.device, *arguments: Any
    ) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=True))
        asked = Launch(kernel.__name__, kernel, named, tile)
        binary, address = self.kernel(asked)
        # Then two addresses of scratch memory, which no kernel here has.
        parameters = packed(asked) + [struct.pack("q", 0)] * 2
        started = Started(
            (ctypes.c_uint32 * 3)(*launching.grid(tiles, rows)),
            (ctypes.c_uint32 * 3)(32 * tile.warps, 1, 1),
            binary.metadata.shared,
            True,
            placed(parameters),
        )
        error = self.machine.ptx_launch(ctypes.c_void_p(address), ctypes.byref(started))
        if error:
            raise RuntimeError(f"ptx: {error.decode()} in {kernel.__name__}")


def packed(asked: Launch) -> list[bytes]:
    types, constants, _ = asked.signature()
    values = []
    for name, value in asked.arguments.items():
        if name in constants:
            continue
        if isinstance(value, torch.Tensor):
            values.append(struct.pack("q", value.data_ptr()))
        else:
            values.append(struct.pack(FORMATS[types[name]], value))
    return values


def placed(parameters: list[bytes]) -> bytes:
    """One behind the other, each at a multiple of its size."""
    together = b""
    for parameter in parameters:
        together += bytes(-len(together) % len(parameter)) + parameter
    return together


def serve(counting: bool = False) -> Launcher:
    launcher = Launcher(counting)
    for module in (row_ops, norm_ops):
        module.launch = launcher
    for op, function in OPS.items():
        override(contract.library, op, checked(op, function), "cpu")
    return launcher


def pytest_configure(config: pytest.Config) -> None:
    serve()


def pytest_unconfigure(config: pytest.Config) -> None:
    build.report()
