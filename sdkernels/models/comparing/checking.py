"""Comparing the blocks of a model with their originals before it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..proof import Asked, Proof
from ..undisturbed import random_state_kept
from .proving import proofs_of

__all__ = ["Checked", "check_blocks"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


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


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, without hooks and gradients."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    hooks = [{name: module.__dict__[name] for name in _HOOKS} for module in modules]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for module in modules:
            for name in _HOOKS:
                module.__dict__[name] = type(module.__dict__[name])()
        model.eval()
        with random_state_kept(devices), torch.no_grad():
            yield
    finally:
        for module, was, own in zip(modules, training, hooks, strict=True):
            module.training = was
            module.__dict__.update(own)


def check_blocks(
    model: nn.Module, entries: Sequence[Any], args: Any, kwargs: Any
) -> tuple[Checked, ...]:
    """Compare the patched blocks of a model on what they get for such inputs."""
    found: dict[str, Checked] = {}

    def seen(entry: Any) -> Any:
        def hook(block: Any, args: Any, kwargs: Any) -> None:
            block.training = True
            state = block._sdkernels
            try:
                proof = proofs_of(block, state.rewriting, "always", args, kwargs)[-1]
            except Asked as asked:
                proof = Proof(False, asked.reason)
            finally:
                block.training = False
            state.refused = None if proof.holds or not proof.lasts else proof
            found[entry.name] = Checked(entry.name, proof.holds, proof.difference, proof.reason)

        return hook

    with _quiet(model):
        for entry in entries:
            entry.block.register_forward_pre_hook(seen(entry), with_kwargs=True)
        model(*args, **kwargs)
    missing = "it did not run on these inputs"
    return tuple(found.get(e.name, Checked(e.name, False, None, missing)) for e in entries)
