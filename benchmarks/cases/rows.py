"""What cases of a single op share: B rows of a stream and k of a branch, in a dtype each."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure.workload import DTYPES, Case, kept_rows, seeded
from sdkernels import KeptRows


@dataclass(frozen=True)
class Tensors:
    """What ops take. The branch's tensors are of another dtype than the stream's if "mixed"."""

    x: Tensor  # [B, ...]: the stream, and the gradient of one
    out: Tensor  # [k, ...]: a branch's output, and the gradient of its input
    weight: Tensor  # [D]
    bias: Tensor  # [D]
    layer_scale: Tensor  # [D], or [C, 1, 1] for images
    rows: KeptRows
    next_rows: KeptRows  # of the branch that follows

    index = property(lambda self: self.rows.index)
    slot = property(lambda self: self.rows.slot)
    width = property(lambda self: [self.x.shape[-1]])

    @cached_property
    def norm(self) -> nn.LayerNorm:
        """Of parameters, see ``trained``."""
        norm = nn.LayerNorm(self.width, device="meta")
        norm.weight, norm.bias = self.weight, self.bias
        return norm

    def _each(self, change: Any) -> Any:
        tensors = (each.name for each in fields(self) if "rows" not in each.name)
        return replace(self, **{name: change(getattr(self, name)) for name in tensors})

    def copy(self) -> Any:
        """The same numbers in memory of its own."""
        return self._each(lambda tensor: tensor.detach().clone())

    def trained(self) -> Any:
        """All of them leaves of a graph."""
        return self._each(nn.Parameter)


class RowCase(Case):
    """An op on rows of tokens, [B, N, D], or of images, [B, C, H, W]."""

    dtype: str  # "mixed": the stream in fp32, the branch in bf16
    shape: tuple[int, ...]
    k: int
    tokens_last = False  # images are [B, H, W, C], for ops that take rows of tokens
    channels_last = True  # else images lie in memory as their shape says

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 4

    @property
    def shape_name(self) -> str:
        return "x".join(str(n) for n in self.shape)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the stream and of the branch."""
        if self.dtype == "mixed":
            return torch.float32, torch.bfloat16
        return DTYPES[self.dtype], DTYPES[self.dtype]

    @property
    def arithmetic(self) -> torch.dtype | None:
        """Where it is narrower than the tensors'."""
        return torch.bfloat16 if self.dtype == "mixed" else None

    def bytes_of(self, traffic: tuple[int, int, int]) -> dict[str, int]:
        """What has to be moved, and what a clone of the stream moves.

        Args:
            traffic: rows of the batch, kept rows of the stream's dtype and of the branch's, reads
                and writes together, in multiples of B, k and k.
        """
        of_batch, of_kept, of_branch = traffic
        stream, branch = (dtype.itemsize for dtype in self.dtypes)
        batch, *row = self.shape
        of_stream = (of_batch * batch + of_kept * self.k) * stream
        return {
            "traffic_bytes": math.prod(row) * (of_stream + of_branch * self.k * branch),
            "copy_bytes": 2 * math.prod(self.shape) * stream,
        }

    def random(self, count: int, own: torch.dtype, generator: torch.Generator) -> Tensor:
        """So many rows; ``own`` is the dtype that their numbers are rounded to."""
        values = torch.randn((count, *self.shape[1:]), generator=generator).to(own)
        if self.is_image and self.channels_last:
            values = values.to(memory_format=torch.channels_last)
        return values.permute(0, 2, 3, 1) if self.is_image and self.tokens_last else values

    def tensors(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensors:
        """In another dtype than the case's own they are the same numbers."""
        generator, (stream, branch) = seeded(), self.dtypes
        batch, *row = self.shape
        width = row[0] if self.is_image else row[-1]
        x = self.random(batch, stream, generator)
        vectors = torch.randn(3, width, generator=generator).to(stream)
        out = self.random(self.k, branch, generator)
        weight, bias, layer_scale = vectors.to(device, dtype or stream)
        if self.is_image and not self.tokens_last:
            layer_scale = layer_scale.view(-1, 1, 1)
        x, out = x.to(device, dtype or stream), out.to(device, dtype or branch)
        rows = (kept_rows(batch, self.k / batch, device, seed) for seed in (1, 2))
        return Tensors(x, out, weight, bias, layer_scale, *rows)
