"""What tests of torch.compile share: what was compiled, how often, and the code that came out."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.graph import GraphLowering

from sdkernels import StochasticDepth

inductor = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler"
    ),
)
needs_inductor = inductor.marks[0]


@dataclass
class Compilation:
    """Counted from the start of ``compilation()``; `code` holds Inductor's output."""

    code: list[str] = field(default_factory=list)

    @property
    def graphs(self) -> int:
        return counters["stats"]["unique_graphs"]

    @property
    def breaks(self) -> int:
        return sum(counters["graph_break"].values())

    @property
    def atomics(self) -> int:
        assert self.code, "nothing was compiled"
        return sum(code.count("atomic_add") for code in self.code)


@contextmanager
def compilation() -> Iterator[Compilation]:
    """Forgets everything that was compiled before, and records what is compiled within."""
    torch._dynamo.reset()
    counters.clear()
    seen = Compilation()
    save = GraphLowering.save_output_code
    GraphLowering.save_output_code = staticmethod(seen.code.append)
    try:
        # A graph that comes out of a cache leaves no code to look at, and code for one thread has no
        # need of atomics.
        with (
            torch._inductor.config.patch({"fx_graph_cache": False, "cpp.threads": 2}),
            torch._functorch.config.patch(enable_autograd_cache=False),
        ):
            yield seen
    finally:
        GraphLowering.save_output_code = save


def make_block(width: int = 6, **options: Any) -> StochasticDepth:
    """The same parameters at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return StochasticDepth(
            nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)),
            0.5,
            norm=nn.LayerNorm(width),
            layer_scale=nn.Parameter(torch.rand(width) + 0.5),
            **options,
        )


def results(function: Callable[..., Tensor], leaves: list[Tensor], *args: Any) -> list[Tensor]:
    """The value, and the gradients of all leaves."""
    y = function(*args)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
