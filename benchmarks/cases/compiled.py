"""A block under torch.compile: the fused op against the code that DINOv3 compiles.

One case for each way in which the number of kept rows can behave: it never changes (``static``), it
differs from step to step with rows given (``dynamic``), or rows are drawn independently inside the
compiled region (``bernoulli``).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import sdkernels
from benchmarks.cases.blocks import BlockCase, Rows
from benchmarks.measure.workload import Comparison, Workload, first_rows, kept_rows, values
from benchmarks.providers.residuals import Rule, dense, dinov2, naive
from sdkernels import KeptRows

STATIC, DYNAMIC, BERNOULLI = "static", "dynamic", "bernoulli"


def _index_add(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    index: Tensor,
    scale: float,
    norm: nn.Module,
    layer_scale: Tensor,
) -> Tensor:
    """DINOv3's residual, with the scale multiplied in: as index_add's ``alpha``, one that changes
    between calls is left at an old value in Inductor's backward (PyTorch 2.13)."""
    out = layer_scale * branch(norm(x[index]))
    return torch.index_add(x, 0, index, out * scale)


def _dinov3(
    x: Tensor, branch: Callable[..., Tensor], p: float, *, rows: KeptRows | None, **options: Any
) -> Tensor:
    """A fixed count, drawn as DINOv3 draws it where no rows are given.

    Inductor knows ``randperm(B)[:k]`` and ``index_add`` in one graph, and drops the atomics then.
    """
    if rows is not None:
        return _index_add(x, branch, rows.index, rows.scale, **options)
    kept = round(x.shape[0] * (1 - p))
    index = torch.randperm(x.shape[0], device=x.device)[:kept]
    return _index_add(x, branch, index, x.shape[0] / kept, **options)


def _dinov2(
    x: Tensor, branch: Callable[..., Tensor], p: float, *, rows: KeptRows, **options: Any
) -> Tensor:
    """DINOv2's flattened rows; as above, the scale is no ``alpha`` where it changes."""
    out = branch(options["norm"](x[rows.index])) * options["layer_scale"]
    out = out.to(x.dtype).flatten(1) * rows.scale
    return torch.index_add(x.flatten(1), 0, rows.index, out).view_as(x)


def _dinov3_bernoulli(
    x: Tensor, branch: Callable[..., Tensor], p: float, *, rows: KeptRows | None, **options: Any
) -> Tensor:
    """The same with independent decisions."""
    if rows is not None:
        return _index_add(x, branch, rows.index, rows.scale, **options)
    index = (torch.rand(x.shape[0], device=x.device) >= p).nonzero().flatten()
    return _index_add(x, branch, index, 1 / (1 - p), **options)


@dataclass(frozen=True)
class Provider:
    """How a block is compiled: the rule, and torch.compile's options (None: eager)."""

    rule: Rule
    options: dict[str, Any] | None
    seeded: bool = False  # draws the rows that KeptRows.sample draws from the same seed


_fused = sdkernels.fused_stochastic_depth
_GIVEN = {
    "naive": Provider(naive, {}),
    "dinov3": Provider(_dinov3, {}),
    "eager": Provider(_fused, None),
    "fused": Provider(_fused, {}),
}
PROVIDERS: dict[str, dict[str, Provider]] = {
    STATIC: {**_GIVEN, "dinov2": Provider(dinov2, {}), "dense": Provider(dense, {})},
    DYNAMIC: {**_GIVEN, "dinov2": Provider(_dinov2, {})},
    BERNOULLI: {
        "naive": Provider(naive, {}),
        "dinov3": Provider(_dinov3_bernoulli, {}),
        "dinov3-fullgraph": Provider(_dinov3_bernoulli, {"fullgraph": True}),
        "eager": Provider(_fused, None, seeded=True),
        "fused": Provider(_fused, {}, seeded=True),
        "fused-fullgraph": Provider(_fused, {"fullgraph": True}, seeded=True),
    },
}


def _why_no_compiler() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"Inductor needs a C++ compiler; {compiler} is none"


@dataclass(frozen=True)
class CompileCase(BlockCase):
    """Forward and backward of a block, compiled by Inductor.

    Args:
        counts: how the number of kept rows behaves: static, dynamic or bernoulli.
    """

    counts: str = STATIC

    kind: ClassVar[str] = "compile"
    baseline: ClassVar[str] = "dinov3"

    @property
    def name(self) -> str:
        return super().name.replace("block-", f"compile-{self.counts}-")

    def describe(self) -> dict[str, Any]:
        ks = [rows[0].k for rows in self.rows_of_steps()]
        return super().describe() | {"counts": self.counts, "k": ks}

    def providers(self, device: torch.device) -> dict[str, str | None]:
        """All need the compiler of Inductor's back end."""
        reason = None if device.type == "cuda" else _why_no_compiler()
        return dict.fromkeys(PROVIDERS[self.counts], reason)

    def rows_of_steps(self, device: torch.device | str = "cpu") -> list[list[KeptRows]]:
        """The rows of all branches, for each of the steps that a provider goes through in turn."""
        shares = [self.keep]
        if self.counts == DYNAMIC:
            shares = [self.keep + step / self.batch for step in (0, -2, 1, 2, -1)]
        count = self.net.branches
        return [
            [kept_rows(self.batch, share, device, seed=count * i + j) for j in range(count)]
            for i, share in enumerate(shares)
        ]

    def _compiled(self, name: str, block: nn.Module) -> Callable[[Tensor, Rows], Tensor]:
        provider = PROVIDERS[self.counts][name]

        def forward(x: Tensor, rows: Rows) -> Tensor:
            y: Tensor = block(x, provider.rule, [1 - self.keep] * self.net.branches, rows)
            return y

        if provider.options is None:
            return forward
        # The providers are copies of one function, and share its limit.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(forward, **provider.options)

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """Compiled for everything that they will meet."""
        block, x, grad = self.setting(device)
        rows = self.rows_of_steps(device)
        wanted = tuple(block.parameters())

        def workload(name: str) -> Workload:
            forward = self._compiled(name, block)
            leaf, d_y = first_rows(self.kept, x, grad) if name == "dense" else (x, grad)
            draws = self.counts == BERNOULLI or (
                self.counts == STATIC and name in ("dinov2", "dinov3")
            )
            steps: Iterator[Rows] = cycle([[None] * self.net.branches] if draws else rows)

            def run() -> None:
                torch.autograd.grad(forward(leaf, next(steps)), (leaf, *wanted), d_y)

            for _ in range(2 * len(rows) if not draws else 6):
                run()
            return Workload(run)

        return {name: workload(name) for name in self.usable(device)}

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against naive masking on the same kept rows.

        Rows drawn by the fused op are those of KeptRows.sample from the same seed; peers are given
        theirs. The dense floor is compared by the block cases.
        """
        block, x, grad = self.setting(device)
        inputs = {"x": x, **dict(block.named_parameters())}
        p, count = 1 - self.keep, self.net.branches
        for name in self.usable(device):
            if name == "dense":
                continue
            forward = self._compiled(name, block)
            for seed, rows in enumerate(self.rows_of_steps(device)):
                given: Rows = rows
                if PROVIDERS[self.counts][name].seeded:
                    torch.manual_seed(seed)
                    rows = [KeptRows.sample(self.batch, p, device=device) for _ in range(count)]
                    torch.manual_seed(seed)
                    given = [None] * count
                got = values(forward(x, given), inputs, grad)
                masked = self.output(block, x, naive, rows)
                yield Comparison(name, got, values(masked, inputs, grad))
