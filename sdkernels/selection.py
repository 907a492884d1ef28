"""The rows of PyTorch's own objects that hold a batch: packed, nested and block-sparse."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Memo", "built_in_selection", "of_ones"]

# Offsets of nested tensors, by the id of those that they are the kept ones of: nested tensors of
# one structure must have one structure afterwards, or PyTorch does not combine them.
Memo = dict[int, tuple[Tensor, Tensor]]
Select = Callable[[Any, Tensor, Memo], Any]


def built_in_selection(value: Any) -> tuple[int, bool, Select] | None:
    """How many samples an object holds, whether one of them broadcasts, and how they are taken.

    None: not known.
    """
    if type(value) is PackedSequence:
        rows = int(value.batch_sizes[0]) if len(value.batch_sizes) else 0
        return rows, False, _of_packed
    if isinstance(value, Tensor):
        if not value.is_nested:
            return None
        return value.size(0), False, _of_jagged if value.layout == torch.jagged else _of_nested
    flex_attention: Any = sys.modules.get("torch.nn.attention.flex_attention")
    if flex_attention is not None and type(value) is flex_attention.BlockMask:
        # Precomputed orders of writes (torch 2.13) are not taken apart here.
        if any(getattr(value, name, None) is not None for name in _WRITE_ORDERS):
            return None
        return value.kv_num_blocks.shape[0], True, _of_block_mask
    return None


def of_ones(taken: Any) -> Any:
    """What was taken, with ones for floating point values; a backward still finds its way."""
    if type(taken) is PackedSequence:
        return PackedSequence(
            _ones(taken.data), taken.batch_sizes, taken.sorted_indices, taken.unsorted_indices
        )
    if not isinstance(taken, Tensor):  # a BlockMask
        return taken
    if taken.layout is torch.strided:
        parts = [_ones(part) for part in taken.unbind()]
        return torch.nested.as_nested_tensor(parts, dtype=taken.dtype, device=taken.device)
    jagged: Any = taken
    return torch.nested.nested_tensor_from_jagged(
        _ones(jagged.values()), jagged.offsets(), jagged_dim=jagged._ragged_idx
    )


def _ones(values: Tensor) -> Tensor:
    floating = values.is_floating_point() or values.is_complex()
    return torch.cat([values[:0], torch.ones_like(values)]) if floating else values


def _of_packed(packed: PackedSequence, index: Tensor, memo: Memo) -> PackedSequence:
    """Its lengths are on the host: a CUDA index is waited for."""
    host = index.cpu()
    unsorted, batch_sizes = packed.unsorted_indices, packed.batch_sizes
    position = host if unsorted is None else unsorted.cpu().index_select(0, host)
    running = batch_sizes[:, None] > position  # [steps, k]: whether a sequence has this step
    order = running.sum(0).argsort(descending=True, stable=True)
    running = running[:, order]
    first = batch_sizes.cumsum(0) - batch_sizes  # of each step, in data
    take = (first[:, None] + position[order])[running].to(packed.data.device)
    if unsorted is not None:
        sorted_indices = order.to(unsorted.device)
        unsorted = torch.argsort(sorted_indices)
    else:  # longest first, and so are those of an ascending index
        sorted_indices = None
    sizes = running.sum(1)
    return PackedSequence(
        packed.data.index_select(0, take), sizes[sizes > 0], sorted_indices, unsorted
    )


def _of_jagged(nested: Any, index: Tensor, memo: Memo) -> Tensor:
    """The number of its values follows from the lengths: a CUDA index is waited for."""
    dim = nested._ragged_idx - 1
    offsets, lengths = nested.offsets(), nested.lengths()
    if lengths is None:
        lengths = offsets.diff()
    counts = lengths.index_select(0, index)
    if id(offsets) not in memo:
        kept = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(offsets.dtype)
        memo[id(offsets)] = offsets, kept
    kept = memo[id(offsets)][1]
    shift = offsets[:-1].index_select(0, index) - kept[:-1]
    take = torch.repeat_interleave(shift, counts)
    take = take + torch.arange(take.shape[0], device=take.device)
    values = nested.values().index_select(dim, take)
    return torch.nested.nested_tensor_from_jagged(values, kept, jagged_dim=dim + 1)


def _of_nested(nested: Tensor, index: Tensor, memo: Memo) -> Tensor:
    parts = nested.unbind()
    kept = [parts[i] for i in index.tolist()]
    return torch.nested.as_nested_tensor(kept, dtype=nested.dtype, device=nested.device)


_WRITE_ORDERS = ("dq_write_order", "dq_write_order_full", "dq_kv_order")


def _of_block_mask(mask: Any, index: Tensor, memo: Memo) -> Any:
    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Any:
        return mask.mask_mod(index[b], h, q, kv)

    blocks = (
        None if tensor is None else tensor.index_select(0, index)
        for tensor in (
            mask.kv_num_blocks,
            mask.kv_indices,
            mask.full_kv_num_blocks,
            mask.full_kv_indices,
        )
    )
    return type(mask).from_kv_blocks(
        *blocks, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask_mod, seq_lengths=mask.seq_lengths
    )
