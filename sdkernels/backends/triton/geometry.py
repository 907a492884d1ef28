"""How rows are walked: as lines of elements, with strides, in every tensor of a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Walk(NamedTuple):
    """A row as `lines` runs of `length` elements.

    ``lines_of[t]`` and ``elements_of[t]`` are the strides of tensor t from one line, and from one
    element, to the next; a layer scale comes last.
    """

    lines: int
    length: int
    line_strides: tuple[int, ...]
    element_strides: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether some tensor is contiguous across the lines, and not along them."""
        return any(
            line == 1 and element > 1
            for line, element in zip(self.line_strides, self.element_strides, strict=True)
        )


def walk_rows(tensors: Sequence[Tensor], layer_scale: Tensor | None = None) -> Walk | None:
    """Merge the dimensions of a row into two levels, in the memory order of the first tensor.

    None where the tensors do not allow that: the caller then makes dense copies. Dimension 0 does
    not matter, so that the answer is remembered whatever the number of rows.
    """
    row = tuple(tensors[0].shape[1:])
    strides = [tensor.stride()[1:] for tensor in tensors]
    if layer_scale is not None:
        strides.append(_broadcast_strides(layer_scale, len(row)))
    return _merge(row, tuple(strides))


def _broadcast_strides(layer_scale: Tensor, dims: int) -> tuple[int, ...]:
    shape, strides = layer_scale.shape, layer_scale.stride()
    own = (0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
    return (0,) * (dims - len(shape)) + tuple(own)


@lru_cache(maxsize=4096)
def _merge(row: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Walk | None:
    walked = [d for d in reversed(range(len(row))) if row[d] != 1]
    walked.sort(key=lambda d: strides[0][d])  # innermost first
    levels: list[tuple[int, int]] = []  # the innermost dimension, and the elements merged into it
    for d in walked:
        if levels:
            inner, size = levels[-1]
            if all(stride[d] == stride[inner] * size for stride in strides):
                levels[-1] = (inner, size * row[d])
                continue
        levels.append((d, row[d]))
    if len(levels) > 2:
        return None
    none = (0,) * len(strides)
    (length, element_strides), (lines, line_strides) = [
        (size, tuple(stride[inner] for stride in strides)) for inner, size in levels
    ] + [(1, none)] * (2 - len(levels))
    return Walk(lines, length, line_strides, element_strides)


class NormWalk(NamedTuple):
    """A row as `lines` of `length` normalized elements, contiguous."""

    lines: int
    length: int
    line_stride: int


def walk_lines(x: Tensor, normalized_dims: int) -> NormWalk | None:
    """The lines that a norm over the last dimensions works on; None where x is not laid out so."""
    split = x.dim() - normalized_dims
    return _lines(tuple(x.shape[1:]), x.stride()[1:], split - 1)


@lru_cache(maxsize=4096)
def _lines(row: tuple[int, ...], strides: tuple[int, ...], split: int) -> NormWalk | None:
    levels = []
    for shape, stride in ((row[:split], strides[:split]), (row[split:], strides[split:])):
        level = _merge(shape, (stride,))
        # Dimensions that are not in order of memory (a transposed image) would come back permuted.
        in_order = [s for size, s in zip(shape, stride, strict=True) if size != 1]
        if level is None or level.lines != 1 or in_order != sorted(in_order, reverse=True):
            return None
        levels.append((level.length, level.element_strides[0]))
    (lines, line_stride), (length, element_stride) = levels
    if length != 1 and element_stride != 1:
        return None
    return NormWalk(lines, length, line_stride)


def in_lines(x: Tensor, normalized_dims: int) -> tuple[Tensor, NormWalk]:
    """x, or a dense copy of it, and its lines."""
    walk = walk_lines(x, normalized_dims)
    if walk is None:
        x = x.clone(memory_format=torch.contiguous_format)
        walk = walk_lines(x, normalized_dims)
        assert walk is not None
    return x, walk
