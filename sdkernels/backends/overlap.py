"""Whether tensors share memory: what an op that writes in place must know. In PyTorch's words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_is_alias_of: Any = torch._C._is_alias_of  # type: ignore[attr-defined]


def has_internal_overlap(x: Tensor) -> bool:
    """Whether two elements are one in memory, as far as PyTorch looks."""
    return bool(x.numel()) and any(
        size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)
    )


def check_no_internal_overlap(x: Tensor) -> None:
    if has_internal_overlap(x):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location. Please clone() the tensor before performing the operation."
        )


def check_no_overlap(written: Tensor, read: Tensor | None) -> None:
    if read is not None and (written is read or _overlap(written, read)):
        raise RuntimeError(
            "unsupported operation: some elements of the input tensor and the written-to tensor "
            "refer to a single memory location. Please clone() the tensor before performing the "
            "operation."
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors share memory; others PyTorch does not look at either."""
    if not _is_alias_of(a, b):  # of storages, as in PyTorch; a fake tensor has no address
        return False
    if not (a.numel() and b.numel() and _is_dense(a) and _is_dense(b)):
        return False
    (begin, end), (other_begin, other_end) = (
        (offset * x.element_size(), (offset + x.numel()) * x.element_size())
        for x, offset in ((a, a.storage_offset()), (b, b.storage_offset()))
    )
    return begin < other_end and other_begin < end


def _is_dense(x: Tensor) -> bool:
    """Every element in a place of its own, and no gaps."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
