"""Where the host cost of a call goes, with the extension and without it.

All take turns of a few calls on one thread, and the lowest tenth of the turns counts, so that the
figures hold on a machine that does other work besides. Writes ``out/host-cost.json``.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases.host import HOST_PROVIDERS, HostCase
from benchmarks.measure import command
from benchmarks.measure.environment import environment_line
from benchmarks.report.table import Table
from benchmarks.studies.study import Study
from sdkernels import KeptRows, functional
from sdkernels.backends import autograd, namespace

CALLS = 20  # a turn
Part = Callable[[Tensor, Tensor, KeptRows], Tensor]


class _FirstNode(torch.autograd.Function):
    """What compacting asks of autograd: two results, two saved tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index, slot)
        return x.detach(), x.detach()

    @staticmethod
    def backward(ctx: Any, d_kept: Tensor, d_stream: Tensor) -> tuple[Tensor | None, ...]:
        _, _ = ctx.saved_tensors
        return d_stream, None, None


class _SecondNode(torch.autograd.Function):
    """What adding asks of autograd: two inputs, one result, a saved tensor."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, out: Tensor, index: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(index)
        ctx.scale = scale
        return stream.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (_,) = ctx.saved_tensors
        return grad, grad, None, None


def _nodes(x: Tensor, grad: Tensor, rows: KeptRows) -> Tensor:
    kept, stream = _FirstNode.apply(x, rows.index, rows.slot)
    y: Tensor = _SecondNode.apply(stream, kept, rows.index, rows.scale)
    return y


def _calls(x: Tensor, grad: Tensor, rows: KeptRows) -> Tensor:
    """Beside what `plain` does, as all that follow."""
    index, scale = rows.index, rows.scale
    with torch.no_grad():
        kept = x.index_select(0, index)
        x.index_add(0, index, kept, alpha=scale)
        grad.index_add(0, index, grad.index_select(0, index).mul_(scale))
    return x + x


def _library(x: Tensor, grad: Tensor, rows: KeptRows) -> Tensor:
    ops, index, slot, scale = namespace.ops, rows.index, rows.slot, rows.scale
    nothing = (None, None)
    with torch.no_grad():
        kept = ops.compact_rows(x, index)
        ops.scatter_add_rows(x, kept, index, slot, *nothing, scale)
        dtype, wanted = kept.dtype, [False, False]
        d_out, _, _ = ops.scatter_add_rows_backward(
            grad, None, index, *nothing, scale, dtype, wanted
        )
        ops.scatter_add_rows(grad, d_out, index, slot, *nothing, 1.0)
    return x + x


def _node(x: Tensor, grad: Tensor, rows: KeptRows) -> Tensor:
    kept = x.index_select(0, rows.index)
    y: Tensor = autograd._add_kept_rows_apply(x, kept, rows.index, rows.scale)
    return y


class _NoBackend:
    """The arithmetic of `plain` in a backend's place."""

    @staticmethod
    def compact(x: Tensor, *options: object) -> tuple[Tensor, Tensor]:
        return x, x

    @staticmethod
    def scatter_add(residual: Tensor, out: Tensor, *options: object) -> Tensor:
        return residual + out


def _no_backend() -> type[_NoBackend]:
    return _NoBackend  # at once, as a mock would not


# What is timed beside the providers: its text, and what calls it (None: a provider, or see there).
PARTS: dict[str, tuple[str, Part | None]] = {
    "index_add-rows": ("PyTorch's calls with PyTorch's nodes", None),
    "nodes": ("two empty autograd functions in Python", _nodes),
    "calls": ("PyTorch's calls of forward and backward, without autograd", _calls),
    "library": ("the same as ops of torch.library in Python, with their checks", _library),
    "node": ("PyTorch's calls, with the one node in Python that the op has", _node),
    "front": ("the op's arguments, above the backend", None),
}


def measure(turns: int) -> dict[str, float]:
    """Seconds of forward and backward, for everything."""
    case = HostCase()
    x, grad, rows = case.inputs(torch.device("cpu"))
    functions: dict[str, Callable[[], Tensor]] = {
        name: lambda function=function: function(x, 1 - case.keep, rows)
        for name, function in HOST_PROVIDERS.items()
    }
    functions |= {
        name: lambda part=part: part(x, grad, rows) for name, (_, part) in PARTS.items() if part
    }
    for function in functions.values():
        _turn(function, x, grad)  # a first call loads what it needs
    times: dict[str, list[float]] = {name: [] for name in (*functions, "front")}
    gc.disable()
    for turn in range(turns):
        for name, function in functions.items():
            times[name].append(_turn(function, x, grad))
        with mock.patch.object(functional, "kernels", _no_backend):
            times["front"].append(_turn(functions["fused-rows"], x, grad))
        if turn % 50 == 0:
            gc.collect()
    gc.enable()
    tenth = max(1, turns // 10)
    return {name: sum(sorted(each)[:tenth]) / tenth for name, each in times.items()}


def _turn(function: Callable[[], Tensor], x: Tensor, grad: Tensor) -> float:
    torch.autograd.grad(function(), x, grad)
    start = time.perf_counter()
    for _ in range(CALLS):
        torch.autograd.grad(function(), x, grad)
    return (time.perf_counter() - start) / CALLS


def table(runs: dict[str, dict[str, float]]) -> str:
    """Extras over `plain`, in microseconds and as shares of naive masking's."""
    texts = {
        "naive": "naive masking",
        "fused-rows": "the op, rows given",
        "fused": "the op, drawing Bernoulli rows",
        **{name: text for name, (text, _) in PARTS.items()},
    }

    def shown(seconds: dict[str, float], name: str) -> str:
        extra, of_naive = (seconds[each] - seconds["plain"] for each in (name, "naive"))
        return f"{1e6 * extra:.1f} us, {extra / of_naive:.2f}"

    columns = {
        "": texts.get,
        "extension": partial(shown, runs["extension"]),
        "without it": partial(shown, runs["without"]),
    }
    return Table.of("", columns, [texts], names=1).markdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the figures; returns the exit code."""
    parser = command.parser("host-cost", __doc__, out=Path("out"))
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--here", action="store_true", help="this process alone, as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.here:
        print(json.dumps(measure(options.turns)))
        return 0
    study = Study("host-cost", arguments, options.out)
    program = [sys.executable, "-m", "benchmarks", "host-cost", "--here"]
    program.append(f"--turns={options.turns}")
    runs = {}
    for name, extension in (("extension", "auto"), ("without", "off")):
        environ = os.environ | {"SDKERNELS_EXTENSION": extension}
        runs[name] = json.loads(subprocess.check_output(program, env=environ, text=True))
    record = study.write(turns=options.turns, calls=CALLS, seconds=runs)
    print(environment_line(record["environment"]))
    print(table(runs))
    return 0
