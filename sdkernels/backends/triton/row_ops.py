"""compact_rows, expand_rows, scatter_rows, scatter_add_rows (with a ReLU too) and its backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import acc_type
from ..traceable import empty_bits, empty_rows, row_format, scatter_add_dtype
from .geometry import Walk, walk_rows
from .launching import ACC, launch
from .row_kernels import (
    copy_rows_kernel,
    place_rows_kernel,
    scatter_add_backward_kernel,
    scatter_add_kernel,
    scatter_add_relu_backward_kernel,
    scatter_add_relu_kernel,
)
from .tiles import Tile, cdiv, row_tile, rows_per_sum

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact_rows(x: Tensor, index: Tensor) -> Tensor:
    kept = empty_rows(x, index.shape[0], x.dtype)
    if kept.numel():
        _copy_rows(_bits(kept), _bits(x), index)
    return kept


def compact_rows_into(kept: Tensor, x: Tensor, index: Tensor) -> None:
    if kept.numel():
        _copy_rows(_bits(kept), _bits(x), index)


def expand_rows(kept: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    x = empty_rows(kept, slot.shape[0], kept.dtype)
    if not kept.numel():
        return x.zero_()
    _copy_rows(_bits(x), _bits(kept), slot, negative_allowed=True)
    return x


def scatter_rows(residual: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    y = empty_rows(residual, residual.shape[0], residual.dtype)
    if not out.numel():
        return y.copy_(residual)
    _copy_rows(_bits(y), _bits(out), slot, negative_allowed=True, base=_bits(residual))
    return y


def scatter_rows_(residual: Tensor, out: Tensor, index: Tensor, slot: Tensor) -> None:
    if not out.numel():
        return
    y, x = _bits(residual), _bits(out)
    walk = walk_rows((y, x))
    if walk is None:
        residual.index_copy_(0, index, out)
        return
    tile = row_tile(walk, torch.float32)
    launch(
        place_rows_kernel, _tiles(walk, tile), x.shape[0], tile, y.device,
        y, x, index, x.shape[0], y.shape[0], walk.lines, walk.length,
        *_strides((y, x), walk),
        tile.lines, tile.length,
    )  # fmt: skip


def _bits(x: Tensor) -> Tensor:
    """x as integers: what is copied is bits."""
    if x.dtype == torch.complex128:
        x = torch.view_as_real(x)
    return x.view(_INTEGERS[x.element_size()])


def _copy_rows(
    y: Tensor,
    x: Tensor,
    source_of: Tensor,
    negative_allowed: bool = False,
    base: Tensor | None = None,
) -> None:
    tensors = (y, x) if base is None else (y, x, base)
    walk = walk_rows(tensors)
    if walk is None:
        # x walks its rows in an order that y cannot follow in two levels.
        dense = y.new_empty(y.shape)
        base = None if base is None else base.contiguous()
        _copy_rows(dense, x.contiguous(), source_of, negative_allowed, base)
        y.copy_(dense)
        return
    strides = _strides(tensors, walk) + ([0, 0, 0] if base is None else [])
    tile = row_tile(walk, torch.float32)
    launch(
        copy_rows_kernel, _tiles(walk, tile), y.shape[0], tile, y.device,
        y, x, base, source_of, y.shape[0], x.shape[0], walk.lines, walk.length,
        *strides,
        negative_allowed, tile.lines, tile.length,
    )  # fmt: skip


def _tiles(walk: Walk, tile: Tile) -> int:
    return cdiv(walk.lines, tile.lines) * cdiv(walk.length, tile.length)


def _strides(tensors: Sequence[Tensor], walk: Walk) -> list[int]:
    """From row to row, line to line and element to element, of each tensor."""
    strides = []
    for tensor, line, element in zip(
        tensors, walk.line_strides, walk.element_strides, strict=False
    ):
        strides += [tensor.stride(0), line, element]
    return strides


def _walk_scaled(
    tensors: Sequence[Tensor], layer_scale: Tensor | None
) -> tuple[Walk | None, Tensor | None]:
    """A layer scale whose shape two levels cannot express ([C, 1, W]) is written out for a row, and
    one that keeps the row from being walked in vectors ([C, 1, 1] of an odd image).
    """
    walk = walk_rows(tensors, layer_scale)
    if layer_scale is not None and (walk is None or _parts_vectors(walk, tensors)):
        layer_scale = _written_out(layer_scale, tensors[0])
        walk = walk_rows(tensors, layer_scale)
    return walk, layer_scale


def _parts_vectors(walk: Walk, tensors: Sequence[Tensor]) -> bool:
    """Whether lines begin anywhere because of the layer scale alone. What Triton knows of a stride
    is whether 16 divides it.
    """
    if walk.lines == 1 or walk.element_strides[-1] or walk.length % 16 == 0:
        return False
    alone = walk_rows(tensors)
    return alone is not None and alone.lines == 1 and alone.length % 16 == 0


def _written_out(layer_scale: Tensor, x: Tensor) -> Tensor:
    """layer_scale for a whole row of x, in the row's strides."""
    row = x.select(0, 0)
    return torch.empty_like(row, dtype=layer_scale.dtype).copy_(layer_scale)


def _dense(row_weight: Tensor | None) -> Tensor | None:
    return None if row_weight is None else row_weight.contiguous()


def _scale_strides(walk: Walk, layer_scale: Tensor | None) -> tuple[int, int]:
    if layer_scale is None:
        return 0, 0
    return walk.line_strides[-1], walk.element_strides[-1]


def scatter_add_rows(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> Tensor:
    dtype = scatter_add_dtype(residual, out, layer_scale)
    y = empty_rows(residual, residual.shape[0], dtype)
    if y.numel():
        _scatter_add_into(y, residual, out, slot, layer_scale, row_weight, scale, in_place=False)
    return y


def scatter_add_rows_(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> None:
    if out.numel():
        # What is read must not be overwritten first.
        out = _apart_from(residual, out)
        layer_scale = None if layer_scale is None else _apart_from(residual, layer_scale)
        row_weight = None if row_weight is None else _apart_from(residual, row_weight)
        _scatter_add_into(
            residual, residual, out, index, layer_scale, row_weight, scale, in_place=True
        )


def _apart_from(written: Tensor, x: Tensor) -> Tensor:
    """x, or a copy of it where both may lie in the same memory."""
    shared = x.untyped_storage().data_ptr() == written.untyped_storage().data_ptr()
    return x.clone() if shared else x


def _scatter_add_into(
    y: Tensor,
    residual: Tensor,
    out: Tensor,
    rows_of: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    in_place: bool,
) -> None:
    # The strides of a tensor without elements mean nothing.
    tensors = (y, residual, out if out.numel() else residual)
    walk, gamma = _walk_scaled(tensors, layer_scale)
    if walk is None:
        dense = residual.contiguous()
        result = dense if in_place else y.new_empty(y.shape)
        _scatter_add_into(
            result, dense, out.contiguous(), rows_of, layer_scale, row_weight, scale, in_place
        )
        if result is not y:
            y.copy_(result)
        return
    acc = acc_type(y.dtype, residual.dtype, out.dtype)
    tile = row_tile(walk, acc)
    scale_strides = _scale_strides(walk, gamma)
    rows, others = (out, y) if in_place else (y, out)
    launch(
        scatter_add_kernel, _tiles(walk, tile), rows.shape[0], tile, y.device,
        y, residual, out, gamma, _dense(row_weight), rows_of, scale,
        rows.shape[0], others.shape[0], walk.lines, walk.length,
        *_strides(tensors, walk), *scale_strides,
        in_place, scale_strides[0] != 0, scale_strides[1] != 0,
        tile.lines, tile.length, ACC[acc],
    )  # fmt: skip


def scatter_add_rows_backward(
    grad: Tensor,
    out: Tensor | None,
    index: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    d_out = empty_rows(grad if out is None else out, index.shape[0], dtype)
    args = out, index, layer_scale, row_weight, scale, wanted
    return d_out, *scatter_add_rows_backward_into(d_out, grad, *args)


def scatter_add_rows_backward_into(
    d_out: Tensor,
    grad: Tensor,
    out: Tensor | None,
    index: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    k = index.shape[0]
    d_layer_scale, d_row_weight = grad.new_empty(0), grad.new_empty(0)
    if not d_out.numel():
        if wanted[0] and layer_scale is not None:
            d_layer_scale = torch.zeros_like(layer_scale)
        if wanted[1] and row_weight is not None:
            d_row_weight = torch.zeros_like(row_weight)
        return d_layer_scale, d_row_weight
    if layer_scale is not None and wanted[0]:
        layer_scale = layer_scale.contiguous()  # its sums are stored at its own offsets
    tensors = (d_out, grad) if out is None else (d_out, grad, out)
    walk, gamma = _walk_scaled(tensors, layer_scale)
    if walk is None:
        dense_out = None if out is None else out.contiguous()
        dense = d_out.new_empty(d_out.shape)
        sums = scatter_add_rows_backward_into(
            dense, grad.contiguous(), dense_out, index, layer_scale, row_weight, scale, wanted
        )
        d_out.copy_(dense)
        return sums

    acc = acc_type(grad.dtype, d_out.dtype)
    tile = row_tile(walk, acc)
    tiles = _tiles(walk, tile)
    scale_strides = _scale_strides(walk, gamma)
    per_line, per_element = (stride != 0 for stride in scale_strides)
    group, layer_scale_sums, row_weight_sums = 1, None, None
    if wanted[0]:
        assert gamma is not None
        group = rows_per_sum((1 if per_line else tile.lines) * (1 if per_element else tile.length))
        parts = cdiv(k, group) * (1 if per_line else cdiv(walk.lines, tile.lines))
        parts *= 1 if per_element else cdiv(walk.length, tile.length)
        layer_scale_sums = grad.new_empty((parts, gamma.numel()), dtype=acc)
    if wanted[1]:
        row_weight_sums = grad.new_empty((k, tiles), dtype=acc)
    strides = _strides(tensors, walk) + ([0, 0, 0] if out is None else [])
    launch(
        scatter_add_backward_kernel, tiles, cdiv(k, group), tile, grad.device,
        d_out, grad, out if any(wanted) else None, gamma, _dense(row_weight),
        layer_scale_sums, row_weight_sums, index, scale,
        grad.shape[0], k, walk.lines, walk.length,
        *strides, *scale_strides, 0 if gamma is None else gamma.numel(),
        per_line, per_element, group, tile.lines, tile.length, ACC[acc],
    )  # fmt: skip
    # The second stage. PyTorch's sum of a given shape adds in a fixed order.
    if layer_scale_sums is not None:
        assert gamma is not None
        assert layer_scale is not None
        total = layer_scale_sums.sum(0).as_strided(gamma.shape, gamma.stride())
        # A layer scale that was written out for a row is summed back to its own shape.
        d_layer_scale = torch.empty_like(layer_scale).copy_(total.sum_to_size(layer_scale.shape))
    if row_weight_sums is not None:
        assert row_weight is not None
        d_row_weight = row_weight_sums.sum(1).to(row_weight.dtype)
    return d_layer_scale, d_row_weight


def _of_one_line(x: Tensor, y: Tensor) -> Tensor:
    """x, or a dense copy of it: each of its rows one line of memory, in the order of y's.

    y itself is dense in a memory format.
    """
    walk = walk_rows((y, x))
    if walk is not None and walk.lines == 1 and walk.element_strides == (1, 1):
        return x
    return x.contiguous(memory_format=row_format(y))


def _layer_scale_of_one_line(layer_scale: Tensor | None, y: Tensor) -> tuple[Tensor | None, bool]:
    """layer_scale for the elements of a line in their order, and whether it differs among them."""
    if layer_scale is None:
        return None, False
    walk = walk_rows((y,), layer_scale)
    if walk is None or walk.lines > 1 or walk.element_strides[-1] > 1:
        return _written_out(layer_scale, y), True
    return layer_scale, walk.element_strides[-1] == 1


def _line_tile(y: Tensor, acc: torch.dtype) -> Tile:
    """The tile for rows of one line: whole bytes of bits."""
    walk = walk_rows((y,))
    assert walk is not None
    tile = row_tile(walk, acc)
    return tile._replace(length=max(tile.length, 8))


def scatter_add_relu_rows(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = scatter_add_dtype(residual, out, layer_scale)
    y = empty_rows(residual, residual.shape[0], dtype)
    positive = empty_bits(y)
    if not y.numel():
        return y, positive
    # In the order in which the bits are counted.
    memory_format = row_format(y)
    is_dense = y.is_contiguous(memory_format=memory_format)
    dense = y if is_dense else torch.empty_like(y, memory_format=memory_format)
    residual = _of_one_line(residual, dense)
    out_row = residual.stride(0)  # those of a tensor without elements mean nothing
    if out.numel():
        out = _of_one_line(out, dense)
        out_row = out.stride(0)
    gamma, per_element = _layer_scale_of_one_line(layer_scale, dense)
    acc = acc_type(dtype)
    length = dense[0].numel()
    tile = _line_tile(dense, acc)
    launch(
        scatter_add_relu_kernel, cdiv(length, tile.length), dense.shape[0], tile, dense.device,
        dense, positive, residual, out, gamma, _dense(row_weight), slot, scale,
        dense.shape[0], index.shape[0], length, residual.stride(0), out_row,
        per_element, tile.length, ACC[acc],
    )  # fmt: skip
    return y if is_dense else y.copy_(dense), positive


def scatter_add_relu_rows_backward(
    grad: Tensor,
    positive: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    wants_out: bool,
) -> tuple[Tensor, Tensor]:
    d_residual = torch.empty_like(grad, memory_format=memory_format)
    if wants_out:
        d_out = empty_rows(d_residual, index.shape[0], dtype)
    else:
        d_out = grad.new_empty(0, dtype=dtype)
    if not grad.numel():
        return d_residual, d_out
    grad = _of_one_line(grad, d_residual)
    gamma, per_element = None, False
    if wants_out:
        gamma, per_element = _layer_scale_of_one_line(layer_scale, d_residual)
    acc = acc_type(grad.dtype, dtype)
    length = grad[0].numel()
    tile = _line_tile(d_residual, acc)
    launch(
        scatter_add_relu_backward_kernel, cdiv(length, tile.length), grad.shape[0], tile,
        grad.device, d_residual, d_out if wants_out else None, grad, positive, gamma,
        _dense(row_weight) if wants_out else None, slot, scale,
        grad.shape[0], index.shape[0], length, grad.stride(0),
        per_element, tile.length, ACC[acc],
    )  # fmt: skip
    return d_residual, d_out
