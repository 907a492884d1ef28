"""A block of which few rows are dropped: compaction against the branch run on every row."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.cases.blocks import BlockCase
from benchmarks.measure.workload import Context
from benchmarks.providers.residuals import Rule, fused, naive

RULES: dict[str, Rule] = {
    "naive": naive,
    "whole": fused(min_saving=1.0),
    "compact": fused(min_saving=0.0),
}


@dataclass(frozen=True)
class BreakEvenCase(BlockCase):
    """A block of which few rows are dropped, all of them given."""

    kind: ClassVar[str] = "break_even"
    floor: ClassVar[str | None] = None

    @property
    def name(self) -> str:
        return f"break_even-{self.net.name}-B{self.batch}-dropped{self.batch - self.kept}"

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"dropped": (self.batch - self.kept) / self.batch}

    def rules(self, device: torch.device) -> dict[str, tuple[Rule, bool, Context]]:
        """With compaction, with the branch on every row, and naive masking."""
        return {name: (rule, False, nullcontext) for name, rule in RULES.items()}

    def providers(self, device: torch.device) -> dict[str, str | None]:
        return dict.fromkeys(RULES)
