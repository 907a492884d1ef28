"""patch and unpatch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal, TypeVar

from torch import nn

from ..empty import Empty
from ..options import checked_options
from ..sampling import Mode, Rescale, Sampler, check_choice
from .adding import BlockState, Options
from .comparing.proving import CHECKS, recall
from .layer_dropout import patch_layers
from .parametrized import give_class
from .parts import is_drop_path, learn, may_drop
from .plans import Schedule, given_probabilities
from .registry import (
    check_model,
    find_rewriting,
    obstacle,
    original_class,
    patched_class,
    rewriting_for,
    unpatch,
)
from .report import LeftAlone, PatchedEntry, PatchReport, refuse_left
from .rewriting import Rewriting

__all__ = ["compacted", "patch", "unpatch"]

Kind = TypeVar("Kind", bound=type[nn.Module])


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
    check: Literal["first", "always", "never"] = "first",
    multiple_of: int = 1,
    strict: bool = False,
) -> PatchReport:
    """Put the op into the blocks of a model, in place.

    Every ``x + drop_path(f(x))`` in the forward of a block becomes
    :func:`sdkernels.fused_stochastic_depth`: the branch is computed for the kept samples only,
    with the block's pre-norm and layer scale fused. The drop probability is read from the block's
    own drop path module at every call. In evaluation, and where no branch drops anything, the
    original forward runs. Parameters, state dict, hooks, copies and pickles of the model stay as
    they are; ``isinstance(block, type_of_before)`` holds. :func:`unpatch` undoes it.

    The new forward is written from the source of the block's own, of whatever library or file:
    ``report.source(name)`` shows it. What cannot be cut out with certainty stays, and the report
    says why. A class that the package's tests have not seen is compared with its original before
    it is used, on a copy of the block (see `check`); one that differs keeps its own forward, with
    a warning, and training goes on.

    Args:
        model: a model, or any part of one. A model that is patched already is patched anew.
        drop_probs: drop probabilities instead of the blocks' own. A number gives the blocks the
            paper's linear schedule that ends there (:func:`sdkernels.linear_decay`); a sequence
            has one entry a branch, in the order of the report. Blocks without a drop path
            (torchvision's ResNet) are patched only if this is given.
        mode: "row" or "batch". Default: as the block's drop path module says.
        sampler, rescale, empty, min_saving: as in :func:`sdkernels.fused_stochastic_depth`. With
            ``rescale="eval"`` evaluation multiplies the branches by 1 - p, so that it is not the
            original forward that runs there. ``empty="run"`` is "ones" here: many attentions
            cannot run on no sample.
        inplace: add the branches after a block's first one into the sum that the block has made so
            far, which saves a pass over the whole batch. The block's input stays as it is: others
            may hold it (intermediate features, the activation before). Nothing changes for blocks
            of one branch. None, the default, does so in training where nobody can see it: no one
            else holds the sum (a hook, a list, autograd), no dispatch mode watches, the result has
            the sum's dtype, nothing is compiled, and what goes in is one tensor, no list of them.
            True does so for every sum of the block's own, False for none.
        rows: "branch" draws rows for every branch. "block" draws one set of rows for all branches
            of a block, which is gathered at its start and put back at its end
            (:func:`sdkernels.fused_layer_dropout`); blocks of any class that have a drop path are
            patched, and with `drop_probs` the layers of a model that have none too: the entries of
            a list of layers of one class with an attention, as in transformers and timm. The
            guide "Layer dropout" says more. `inplace`, `min_saving` and `multiple_of` have no
            effect then.
        check: when a rewritten forward is compared with the original, once for each class and
            configuration: "first", in the first training step, unless the tests have done so for
            this very source; "always", for those too; "never". ``report.check(*inputs)`` does it
            ahead of time, which compiled and sharded models need.
        multiple_of: what the number of tokens is rounded up to where a block's list of crops goes
            packed, as in blocks of DINOv2, DINOv3 and timm's ViT and EVA; see
            :func:`sdkernels.fused_stochastic_depth`.
        strict: raise where blocks are left alone, or none was found. Default: they stay as they
            are, and the report says why; one warning says that none was found.

    Returns:
        A report of the blocks that were patched and those that were not. It prints as a table. With
        ``rows="block"`` a :class:`sdkernels.models.LayerReport`, whose `drop_probs` can be set.

    Raises:
        TypeError: `model` is not a module, or an option of the wrong kind.
        ValueError: an option outside its range, or a number of `drop_probs` that is not the
            number of branches; with `strict`, blocks that are left alone. The model is as it was
            then.

    Note:
        What runs on the kept samples only: hooks on a block's submodules see k samples, BatchNorm
        computes its statistics over them, and dropout inside a branch draws other numbers than
        before. Hooks on a drop path module make its block run as before. torch.jit and
        torch.fx record the original forward.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mlp, self.drop_path = nn.Linear(4, 4), nn.Identity()
        ...
        ...     def forward(self, x):
        ...         return x + self.drop_path(self.mlp(x))
        >>> len(patch(Block(), drop_probs=0.5).patched)
        1
    """
    check_model(model)
    check_choice("rows", rows, ("branch", "block"))
    check_choice("check", check, CHECKS)
    law = 0.0, mode or "row", True, sampler, rescale
    checked_options(*law, empty, inplace, min_saving, None, True, multiple_of)
    options = Options(mode, sampler, rescale, empty, inplace, min_saving, check, multiple_of)
    if rows == "block":
        return patch_layers(model, drop_probs, options, strict)
    if callable(drop_probs):
        raise TypeError(
            "drop_probs: expected a number or a sequence of drop probabilities, got a function "
            '(which rows="block" takes)'
        )
    found, left = _find(model, options, drop_probs is not None)
    if strict and (left or not found):
        refuse_left(left)
    if mode is None:
        _check_modes(found, sampler)
    if drop_probs is not None:
        given = given_probabilities(drop_probs, [len(state.branches) for _, _, state in found])
        for (_, _, state), p in zip(found, given, strict=True):
            state.p = p

    for _, block, _ in found:
        patched_class(original_class(block))  # what this may raise comes before the model changes
    unpatch(model)
    for _, block, state in found:
        _give(block, state)
    if not found and (drop_probs is not None or not left):
        what = "a drop path" if drop_probs is None else "a residual branch"
        warnings.warn(f"model: no block with {what} was found to patch", stacklevel=2)
    blocks = tuple(PatchedEntry(name, block, state.branches) for name, block, state in found)
    return PatchReport(model, blocks, left)


def compacted(kind: Kind) -> Kind:
    """Decorator: blocks of this class compact their branches as if :func:`patch` had been called.

    ``@compacted`` on a class whose forward adds the results of drop paths. Each instance is patched
    as it is made, with the defaults of :func:`sdkernels.patch`; calling that on the model later
    gives it other options.

    Raises:
        TypeError: what is decorated is not a class of modules.

    Example:
        >>> @compacted
        ... class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mlp, self.drop_path = nn.Linear(4, 4), nn.Identity()
        ...
        ...     def forward(self, x):
        ...         return x + self.drop_path(self.mlp(x))
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"compacted: expected a class of modules, got {kind!r}")
    made = kind.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if type(self) is kind:
            _patch_block(self)

    __init__.__wrapped__ = made  # type: ignore[attr-defined]
    kind.__init__ = __init__  # type: ignore[method-assign]
    return kind


def _patch_block(block: nn.Module) -> None:
    """Patch one block with the defaults, if that can be done."""
    rewriting = find_rewriting(block)
    if isinstance(rewriting, Rewriting) and obstacle(block) is None:
        _give(block, _state(rewriting, Options()))


def _state(rewriting: Rewriting, options: Options) -> BlockState:
    p: list[float | None] = [None] * len(rewriting.branches)
    return BlockState(options, rewriting.branches, p, rewriting)


def _give(block: Any, state: BlockState) -> None:
    """Make a block a patched one, which is compared anew if that failed before."""
    block._sdkernels = state
    recall(block, rewriting_for(block))
    proofs = block._sdkernels.proofs
    for kind in [kind for kind, proof in proofs.items() if not proof.holds]:
        del proofs[kind]
    give_class(block, patched_class(original_class(block)))
    for module in block.modules():
        learn(module)  # its class, which compiled code could not


Found = list[tuple[str, Any, BlockState]]


def _find(
    model: nn.Module, options: Options, with_probabilities: bool
) -> tuple[Found, tuple[LeftAlone, ...]]:
    """The blocks to patch, and those with a drop path to leave alone."""
    found: Found = []
    left: list[LeftAlone] = []
    seen: set[int] = set()  # drop path modules that are accounted for
    for name, block in model.named_modules():
        kind = original_class(block)
        if kind.__module__.startswith("torch.nn.") or is_drop_path(block):
            continue
        rewriting = find_rewriting(block)
        if rewriting is None:
            continue
        reason = obstacle(block)
        if not isinstance(rewriting, Rewriting):
            reason = reason or rewriting.reason
        else:
            state = _state(rewriting, options)
            reason = reason or _drop_obstacle(block, state, with_probabilities)
        if reason is not None:
            left.append(LeftAlone(name, kind, reason))
            seen.update(id(child) for child in block.children() if may_drop("", child))
            continue
        assert isinstance(rewriting, Rewriting)
        found.append((name, block, state))
        left += [LeftAlone(name, kind, each.reason) for each in rewriting.left]
        drops = [each.drop for each in rewriting.branches] + [each.drop for each in rewriting.left]
        seen.update(id(attrgetter(drop)(block)) for drop in drops if drop)
    for name, parent in model.named_modules():
        if any(may_drop("", child) and id(child) not in seen for child in parent.children()):
            reason = obstacle(parent) or (
                "its forward does not call its drop path (it has no skip connection?)"
            )
            left.append(LeftAlone(name, original_class(parent), reason))
    return found, tuple(left)


def _drop_obstacle(block: Any, state: BlockState, with_probabilities: bool) -> str | None:
    """What is wrong with the drop path modules of a block; None if nothing is."""
    if not with_probabilities and all(b.drop is None and b.p is None for b in state.branches):
        return "it has no drop path (drop_probs= gives it one)"
    return state.why_whole(block)


def _check_modes(found: Found, sampler: str) -> None:
    """Refuse what the blocks' own drop path modules cannot do, before they are asked to."""
    for name, block, state in found:
        laws = [state.law(block, branch) for branch in range(len(state.branches))]
        if sampler != "bernoulli" and any(law and law.mode == "batch" for law in laws):
            number = "a fixed number of" if sampler == "fixed" else "B * (1 - p)"
            raise ValueError(
                f'sampler: "{sampler}" keeps {number} rows, which the drop path of '
                f'{name or "the model"}, of mode "batch", has no choice of; use '
                'sampler="bernoulli", or mode="row"'
            )
