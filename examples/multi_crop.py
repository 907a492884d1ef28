"""DINO-style multi-crop: crops of two sizes go through one network as a list.

    python examples/multi_crop.py
    python examples/multi_crop.py --packed  # linear layers run once on the tokens of both sizes

Two large and four small crops of every image go through the same blocks, each size as one tensor.
Every tensor of every block has kept samples of its own, drawn for the whole list at once. (The loss
is a plain one, with labels for all crops, so that a minute suffices.)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from digits import Attention, digits
from torch import Tensor, nn

from sdkernels import DepthPlan, Packed, StochasticDepth, uniform

LARGE, SMALL = 2, 4  # crops of an image


class EachTensor(nn.Module):
    """Applies a module to every tensor of a list."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [self.module(x) for x in xs]


class OnTokens(nn.Module):
    """Applies a module to the tokens of all crops at once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, packed: Packed) -> Tensor:
        return self.module(packed.values)


class PackedAttention(Attention):
    """Its linear layers run on the tokens of all crops at once, attention on one size at a time."""

    def forward(self, packed: Packed) -> Tensor:
        outs = []
        for qkv in packed.split(self.qkv(packed.values)):  # [k, N, 3 * width], a size each
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            outs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.out(packed.join(outs))


class Encoder(nn.Module):
    """Lists of crops [B, 1, s, s] to lists of logits [B, outputs]."""

    def __init__(
        self,
        width: int = 64,
        depth: int = 4,
        p: float = 0.4,
        outputs: int = 10,
        packed: bool = False,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.position = nn.Parameter(0.5 * torch.randn(1, width, 4, 4))
        self.drop_probs = uniform(2 * depth, p)
        self.branches = nn.ModuleList()
        for i, drop in enumerate(self.drop_probs):
            mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            if packed:
                branch = PackedAttention(width, 4) if i % 2 == 0 else OnTokens(mlp)
            else:
                branch = EachTensor(Attention(width, 4) if i % 2 == 0 else mlp)
            norm = nn.LayerNorm(width)
            self.branches.append(StochasticDepth(branch, drop, norm=norm, packed=packed))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, crops: list[Tensor], plan: DepthPlan | None = None) -> list[Tensor]:
        xs = []
        for crop in crops:
            x = self.patches(crop)
            xs.append((x + self.position[..., : x.shape[2], : x.shape[3]]).flatten(2).mT)
        for i, branch in enumerate(self.branches):
            xs = branch(xs, rows=None if plan is None else plan[i])
        return [self.head(x.mean(1)) for x in xs]


def crop(images: Tensor, size: int, count: int) -> Tensor:
    """`count` random crops of every image, [count * B, 1, size, size], noise added."""
    room = images.shape[-1] - size + 1
    crops = []
    for _ in range(count):
        top, left = torch.randint(room, (2,)).tolist()
        crops.append(images[:, :, top : top + size, left : left + size])
    return torch.cat(crops) + 0.1 * torch.randn(count * len(images), 1, size, size)


@torch.no_grad()
def accuracy_of(model: Encoder, images: Tensor, labels: Tensor) -> float:
    """Share of right answers on whole images, in evaluation mode."""
    model.eval()
    (logits,) = model([images])
    model.train()
    return (logits.argmax(1) == labels).double().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--drop-path", type=float, default=0.4)
    parser.add_argument("--packed", action="store_true", help="all crops in one tensor of tokens")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train_x, train_y, val_x, val_y = digits()
    model = Encoder(p=options.drop_path, packed=options.packed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ran = total = 0
    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        losses = []
        for batch in torch.randperm(len(train_y)).split(options.batch_size):
            crops = [crop(train_x[batch], 8, LARGE), crop(train_x[batch], 4, SMALL)]
            # sdkernels: one plan for all blocks and both sizes
            plan = DepthPlan.sample([len(x) for x in crops], model.drop_probs)
            large, small = model(crops, plan)
            labels = train_y[batch]
            loss = F.cross_entropy(large, labels.repeat(LARGE))
            loss = loss + F.cross_entropy(small, labels.repeat(SMALL))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            for branch in plan:
                for rows, x in zip(branch, crops, strict=True):  # a sample weighs its tokens
                    ran += rows.k * x[0].numel()
                    total += rows.batch * x[0].numel()
        mean, right = torch.stack(losses).mean(), accuracy_of(model, val_x, val_y)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch:2d}  loss {mean:.4f}  accuracy {right:.3f}  {seconds:.1f} s")
    print(f"saved {1 - ran / total:.0%} of the computation of the branches")


if __name__ == "__main__":
    main()
