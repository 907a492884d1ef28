"""What a forward returns, and how far two results are from each other."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

from torch import Tensor

from ..proof import leaves
from .clones import Unequal

__all__ = ["CHANGED", "distance_between", "largest_entry", "of_unchanged", "outputs_of"]

CHANGED = (1, 3)  # rows that are others in the check for what mixes samples


def outputs_of(result: Any, only: Container[str] | None = None) -> dict[str, Tensor | None]:
    """Outputs, or only those of these names."""
    _check_container(result)
    named = ((f"output{path}", leaf.detach()) for path, leaf in leaves(result))
    return {
        name: leaf if leaf.is_floating_point() or leaf.is_complex() else leaf.double()
        for name, leaf in named
        if only is None or name in only
    }


def _check_container(result: Any) -> None:
    """Refuse an output that may hold tensors where they are not seen."""
    if isinstance(result, (list, tuple)):
        for each in result:
            _check_container(each)
    elif isinstance(result, dict):
        _check_container(list(result.values()))
    elif not (result is None or isinstance(result, (Tensor, bool, int, float, str))):
        raise Unequal(f"its output has a {type(result).__name__}, which may hold tensors unseen")


def of_unchanged(outputs: dict[str, Tensor | None], batch: int) -> dict[str, Tensor | None]:
    """What of the outputs does not belong to the samples that are others."""
    rows = [row for row in range(batch) if row not in CHANGED]
    return {
        name: t[rows]
        for name, t in outputs.items()
        if t is not None and t.dim() and t.shape[0] == batch
    }


def largest_entry(tensor: Tensor) -> float:
    """The absolute value of the largest entry that is finite."""
    if not tensor.numel():
        return 0.0
    largest = float(tensor.abs().amax())
    if not math.isfinite(largest):
        largest = float(tensor.abs().nan_to_num(0.0, 0.0, 0.0).amax())
    return largest


def distance_between(a: Tensor, b: Tensor, scale: float) -> float:
    """The largest difference, relative to this."""
    if not a.numel():
        return 0.0
    off = (a - b).abs()
    largest = float(off.amax())
    if not math.isfinite(largest):  # what is infinite or no number in both is the same
        same = (a == b) | (a.isnan() & b.isnan())
        largest = float(off.masked_fill(same, 0.0).amax())
    distance = largest / max(scale, 1e-30)
    return math.inf if distance != distance else distance
