"""fused_layer_dropout in compiled and in exported code."""

from __future__ import annotations

import pytest
import torch
from compiling import assert_same, compilation, needs_inductor, results
from test_layer_dropout import B, C, Layer, N, make, rows_of
from torch import Tensor, nn

from sdkernels import KeptRows, fused_layer_dropout

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("backend", "inplace"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", False, marks=needs_inductor),
    ],
)
def test_compiled(backend, inplace):
    """One graph for every number of kept rows, and no atomics."""
    layer, x, bias, _ = make(torch.float32)
    leaves = [x, bias, *layer.parameters()]

    def run(x: Tensor, bias: Tensor, rows: KeptRows) -> Tensor:
        given = x.clone() if inplace else x
        options = {"rows": rows, "rescale": "train", "inplace": inplace}
        return fused_layer_dropout(given, layer, 0.5, args=(bias,), **options)

    with compilation() as seen:
        compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
        for index in ([0, 2, 3, 7], [1, 2, 5], [0, 1, 2, 3, 4, 6], [2, 4]):
            rows = rows_of(index, 2.0)
            actual = results(compiled, leaves, x, bias, rows)
            assert_same(actual, results(run, leaves, x, bias, rows))
        assert seen.graphs == 1
        if backend == "inductor":
            assert seen.atomics == 0


def test_rows_drawn_in_a_graph():
    x = torch.zeros(16, 3)

    def run(x: Tensor) -> Tensor:
        return fused_layer_dropout(x, lambda kept: kept + 1, 0.5)

    with compilation():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        sums = {int(compiled(x).sum()) for _ in range(10)}
    assert len(sums) > 2
    assert all(total % 3 == 0 for total in sums)


def test_exported_in_evaluation():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return fused_layer_dropout(x, self.layer, 0.5, training=self.training)

    model, x = Model().eval(), torch.randn(B, N, C)
    graph = torch.export.export(model, (x,)).module()
    assert not any("sdkernels" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), model(x))
