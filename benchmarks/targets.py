"""What the package wants to reach. Only bounds stand here; every figure comes from a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.presets import HEADLINE_BLOCKS, MODELS
from benchmarks.providers import HostCase, OpCase


@dataclass(frozen=True)
class Outcome:
    """One target of the report's last table."""

    target: str
    case: str
    bound: float
    at_most: bool  # else at least
    unit: str  # "x" or "%"
    measured: float | None  # None: its case was not run
    low: float | None = None  # smallest and largest over the repeats, where known
    high: float | None = None

    @property
    def met(self) -> bool | None:
        """None when it was not measured."""
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    @property
    def gap(self) -> float | None:
        """How far past the bound the figure lies, relative to the bound; negative when met."""
        if self.measured is None:
            return None
        return (self.measured / self.bound - 1) * (1 if self.at_most else -1)


def outcomes(cases: list[dict[str, Any]]) -> list[Outcome]:
    """Every target with its figure from ``cases`` (as ``figures.collect`` returns them)."""
    providers = {case["name"]: case["providers"] for case in cases}

    def figure(case: str, provider: str, key: str) -> Any:
        return providers.get(case, {}).get(provider, {}).get(key)

    found = []
    for block in HEADLINE_BLOCKS:
        low, high = figure(block.name, "fused", "over_floor_turns") or (None, None)
        over_floor = figure(block.name, "fused", "over_floor")
        found.append(
            Outcome("fused / dense on k", block.name, 1.02, True, "x", over_floor, low, high)
        )
    for block in HEADLINE_BLOCKS:
        speedup = figure(block.name, "fused", "speedup")
        found.append(Outcome("naive / fused", block.name, 0.97 / block.keep, False, "x", speedup))
    for block in HEADLINE_BLOCKS:
        share = figure(block.name, "fused", "memory_of_baseline")
        found.append(
            Outcome("memory, fused / naive", block.name, block.keep + 0.05, True, "%", share)
        )
    for model in MODELS:
        bound = 0.95 * model.batch / model.kept
        speedup = figure(model.name, "fused", "speedup")
        found.append(Outcome("naive / fused", model.name, bound, False, "x", speedup))
    for dtype in ("fp32", "bf16"):
        case = OpCase("scatter_add", "fwd", dtype).name
        found.append(
            Outcome(
                "index_add / scatter-add", case, 1.5, False, "x", figure(case, "fused", "speedup")
            )
        )
    for op in ("compact", "scatter_add"):
        for direction in ("fwd", "bwd"):
            for dtype in ("fp32", "bf16"):
                case = OpCase(op, direction, dtype).name
                share = figure(case, "fused", "of_copy_bandwidth")
                found.append(Outcome("bandwidth / copy's", case, 0.9, False, "%", share))
    host = HostCase().name
    for provider, bound, title in (
        ("fused-rows", 1.5, "extra per call / naive's, rows given"),
        ("fused", 2.0, "extra per call / naive's, with sampling"),
    ):
        extra = figure(host, provider, "extra_of_baseline")
        found.append(Outcome(title, host, bound, True, "x", extra))
    return found
