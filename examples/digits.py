"""What the examples share: scikit-learn's handwritten digits, and a small ViT for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sdkernels import KeptRows, StochasticDepth, linear_decay


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1437 images [1, 8, 8] and labels to train with, 360 to validate with."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, validation = order[:1437], order[1437:]
    return images[train], labels[train], images[validation], labels[validation]


class Attention(nn.Module):
    """Self-attention, [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SmallViT(nn.Module):
    """Images [B, 1, 8, 8] to logits [B, 10]; two residual branches a block."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, p_last: float = 0.4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.position = nn.Parameter(0.5 * torch.randn(1, 16, width))
        self.drop_probs = linear_decay(2 * depth, p_last)
        self.branches = nn.ModuleList()
        for i, p in enumerate(self.drop_probs):
            mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            branch = Attention(width, heads) if i % 2 == 0 else mlp
            self.branches.append(StochasticDepth(branch, p, norm=nn.LayerNorm(width)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor, rows: Sequence[KeptRows] | None = None) -> Tensor:
        """`rows`: the rows of every branch. Default: each branch draws its own."""
        x = self.patches(images).flatten(2).mT + self.position
        for i, branch in enumerate(self.branches):
            x = branch(x, rows=None if rows is None else rows[i])
        return self.head(x.mean(1))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers, in evaluation mode."""
    model.eval()
    right = model(images).argmax(1) == labels
    model.train()
    return right.double().mean().item()
