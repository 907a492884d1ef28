"""What runs where no row is kept: the branch on no row, the branch on a row of ones, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .backends.ops import is_compiling
from .rows import KeptRows
from .statistics import waits_for_others

__all__ = ["EMPTY", "has_no_rows", "note_no_rows", "run_list_on_ones", "run_on_ones"]

Empty = Literal["run", "ones", "skip"]
EMPTY: tuple[str, ...] = get_args(Empty)


def has_no_rows(rows: KeptRows) -> bool:
    """Whether none is kept; False in a graph that draws rows inside and so does not know."""
    if not is_compiling():
        return rows.k == 0
    # Here, because it imports SymPy.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(rows.k == 0)


def run_on_ones(branch: Callable[..., Any], kept: Tensor, args: Sequence[Any]) -> Any:
    """The branch on one row of ones where none is kept, without what it says of that row."""
    with _said(), _without_statistics(branch):
        return _without_row(branch(_with_row_of_ones(kept), *args))


def run_list_on_ones(
    branch: Callable[..., Any], kept: list[Tensor], args: Sequence[Any], which: list[bool]
) -> Any:
    """The same for the tensors of a list of which none is kept, which may be some of them."""
    padded = [
        _with_row_of_ones(each) if none else each for each, none in zip(kept, which, strict=True)
    ]
    with _said(), _without_statistics(branch) if all(which) else nullcontext():
        outs = branch(padded, *args)
    if not isinstance(outs, (list, tuple)) or len(outs) != len(padded):
        return outs  # refused by the caller
    return [_without_row(out) if none else out for out, none in zip(outs, which, strict=True)]


def _with_row_of_ones(kept: Tensor) -> Tensor:
    """[0, ...] to [1, ...]; no sample of the batch: what is in a dropped one reaches nothing."""
    return torch.cat([kept, kept.new_ones((1, *kept.shape[1:]))])


def _without_row(out: Any) -> Any:
    """The branch's output as if it had run on no row; another than one row is refused later."""
    is_one = isinstance(out, Tensor) and out.dim() > 0 and out.shape[0] == 1
    return out[:0] if is_one else out


# What is said where the branch raises


def note_no_rows(error: Exception, rows: Sequence[KeptRows]) -> None:
    """If it ran on no row, that may be why."""
    if any(each.k == 0 for each in rows):
        _add_note(
            error,
            "sdkernels: fused_stochastic_depth ran this branch on 0 kept rows; where it cannot do "
            'that, empty="ones" runs it on one row of ones and leaves the result out',
        )


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _add_note(
            error,
            "sdkernels: fused_stochastic_depth ran this branch on one row of ones, in place of 0 "
            'kept rows (empty="ones")',
        )
        raise


def _add_note(error: Exception, note: str) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])


# Statistics


@contextmanager
def _without_statistics(branch: Callable[..., Any]) -> Iterator[None]:
    """The modules of the branch take none from what runs.

    BatchNorm and InstanceNorm do not look at it; what others write into buffers is forgotten.
    """
    modules = _modules_of(branch)
    norms: list[Any] = [m for m in modules if isinstance(m, _NormBase) and m.training]
    replaced = [norm for norm in norms if "forward" not in norm.__dict__ and _cannot_rest(norm)]
    resting = [norm for norm in norms if norm not in replaced]
    # A graph has its buffers as inputs, and those of a constant number of rows are not worth it.
    others = [] if is_compiling() else [m for m in modules if m not in norms and m._buffers]
    buffers = [(module._buffers, dict(module._buffers)) for module in others]
    try:
        for norm in resting:
            norm.training = False
        for norm in replaced:
            exchanges = waits_for_others(norm)
            norm.forward = partial(_exchange_nothing if exchanges else _scale_and_shift, norm)
        for now, before in buffers:
            now.update({name: t if t is None else t.clone() for name, t in before.items()})
        yield
    finally:
        for norm in resting:
            norm.training = True
        for norm in replaced:
            norm.__dict__.pop("forward", None)
        for now, before in buffers:
            now.update(before)


def _cannot_rest(norm: Any) -> bool:
    """Whether evaluation would not do: it has no statistics, or other processes wait for it."""
    return norm.running_mean is None or waits_for_others(norm)


def _exchange_nothing(norm: Any, x: Tensor) -> Tensor:
    """The forward of a SyncBatchNorm that joins in with no sample; x goes through as it is."""
    joined: Tensor = type(norm).forward(norm, x[:0])
    return torch.cat([joined, x])


def _scale_and_shift(norm: Any, x: Tensor) -> Tensor:
    """The forward of a norm with a mean of 0 and a variance of 1."""
    mean, variance = x.new_zeros(norm.num_features), x.new_ones(norm.num_features)
    return F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)


def _modules_of(branch: Any) -> list[nn.Module]:
    """The modules that a branch runs: itself, or what a function or an object of it refers to."""
    found: dict[nn.Module, None] = {}
    _collect(branch, found, set(), 4)
    return list(found)


def _collect(value: Any, found: dict[nn.Module, None], seen: set[int], depth: int) -> None:
    kind = type(value)
    if issubclass(kind, nn.Module):
        found.update(dict.fromkeys(value.modules()))
        return
    if depth <= 0 or issubclass(kind, (type, ModuleType, Tensor, str)):
        return
    if not is_compiling():  # a graph would be bound to a method's id, which is new at every access
        if id(value) in seen:
            return
        seen.add(id(value))
    held: list[Any] = []
    if kind is MethodType:
        held += [value.__self__, value.__func__]
    elif kind is FunctionType:
        if not is_compiling():  # Dynamo does not open cells
            held += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        held += value.__defaults__ or ()
        used = (value.__globals__.get(name) for name in value.__code__.co_names)
        held += [each for each in used if issubclass(type(each), nn.Module)]
    elif kind is partial:
        held += [value.func, *value.args, *value.keywords.values()]
    elif issubclass(kind, (list, tuple)):
        held += value
    elif issubclass(kind, dict):
        held += value.values()
    else:
        held += getattr(value, "__dict__", {}).values()
    for each in held:
        _collect(each, found, seen, depth - 1)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that has no value yet
        return False
