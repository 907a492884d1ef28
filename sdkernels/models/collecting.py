"""Whether transformers collects what the modules of a block compute: attention maps, say."""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import Any

from torch import nn

__all__ = ["is_collected"]

_CAPTURING = "transformers.utils.output_capturing"


def is_collected(block: nn.Module) -> bool:
    """Whether hooks on modules inside the block hand on what these compute in this call.

    They are there from the first call on that collected something, and look then whether their kind
    of output is asked for. Those on the block itself get what it returns, which is of all samples.
    """
    capturing: Any = sys.modules.get(_CAPTURING)  # its hooks are not there before it is
    if capturing is None:
        return False
    collector = getattr(capturing, "_active_collector", None)
    asked = None if collector is None else collector.get()
    if not asked:
        return False
    inside = (module for module in block.modules() if module is not block)
    hooks = (hook for module in inside for hook in module._forward_hooks.values())
    return any(_collects(hook, asked) for hook in hooks)


def _collects(hook: Any, asked: Container[str]) -> bool:
    """Whether it is a hook of transformers for one of these kinds of outputs."""
    if getattr(hook, "__module__", "") != _CAPTURING:
        return False
    kind = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True)).get("key")
    return kind is None or kind.cell_contents in asked  # of another version: it may be any
