"""What a user writes, for type checkers: test_types.py gives it to mypy and pyright, strictly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import sdkernels
from sdkernels import DepthPlan, KeptRows, StochasticDepth, fused_stochastic_depth, linear_decay

x = torch.zeros(8, 4)
crops = [torch.zeros(8, 4), torch.zeros(4, 4)]


def of_one(kept: Tensor) -> Tensor:
    return 2 * kept


def of_list(inputs: list[Tensor]) -> list[Tensor]:
    return [2 * each for each in inputs]


assert_type(fused_stochastic_depth(x, nn.Linear(4, 4), 0.5), Tensor)
assert_type(fused_stochastic_depth(x, of_one, 0.5, residual=x), Tensor)
assert_type(fused_stochastic_depth(crops, of_list, 0.5, sampler="fixed"), list[Tensor])
assert_type(fused_stochastic_depth(x, nn.Linear(4, 4), 0.5, min_saving="auto"), Tensor)

block = StochasticDepth(nn.Linear(4, 4), p=0.5, norm=nn.LayerNorm(4), activation="relu")
assert_type(block(x), Tensor)
assert_type(block(x, residual=x), Tensor)
assert_type(StochasticDepth(of_list, p=0.5)(crops), list[Tensor])

assert_type(KeptRows.sample(8, 0.5, sampler="rounded").k, int)
assert_type(DepthPlan.for_step(1, 1, 8, [0.5], sampler="balanced", kinds=2)[0], KeptRows)
plan = DepthPlan.sample(8, linear_decay(2, 0.5), mode="batch", rescale="none")
assert_type(plan, DepthPlan[KeptRows])
assert_type(plan[0], KeptRows)
assert_type(plan[0].index, Tensor)
assert_type(plan.resample_()[1], KeptRows)
for rows in plan:
    assert_type(rows, KeptRows)
    fused_stochastic_depth(x, nn.Linear(4, 4), 0.5, rows=rows)

crop_plan = DepthPlan.for_step(1, 2, [8, 4], [0.25, 0.5])
assert_type(crop_plan[0], list[KeptRows])
fused_stochastic_depth(crops, of_list, 0.5, rows=crop_plan[0])


class Model(nn.Module):
    def __init__(self, plan: DepthPlan) -> None:  # of one batch, where nothing is said
        super().__init__()
        self.rows = plan[0]
        self.drop = StochasticDepth(nn.Linear(4, 4), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        assert_type(self.rows, KeptRows)
        return self.drop(x, rows=self.rows)


assert_type(sdkernels.compact_rows(x, plan[0]), Tensor)
assert_type(sdkernels.patch(Model(plan)).plan(8).batch, "int | list[int]")

# Each line is an error of one kind, and the checkers say if it is none.
fused_stochastic_depth(x, nn.Linear(4, 4), 0.5, sampler="poisson")  # type: ignore[arg-type]
KeptRows.sample(8, 0.5, sampler="balanced")  # type: ignore[arg-type]
fused_stochastic_depth(x, nn.Linear(4, 4), 0.5, "column")  # type: ignore[arg-type]
fused_stochastic_depth(x, nn.Linear(4, 4), 0.5, rescale="yes")  # type: ignore[arg-type]
fused_stochastic_depth(x, nn.Linear(4, 4), 0.5, empty="no")  # type: ignore[arg-type]
fused_stochastic_depth(x, nn.Linear(4, 4), 0.5, min_saving="no")  # type: ignore[arg-type]
StochasticDepth(nn.Linear(4, 4), 0.5, activation="gelu")  # type: ignore[arg-type]
KeptRows.sample(8, 0.5, sampler="poisson")  # type: ignore[arg-type]
DepthPlan.sample("8", [0.5])  # type: ignore[arg-type]
print(block(x).no_such_attribute)  # type: ignore[attr-defined]
print(plan[0].no_such_attribute)  # type: ignore[attr-defined]
