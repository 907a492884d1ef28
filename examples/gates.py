"""Gates that look at the input: a router chooses the samples that run a branch, and is trained.

    python examples/gates.py

In every branch the half of the samples with the largest gate runs, in training and in evaluation; a
gate's value weighs what the branch adds, which is how the router gets its gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from digits import SmallViT, accuracy, digits
from torch import Tensor, nn

from sdkernels import KeptRows, fused_stochastic_depth


class Gated(nn.Module):
    """A small ViT whose branches, but for the first two, run on a share of the samples."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.vit = SmallViT(p_last=0.0)
        self.share = share
        width = self.vit.position.shape[-1]
        self.routers = nn.ModuleList(nn.Linear(width, 1) for _ in self.vit.branches)

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit.patches(images).flatten(2).mT + self.vit.position
        for i, (block, router) in enumerate(zip(self.vit.branches, self.routers, strict=True)):
            if i < 2:
                x = block(x)
                continue
            gate = torch.sigmoid(router(x.mean(1))).flatten()  # [B]
            k = max(1, round(self.share * len(x)))
            mask = torch.zeros_like(gate, dtype=torch.bool).index_fill(
                0, gate.topk(k).indices, True
            )
            rows = KeptRows.from_mask(mask, k=k, weight=gate)
            # training=True: the gate holds in evaluation too
            x = fused_stochastic_depth(
                x, block.branch, 0.0, training=True, norm=block.norm, rows=rows
            )
        return self.vit.head(x.mean(1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--share", type=float, default=0.5, help="of the samples, in each branch")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train_x, train_y, val_x, val_y = digits()
    model = Gated(options.share)
    before = [router.weight.detach().clone() for router in model.routers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        losses = []
        for batch in torch.randperm(len(train_y)).split(options.batch_size):
            loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean, right = torch.stack(losses).mean(), accuracy(model, val_x, val_y)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch:2d}  loss {mean:.4f}  accuracy {right:.3f}  {seconds:.1f} s")
    moved = [
        (router.weight - old).norm().item()
        for router, old in zip(model.routers, before, strict=True)
    ]
    gated = len(moved) - 2
    print(f"{sum(m > 0 for m in moved)} routers of {gated} trained")
    saved = (1 - options.share) * gated / len(moved)
    print(f"saved {saved:.0%} of the computation of the branches")


if __name__ == "__main__":
    main()
