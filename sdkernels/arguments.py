"""``args``: what a branch gets beside its rows, and which of it belongs to the samples."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set, ValuesView
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from .backends.ops import kernels
from .building_blocks import STRIDED
from .rows import KeptRows
from .selection import Memo, built_in_selection, of_ones

__all__ = [
    "EVERYTHING",
    "Apart",
    "Everything",
    "Kept",
    "KeptAndOnes",
    "PerSample",
    "Shared",
    "holds_tensors",
    "take_args",
    "take_args_of_list",
    "unmarked",
]


class Shared:
    """Marks an entry of ``args`` that belongs to the whole batch: the branch gets `value` as it is.

    Args:
        value: anything; entries inside of tuples, lists and dicts can be marked one by one.

    Example:
        >>> window_mask = torch.zeros(8, 49, 49)  # 8 windows, whatever the batch
        >>> args = (Shared(window_mask),)
    """

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


class PerSample:
    """Marks an entry of ``args`` that belongs to the samples, and can say how to take theirs.

    A tensor whose dimension 0 is the batch needs no mark. This is for what the op cannot know: a
    tensor whose batch is another dimension, an object of one's own, a list with one entry a sample,
    an ``nn.Parameter`` that holds something for each sample.

    Args:
        value: what belongs to the samples.
        select: ``select(value, index)`` returns what belongs to the rows in `index`, [k] int64,
            ascending, on the device of `x`. It is not called where every row runs the branch.
            Default: what the op does with an entry without a mark.

    Raises:
        TypeError: `select` is not callable.

    Example:
        >>> mask = torch.zeros(6, 4, 4)  # [tokens, B, C]
        >>> entry = PerSample(mask, lambda mask, index: mask.index_select(1, index))
        >>> entry.select(mask, torch.tensor([0, 3])).shape
        torch.Size([6, 2, 4])
    """

    __slots__ = ("select", "value")

    def __init__(self, value: object, select: Callable[[Any, Tensor], Any] | None = None) -> None:
        if select is not None and not callable(select):
            raise TypeError(
                "select: expected a function of the value and the kept rows' numbers, got "
                f"{type(select).__name__}"
            )
        self.value = value
        self.select = select


# How the entries that belong to the samples are taken

Where = tuple[int, ...]  # the entry of args, and of a list in it


class Everything:
    """As they are: every row runs the branch."""

    def tensor(self, value: Tensor, where: Where) -> Tensor:
        return value

    def built_in(self, value: Any, select: Callable[[Any, Tensor, Memo], Any]) -> Any:
        return value

    def selected(self, value: Any, select: Callable[[Any, Tensor], Any]) -> Any:
        return value


class Apart(Everything):
    """As they are, but for copies of what shares memory with tensors that are written to."""

    def __init__(self, written: list[Tensor]) -> None:
        self.written = written

    def tensor(self, value: Tensor, where: Where) -> Tensor:
        is_alias_of: Any = torch._C._is_alias_of  # type: ignore[attr-defined]
        shared = any(each is value or is_alias_of(each, value) for each in self.written)
        return value.clone() if shared else value


class Kept(Everything):
    """For the kept rows."""

    def __init__(self, rows: KeptRows) -> None:
        self.rows = rows
        self.memo: Memo = {}

    def tensor(self, value: Tensor, where: Where) -> Tensor:
        rows = self.rows
        if value.device != rows.index.device:
            raise ValueError(
                f"{_name(where)}: expected a tensor of the batch on {rows.index.device}, got one "
                f"on {value.device} (wrap it in sdkernels.Shared if it belongs to the whole batch)"
            )
        kept: Tensor = kernels().compact(value, rows.index, rows.slot, False, False, False)[0]
        return kept

    def built_in(self, value: Any, select: Callable[[Any, Tensor, Memo], Any]) -> Any:
        return select(value, self.index(), self.memo)

    def selected(self, value: Any, select: Callable[[Any, Tensor], Any]) -> Any:
        return select(value, self.index())

    def index(self) -> Tensor:
        return self.rows.index


class KeptAndOnes(Kept):
    """For no row, and for the one that stands in for it (``empty="ones"``).

    Nothing that a dropped row holds may reach a gradient, so the floating point tensors of the
    stand-in are ones. Integers, which the branch may look something up with, are those of row 0.
    """

    def tensor(self, value: Tensor, where: Where) -> Tensor:
        kept = super().tensor(value, where)
        row = (1, *value.shape[1:])
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            stand_in = value.new_ones(row)
        else:
            stand_in = value[:1] if value.shape[0] else value.new_zeros(row)
        return torch.cat([kept, stand_in])

    def built_in(self, value: Any, select: Callable[[Any, Tensor, Memo], Any]) -> Any:
        taken = super().built_in(value, select)
        return of_ones(taken) if self.rows.batch else taken

    def index(self) -> Tensor:
        index = self.rows.index
        return index.new_zeros(1) if self.rows.batch else index


EVERYTHING = Everything()

# Which those are


def take_args(args: Sequence[Any], batch: int, how: Everything) -> list[Any]:
    """The entries of args as the branch gets them."""
    return [_take(arg, batch, how, (i,)) for i, arg in enumerate(args)]


def take_args_of_list(
    args: Sequence[Any], batches: list[int], hows: Sequence[Everything]
) -> list[Any]:
    """The same beside a list x: each entry a list with one item a tensor, or of them all."""
    taken = []
    for i, arg in enumerate(args):
        if type(arg) is list and len(arg) == len(batches):
            items = enumerate(zip(arg, batches, hows, strict=True))
            arg = [_take(item, batch, how, (i, j)) for j, (item, batch, how) in items]
        elif isinstance(arg, Shared):
            arg = arg.value
        elif isinstance(arg, PerSample) or holds_tensors(arg):
            raise TypeError(
                f"args[{i}]: expected a list of {len(batches)}, one entry a tensor of x, got "
                f"{_described(arg)} (wrap it in sdkernels.Shared if it belongs to all of them)"
            )
        taken.append(arg)
    return taken


def unmarked(arg: Any) -> Any:
    """An entry without its marks, as it is: for tracers, whose sizes nobody can ask for."""
    if isinstance(arg, Shared):
        return arg.value
    if isinstance(arg, PerSample):
        return unmarked(arg.value)
    return _rebuilt(arg, unmarked) if _is_container(arg) else arg


def _take(arg: Any, batch: int, how: Everything, where: Where, marked: bool = False) -> Any:
    if type(arg) is Tensor and _is_dense(arg) and arg.dim() and arg.shape[0] == batch:
        return how.tensor(arg, where)  # as nearly always, in one step
    if isinstance(arg, Tensor) and _is_plain(arg):
        return how.tensor(arg, where) if _is_of_batch(arg, batch, where, marked) else arg
    if isinstance(arg, Shared):
        return arg.value
    if isinstance(arg, PerSample):
        if arg.select is not None:
            return how.selected(arg.value, arg.select)
        return _take(arg.value, batch, how, where, marked=True)
    if isinstance(arg, _LEAVES):
        return arg
    if _is_container(arg):
        return _rebuilt(arg, lambda entry: _take(entry, batch, how, where, marked))
    known = built_in_selection(arg)
    if known is not None:
        rows, broadcasts, select = known
        if rows == 1 != batch and broadcasts and not marked:
            return arg
        if rows != batch:
            raise _wrong_rows(where, batch, f"{_described(arg)} of {rows}")
        return how.built_in(arg, select)
    if holds_tensors(arg):
        raise TypeError(
            f"{_name(where)}: expected tensors, alone or in tuples, lists, dicts and named tuples, "
            f"got {_described(arg)}, of which it is not known what belongs to a sample; wrap it in "
            "sdkernels.Shared if it belongs to the whole batch, and in "
            "sdkernels.PerSample(value, select) if not"
        )
    return arg


def _is_of_batch(tensor: Tensor, batch: int, where: Where, marked: bool) -> bool:
    """Whether a tensor belongs to the samples; where that would depend on B, it is refused."""
    if tensor.dim() == 0 and not marked:
        return False
    rows = tensor.shape[0] if tensor.dim() else None
    of_all = type(tensor) is nn.Parameter and not marked
    if rows == batch and not of_all:
        return True
    if rows == 1 and not marked:  # it broadcasts
        return False
    if rows != batch:
        raise _wrong_rows(where, batch, f"shape {tuple(tensor.shape)}")
    raise ValueError(
        f"{_name(where)}: expected a tensor of the samples, got a parameter of shape "
        f"{tuple(tensor.shape)}; wrap it in sdkernels.Shared if it belongs to the whole batch, "
        "and in sdkernels.PerSample if it does not"
    )


def _wrong_rows(where: Where, batch: int, got: str) -> ValueError:
    return ValueError(
        f"{_name(where)}: expected {batch} rows as x has (or one, which broadcasts), got {got}; "
        "wrap it in sdkernels.Shared if it belongs to the whole batch"
    )


def _name(where: Where) -> str:
    return "args" + "".join(f"[{i}]" for i in where)


def _is_plain(tensor: Tensor) -> bool:
    """Whether dimension 0 of the tensor is its rows, and the kernels can take them."""
    kind: Any = type(tensor)
    known = kind is Tensor or kind is nn.Parameter
    if not known:  # what stands for a tensor while a graph is made
        known = kind.__module__.startswith(("torch._subclasses.", "torch._functorch."))
    return known and _is_dense(tensor)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is STRIDED and not tensor.is_nested


def _is_container(arg: Any) -> bool:
    """Whether it is a tuple, list, dict or named tuple, and nothing besides."""
    kind = type(arg)
    if kind in _CONTAINERS:
        return True
    if not issubclass(kind, tuple):
        return False
    # A named tuple, or a subclass of one that is made of the same fields and holds nothing else.
    new: Any = kind.__new__
    return any(
        tuple in base.__bases__ and "_fields" in base.__dict__ and new is base.__new__
        for base in kind.__mro__
    ) and not getattr(arg, "__dict__", None)


def _rebuilt(container: Any, function: Callable[[Any], Any]) -> Any:
    kind = type(container)
    if issubclass(kind, (list, tuple)):
        entries = [function(entry) for entry in container]
        return kind(*entries) if hasattr(container, "_fields") else kind(entries)
    items = {} if kind is dict else copy.copy(container)
    for key, entry in container.items():
        items[key] = function(entry)
    return items


def holds_tensors(value: Any) -> bool:
    """Whether an object is, or holds, a tensor or an array of another library.

    Functions and modules are not looked into: they are part of the branch.
    """
    return _holds_tensors(value, set())


def _holds_tensors(value: Any, seen: set[int]) -> bool:
    if isinstance(value, _HOLDERS):
        return True
    if isinstance(value, _LEAVES) or id(value) in seen:
        return False
    if hasattr(type(value), "__array__"):
        return getattr(value, "ndim", 1) != 0
    seen.add(id(value))
    if type(value) is partial:
        return any(_holds_tensors(v, seen) for v in (*value.args, *value.keywords.values()))
    held: list[Any] = []
    if isinstance(value, ReferenceType):
        held.append(value())
    elif isinstance(value, Mapping):
        held += value.values()
    elif isinstance(value, (list, tuple, Set, ValuesView, deque)):
        held += value
    held += getattr(value, "__dict__", {}).values()
    for base in type(value).__mro__:
        slots = getattr(base, "__slots__", ())
        names = [slots] if isinstance(slots, str) else slots
        held += [getattr(value, name) for name in names if hasattr(value, name)]
    return any(_holds_tensors(entry, seen) for entry in held)


def _described(value: Any) -> str:
    """For messages."""
    if isinstance(value, Tensor) and type(value) is Tensor:
        kind = str(value.layout).removeprefix("torch.")
        return f"a nested tensor ({kind})" if value.is_nested else f"a {kind} tensor"
    return f"a {type(value).__name__}"


# An iterator may give tensors, and gives what it has only once.
_HOLDERS = (Tensor, torch.UntypedStorage, torch.TypedStorage, Iterator)
_CONTAINERS = frozenset((tuple, list, dict, OrderedDict, defaultdict))
# What holds no tensors, or is part of the branch.
_LEAVES = (
    type(None), bool, int, float, complex, str, bytes, torch.SymInt, torch.SymFloat, torch.SymBool,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.Generator,
    type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module,
)  # fmt: skip
