"""What a forward returns and leaves behind, and how far two of these are from each other."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from ..proof import leaves
from ..settings import EVERYBODY
from .clones import Forced, Unequal
from .contents import contents

__all__ = [
    "CHANGED",
    "State",
    "distance_between",
    "largest_entry",
    "of_unchanged",
    "other_state",
    "outputs_of",
    "state_of",
]

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


State = dict[str, Any]  # what a block and its modules hold besides parameters, and where


def state_of(clone: nn.Module) -> State:
    """The attributes and buffers of a block's modules, as they are."""
    found: State = {}
    for name, module in clone.named_modules():
        if isinstance(module, Forced):
            continue
        own = {n: v for n, v in module.__dict__.items() if n not in EVERYBODY}
        for key, value in (*own.items(), *module._buffers.items()):
            for path, each in contents(value, f"{name}.{key}".lstrip(".")):
                found[path] = each.detach().clone() if isinstance(each, Tensor) else each
    return found


def other_state(first: State, second: State, tolerance: float = math.inf) -> str | None:
    """Where other values, whole numbers or numbers of entries are; None where nowhere.

    Args:
        tolerance: for tensors of other numbers. None by default: they may be anything.
    """
    for path in dict.fromkeys((*first, *second)):
        if path not in first or path not in second:
            return path
        if not _is_same(first[path], second[path], tolerance):
            return path
    return None


def _is_same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, Tensor) != isinstance(b, Tensor):
        return False
    if not isinstance(a, Tensor):
        return a is b or a == b or (a != a and b != b)
    whole = [not (t.is_floating_point() or t.is_complex()) for t in (a, b)]
    if any(whole):
        return all(whole) and torch.equal(a, b)
    if tolerance == math.inf:
        return True
    return a.shape == b.shape and distance_between(a, b, largest_entry(a)) <= tolerance
