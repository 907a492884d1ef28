"""Comparing the blocks of a model with their originals before it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..proof import Asked, Proof
from ..undisturbed import in_evaluation, random_state_kept
from .proving import proofs_of

__all__ = ["MISSING", "Checked", "check_blocks", "look_at_blocks"]

MISSING = "it did not run on these inputs"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Without their own no module runs: fully_shard's put the shards together, lazy modules' make their
# parameters, and what transformers' hand on is what a layer before has given.
_NEEDED = ("torch.distributed.", "torch.nn.modules.lazy", "transformers.utils.")


class Checked(NamedTuple):
    """What came of the comparison of a block.

    Args:
        name: of the block.
        holds: whether the block computes what its original does, and compacts its branches.
        difference: the largest one that was measured, relative to the largest entry of a tensor;
            None where nothing was compared (a forward written by hand, a block that did not run).
        reason: why the block keeps its own forward.
    """

    name: str
    holds: bool
    difference: float | None
    reason: str


def look_at_blocks(model: nn.Module, entries: Sequence[Any], look: Any, given: Any) -> None:
    """Run a model in evaluation, without the user's hooks and gradients, and leave no trace.

    Args:
        look: ``look(entry, args, kwargs)``, before each of these blocks runs.
        given: the model's own arguments, by position and by name.
    """
    hooks = [getattr(module, name) for module in model.modules() for name in _HOOKS]
    own = [dict(each) for each in hooks]
    handles = []
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for each in hooks:
            for number in [number for number, hook in each.items() if not _is_needed(hook)]:
                del each[number]
        for entry in entries:

            def hook(block: Any, args: Any, kwargs: Any, entry: Any = entry) -> None:
                look(entry, args, kwargs)

            handles.append(entry.block.register_forward_pre_hook(hook, with_kwargs=True))
        args, kwargs = given
        with in_evaluation(model), random_state_kept(devices), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for each, before in zip(hooks, own, strict=True):
            # With those that the model has registered in its first call, without those that it
            # has removed.
            after = dict(each)
            stay = {n: h for n, h in before.items() if n in after or not _is_needed(h)}
            each.clear()
            each.update(stay | after)


def _is_needed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_NEEDED)


def check_blocks(
    model: nn.Module, entries: Sequence[Any], args: Any, kwargs: Any
) -> tuple[Checked, ...]:
    """Compare the patched blocks of a model on what they get for such inputs."""
    found: dict[str, Checked] = {}

    def look(entry: Any, args: Any, kwargs: Any) -> None:
        block, state = entry.block, entry.block._sdkernels
        block.training = True
        try:
            proof = proofs_of(block, state.rewriting, "always", args, kwargs)[-1]
        except Asked as asked:
            proof = Proof(False, asked.reason)
        finally:
            block.training = False
        state.refused = None if proof.holds or not proof.lasts else proof
        found[entry.name] = Checked(entry.name, proof.holds, proof.difference, proof.reason)

    look_at_blocks(model, entries, look, (args, kwargs))
    return tuple(found.get(e.name, Checked(e.name, False, None, MISSING)) for e in entries)
