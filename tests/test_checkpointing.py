"""Activation checkpointing around the op and inside its branch: the same bits as without it.

(test_torch_integration.py looks at what the recomputation draws.)
"""

from functools import partial

import pytest
import torch
from checkpointing import each_variant
from comparison import assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from sdkernels import DepthPlan, StochasticDepth, fused_stochastic_depth

WIDTH, DEPTH, BATCH = 6, 3, 4


class Mlp(nn.Sequential):
    """With dropout: its masks have to come back as well."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.variant: dict[str, object] | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Model(nn.Module):
    def __init__(self, norm: bool, **options: object) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            StochasticDepth(
                Mlp(),
                0.6,
                norm=nn.LayerNorm(WIDTH) if norm else None,
                layer_scale=nn.Parameter(torch.full((WIDTH,), 0.5)),
                **options,
            )
            for _ in range(DEPTH)
        )

    def run(self, x: Tensor, where: str, variant: dict[str, object], rows: object) -> Tensor:
        for block, each in zip(self.blocks, rows or [None] * DEPTH, strict=True):
            if where == "outside":
                x = checkpoint(partial(block, rows=each), x, **variant)
            elif where == "inside":
                x = fused_stochastic_depth(
                    x,
                    lambda kept, mlp=block.branch: checkpoint(mlp, kept, **variant),
                    block.p,
                    norm=block.norm,
                    layer_scale=block.layer_scale,
                    rows=each,
                    sampler=block.sampler,
                    min_saving=block.min_saving,
                )
            else:
                x = block(x, rows=each)
        return x


def results(
    where: str, variant: dict[str, object], seed: int, norm: bool = True, **options: object
) -> tuple[list[Tensor], int]:
    torch.manual_seed(0)
    model = Model(norm, **options)
    x = torch.randn(BATCH, 5, WIDTH, requires_grad=True)
    torch.manual_seed(seed)
    y = model.run(x, where, variant, None)
    y.square().sum().backward()
    drawn_after = torch.rand(3)
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters()), drawn_after]
    return found, sum(block.branch.calls for block in model.blocks)


@each_variant
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize(
    ("norm", "options"),
    [(True, {}), (False, {"sampler": "fixed"}), (True, {"min_saving": 0.5})],
    ids=["norm", "fixed", "min_saving"],
)
def test_same_bits(where, variant, norm, options):
    for seed in range(4):
        expected, calls = results("nowhere", {}, seed, norm, **options)
        actual, again = results(where, variant, seed, norm, **options)
        assert (calls, again) == (DEPTH, 2 * DEPTH)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)


@each_variant
def test_branch_without_rows(variant):
    """Seeds under which a block keeps none: the checkpointed branch still gives zero gradients."""
    kept_none = 0
    for seed in range(6):
        torch.manual_seed(seed)
        linear, x = nn.Linear(WIDTH, WIDTH), torch.randn(2, WIDTH, requires_grad=True)
        seen: list[int] = []

        def branch(kept: Tensor, linear: nn.Linear = linear, seen: list[int] = seen) -> Tensor:
            seen.append(len(kept))
            return checkpoint(linear, kept, **variant)

        fused_stochastic_depth(x, branch, 0.8).sum().backward()
        if seen == [0]:
            kept_none += 1
            assert linear.weight.grad.count_nonzero() == 0
            assert torch.equal(x.grad, torch.ones_like(x))
    assert kept_none


@each_variant
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_rows_of_a_plan(where, variant):
    """Drawn outside of what is recomputed, from a generator that checkpointing knows nothing of."""
    generator = torch.Generator().manual_seed(1)
    plan = DepthPlan.sample(BATCH, [0.6] * DEPTH, generator=generator)
    for _ in range(3):
        found = []
        for how in ("nowhere", where):
            torch.manual_seed(0)
            model = Model(True)
            x = torch.randn(BATCH, 5, WIDTH, requires_grad=True)
            y = model.run(x, how, variant, list(plan))
            y.square().sum().backward()
            found.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
        for a, e in zip(*found, strict=True):
            assert_same_bits(a, e)
        plan.resample_()


def test_private_generator_in_a_checkpointed_region():
    """What the README warns of: it is not restored, the recomputation draws other rows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, WIDTH, requires_grad=True)
    linear = nn.Linear(WIDTH, WIDTH)

    def block(x: Tensor) -> Tensor:
        return fused_stochastic_depth(x, lambda kept: linear(kept).sin(), 0.5, generator=generator)

    y = checkpoint(block, x, use_reentrant=False)
    with pytest.raises(CheckpointError, match="different metadata"):
        y.sum().backward()
