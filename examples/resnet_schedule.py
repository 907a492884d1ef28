"""A ResNet by the paper's schedule: the deeper a block, the more often it is dropped.

    python examples/resnet_schedule.py

`linear_decay(L, p_last)` gives block l of L the drop probability p_last * l / L (equation 4 of
"Deep Networks with Stochastic Depth"). A fixed count of kept samples keeps the statistics of the
BatchNorms steady.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from digits import accuracy, digits
from torch import Tensor, nn

from sdkernels import DepthPlan, StochasticDepth, linear_decay


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Images [B, 1, 8, 8] to logits [B, 10]: two stages of residual blocks."""

    def __init__(self, width: int = 16, blocks: int = 4, p_last: float = 0.5) -> None:
        super().__init__()
        self.drop_probs = linear_decay(2 * blocks, p_last)
        self.stem = nn.Sequential(convolution(1, width), nn.ReLU())
        self.down = nn.Sequential(convolution(width, 2 * width, stride=2), nn.ReLU())
        self.blocks = nn.ModuleList()
        for i, p in enumerate(self.drop_probs):
            channels = width if i < blocks else 2 * width
            branch = nn.Sequential(
                convolution(channels, channels), nn.ReLU(), convolution(channels, channels)
            )
            # relu(x + drop_path(branch(x))), the ReLU in the pass that adds
            self.blocks.append(StochasticDepth(branch, p, sampler="fixed", activation="relu"))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor, plan: DepthPlan | None = None) -> Tensor:
        x = self.stem(images)
        for i, block in enumerate(self.blocks):
            if i == len(self.blocks) // 2:
                x = self.down(x)
            x = block(x, rows=None if plan is None else plan[i])
        return self.head(x.mean((2, 3)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--p-last", type=float, default=0.5)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train_x, train_y, val_x, val_y = digits()
    model = ResNet(p_last=options.p_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    ran = total = 0
    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        losses = []
        for batch in torch.randperm(len(train_y)).split(options.batch_size):
            plan = DepthPlan.sample(len(batch), model.drop_probs, sampler="fixed")
            loss = F.cross_entropy(model(train_x[batch], plan), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            ran += sum(rows.k for rows in plan)
            total += sum(rows.batch for rows in plan)
        mean, right = torch.stack(losses).mean(), accuracy(model, val_x, val_y)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch:2d}  loss {mean:.4f}  accuracy {right:.3f}  {seconds:.1f} s")
    print(f"saved {1 - ran / total:.0%} of the computation of the blocks")


if __name__ == "__main__":
    main()
