"""What a call of fused_stochastic_depth says besides tensors and functions: one checked object."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

from .break_even import check_min_saving
from .building_blocks import Activation, check_activation
from .empty import EMPTY, Empty
from .packed import check_multiple_of
from .sampling import Mode, Rescale, Sampler, check_choice, check_law
from .schedules import check_probability

__all__ = ["OpOptions", "checked_options", "options_of"]


class OpOptions(NamedTuple):
    """The options of one call; nothing in it depends on a tensor."""

    p: float
    mode: Mode
    sampler: Sampler
    rescale: Rescale
    factor: float  # on the branch's output, where all rows run
    drops: bool  # or copies the rows, in training
    empty: Empty
    inplace: bool
    permitted: bool  # inplace=None: where it changes nothing else
    min_saving: float | Literal["auto"]
    relu: bool
    multiple_of: int | None  # of the tokens of a packed list; None: not packed


def checked_options(
    p: float,
    mode: Mode,
    training: bool,
    sampler: Sampler,
    rescale: Rescale,
    empty: Empty,
    inplace: bool | None,
    min_saving: float | Literal["auto"],
    activation: Activation | None,
    packed: bool,
    multiple_of: int,
) -> OpOptions:
    p = check_probability(p)
    check_law(mode, sampler, rescale)
    check_choice("empty", empty, EMPTY)
    if inplace not in (True, False, None):
        raise TypeError(f"inplace: expected True, False or None, got {inplace!r}")
    multiple_of = check_multiple_of(multiple_of)
    if multiple_of != 1 and not packed:
        raise ValueError(f"multiple_of: expected 1 without packed=True, got {multiple_of}")
    return OpOptions(
        p=p,
        mode=mode,
        sampler=sampler,
        rescale=rescale,
        factor=1.0 - p if rescale == "eval" and not training else 1.0,
        # In place, the branch needs a copy of its rows: it may save them for its backward.
        drops=p != 0.0 or bool(inplace),
        empty=empty,
        inplace=bool(inplace),
        permitted=inplace is None,
        min_saving=check_min_saving(min_saving),
        relu=check_activation(activation),
        multiple_of=multiple_of if packed else None,
    )


# The same, checked once for all calls that say it. Dynamo warns of caches: not for graphs.
options_of = lru_cache(maxsize=1024)(checked_options)
