"""What cases of a single op share: B rows of a stream and k of a branch, in a dtype each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.workload import DTYPES, Case, seeded


class RowCase(Case):
    """An op on rows of tokens, [B, N, D], or of images, [B, C, H, W]."""

    dtype: str  # "mixed": the stream in fp32, the branch in bf16
    shape: tuple[int, ...]
    k: int

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 4

    @property
    def channels_last(self) -> bool:
        return self.is_image

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

    def random(
        self, device: torch.device, dtype: torch.dtype | None = None, **more: tuple[Any, ...]
    ) -> dict[str, Tensor]:
        """x [B, ...], out [k, ...], weight [D], bias [D] and layer_scale ([D], or [C, 1, 1]).

        Args:
            dtype: in another one than the case's own they are the same numbers.
            more: further tensors of the stream's dtype, by name with their sizes.
        """
        generator = seeded()
        stream, branch = self.dtypes
        batch, *row = self.shape
        width = row[0] if self.is_image else row[-1]

        def randn(own: torch.dtype, size: tuple[int, ...]) -> Tensor:
            values = torch.randn(size, generator=generator).to(own).to(device, dtype or own)
            last = self.channels_last and len(size) == 4
            return values.to(memory_format=torch.channels_last) if last else values

        sizes = {
            "x": (batch, *row),
            "weight": (width,),
            "bias": (width,),
            "layer_scale": (width, 1, 1) if self.is_image else (width,),
            **more,
        }
        made = {name: randn(stream, size) for name, size in sizes.items()}
        return made | {"out": randn(branch, (self.k, *row))}
