"""Stochastic depth as others write it, for tests and benchmarks: nothing here is fast or fused.

Both functions take the branch and the options of :func:`sdkernels.fused_stochastic_depth` and can
be given the same kept rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .rows import KeptRows

__all__ = ["index_add", "naive_masking"]


def naive_masking(
    x: Tensor,
    branch: Callable[..., Tensor],
    p: float,
    mode: str = "row",
    training: bool = True,
    *,
    args: Sequence[Any] = (),
    norm: nn.Module | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    rows: KeptRows | None = None,
) -> Tensor:
    """The branch for every row, multiplied by a mask: what torchvision and timm do.

    The mask is drawn as torchvision draws it, or made from `rows`.
    """
    out = branch(x if norm is None else norm(x), *args)
    if layer_scale is not None:
        out = out * layer_scale
    if training and (p > 0.0 or rows is not None):
        size = [out.shape[0] if mode == "row" or rows is not None else 1] + [1] * (out.dim() - 1)
        if rows is not None:
            noise = (rows.slot >= 0).to(out.dtype)
            if rows.weight is not None:
                noise = noise.index_copy(0, rows.index, rows.weight.to(out.dtype))
            noise = (noise * rows.scale).view(size)
        else:
            noise = torch.empty(size, dtype=out.dtype, device=out.device).bernoulli_(1.0 - p)
            if p < 1.0:
                noise.div_(1.0 - p)
        out = out * noise
    return (x if residual is None else residual) + out


def index_add(
    x: Tensor,
    branch: Callable[..., Tensor],
    *,
    rows: KeptRows,
    args: Sequence[Any] = (),
    norm: nn.Module | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Gather, branch, ``torch.index_add``: what DINOv2 does. `args` are compacted by the caller."""
    kept = x[rows.index]
    out = branch(kept if norm is None else norm(kept), *args)
    if layer_scale is not None:
        out = out * layer_scale
    if rows.weight is not None:
        out = out * rows.weight.view(-1, *[1] * (out.dim() - 1))
    stream = x if residual is None else residual
    return torch.index_add(stream, 0, rows.index, out.to(stream.dtype), alpha=rows.scale)
