"""Whether transformers collects what the modules of a block compute: attention maps, say."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.compiler import is_compiling

__all__ = ["collected_inside"]

_CAPTURING = "transformers.utils.output_capturing"


def collected_inside(block: nn.Module) -> str | None:
    """What hooks on modules inside the block hand on of this call, by its name; None if nothing.

    They are there from the first call on that collected something, and look then whether their kind
    of output is asked for. Those on the block itself get what it returns, which is of all samples.
    """
    capturing: Any = sys.modules.get(_CAPTURING)  # its hooks are not there before it is
    collector = getattr(capturing, "_active_collector", None)
    # Dynamo cannot follow a context variable: there it is asked where a hook is going to ask, too.
    if collector is None or not (is_compiling() or collector.get()):
        return None
    for module in block.modules():
        for hook in module._forward_hooks.values() if module is not block else ():
            if getattr(hook, "__module__", "") != _CAPTURING:
                continue
            cells = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
            kind = cells["key"].cell_contents if "key" in cells else None
            if kind is None:  # of another version: it may be any
                return "outputs"
            if kind in (collector.get() or ()):
                return str(kind)
    return None
