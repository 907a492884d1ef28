"""A residual net of many small branches: what the op costs when there are hundreds of calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.blocks import BlockCase, Net, Rules
from benchmarks.providers.networks import seeded_module
from benchmarks.providers.residuals import RULES, Rows, Rule
from sdkernels import DepthPlan

PROVIDERS = ("naive", "dinov2", "fused", "fused-inplace", "fused-fixed", "fused-bernoulli", "dense")


class Stack(nn.Module):
    """Many times ``x + drop_path(scale * mlp(norm(x)))``."""

    def __init__(self, branches: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(branches))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(branches)
        )
        # 1 / L keeps the stream of a thousand branches at the size of its input.
        self.scales = nn.ParameterList(torch.full((width,), 1 / branches) for _ in range(branches))

    def forward(self, x: Tensor, rule: Rule, p: Sequence[float], rows: Rows) -> Tensor:
        parts = zip(self.norms, self.mlps, self.scales, p, rows, strict=True)
        for norm, mlp, scale, drop, kept in parts:
            x = rule(x, mlp, drop, norm=norm, layer_scale=scale, rows=kept)
        return x


@dataclass(frozen=True)
class StackNet(Net):
    branches: int = 1  # type: ignore[misc]

    @property
    def row(self) -> tuple[int, ...]:
        return self.size, self.width

    def module(self, drop: float) -> nn.Module:
        return seeded_module(lambda: Stack(self.branches, self.width))


@dataclass(frozen=True)
class DepthCase(BlockCase):
    """A stack on rows of a few tokens. Where rows are given they are those of a plan, one a step,
    its drawing in the step's time."""

    kind = "depth"

    @property
    def name(self) -> str:
        shape = f"{self.batch}x{self.net.size}x{self.net.width}"
        return f"depth-L{self.net.branches}-{shape}-keep{self.keep:g}"

    def describe(self) -> dict[str, Any]:
        told, net = super().describe(), self.net
        told = {key: told[key] for key in ("batch", "keep", "dtype", "direction", "k")}
        return told | {"branches": net.branches, "tokens": net.size, "width": net.width}

    def rules(self, device: torch.device) -> Rules:
        return {name: (*RULES[name], nullcontext, None) for name in PROVIDERS}

    def given(self, device: torch.device) -> Callable[[], Rows]:
        drop = [1 - self.keep] * self.net.branches
        return lambda: list(DepthPlan.sample(self.batch, drop, sampler="fixed", device=device))


def stack(branches: int, batch: int = 64, tokens: int = 16, width: int = 64) -> DepthCase:
    return DepthCase(StackNet("stack", width, tokens, "", branches), batch, 0.5)
