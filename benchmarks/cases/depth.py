"""A residual net of many small branches: what the op costs when there are hundreds of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.measure.workload import (
    Case,
    Comparison,
    Workload,
    everything,
    first_rows,
    kept_rows,
    seeded,
    step,
    values,
)
from benchmarks.providers.residuals import RULES, Rule
from sdkernels import DepthPlan, KeptRows

# name: (rule, how it gets its rows)
PROVIDERS: dict[str, tuple[Rule, str]] = {
    "naive": (RULES["naive"][0], "drawn"),
    "dinov2": (RULES["dinov2"][0], "drawn"),
    "fused": (RULES["fused"][0], "plan"),  # one a step, its drawing in the step's time
    "fused-inplace": (RULES["fused-inplace"][0], "plan"),
    "fused-fixed": (RULES["fused-fixed"][0], "drawn"),
    "fused-bernoulli": (RULES["fused-bernoulli"][0], "drawn"),
    "dense": (RULES["dense"][0], "drawn"),
}


class Stack(nn.Module):
    """``branches`` times ``x + drop_path(scale * mlp(norm(x)))``."""

    def __init__(self, branches: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(branches))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(branches)
        )
        # 1 / L keeps the stream of a thousand branches at the size of its input.
        self.scales = nn.ParameterList(
            torch.full((width,), 1.0 / branches) for _ in range(branches)
        )

    def forward(self, x: Tensor, rule: Rule, p: float, rows: Any) -> Tensor:
        parts = zip(self.norms, self.mlps, self.scales, rows, strict=True)
        for norm, mlp, scale, kept in parts:
            x = rule(x, mlp, p, norm=norm, layer_scale=scale, rows=kept)
        return x


@dataclass(frozen=True)
class DepthCase(Case):
    """Forward and backward of a stack of branches on rows of a few tokens."""

    branches: int
    batch: int = 64
    tokens: int = 16
    width: int = 64
    keep: float = 0.5

    kind: ClassVar[str] = "depth"
    baseline: ClassVar[str] = "naive"
    floor: ClassVar[str | None] = "dense"

    @property
    def name(self) -> str:
        return f"depth-L{self.branches}-{self.batch}x{self.tokens}x{self.width}-keep{self.keep:g}"

    def providers(self, device: torch.device) -> dict[str, str | None]:
        return dict.fromkeys(PROVIDERS)

    def describe(self) -> dict[str, Any]:
        k = KeptRows.sample(self.batch, 1 - self.keep, sampler="fixed").k
        return asdict(self) | {"direction": "fwd+bwd", "dtype": "fp32", "k": k}

    def _setting(self, device: torch.device) -> tuple[Stack, Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stack = Stack(self.branches, self.width)
        generator = seeded()
        size = (self.batch, self.tokens, self.width)
        x = torch.randn(size, generator=generator).to(device).requires_grad_()
        return stack.to(device), x, torch.randn(size, generator=generator).to(device)

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        stack, x, grad = self._setting(device)
        parameters = tuple(stack.parameters())
        p, none = 1 - self.keep, [None] * self.branches

        def plan() -> DepthPlan:
            drop = [p] * self.branches
            return DepthPlan.sample(self.batch, drop, sampler="fixed", device=device)

        few = first_rows(plan()[0].k, x, grad)

        def workload(name: str, rule: Rule, source: str) -> Workload:
            leaf, d_y = few if name == "dense" else (x, grad)
            rows: Callable[[], Any] = plan if source == "plan" else lambda: none
            return step(lambda: stack(leaf, rule, p, rows()), (leaf, *parameters), d_y, parameters)

        return {name: workload(name, *how) for name, how in PROVIDERS.items()}

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against naive masking with the same rows; ``dense`` where all are kept."""
        stack, x, grad = self._setting(device)
        inputs = {"x": x, **dict(stack.named_parameters())}

        def evaluate(name: str, rows: list[KeptRows]) -> dict[str, Tensor]:
            y = stack(x, PROVIDERS[name][0], 1 - self.keep, rows)
            return values(y, inputs, grad)

        rows = [kept_rows(self.batch, self.keep, device, seed) for seed in range(self.branches)]
        expected = evaluate("naive", rows)
        for name in ("dinov2", "fused", "fused-inplace"):
            yield Comparison(name, evaluate(name, rows), expected)
        rows = [everything(self.batch, device)] * self.branches
        yield Comparison("dense", evaluate("dense", rows), evaluate("naive", rows))
