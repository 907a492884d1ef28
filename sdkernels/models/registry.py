"""How a block is patched, by hand or by rewriting; its patched class, and what undoes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from torch import nn

from ..functional import PLAIN_NORM_FORWARDS
from .blocks import PatchedBlock, compact, make_patched, up_to_date
from .by_hand import BY_HAND, ByHand
from .fingerprint import fingerprint
from .parametrized import give_class, plain_class
from .rewriting import Branch, Rewriting, rewriting_of
from .rewriting.source import Refusal, function_tree
from .rewriting.sums import hides_sums

__all__ = [
    "check_model",
    "class_of_name",
    "find_rewriting",
    "obstacle",
    "original_class",
    "patched_blocks",
    "patched_class",
    "register",
    "rewriting_for",
    "unpatch",
]

# Norms that the op may fuse as if they were nn.LayerNorm, by their library, each with the
# fingerprint of a forward that calls F.layer_norm unless `_fast_norm` is set.
NORMS = {"timm": ("timm.layers.norm", "LayerNorm", "20262265935c")}

ANOTHER = "its source is not that of the versions that its forward by hand was written for"

_REGISTERED: dict[type[nn.Module], ByHand] = {}
_PATCHED: dict[type[nn.Module], type[nn.Module]] = {}


def register(
    kind: type[nn.Module], forward: Callable[..., Any], drops: Sequence[str | None]
) -> None:
    """Patch the blocks of a class with a forward written by hand.

    Args:
        kind: a class of modules. Subclasses are not meant.
        forward: ``forward(block, add, *inputs)``: the forward of the class with
            ``add(i, x, branch)`` in the place of ``x + drop_path_i(branch(x))``. `add` takes
            ``norm``, ``layer_scale``, ``residual`` and ``args`` as
            :func:`sdkernels.fused_stochastic_depth`, and a module as ``activation``.
        drops: dotted names of the drop path modules of the branches 0, 1, ..., None for one that
            has none. A module may serve several branches.

    Raises:
        TypeError: `kind` is not a class of modules, or `forward` cannot be called.
        ValueError: there are no branches.

    Note:
        It is not compared with the original: that is for its author to test.

    Example:
        >>> class Block(nn.Module):
        ...     def forward(self, x):
        ...         return x + self.drop_path(self.mlp(x))
        >>> register(Block, lambda block, add, x: add(0, x, block.mlp), ["drop_path"])
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind: expected a class of modules, got {kind!r}")
    if not callable(forward):
        raise TypeError(f"forward: expected a function, got {type(forward).__name__}")
    if isinstance(drops, str) or not drops:
        raise ValueError(f"drops: expected a list with one entry for each branch, got {drops!r}")

    def branches(block: nn.Module) -> tuple[Branch, ...]:
        return tuple(Branch(drop, ("",)) for drop in drops)

    _REGISTERED[kind] = ByHand(forward, branches, hides_sums=_hides_sums(forward))


def _hides_sums(forward: Callable[..., Any]) -> bool:
    try:
        _, tree = function_tree(forward)
    except Refusal:
        return False
    return len(tree.args.args) > 1 and hides_sums(tree.body, tree.args.args[1].arg)


def original_class(block: nn.Module) -> type[nn.Module]:
    """The class of a block before it was patched."""
    kind = plain_class(block)
    return kind._original if issubclass(kind, PatchedBlock) else kind


def _by_hand(kind: type[nn.Module]) -> ByHand | None:
    return _REGISTERED.get(kind) or BY_HAND.get(f"{kind.__module__}:{kind.__qualname__}")


def find_rewriting(block: nn.Module) -> Rewriting | Refusal | None:
    """How a block is patched, why it cannot be, or None where it has no residual branch to drop."""
    kind = original_class(block)
    hand = _by_hand(kind)
    if hand is not None and hand.stands_for(kind):
        own = hand.branches(block)
        return Rewriting(kind, hand.forward, own, hides_sums=hand.hides_sums)
    found = rewriting_of(block, kind)
    if hand is not None and hand.reads and not isinstance(found, Rewriting):
        return Refusal(ANOTHER)
    return found


def obstacle(block: nn.Module) -> str | None:
    """Why a block cannot be patched, whatever its class; None if it can."""
    if "forward" in block.__dict__:
        return "its forward was replaced"
    if getattr(block, "_compiled_call_impl", None) is not None:
        return "it was compiled: compile after patch"
    return None


def rewriting_for(block: Any) -> Rewriting:
    """The rewriting of a patched block, found again in one that was unpickled."""
    state = block._sdkernels
    if state.rewriting is None:
        found = find_rewriting(block)
        if not isinstance(found, Rewriting) or len(found.branches) != len(state.branches):
            raise RuntimeError(
                f"a {type(block).__name__} was patched where its forward was another one; patch "
                "the model again"
            )
        state.rewriting = found
    return state.rewriting  # type: ignore[no-any-return]


def patched_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class that patched blocks of a class get; one for each."""
    if original not in _PATCHED:
        _trust_norm(original)
        _PATCHED[original] = make_patched(
            original,
            __name__,
            lambda block, *call: compact(block, rewriting_for(block), *call),
            _takes_lists(original),
        )
    return up_to_date(_PATCHED[original])


def _trust_norm(original: type[nn.Module]) -> None:
    """Let the op fuse the norms of a library, if their forward is the one that was read."""
    module, name, known = NORMS.get(original.__module__.partition(".")[0], ("", "", ""))
    if module:
        forward = getattr(importlib.import_module(module), name).forward
        if fingerprint(forward) == known:
            PLAIN_NORM_FORWARDS[forward] = _calls_layer_norm


def _calls_layer_norm(norm: Any) -> bool:
    return not norm._fast_norm


def _takes_lists(original: type[nn.Module]) -> Callable[[], bool]:
    """Whether the original takes a list of tensors, which may depend on what is installed."""
    hand = _by_hand(original)
    takes = None if hand is None else hand.takes_lists
    return lambda: takes is not None and takes(original)


def class_of_name(
    room: str, name: str, patched: Callable[[type[nn.Module]], type[nn.Module]]
) -> type[nn.Module]:
    """The patched class that pickle looks for in a module, by the name that it has there."""
    module, _, path = name.replace("/", ".").partition(":")
    if not path:
        raise AttributeError(f"module {room!r} has no attribute {name!r}")
    try:
        original: Any = attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise AttributeError(f"the class {module}.{path} of a patched block is gone") from error
    return patched(original)


def __getattr__(name: str) -> type[nn.Module]:
    return class_of_name(__name__, name, patched_class)


# Whole models


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def patched_blocks(model: nn.Module) -> list[Any]:
    """The patched blocks of a model, in the order of plans."""
    return [module for module in model.modules() if isinstance(module, PatchedBlock)]


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
        if "_original" not in plain_class(block).__dict__:
            raise ValueError(
                f"model: a {type(block).__name__} got its class after it was patched (fully_shard "
                "does that), and cannot be unpatched"
            )
    for block in blocks:
        give_class(block, original_class(block))
        del block.__dict__["_sdkernels"]
    return model
