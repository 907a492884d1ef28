"""patch and unpatch."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn

from ..empty import Empty
from ..functional import fused_stochastic_depth
from ..sampling import Mode, Rescale, Sampler, check_choice
from ..schedules import check_probability, linear_decay
from .blocks import BlockState, Branch, Options
from .layer_dropout import Schedule, patch_layers
from .parts import layer_scale_of, looks_like_drop_path
from .plans import check_model, patched_blocks
from .registry import find_known, obstacle, original_class, patched_class
from .report import LeftAlone, PatchedEntry, PatchReport

__all__ = ["patch", "unpatch"]


def patch(
    model: nn.Module,
    *,
    drop_probs: float | Sequence[float] | Schedule | None = None,
    mode: Mode | None = None,
    sampler: Sampler = "bernoulli",
    rescale: Rescale = "train",
    empty: Empty = "run",
    inplace: bool | None = None,
    min_saving: float | Literal["auto"] = 0.0,
    rows: Literal["branch", "block"] = "branch",
) -> PatchReport:
    """Put the op into the blocks of a timm, torchvision or transformers model, in place.

    ``x + drop_path(f(x))`` of every block whose class is known becomes
    :func:`sdkernels.fused_stochastic_depth`: the branch is computed for the kept samples only,
    with the block's pre-norm and layer scale fused. The drop probability is read from the block's
    own drop path module at every call. In evaluation, and where no branch drops anything, the
    original forward runs. Parameters, state dict, hooks, copies and pickles of the model stay as
    they are; ``isinstance(block, type_of_before)`` holds. :func:`unpatch` undoes it.

    A class is patched only if its forward is one that was read when its patch was written
    (compared by a fingerprint of its source). Every other block with a drop path is left alone,
    and the report says why.

    Args:
        model: a model, or any part of one. A model that is patched already is patched anew.
        drop_probs: drop probabilities instead of the blocks' own. A number gives the blocks the
            paper's linear schedule that ends there (:func:`sdkernels.linear_decay`); a sequence
            has one entry a branch, in the order of the report. Blocks without a drop path
            (torchvision's ResNet) are patched only if this is given.
        mode: "row" or "batch". Default: as the block's drop path module says.
        sampler, rescale, empty, min_saving: as in :func:`sdkernels.fused_stochastic_depth`. With
            ``rescale="eval"`` evaluation multiplies the branches by 1 - p, so that it is not the
            original forward that runs there. ``empty="run"`` is "ones" for the blocks whose
            branches cannot run on no sample (attention).
        inplace: add the branches after a block's first one into the sum that the block has made so
            far, which saves a pass over the whole batch. The block's input stays as it is: others
            may hold it (intermediate features, the activation before). Nothing changes for blocks
            of one branch. None, the default, does so in training where nobody can see it: the
            branches run on copies of the kept rows (not on all rows), no dispatch or function mode
            watches, the result has the sum's dtype, and nothing is compiled. True does so for every
            sum of the block's own, False for none.
        rows: "branch" draws rows for every branch. "block" draws one set of rows for all branches
            of a block, which is gathered at its start and put back at its end
            (:func:`sdkernels.fused_layer_dropout`); blocks of any class that have a drop path are
            patched, and with `drop_probs` the layers of a model that have none too: the entries of
            a list of layers of one class with an attention, as in transformers and timm. The
            guide "Layer dropout" says more. `inplace` and `min_saving` have no effect then.

    Returns:
        A report of the blocks that were patched and those that were not. It prints as a table. With
        ``rows="block"`` a :class:`sdkernels.models.LayerReport`, whose `drop_probs` can be set.

    Raises:
        TypeError: `model` is not a module, or an option of the wrong kind.
        ValueError: an option outside its range, or a number of `drop_probs` that is not the
            number of branches. The model is as it was then.

    Note:
        What runs on the kept samples only: hooks on a block's submodules see k samples, BatchNorm
        computes its statistics over them, and dropout inside a branch draws other numbers than
        before. Hooks on a drop path module make its block run as before. torch.jit and
        torch.fx record the original forward.

    Example:
        >>> patch(nn.Linear(4, 4)).patched
        ()
    """
    check_model(model)
    check_choice("rows", rows, ("branch", "block"))
    # The op checks its own options; without training nothing is drawn.
    options = Options(mode, sampler, rescale, empty, inplace, min_saving)
    fused_stochastic_depth(
        torch.zeros(1, 1),
        torch.neg,
        0.0,
        mode or "row",
        training=False,
        sampler=sampler,
        rescale=rescale,
        empty=empty,
        inplace=inplace,
        min_saving=min_saving,
    )
    if rows == "block":
        return patch_layers(
            model,
            drop_probs=drop_probs,
            options=options,
            release=unpatch,
        )
    if callable(drop_probs):
        raise TypeError(
            "drop_probs: expected a number or a sequence of drop probabilities, got a function "
            '(which rows="block" takes)'
        )
    found, left = _find(model, drop_probs is not None)
    if mode is None:
        _check_modes(found, sampler)
    overrides = iter(_overrides(drop_probs, [len(branches) for _, _, branches in found]))

    unpatch(model)
    for _, block, branches in found:
        p = [next(overrides) for _ in branches]
        block._sdkernels = BlockState(options, tuple(branch.drop for branch in branches), p)
        block.__class__ = patched_class(type(block))
        for module in block.modules():
            layer_scale_of(module)  # learns its class, which compiled code could not
    blocks = tuple(PatchedEntry(name, block, branches) for name, block, branches in found)
    return PatchReport(model, blocks, left)


Found = list[tuple[str, Any, tuple[Branch, ...]]]


def _find(model: nn.Module, with_probabilities: bool) -> tuple[Found, tuple[LeftAlone, ...]]:
    """The blocks to patch, and those with a drop path to leave alone."""
    found: Found = []
    left: dict[str, LeftAlone] = {}
    drops: set[int] = set()  # drop path modules that are accounted for
    for name, block in model.named_modules():
        kind = original_class(block)
        known = find_known(kind)
        if known is None:
            continue
        reason = obstacle(block)
        branches: tuple[Branch, ...] = ()
        if reason is None:
            branches = known.branches_of(block)
            reason = _drop_obstacle(block, branches, with_probabilities)
        if reason is None:
            found.append((name, block, branches))
            drops.update(id(attrgetter(b.drop)(block)) for b in branches if b.drop)
        else:
            left[name] = LeftAlone(name, kind, reason)
    for name, parent in model.named_modules():
        own = [child for child in parent.children() if looks_like_drop_path(child)]
        if name not in left and any(id(child) not in drops for child in own):
            left[name] = LeftAlone(name, type(parent), obstacle(parent) or "unknown class")
    return found, tuple(left.values())


def _drop_obstacle(
    block: Any, branches: tuple[Branch, ...], with_probabilities: bool
) -> str | None:
    """What is wrong with the drop path modules of a block; None if nothing is."""
    if not with_probabilities and all(branch.drop is None for branch in branches):
        return "it has no drop path (drop_probs= gives it one)"
    state = BlockState(Options(), tuple(branch.drop for branch in branches), [None] * len(branches))
    return state.why_whole(block)


def _check_modes(found: Found, sampler: str) -> None:
    """Refuse what the blocks' own drop path modules cannot do, before they are asked to."""
    for name, block, branches in found:
        state = BlockState(Options(), tuple(b.drop for b in branches), [None] * len(branches))
        laws = [state.law(block, index) for index in range(len(branches))]
        if sampler == "fixed" and any(law is not None and law.mode == "batch" for law in laws):
            raise ValueError(
                f'sampler: "fixed" keeps a fixed number of rows, which the drop path of '
                f'{name or "the model"}, of mode "batch", has no choice of; use '
                'sampler="bernoulli", or mode="row"'
            )


def _overrides(
    drop_probs: float | Sequence[float] | None, counts: list[int]
) -> list[float] | list[None]:
    """The drop probability of every branch, None for the module's own."""
    total = sum(counts)
    if drop_probs is None:
        return [None] * total
    if isinstance(drop_probs, Real):
        last = check_probability(drop_probs, "drop_probs")
        schedule = linear_decay(len(counts), last)
        return [p for p, count in zip(schedule, counts, strict=True) for _ in range(count)]
    if isinstance(drop_probs, str) or not isinstance(drop_probs, Sequence):
        raise TypeError(
            "drop_probs: expected a number or a sequence of drop probabilities, got "
            f"{type(drop_probs).__name__}"
        )
    if len(drop_probs) != total:
        raise ValueError(
            f"drop_probs: expected {total} entries, one for each branch of the blocks that can be "
            f"patched, got {len(drop_probs)}"
        )
    return [check_probability(p, "drop_probs") for p in drop_probs]


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`: every block gets its class back.

    Args:
        model: a model, or any part of one, patched or not.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a block was given yet another class after it was patched (fully_shard does).

    Example:
        >>> type(unpatch(nn.Linear(4, 4))).__name__
        'Linear'
    """
    check_model(model)
    blocks = patched_blocks(model)
    for block in blocks:
        if "_original" not in type(block).__dict__:
            raise ValueError(
                f"model: a {type(block).__name__} got its class after it was patched (fully_shard "
                "does that), and cannot be unpatched"
            )
    for block in blocks:
        block.__class__ = type(block)._original
        del block.__dict__["_sdkernels"]
    return model
