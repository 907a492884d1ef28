"""compact_norm (LayerNorm and RMSNorm of the kept rows) and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..checks import acc_type
from .geometry import in_lines
from .launching import ACC, launch
from .norm_kernels import (
    compact_norm_backward_kernel,
    compact_norm_kernel,
    norm_parameter_sums_kernel,
)
from .tiles import cdiv, norm_tile, rows_per_sum, sum_tile


def compact_norm_into(
    normed: Tensor,
    x: Tensor,
    index: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    keep_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(normalized_shape)
    acc = acc_type(x.dtype)
    k = index.shape[0]
    row = x.shape[1:]
    lines = prod(row[: len(row) - len(shape)])
    kept = x.new_empty((k, *row) if keep_rows else 0)
    mean = x.new_empty(0 if rms else k * lines, dtype=acc)
    rstd = x.new_empty(k * lines, dtype=acc)
    if not normed.numel():
        return kept, mean.zero_(), rstd.zero_()
    x, walk = in_lines(x, len(shape))
    tile = norm_tile(walk.lines, walk.length, acc)
    launch(
        compact_norm_kernel, cdiv(walk.lines, tile.lines), k, tile, x.device,
        normed, kept if keep_rows else None, None if rms else mean, rstd,
        x, _dense(weight), _dense(bias), index, eps,
        x.shape[0], k, walk.lines, walk.length, x.stride(0), walk.line_stride,
        cdiv(walk.length, tile.length), tile.lines, tile.length, ACC[acc],
    )  # fmt: skip
    return kept, mean, rstd


def compact_norm(
    x: Tensor,
    index: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    keep_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed = x.new_empty((index.shape[0], *x.shape[1:]), dtype=dtype)
    args = normalized_shape, weight, bias, eps, rms, keep_rows
    kept, mean, rstd = compact_norm_into(normed, x, index, *args)
    return normed, kept, mean, rstd


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def compact_norm_backward(
    d_stream: Tensor | None,
    d_normed: Tensor,
    kept: Tensor,
    mean: Tensor,
    rstd: Tensor,
    index: Tensor,
    slot: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    rms: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(normalized_shape)
    k, batch, row = kept.shape[0], slot.shape[0], tuple(kept.shape[1:])
    lines, length = prod(row[: len(row) - len(shape)]), prod(shape)
    acc = acc_type(kept.dtype)
    d_x = kept.new_empty((batch, *row) if wanted[0] else 0)

    def zeros(is_wanted: bool) -> Tensor:
        return kept.new_zeros(shape if is_wanted else 0, dtype=acc)

    if not batch * lines * length:
        return d_x, zeros(wanted[1]), zeros(wanted[2])
    d_normed, kept, rstd = d_normed.contiguous(), kept.contiguous(), rstd.contiguous()
    center = None if rms else mean.contiguous()
    stream_strides = (0, 0)
    if d_stream is not None:
        d_stream, stream = in_lines(d_stream, len(shape))
        stream_strides = d_stream.stride(0), stream.line_stride

    tile = norm_tile(lines, length, acc)
    tiles, blocks = cdiv(lines, tile.lines), cdiv(length, tile.length)
    sums_here = blocks == 1 and (wanted[1] or wanted[2])
    group = rows_per_sum(tile.lines) if sums_here else 1

    def partial_sums(is_wanted: bool, parts: int) -> Tensor | None:
        return kept.new_empty((parts, length), dtype=acc) if is_wanted else None

    sums = [partial_sums(sums_here and w, cdiv(batch, group) * tiles) for w in wanted[1:]]
    if wanted[0] or sums_here:
        launch(
            compact_norm_backward_kernel, tiles, cdiv(batch, group), tile, kept.device,
            d_x if wanted[0] else None, d_stream, d_normed, kept, center, rstd, _dense(weight),
            *sums, slot, batch, k, lines, length, *stream_strides,
            group, blocks, tile.lines, tile.length, ACC[acc],
        )  # fmt: skip
    if (wanted[1] or wanted[2]) and not sums_here and k:
        group = rows_per_sum(1)
        sums = [partial_sums(w, cdiv(k * lines, group)) for w in wanted[1:]]
        column_tile = sum_tile(acc)
        launch(
            norm_parameter_sums_kernel, cdiv(length, column_tile.length), cdiv(k * lines, group),
            column_tile, kept.device, *sums, d_normed, kept, center, rstd, k * lines, length,
            group, column_tile.length, ACC[acc],
        )  # fmt: skip
    # The second stage. PyTorch's sum of a given shape adds in a fixed order. The sums stay in the
    # type of the arithmetic: autograd rounds them to the parameters' own.
    d_weight, d_bias = (
        zeros(is_wanted) if parts is None else parts.sum(0).view(shape)
        for parts, is_wanted in zip(sums, wanted[1:], strict=True)
    )
    return d_x, d_weight, d_bias
