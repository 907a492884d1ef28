"""The class of a patched block: when its rewriting runs, and when its own forward."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.compiler import is_compiling

from ..tracing import is_recorded, refuse_script
from .adding import Add, BlockState
from .collecting import collected_inside
from .comparing.proving import proofs_of, warn
from .packing import packed_form
from .proof import REPLACED, Asked, Proof, entries
from .rewriting import Rewriting

__all__ = ["PatchedBlock", "compact", "inputs_of", "make_patched", "up_to_date"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class PatchedBlock:
    """Base of the classes that patch() gives to blocks: ``isinstance(block, PatchedBlock)``."""

    if TYPE_CHECKING:  # TorchScript reads annotations, and does not know these
        _sdkernels: BlockState
        _original: type[nn.Module]
        _sdkernels_names: tuple[str, ...]  # of its input, and what else takes a position

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script compiles the original forward, which cannot multiply by 1 - p."""
        if self._sdkernels.options.rescale == "eval":
            refuse_script(
                'a block patched with rescale="eval"',
                "script the model before patch or after unpatch",
            )
        say_what_is_left_out(self)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        """nn.DataParallel's copy for a device: it draws for its share of the batch."""
        state = self._sdkernels
        if state.rows[0] is not None:
            raise RuntimeError(
                "plan: nn.DataParallel splits the batch, and the rows of a plan are of the whole "
                "one; let the replicas draw their own rows, or use DistributedDataParallel"
            )
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica._sdkernels = copy.copy(state)  # threads remember their forwards for themselves
        return replica


def say_what_is_left_out(block: Any) -> None:
    """Of what patch() was told, where the original forward is recorded instead."""
    state: BlockState = block._sdkernels
    if state.rows[0] is not None:
        raise RuntimeError(
            "plan: torch.jit and torch.fx would repeat its rows for ever; trace or script outside "
            "of the with statement, where a patched block runs its original forward"
        )
    options = state.options
    given = any(p is not None for p in state.p) or options.mode or options.rescale != "train"
    if block.training and given:
        warnings.warn(
            "sdkernels: a patched block that is traced or scripted in training is its original "
            "forward, without the drop_probs=, mode= and rescale= given to patch",
            stacklevel=3,
        )


def inputs_of(kind: type[nn.Module]) -> list[inspect.Parameter]:
    """What the forward of a class takes besides the module."""
    parameters = [*inspect.signature(kind.forward).parameters.values()]
    gathers = parameters[:1] and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    return parameters if gathers else parameters[1:]


def make_patched(
    original: type[nn.Module],
    module: str,
    compact: Callable[..., tuple[Any, str | None]],
    takes_lists: Callable[[], bool] = lambda: False,
) -> type[nn.Module]:
    """A subclass of a class of blocks that runs on its kept rows where that saves anything.

    The class keeps the name of the original: what looks for blocks by name (wrapping policies)
    finds them.

    Args:
        module: where pickle finds the class, by the name that it is given.
        compact: ``compact(block, laws, args, kwargs)`` is what the block computes, with None; or
            anything, with the reason for which it has to run its own forward.
        takes_lists: whether the original takes a list of tensors.
    """

    def call(self: Any, args: Any, kwargs: Any) -> Any:
        state = self._sdkernels
        if not self.training or is_compiling():
            return run(self, state, args, kwargs)
        if is_recorded(args, [*kwargs.values()]):  # torch.jit.trace and torch.fx cannot draw rows
            say_what_is_left_out(self)
            return run_original(self, args, kwargs)
        if torch._C._current_graph_task_id() != -1:  # inside a backward: a checkpoint's second run
            state.check_recomputation()
            return run(self, state, args, kwargs)
        y = run(self, state, args, kwargs)
        state.remember(y)
        return y

    def run(self: Any, state: BlockState, args: Any, kwargs: Any) -> Any:
        bound = state.rows[0] is not None
        laws: Any = [state.law(self, branch) for branch in range(len(state.branches))]
        scaled_later = state.options.rescale == "eval"  # evaluation multiplies by 1 - p
        reason: str | None
        if None in laws:
            reason = state.why_whole(self)
        elif any(
            law.p > 0.0 or (bound and law.training) or state.silences(branch)
            for branch, law in enumerate(laws)
            if law.training or scaled_later
        ):
            y, reason = compact(self, laws, args, kwargs)
            if reason is None:
                return y
        else:
            return run_original(self, args, kwargs)
        if bound:
            raise RuntimeError(f"plan: a {original.__name__} draws its own rows: {reason}")
        return run_original(self, args, kwargs)

    def run_original(self: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(self._sdkernels_names[0])
        if isinstance(x, list) and not takes_lists():
            return _each(original.forward, self, len(x), args, kwargs)
        return original.forward(self, *args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, args, kwargs)

    own = original.forward
    first, *others = inputs_of(original)
    names = (first.name, *(each.name for each in others if each.kind in _POSITIONAL))
    # TorchScript compiles the source of what is wrapped, with the globals of what wraps it.
    globals_of = getattr(own, "__globals__", forward.__globals__)
    scriptable = FunctionType(forward.__code__, globals_of, "forward", None, forward.__closure__)
    again = functools.partial(make_patched, original, module, compact, takes_lists)
    members = {
        "forward": functools.wraps(own)(scriptable),
        "_original": original,
        "_sdkernels_names": names,
        "_sdkernels_shows": staticmethod(own),
        "_sdkernels_again": staticmethod(again),
        "__module__": module,
        "__qualname__": f"{original.__module__}:{original.__qualname__}".replace(".", "/"),
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (PatchedBlock, original), members)


def up_to_date(kind: type[Any]) -> type[Any]:
    """A patched class with the signature of its original's forward, which may be another now.

    It stays the same class: models that have it call that forward too, and pickle finds it.
    """
    if kind._sdkernels_shows is not kind._original.forward:
        made = kind._sdkernels_again().__dict__
        for name in ("forward", "_sdkernels_names", "_sdkernels_shows"):
            setattr(kind, name, made[name])
    return kind


def compact(
    block: Any, rewriting: Rewriting, laws: Any, args: Any, kwargs: Any
) -> tuple[Any, str | None]:
    """A block by its rewriting, if that holds."""
    state = block._sdkernels
    proof = state.refused
    if proof is None and _collected(block):
        proof = Proof(False, "what its modules compute is collected in this call", lasts=False)
    elif proof is None:
        try:
            proofs = proofs_of(block, rewriting, state.options.check, args, kwargs)
            proof = proofs[-1]
            if proof.holds:
                add = Add(block, laws, rewriting, proofs, rewriting.asked(block, kwargs))
                x = args[0] if args else kwargs.get(block._sdkernels_names[0])
                packs = packed_form(block) if isinstance(x, list) and not is_compiling() else None
                return (packs or rewriting.forward)(block, add, *args, **kwargs), None
        except Asked as asked:
            proof = state.refused = Proof(False, asked.reason)
            warn(rewriting, proof)
    if proof is REPLACED and state.refused is None and not is_compiling():
        state.refused = proof
        warn(rewriting, proof)
    if proof.lasts and state.proofs and proof in state.proofs.values():
        state.refused = proof
    return None, proof.reason


def _collected(block: Any) -> bool:
    """Whether somebody collects what the modules of a block compute, which a compiler cannot see.

    Nobody does any more where a checkpoint runs it again, as the forward was run.
    """
    if is_compiling():
        return False
    state = block._sdkernels
    if torch._C._current_graph_task_id() == -1:
        state.collected = collected_inside(block) is not None
    return bool(state.collected)


def _each(forward: Callable[..., Any], block: Any, crops: int, args: Any, kwargs: Any) -> list[Any]:
    """The original forward for every tensor of a list."""
    return [
        forward(block, *entries(args, crop, crops), **entries(kwargs, crop, crops))
        for crop in range(crops)
    ]
