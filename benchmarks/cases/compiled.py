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
from typing import Any

import torch
from torch import Tensor, nn

import sdkernels
from benchmarks.cases.blocks import BlockCase
from benchmarks.measure.workload import Comparison, Workload, first_rows, kept_rows, values
from benchmarks.providers.residuals import Rows, Rule, dense, dinov2, naive
from sdkernels import KeptRows

COUNTS = STATIC, DYNAMIC, BERNOULLI = "static", "dynamic", "bernoulli"


def _fixed(x: Tensor, p: float) -> tuple[Tensor, float]:
    """As DINOv3 draws: Inductor knows ``randperm(B)[:k]`` and ``index_add`` in one graph, and drops
    the atomics then."""
    kept = round(x.shape[0] * (1 - p))
    return torch.randperm(x.shape[0], device=x.device)[:kept], x.shape[0] / kept


def _independent(x: Tensor, p: float) -> tuple[Tensor, float]:
    return (torch.rand(x.shape[0], device=x.device) >= p).nonzero().flatten(), 1 / (1 - p)


def _index_add(draw: Callable[[Tensor, float], tuple[Tensor, float]], flat: bool = False) -> Rule:
    """DINOv3's residual, or DINOv2's with flattened rows, with the scale multiplied in: as
    index_add's ``alpha``, one that changes between calls is left at an old value in Inductor's
    backward (PyTorch 2.13)."""

    def rule(
        x: Tensor, branch: Callable[..., Tensor], p: float, *, rows: KeptRows | None, **options: Any
    ) -> Tensor:
        index, scale = draw(x, p) if rows is None else (rows.index, rows.scale)
        out = options["layer_scale"] * branch(options["norm"](x[index]))
        if not flat:
            return torch.index_add(x, 0, index, out * scale)
        out = out.to(x.dtype).flatten(1) * scale
        return torch.index_add(x.flatten(1), 0, index, out).view_as(x)

    return rule


_fused = sdkernels.fused_stochastic_depth
# How a block is compiled: the rule, and torch.compile's options (None: eager).
_GIVEN: dict[str, tuple[Rule, dict[str, Any] | None]] = {
    "naive": (naive, {}),
    "dinov3": (_index_add(_fixed), {}),
    "eager": (_fused, None),
    "fused": (_fused, {}),
}
PROVIDERS = {
    STATIC: {**_GIVEN, "dinov2": (dinov2, {}), "dense": (dense, {})},
    DYNAMIC: {**_GIVEN, "dinov2": (_index_add(_fixed, flat=True), {})},
    BERNOULLI: {
        "naive": (naive, {}),
        "dinov3": (_index_add(_independent), {}),
        "dinov3-fullgraph": (_index_add(_independent), {"fullgraph": True}),
        "eager": (_fused, None),
        "fused": (_fused, {}),
        "fused-fullgraph": (_fused, {"fullgraph": True}),
    },
}


@dataclass(frozen=True)
class CompileCase(BlockCase):
    """Forward and backward of a block, compiled by Inductor.

    Args:
        counts: how the number of kept rows behaves: static, dynamic or bernoulli.
    """

    counts: str = STATIC

    kind, baseline = "compile", "dinov3"

    @property
    def name(self) -> str:
        return super().name.replace("block-", f"compile-{self.counts}-")

    def describe(self) -> dict[str, Any]:
        ks = [rows[0].k for rows in self.rows_of_steps()]
        return super().describe() | {"counts": self.counts, "k": ks}

    def providers(self, device: torch.device) -> dict[str, str | None]:
        """All need the compiler of Inductor's back end."""
        compiler = os.environ.get("CXX", "g++")
        missing = device.type != "cuda" and shutil.which(compiler) is None
        reason = f"Inductor needs a C++ compiler; {compiler} is none" if missing else None
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
        rule, options = PROVIDERS[self.counts][name]

        def forward(x: Tensor, rows: Rows) -> Tensor:
            return block(x, rule, [1 - self.keep] * self.net.branches, rows)

        if options is None:
            return forward
        # The providers are copies of one function, and share its limit.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(forward, **options)

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """Compiled for everything that they will meet."""
        block, x, grad = self.setting(device)
        rows = self.rows_of_steps(device)
        wanted = tuple(block.parameters())

        def workload(name: str) -> Workload:
            forward = self._compiled(name, block)
            leaf, d_y = first_rows(self.kept, x, grad) if name == "dense" else (x, grad)
            draws = self.counts == BERNOULLI or (self.counts == STATIC and name.startswith("dino"))
            steps: Iterator[Rows] = cycle([[None] * self.net.branches] if draws else rows)

            def run() -> None:
                torch.autograd.grad(forward(leaf, next(steps)), (leaf, *wanted), d_y)

            for _ in range(6 if draws else 2 * len(rows)):
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
        for name in (name for name in self.usable(device) if name != "dense"):
            forward = self._compiled(name, block)
            for seed, rows in enumerate(self.rows_of_steps(device)):
                given: Rows = rows
                if self.counts == BERNOULLI and PROVIDERS[BERNOULLI][name][0] is _fused:
                    torch.manual_seed(seed)
                    rows = [KeptRows.sample(self.batch, p, device=device) for _ in range(count)]
                    torch.manual_seed(seed)
                    given = [None] * count
                got = values(forward(x, given), inputs, grad)
                masked = self.output(block, x, naive, rows)
                yield Comparison(name, got, values(masked, inputs, grad))
