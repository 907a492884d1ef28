"""Every way in which the sample inputs may lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def _permuted(x: Tensor, order: list[int]) -> Tensor:
    """`x` with the dimensions in memory in this `order`, outermost first."""
    inverse = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


def _sliced(x: Tensor, steps: tuple[int, ...], memory_format: torch.memory_format) -> Tensor:
    """`x` inside of a larger tensor of NaN, with one element more at each end of each dimension."""
    sizes = [size * step + 2 for size, step in zip(x.shape, steps, strict=True)]
    outer = torch.full(sizes, torch.nan, dtype=x.dtype, device=x.device)
    outer = outer.contiguous(memory_format=memory_format)
    inner = outer[tuple(slice(1, size - 1, step) for size, step in zip(sizes, steps, strict=True))]
    return inner.copy_(x)


def _channels_last(x: Tensor) -> torch.memory_format:
    return {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]


# Each returns a tensor of x's shape and dtype, and of its values but for the expanded ones.
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=_channels_last(x)),
    "sliced": lambda x: _sliced(x, (1,) * x.dim(), torch.contiguous_format),
    "strided": lambda x: _sliced(x, (1,) * (x.dim() - 1) + (2,), torch.contiguous_format),
    "every_second_row": lambda x: _sliced(x, (2,) + (1,) * (x.dim() - 1), torch.contiguous_format),
    "sliced_channels_last": lambda x: _sliced(x, (1,) * x.dim(), _channels_last(x)),
    "sequence_first": lambda x: _permuted(x, [1, 0, *range(2, x.dim())]),
    "reversed": lambda x: _permuted(x, list(range(x.dim()))[::-1]),
    "batch_last": lambda x: _permuted(x, [*range(1, x.dim()), 0]),
    "expanded_rows": lambda x: x[:1].expand(x.shape),
    "expanded_elements": lambda x: x[..., :1].expand(x.shape),
    "expanded_all": lambda x: x.new_full((), 0.5).expand(x.shape),
}


def layouts_for(dims: int, elements: int = 1) -> list[str]:
    """The layouts that a tensor with this many dimensions can have."""
    names = ["contiguous", "sliced", "every_second_row", "expanded_all"]
    if elements:
        names.append("expanded_rows")
    if dims >= 2:
        names += ["strided", "sequence_first", "reversed", "batch_last"]
        names += ["expanded_elements"] if elements else []
    if dims in (4, 5):
        names += ["channels_last", "sliced_channels_last"]
    return names
