"""A transformer of one's own: `StochasticDepth` in place of `x + drop_path(branch(norm(x)))`.

    python examples/own_block.py

The same network is trained twice, masked and compacted, with the same rows: the losses agree, the
time and the saved activations do not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from digits import SmallViT, digits
from torch import Tensor, nn

from sdkernels import DepthPlan, KeptRows, StochasticDepth
from sdkernels.reference import naive_masking


class Masked(StochasticDepth):
    """What the op replaces: the branch runs for every sample, and most of it is multiplied by 0."""

    def forward(self, x: Tensor, rows: KeptRows | None = None) -> Tensor:
        if not self.training:
            return x + self.branch(self.norm(x))
        return naive_masking(x, self.branch, self.p, norm=self.norm, rows=rows)


def train(model: SmallViT, epochs: int, batch_size: int) -> tuple[list[float], float, int]:
    """Losses of every step, seconds, and bytes saved for the backward of the first step."""
    images, labels, *_ = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    shuffle = torch.Generator().manual_seed(0)
    losses, saved, step, start = [], 0, 0, time.perf_counter()

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=shuffle).split(batch_size):
            plan = DepthPlan.for_step(0, step, len(batch), model.drop_probs)
            if step == 0:
                with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                    logits = model(images[batch], plan)
            else:
                logits = model(images[batch], plan)
            loss = F.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
    return losses, time.perf_counter() - start, saved


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--drop-path", type=float, default=0.6)
    options = parser.parse_args(arguments)

    results = {}
    for name in ("masked", "compacted"):
        torch.manual_seed(0)
        model = SmallViT(p_last=options.drop_path)
        if name == "masked":
            model.branches = nn.ModuleList(
                Masked(b.branch, b.p, norm=b.norm) for b in model.branches
            )
        losses, seconds, saved = train(model, options.epochs, options.batch_size)
        results[name] = losses, saved
        print(
            f"{name:9}  loss {losses[-1]:.4f}  {seconds:5.1f} s  "
            f"{saved / 2**20:.1f} MiB of activations in the first step"
        )
    pairs = zip(results["masked"][0], results["compacted"][0], strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    share = 1 - results["compacted"][1] / results["masked"][1]
    print(f"losses differ by at most {difference:.1e}; saved {share:.0%} of the activations")


if __name__ == "__main__":
    main()
