"""A ViT block under torch.compile: the fused op against the code that DINOv3 compiles.

One case for each way in which the number of kept rows can behave: it never changes (``static``), it
differs from step to step with rows given (``dynamic``), or rows are drawn independently inside the
compiled region (``bernoulli``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import sdkernels
from benchmarks.providers import BlockCase, Comparison, Workload, _gradients, _kept_rows
from benchmarks.vit import Residual, dense
from sdkernels import KeptRows, reference

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
    """How a block is compiled: the residual rule, and torch.compile's options (None: eager)."""

    residual: Residual
    options: dict[str, Any] | None
    seeded: bool = False  # draws the rows that KeptRows.sample draws from the same seed


_fused = sdkernels.fused_stochastic_depth
_GIVEN = {
    "naive": Provider(reference.naive_masking, {}),
    "dinov3": Provider(_dinov3, {}),
    "eager": Provider(_fused, None),
    "fused": Provider(_fused, {}),
}
PROVIDERS: dict[str, dict[str, Provider]] = {
    STATIC: {**_GIVEN, "dense": Provider(dense, {})},
    DYNAMIC: _GIVEN,
    BERNOULLI: {
        "naive": Provider(reference.naive_masking, {}),
        "dinov3": Provider(_dinov3_bernoulli, {}),
        "dinov3-fullgraph": Provider(_dinov3_bernoulli, {"fullgraph": True}),
        "eager": Provider(_fused, None, seeded=True),
        "fused": Provider(_fused, {}, seeded=True),
        "fused-fullgraph": Provider(_fused, {"fullgraph": True}, seeded=True),
    },
}


@dataclass(frozen=True)
class CompileCase:
    """Forward and backward of the block of :class:`BlockCase`, compiled by Inductor."""

    counts: str
    width: int
    tokens: int
    batch: int
    keep: float
    head_width: int = 64
    dtype: str = "fp32"

    kind: ClassVar[str] = "compile"
    baseline: ClassVar[str] = "dinov3"
    floor: ClassVar[str | None] = "dense"

    @property
    def name(self) -> str:
        return self._plain.name.replace("block-vit", f"compile-{self.counts}")

    @property
    def _plain(self) -> BlockCase:
        return BlockCase(
            self.width, self.tokens, self.batch, self.keep, self.head_width, self.dtype
        )

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(PROVIDERS[self.counts])

    def describe(self) -> dict[str, Any]:
        """What the report has to know about the case, ready for JSON."""
        return asdict(self) | {"direction": "fwd+bwd", "k": [rows.k for rows, _ in self._rows()]}

    def _rows(self, device: torch.device | str = "cpu") -> list[tuple[KeptRows, KeptRows]]:
        """The rows of both branches, for each of the steps that a provider goes through in turn."""
        device = torch.device(device)
        shares = [self.keep]
        if self.counts == DYNAMIC:
            shares = [self.keep + step / self.batch for step in (0, -2, 1, 2, -1)]
        return [
            (
                _kept_rows(self.batch, share, device, seed=2 * i),
                _kept_rows(self.batch, share, device, seed=2 * i + 1),
            )
            for i, share in enumerate(shares)
        ]

    def _step(
        self, name: str, block: nn.Module
    ) -> Callable[[Tensor, Sequence[KeptRows | None]], Tensor]:
        provider = PROVIDERS[self.counts][name]

        def step(x: Tensor, rows: Rows) -> Tensor:
            y: Tensor = block(x, provider.residual, [1 - self.keep] * 2, rows)
            return y

        if provider.options is None:
            return step
        # The providers are copies of one function, and share its limit.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(step, **provider.options)

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider, compiled for everything that it will meet."""
        block, x, grad = self._plain._block(device)
        rows = self._rows(device)
        wanted = tuple(block.parameters())

        def workload(name: str) -> Workload:
            step = self._step(name, block)
            leaf, d_y = x, grad
            if name == "dense":
                k = rows[0][0].k
                leaf, d_y = x.detach()[:k].clone().requires_grad_(), grad[:k].clone()
            draws = self.counts == BERNOULLI or (self.counts == STATIC and name == "dinov3")
            steps: Iterator[Rows] = cycle([(None, None)] if draws else rows)

            def run() -> None:
                torch.autograd.grad(step(leaf, next(steps)), (leaf, *wanted), d_y)

            for _ in range(2 * len(rows) if not draws else 6):
                run()
            return Workload(run)

        return {name: workload(name) for name in self.providers}

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against naive masking on the same kept rows.

        Rows drawn by the fused op are those of KeptRows.sample from the same seed; peers are given
        theirs. The dense floor is compared by the block cases.
        """
        block, x, grad = self._plain._block(device)
        inputs = {"x": x, **dict(block.named_parameters())}

        def evaluate(step: Callable[..., Tensor], rows: Rows) -> dict[str, Tensor]:
            output = step(x, rows)
            return {"output": output.detach(), **_gradients(output, inputs, grad)}

        def naive(x: Tensor, rows: Rows) -> Tensor:
            y: Tensor = block(x, reference.naive_masking, [1 - self.keep] * 2, rows)
            return y

        for name, provider in PROVIDERS[self.counts].items():
            if name == "dense":
                continue
            step = self._step(name, block)
            for i, rows in enumerate(self._rows(device)):
                given: Rows = rows
                if provider.seeded:
                    torch.manual_seed(i)
                    p = 1 - self.keep
                    rows = (
                        KeptRows.sample(self.batch, p, device=device),
                        KeptRows.sample(self.batch, p, device=device),
                    )
                    torch.manual_seed(i)
                    given = (None, None)
                yield Comparison(name, evaluate(step, given), evaluate(naive, rows))
