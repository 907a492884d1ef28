"""Patched models beside the models as they were, with masks of the same rows."""

import copy
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from zoo import Net, output_of

import sdkernels
from sdkernels import KeptRows
from sdkernels.models import PatchReport
from sdkernels.models.blocks import PatchedBlock

BATCH = 4
NORMS = (nn.BatchNorm2d,)


class Masked(nn.Module):
    """In the place of a drop path: multiplies by the mask of given rows, one call after another."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[KeptRows] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows[self.calls % len(self.rows)]
        self.calls += 1
        mask = (rows.slot >= 0).to(x.dtype) * rows.scale
        return x * mask.view(-1, *[1] * (x.dim() - 1))


def make_rows(count: int, batch: int = BATCH) -> list[KeptRows]:
    """Rows for every branch: none in the second, all but scaled in the third, half elsewhere."""
    generator = torch.Generator().manual_seed(0)
    plan = []
    for branch in range(count):
        mask = torch.rand(batch, generator=generator) < 0.5
        if branch == 1:
            mask[:] = False
        elif branch == 2:
            mask[:] = True
        plan.append(KeptRows.from_mask(mask, 1.5))
    return plan


def give_masks(model: nn.Module, report: PatchReport, plan: list[KeptRows]) -> nn.Module:
    """The model before it was patched, with the masks of these rows for drop paths."""
    rows = iter(plan)
    for entry in report.patched:
        for branch in entry.branches:
            if branch.drop is None:  # torchvision's ResNet: after the last norm of the branch
                norm = "bn3" if hasattr(entry.block, "bn3") else "bn2"
                name, masked = f"{entry.name}.{norm}", Masked()
                masked.rows.append(next(rows))
                whole = nn.Sequential(model.get_submodule(name), masked)
                model.set_submodule(name, whole)
                continue
            name = f"{entry.name}.{branch.drop}"
            there = attrgetter(name)(model)
            if not isinstance(there, Masked):
                there = Masked()
                model.get_submodule(name.rpartition(".")[0])
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, there)
            there.rows.append(next(rows))
    return model


def freeze_norms(model: nn.Module) -> None:
    """Batch statistics are of the kept rows, by design: out of the comparison with masking."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()


def train_step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)  # patch dropout (of EVA) draws from it
    y = output_of(model(x))
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2)))
    return y.detach(), {"x": x.grad} | {n: p.grad for n, p in model.named_parameters()}


def patched_copy(model: nn.Module, net: Net) -> tuple[nn.Module, PatchReport]:
    model = copy.deepcopy(model)
    return model, sdkernels.patch(model, drop_probs=net.drop_probs)


def patched_blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PatchedBlock)]
