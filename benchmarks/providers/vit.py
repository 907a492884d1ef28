"""The vision transformer that is timed as a block and trained on digits, with the residual rule
left open.

Every residual branch goes through one rule of ``residuals.py``, so that all providers run the same
modules and differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.providers.residuals import Rows, Rule


class Attention(nn.Module):
    """Multi-head self-attention, ``[B, N, D] -> [B, N, D]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Pre-norm transformer block with layer scale: two residual branches, attention and MLP."""

    def __init__(self, width: int, heads: int, layer_scale: float = 1.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.scale1 = nn.Parameter(torch.full((width,), layer_scale))
        self.norm2 = nn.LayerNorm(width)
        inside = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(*inside)
        self.scale2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(
        self, x: Tensor, rule: Rule, p: Sequence[float] = (0.0, 0.0), rows: Rows = (None, None)
    ) -> Tensor:
        """``p`` and ``rows`` hold one entry for attention and one for the MLP."""
        x = rule(x, self.attention, p[0], norm=self.norm1, layer_scale=self.scale1, rows=rows[0])
        return rule(x, self.mlp, p[1], norm=self.norm2, layer_scale=self.scale2, rows=rows[1])


class DigitsViT(nn.Module):
    """A small ViT for 8x8 images: 2x2 patches, mean pooling, ten classes."""

    def __init__(self, width: int, depth: int, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, kernel_size=2, stride=2)
        # Larger than the usual 0.02: mean pooling sees no order, and a few hundred steps would not
        # teach it one.
        self.position = nn.Parameter(0.5 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(
        self, images: Tensor, rule: Rule, p: Sequence[float] = (), rows: Rows = ()
    ) -> Tensor:
        """Images [B, 1, 8, 8] to logits [B, 10].

        ``p`` and ``rows`` hold one entry per branch, two per block; without rows none is dropped.
        """
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for i, block in enumerate(self.blocks):
            both = slice(2 * i, 2 * i + 2)
            x = block(x, rule, p[both], rows[both]) if rows else block(x, rule)
        return self.head(self.norm(x).mean(1))
