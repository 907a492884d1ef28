"""packed=True in compiled code: one graph for all counts."""

from __future__ import annotations

import pytest
import torch
from compiling import assert_same, compilation, needs_inductor
from test_packed import C, Setting
from torch import Tensor

from sdkernels import KeptRows, fused_stochastic_depth

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# Counts and sizes that are equal by chance in the first call are taken for equal in a graph.
SHAPES = [(11, 5, C), (13, 3, C), (9, 2, 2, C)]
COUNTS = [(7, 6, 4), (5, 9, 6), (8, 2, 3)]


def rows_of(counts: tuple[int, ...], shapes: list[tuple[int, ...]]) -> list[KeptRows]:
    return [
        KeptRows.from_index(torch.arange(k), shape[0], 2.0)
        for k, shape in zip(counts, shapes, strict=True)
    ]


@pytest.mark.parametrize("multiple_of", [pytest.param(1, marks=pytest.mark.whole), 16])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_inductor)])
def test_compiled(backend, multiple_of):
    first = 1 if backend == "inductor" else 0  # which takes long, and longer with every crop
    shapes = SHAPES[first:]
    setting = Setting("attention", "layer", torch.float32, shapes)

    def gradients(ys: list[Tensor]) -> list[Tensor]:
        return setting.collect(ys)

    with compilation() as seen:
        run = torch.compile(setting.packed, backend=backend, fullgraph=True, dynamic=True)
        for counts in COUNTS:
            rows = rows_of(counts[first:], shapes)
            actual = gradients(run(rows, multiple_of=multiple_of))
            assert_same(actual, gradients(setting.packed(rows, multiple_of=multiple_of)))
        assert seen.graphs == 1
        if backend == "inductor":
            assert seen.atomics == 0


def test_rows_drawn_in_the_graph():
    setting = Setting("mlp", "layer", torch.float32)

    def run(xs: list[Tensor]) -> list[Tensor]:
        return fused_stochastic_depth(xs, setting.branch, 0.5, norm=setting.norm, packed=True)

    with compilation():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        changed = set()
        for _ in range(4):
            ys = compiled(setting.xs)
            pairs = zip(ys, setting.xs, strict=True)
            changed.add(tuple(int((y != x).any(-1).sum()) for y, x in pairs))
    assert len(changed) > 1
