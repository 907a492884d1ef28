"""What runs where no row is kept, and what is said where a branch fails on the rows it is given."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .backends.ops import is_compiling
from .rows import KeptRows
from .statistics import no_statistics

__all__ = [
    "EMPTY",
    "add_note",
    "has_no_rows",
    "run_list_on_ones",
    "run_on_kept",
    "run_on_nothing",
    "run_on_ones",
]

Empty = Literal["run", "ones", "skip"]
EMPTY: tuple[str, ...] = get_args(Empty)


def has_no_rows(rows: KeptRows) -> bool:
    """Whether none is kept; False in a graph that draws rows inside and so does not know."""
    if not is_compiling():
        return rows.k == 0
    # Here, because it imports SymPy.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(rows.k == 0)


def run_on_kept(branch: Callable[..., Any], kept: Tensor, args: Sequence[Any], batch: int) -> Any:
    """The branch on the rows kept; an exception that names the batch's size says where it is from.

    PyTorch names the sizes that do not fit: one of them is the batch's where the branch holds
    something of all its samples.
    """
    try:
        return branch(kept, *args)
    except Exception as error:
        rows = kept.shape[0]
        if rows != batch and re.search(rf"(?<![\d.]){batch}(?!\d|\.\d)", str(error)):
            add_note(error, _ON_KEPT_ROWS.format(rows, batch))
        raise


def run_on_nothing(branch: Callable[..., Any], kept: Any, args: Sequence[Any]) -> Any:
    """The branch on no row, or on a list of which at least one tensor has none."""
    several = isinstance(kept, list)
    with _said(_ON_NO_ROWS), no_statistics(branch, kept[0] if several else kept, on_ones=False):
        return branch(kept, *args)


def run_on_ones(branch: Callable[..., Any], kept: Tensor, args: Sequence[Any]) -> Any:
    """The branch on one row of ones where none is kept, without what it says of that row."""
    with _said(_ON_ONES), no_statistics(branch, kept, on_ones=True):
        return _without_row(branch(_with_row_of_ones(kept), *args))


def run_list_on_ones(
    branch: Callable[..., Any], kept: list[Tensor], args: Sequence[Any], which: list[bool]
) -> Any:
    """The same for the tensors of a list of which none is kept, which may be some of them."""
    padded = [
        _with_row_of_ones(each) if none else each for each, none in zip(kept, which, strict=True)
    ]
    with (
        _said(_ON_ONES),
        no_statistics(branch, kept[0], on_ones=True) if all(which) else nullcontext(),
    ):
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

_ON_NO_ROWS = (
    "sdkernels: fused_stochastic_depth ran this branch on 0 kept rows; where it cannot do that, "
    'empty="ones" runs it on one row of ones and leaves the result out'
)
_ON_KEPT_ROWS = (
    "sdkernels: fused_stochastic_depth ran this branch on the {} kept rows of a batch of {}; what "
    "it holds of the whole batch (captured by a closure, set on a module) has to come in through "
    "args="
)
_ON_ONES = (
    "sdkernels: fused_stochastic_depth ran this branch on one row of ones, in place of 0 kept rows "
    '(empty="ones")'
)


@contextmanager
def _said(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        add_note(error, note)
        raise


def add_note(error: Exception, note: str) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
