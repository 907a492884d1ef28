"""torch.compile of code around the op: the same values and gradients, and new rows every call."""

import shutil

import pytest
import torch
from torch import Tensor, nn

from sdkernels import KeptRows, StochasticDepth, fused_stochastic_depth

# Graph breaks warn of what they cannot trace; newer compilers warn of older modules of their own.
pytestmark = pytest.mark.filterwarnings("ignore")

BACKENDS = ["eager", "aot_eager", "inductor"]
ROWS = KeptRows.from_index(torch.tensor([0, 2, 3]), batch=8, scale=2.0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor needs a C++ compiler")
    torch._dynamo.reset()
    return request.param


def make_block() -> StochasticDepth:
    branch = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    layer_scale = nn.Parameter(torch.rand(6))
    return StochasticDepth(branch, 0.5, norm=nn.LayerNorm(6), layer_scale=layer_scale)


def test_values_and_gradients(backend):
    block, x = make_block(), torch.randn(8, 5, 6, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        y = fused_stochastic_depth(
            torch.sin(x), block.branch, 0.5, norm=block.norm, layer_scale=block.layer_scale,
            rows=ROWS,
        )  # fmt: skip
        return torch.cos(y)

    compiled = torch.compile(function, backend=backend)
    leaves = [x, *block.parameters()]
    for _ in range(2):
        expected, actual = function(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        )


def test_rows_are_drawn_anew(backend):
    """Rows, and their number, are not those of the call that was traced."""
    block = make_block()
    compiled = torch.compile(block, backend=backend)
    x = torch.randn(16, 6)

    def run(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(5)
        with torch.no_grad():
            return [module(x) for _ in range(6)]

    expected, actual = run(block), run(compiled)
    torch.testing.assert_close(actual, expected)
    kept = {tuple((y != x).any(1).tolist()) for y in actual}
    assert len(kept) == 6
    assert len({sum(rows) for rows in kept}) > 1


def test_evaluation_is_one_graph(backend):
    block = make_block().eval()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    x = torch.randn(8, 6)
    torch.testing.assert_close(compiled(x), block(x))
