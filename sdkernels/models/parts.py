"""The small modules that every library has a copy of: drop path, layer scale, pre-norm.

Each is recognised by the fingerprint of its forward, and by nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..functional import PLAIN_NORM_FORWARDS
from ..sampling import Mode
from .fingerprint import fingerprint

__all__ = [
    "Law",
    "drop_law",
    "is_bare",
    "layer_scale_of",
    "looks_like_drop_path",
    "own_probability",
    "trust_norm",
    "why_it_draws_itself",
]

# Fingerprint of the forward -> the attribute that holds the drop probability.
DROP_PATHS = {
    "597794de8b05": "drop_prob",  # timm
    "0eec8523c183": "p",  # torchvision
    "c7b6cfc90bf4": "drop_prob",  # transformers
    "7147c45d5530": "drop_prob",  # transformers before 5.14
}

# Fingerprint of the forward -> the attribute that holds the factor on the last dimension, and
# whether channels come first instead.
LAYER_SCALES = {
    "63a5a6171aaf": ("gamma", False),
    "8e82aabeef84": ("gamma", True),
    "cd7fa93ee00c": ("lambda1", False),
}

# Forwards of subclasses of nn.LayerNorm that call F.layer_norm unless `_fast_norm` is set.
NORMS = frozenset(("20262265935c",))


class Law(NamedTuple):
    """How a block's own drop path module draws."""

    p: float
    mode: Mode
    scaled: bool  # divides by the survival probability
    training: bool


# What was found for a class, in dicts that torch.compile reads without looking further: patch()
# has filled them by then.
_DROP_PATH_ATTRIBUTES: dict[Any, str | None] = {}
_LAYER_SCALE_ATTRIBUTES: dict[Any, tuple[str, bool] | None] = {}


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else of its own.

    Hooks that are set for all modules at once (a profiler's) do not count.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def looks_like_drop_path(module: nn.Module) -> bool:
    """Whether a module is a drop path of any library, known or not, by its name."""
    name = type(module).__name__.lower()
    return name.endswith(("droppath", "stochasticdepth", "drop_path"))


def _drop_path_attribute(kind: Any) -> str | None:
    """The attribute of a class of drop paths that holds the probability; None if not known."""
    if kind not in _DROP_PATH_ATTRIBUTES:
        _DROP_PATH_ATTRIBUTES[kind] = DROP_PATHS.get(fingerprint(kind.forward) or "")
    return _DROP_PATH_ATTRIBUTES[kind]


def own_probability(drop: Any) -> float | None:
    """The drop probability that a module holds, however it is called; None if that is not known."""
    if type(drop) is nn.Identity:  # what libraries make of p = 0
        return 0.0
    attribute = _drop_path_attribute(type(drop))
    p = None if attribute is None else getattr(drop, attribute)
    if attribute is None or (isinstance(p, Tensor) and p.numel() != 1):
        return None
    return 0.0 if p is None else float(p)


def drop_law(drop: nn.Module) -> Law | None:
    """The law of a drop path module; None where only the module itself can tell what it does."""
    p = own_probability(drop) if is_bare(drop) else None
    if p is None:
        return None
    return Law(p, getattr(drop, "mode", "row"), getattr(drop, "scale_by_keep", True), drop.training)


def why_it_draws_itself(drop: nn.Module) -> str:
    """Where `drop_law` is None."""
    if type(drop) is not nn.Identity and _drop_path_attribute(type(drop)) is None:
        return f"the class of its drop path, {type(drop).__name__}, is not known"
    if "forward" in drop.__dict__:
        return "the forward of its drop path module was replaced"
    if not is_bare(drop):
        return "its drop path module has hooks"
    return "the drop probability of its drop path is not one number"


def layer_scale_of(module: nn.Module) -> Tensor | None:
    """The tensor that a layer scale module multiplies by; None where it must be called instead."""
    kind: Any = type(module)
    if kind not in _LAYER_SCALE_ATTRIBUTES:
        _LAYER_SCALE_ATTRIBUTES[kind] = LAYER_SCALES.get(fingerprint(kind.forward) or "")
    attribute = _LAYER_SCALE_ATTRIBUTES[kind]
    if attribute is None or not is_bare(module):
        return None
    name, channels_first = attribute
    factor: Tensor = getattr(module, name)
    return factor.view(-1, 1, 1) if channels_first else factor


def _calls_layer_norm(norm: Any) -> bool:
    return not norm._fast_norm


def trust_norm(kind: Any) -> None:
    """Let the op fuse norms of this class, if its forward is known to be that of nn.LayerNorm."""
    if fingerprint(kind.forward) in NORMS:
        PLAIN_NORM_FORWARDS[kind.forward] = _calls_layer_norm
