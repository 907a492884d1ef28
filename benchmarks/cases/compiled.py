"""A block under torch.compile: the fused op against the code that DINOv3 compiles.

One case for each way in which the number of kept rows can behave: it never changes (``static``), it
differs from step to step with rows given (``dynamic``), or rows are drawn independently inside the
compiled region (``bernoulli``).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import sdkernels
from benchmarks.cases.blocks import BlockCase, Net
from benchmarks.measure.workload import Comparison, Workload, gradients, kept_rows
from benchmarks.providers.residuals import Rule, dense, dinov2, naive
from sdkernels import KeptRows

STATIC, DYNAMIC, BERNOULLI = "static", "dynamic", "bernoulli"

Rows = Sequence[KeptRows | None]


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
class CompileCase:
    """Forward and backward of a block, compiled by Inductor.

    Args:
        counts: how the number of kept rows behaves: static, dynamic or bernoulli.
    """

    counts: str
    net: Net
    batch: int
    keep: float
    dtype: str = "fp32"

    kind: ClassVar[str] = "compile"
    baseline: ClassVar[str] = "dinov3"
    floor: ClassVar[str | None] = "dense"

    @property
    def name(self) -> str:
        return self._plain.name.replace("block-", f"compile-{self.counts}-")

    @property
    def _plain(self) -> BlockCase:
        return BlockCase(self.net, self.batch, self.keep, self.dtype)

    def providers(self, device: torch.device) -> dict[str, str | None]:
        """All need the compiler of Inductor's back end."""
        reason = None if device.type == "cuda" else _why_no_compiler()
        return dict.fromkeys(PROVIDERS[self.counts], reason)

    def describe(self) -> dict[str, Any]:
        """What the report has to know about the case, ready for JSON."""
        ks = [rows[0].k for rows in self._rows()]
        return self._plain.describe() | {"counts": self.counts, "k": ks}

    def _usable(self, device: torch.device) -> list[str]:
        return [name for name, reason in self.providers(device).items() if reason is None]

    def _rows(self, device: torch.device | str = "cpu") -> list[list[KeptRows]]:
        """The rows of all branches, for each of the steps that a provider goes through in turn."""
        device = torch.device(device)
        shares = [self.keep]
        if self.counts == DYNAMIC:
            shares = [self.keep + step / self.batch for step in (0, -2, 1, 2, -1)]
        count = self.net.branches
        return [
            [kept_rows(self.batch, share, device, seed=count * i + j) for j in range(count)]
            for i, share in enumerate(shares)
        ]

    def _step(
        self, name: str, block: nn.Module
    ) -> Callable[[Tensor, Sequence[KeptRows | None]], Tensor]:
        provider = PROVIDERS[self.counts][name]

        def step(x: Tensor, rows: Rows) -> Tensor:
            y: Tensor = block(x, provider.rule, [1 - self.keep] * self.net.branches, rows)
            return y

        if provider.options is None:
            return step
        # The providers are copies of one function, and share its limit.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(step, **provider.options)

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider, compiled for everything that it will meet."""
        block, x, grad = self._plain.setting(device)
        rows = self._rows(device)
        wanted = tuple(block.parameters())
        none: Rows = [None] * self.net.branches

        def workload(name: str) -> Workload:
            step = self._step(name, block)
            leaf, d_y = x, grad
            if name == "dense":
                k = rows[0][0].k
                leaf, d_y = x.detach()[:k].clone().requires_grad_(), grad[:k].clone()
            draws = self.counts == BERNOULLI or (
                self.counts == STATIC and name in ("dinov2", "dinov3")
            )
            steps: Iterator[Rows] = cycle([none] if draws else rows)

            def run() -> None:
                torch.autograd.grad(step(leaf, next(steps)), (leaf, *wanted), d_y)

            for _ in range(2 * len(rows) if not draws else 6):
                run()
            return Workload(run)

        return {name: workload(name) for name in self._usable(device)}

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against naive masking on the same kept rows.

        Rows drawn by the fused op are those of KeptRows.sample from the same seed; peers are given
        theirs. The dense floor is compared by the block cases.
        """
        block, x, grad = self._plain.setting(device)
        inputs = {"x": x, **dict(block.named_parameters())}

        def evaluate(step: Callable[..., Tensor], rows: Rows) -> dict[str, Tensor]:
            output = step(x, rows)
            return {"output": output.detach(), **gradients(output, inputs, grad)}

        def masked(x: Tensor, rows: Rows) -> Tensor:
            y: Tensor = block(x, naive, [1 - self.keep] * self.net.branches, rows)
            return y

        for name in self._usable(device):
            provider = PROVIDERS[self.counts][name]
            if name == "dense":
                continue
            step = self._step(name, block)
            for i, rows in enumerate(self._rows(device)):
                given: Rows = rows
                if provider.seeded:
                    torch.manual_seed(i)
                    p, count = 1 - self.keep, self.net.branches
                    rows = [KeptRows.sample(self.batch, p, device=device) for _ in range(count)]
                    torch.manual_seed(i)
                    given = [None] * count
                yield Comparison(name, evaluate(step, given), evaluate(masked, rows))
