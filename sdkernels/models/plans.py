"""The rows of a plan for a patched model: drawing them as its blocks say, and running with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isclose, nan
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..plan import BranchLaw, DepthPlan, step_key
from ..rows import KeptRows
from ..sampling import check_law, law
from ..schedules import check_probability, linear_decay
from .parts import own_probability
from .registry import check_model, patched_blocks

__all__ = [
    "Schedule",
    "drop_probs",
    "given_probabilities",
    "plan_for_step",
    "probabilities",
    "sample_plan",
    "use",
]


Schedule = Callable[[float], "float | Sequence[float]"]


def given_probabilities(
    drop_probs: float | Sequence[float], counts: Sequence[int], layers: bool = False
) -> list[list[float | None]]:
    """The drop probability of every branch of every block, as patch() is given it.

    Args:
        counts: how many branches each block has.
        layers: whether these are the layers of ``rows="block"``, for messages.
    """
    if isinstance(drop_probs, Real):
        schedule = linear_decay(len(counts), check_probability(drop_probs, "drop_probs"))
        return [[p] * count for p, count in zip(schedule, counts, strict=True)]
    if isinstance(drop_probs, str) or not isinstance(drop_probs, Sequence):
        kinds = "a number or a sequence of drop probabilities"
        if layers:
            kinds = "a number, a sequence of drop probabilities or a function of the progress"
        raise TypeError(f"drop_probs: expected {kinds}, got {type(drop_probs).__name__}")
    if len(drop_probs) != sum(counts):
        each = "layer" if layers else "branch of the blocks that can be patched"
        raise ValueError(
            f"drop_probs: expected {sum(counts)} entries, one for each {each}, got "
            f"{len(drop_probs)}"
        )
    given = iter([check_probability(p, "drop_probs") for p in drop_probs])
    return [[next(given) for _ in range(count)] for count in counts]


def probabilities(block: Any) -> list[float]:
    """The drop probability of every branch of a patched block, as it is now; NaN if not known."""
    state = block._sdkernels
    found = []
    for branch in range(len(state.branches)):
        law = state.law(block, branch)
        p = own_probability(state.drop_path(block, branch)) if law is None else law.p
        found.append(nan if p is None else p)
    return found


def drop_probs(model: nn.Module) -> list[float]:
    """The drop probability of every branch of a patched model, in the order of plans.

    Args:
        model: a patched model.

    Returns:
        One probability a branch, as they are now: the blocks in the order of ``model.modules()``,
        the branches of a block in the order in which they are added. NaN for a drop path that has
        got a class which is not known.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> drop_probs(nn.Linear(4, 4))
        []
    """
    check_model(model)
    return [p for block in patched_blocks(model) for p in probabilities(block)]


def _blocks_of_plan(model: nn.Module) -> list[Any]:
    """The patched blocks of a model, all of which run with the rows that they are given."""
    check_model(model)
    blocks = patched_blocks(model)
    for block in blocks:
        reason = block._sdkernels.why_whole(block)
        if reason is not None:
            name = next(name for name, module in model.named_modules() if module is block)
            raise RuntimeError(f"plan: {name or 'the model'} draws its own rows: {reason}")
    return blocks


def _branch_laws(blocks: list[Any]) -> list[BranchLaw]:
    """How every branch draws now."""
    laws = []
    for block in blocks:
        state = block._sdkernels
        options = state.options
        for branch in range(len(state.branches)):
            own = state.law(block, branch)
            mode, rescale = options.mode or own.mode, options.rescale_of(own)
            laws.append(BranchLaw(own.p, mode, options.sampler, rescale))
    return laws


def _draw(
    model: nn.Module,
    batch: int | Sequence[int],
    device: torch.device | str | None,
    generator: torch.Generator | None = None,
    step: tuple[int, int, int] | None = None,
) -> DepthPlan[Any]:
    laws = _branch_laws(_blocks_of_plan(model))
    if device is None:
        device = next((p.device for p in model.parameters()), None)
    for each in laws:
        check_law(each.mode, each.sampler, each.rescale)
    return DepthPlan(batch, laws, device, generator, step)


def sample_plan(
    model: nn.Module,
    batch: int | Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> DepthPlan[Any]:
    """Draw the rows of every branch of a patched model as its blocks would draw them.

    Drop probabilities and modes are those of the blocks as they are now, sampler and rescaling
    those that the model was patched with.

    Args:
        model: a patched model.
        batch, generator: as in :meth:`sdkernels.DepthPlan.sample`.
        device: where the rows go. Default: where the model's parameters are.

    Returns:
        A plan for :func:`use`. Its ``resample_()`` goes on with these probabilities, and `use`
        refuses it once the blocks have others.

    Raises:
        TypeError: `model` is not a module, or as :meth:`sdkernels.DepthPlan.sample`.
        RuntimeError: a drop path of the model draws for itself, as in :func:`use`.
        ValueError: as :meth:`sdkernels.DepthPlan.sample`.

    Example:
        >>> len(sample_plan(nn.Linear(4, 4), batch=8))
        0
    """
    return _draw(model, batch, device, generator)


def plan_for_step(
    model: nn.Module,
    seed: int,
    step: int,
    batch: int | Sequence[int],
    *,
    rank: int | None = None,
    device: torch.device | str | None = None,
) -> DepthPlan[Any]:
    """:func:`sample_plan` as a function of the number of the step.

    Args:
        model: a patched model.
        seed, step, batch, rank: as in :meth:`sdkernels.DepthPlan.for_step`.
        device: where the rows go. Default: where the model's parameters are.

    Returns:
        A plan for :func:`use`; ``resample_()`` goes on to the next step.

    Raises:
        TypeError: `model` is not a module, or as :meth:`sdkernels.DepthPlan.for_step`.
        RuntimeError: a drop path of the model draws for itself, as in :func:`use`.
        ValueError: as :meth:`sdkernels.DepthPlan.for_step`.

    Example:
        >>> len(plan_for_step(nn.Linear(4, 4), seed=1, step=1000, batch=8))
        0
    """
    return _draw(model, batch, device, step=step_key(seed, step, rank))


def _check_plan(plan: DepthPlan[Any], blocks: list[Any]) -> None:
    """Refuse a plan of another law: training would no longer average to what evaluation computes.

    Mode and sampler are a plan's own choice: they keep every row with the same probability.
    """
    how = "draw it with sdkernels.models.sample_plan(model, batch), or give list(plan)"
    for number, (drawn, own) in enumerate(zip(plan._branches, _branch_laws(blocks), strict=True)):
        if drawn.p == own.p and drawn.rescale == own.rescale:
            continue
        if not isclose(drawn.p, own.p, rel_tol=1e-6):
            raise ValueError(
                f"plan: branch {number} was drawn with a drop probability of {drawn.p:g}, and the "
                f"model has {own.p:g}; {how}"
            )
        rule = drawn._replace(rescale=own.rescale)
        for batch, (_, scale) in zip(plan._batches, plan._laws[number], strict=True):
            if not isclose(scale, law(batch, *rule)[1], rel_tol=1e-6):
                raise ValueError(
                    f"plan: branch {number} was drawn with rescale={drawn.rescale!r}, and the "
                    f"model's rule is {own.rescale!r}; {how}"
                )


@contextmanager
def use(model: nn.Module, plan: DepthPlan[Any] | Sequence[Any]) -> Iterator[None]:
    """Run a patched model with the rows of a plan: ``plan[i]`` goes to its i-th branch.

    The rows are bound to the branches, not handed out in the order of calls: a block that
    activation checkpointing runs again in the backward finds its rows again, as long as
    ``backward()`` is called inside the with statement, before a forward with other rows and before
    the plan is resampled (else that is an error). The scale is that of the plan's rows.

    Args:
        model: a patched model.
        plan: of :func:`sample_plan` or :func:`plan_for_step`. Any other plan must have been drawn
            with the drop probabilities and the rescaling of the model. A list of KeptRows, one a
            branch in the order of :func:`drop_probs`, is taken as it is; an entry is itself a list
            where the blocks get a list of tensors (multi-crop).

    Raises:
        TypeError: `model` is not a module, or an entry of the plan not KeptRows.
        RuntimeError: another thread is inside a `use` of this model, or a drop path draws for
            itself, because it has hooks or a class that is not known.
        ValueError: the plan has another number of branches than the model, other drop
            probabilities, or scales of another rule. (Rows that do not fit the batch are refused by
            the op.)

    Example:
        >>> with use(nn.Linear(4, 4), []):
        ...     pass
    """
    blocks = _blocks_of_plan(model)
    states = [block._sdkernels for block in blocks]
    total = sum(len(state.rows) for state in states)
    if len(plan) != total:
        raise ValueError(
            f"plan: expected {total} branches as the model has, got {len(plan)} (draw it with "
            "sdkernels.models.sample_plan(model, batch))"
        )
    if isinstance(plan, DepthPlan):
        _check_plan(plan, blocks)
    for entry in plan:
        if not all(
            isinstance(e, KeptRows) for e in (entry if isinstance(entry, list) else [entry])
        ):
            raise TypeError(
                "plan: expected KeptRows, or a list of them, for every branch, got "
                f"{type(entry).__name__}"
            )
    thread = threading.get_ident()
    if any(state.user not in (None, thread) for state in states):
        raise RuntimeError("plan: another thread is using this model with a plan of its own")
    before = [(state.rows, state.user) for state in states]
    rows = iter(plan)
    try:
        for state in states:
            state.rows, state.user = [next(rows) for _ in state.rows], thread
        yield
    finally:
        for state, previous in zip(states, before, strict=True):
            state.rows, state.user = previous
