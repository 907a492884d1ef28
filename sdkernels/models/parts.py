"""The small modules that every library has a copy of: drop path, layer scale, norm.

Drop paths and layer scales are known by what they compute: each class is tried out once, on a copy.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..sampling import Mode
from .settings import key_of
from .undisturbed import random_state_kept

__all__ = [
    "Law",
    "drop_function_arguments",
    "drop_law",
    "is_bare",
    "is_drop_path",
    "is_layer_scale",
    "is_to_drop",
    "layer_scale_of",
    "learn",
    "looks_like_drop_path",
    "may_drop",
    "own_probability",
    "sounds_like_drop_path",
    "sounds_like_layer_drop",
    "why_it_draws_itself",
]

_LAYER_NAMES = re.compile(r"drop(out)?_?layers?|layer_?drop", re.IGNORECASE)
_NAMES = re.compile(r"drop_?path|stochastic_?(depth|drop)|drop_?connect", re.IGNORECASE)


class Law(NamedTuple):
    """How a block's own drop path module draws."""

    p: float
    mode: Mode
    scaled: bool  # divides by the survival probability
    training: bool


class _Drawn(NamedTuple):
    """What a drop path was seen to do."""

    mode: str
    scaled: bool


# What was found for a class, in dicts that torch.compile reads without looking further: patch()
# has filled them by then.
_DROP_PATHS: dict[Any, tuple[str, bool, str, bool] | None] = {}
_LAYER_SCALES: dict[Any, tuple[str, bool] | None] = {}
_TRIED: dict[Any, bool] = {}  # whether what has these settings is a layer scale


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
    """Whether a module is a drop path of any library by its name."""
    return bool(_NAMES.search(type(module).__name__)) and not list(module.children())


def is_to_drop(path: str, module: object) -> bool:
    """Whether a module drops samples, or is what a library puts there for p = 0."""
    if module is None or type(module) is nn.Identity:
        return sounds_like_drop_path(path.rpartition(".")[2])
    return is_drop_path(module)


def may_drop(path: str, module: object) -> bool:
    """The same, or what is called a drop path and does something else."""
    if is_to_drop(path, module):
        return True
    return isinstance(module, nn.Module) and looks_like_drop_path(module)


def sounds_like_drop_path(name: str) -> bool:
    """Whether an attribute or a function is named as a drop path."""
    return bool(_NAMES.search(name))


def sounds_like_layer_drop(name: str) -> bool:
    """Whether a function is named as one that drops whole layers."""
    return bool(_LAYER_NAMES.search(name))


def _settings(module: nn.Module, but: str = "") -> tuple[Any, ...]:
    plain = (bool, int, float, str, tuple, type(None))
    own = module.__dict__.items()
    values = [(k, v) for k, v in own if k[0] != "_" and k not in (but, "training")]
    return (type(module), *((k, key_of(v)) for k, v in values if isinstance(v, plain)))


@contextmanager
def _alone() -> Iterator[None]:
    """Random numbers, default device and modes as if what runs here had not run."""
    with random_state_kept(), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        yield


# Drop paths


def _drawn(drop: Callable[[Tensor], Tensor], p: float) -> _Drawn | None:
    """What a function does to the rows of a tensor, if that is drop path of probability p.

    Some know tensors of three dimensions only, some of four.
    """
    for shape in ((64, 3, 2), (64, 3, 2, 2)):
        try:
            found = _drawn_from(torch.ones(shape), drop, p)
        except (RuntimeError, ValueError, IndexError):
            continue
        if found is not None:
            return found
    return None


def _drawn_from(x: Tensor, drop: Callable[[Tensor], Tensor], p: float) -> _Drawn | None:
    modes: set[str] = set()
    factors: set[float] = set()
    kept = 0.0
    for _ in range(16):
        y = drop(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return None
        rows = y.flatten(1)
        if not torch.equal(rows, rows[:, :1].expand_as(rows)):
            return None  # dropout
        found = set(rows[:, 0].tolist())
        factors |= found - {0.0}
        modes.add("row" if len(found) > 1 else "batch")
        kept += float((rows[:, 0] != 0).double().mean()) / 16
    if len(factors) != 1:
        return None
    mode = "row" if "row" in modes else "batch"
    if not 0.0 < kept < 1.0 or abs(kept - (1 - p)) > (0.1 if mode == "row" else 0.3):
        return None
    factor = factors.pop()
    for scaled, expected in ((True, 1 / (1 - p)), (False, 1.0)):
        if abs(factor - expected) < 1e-3:
            return _Drawn(mode, scaled)
    return None


def _try_drop_path(module: nn.Module) -> tuple[str, bool, str, bool] | None:
    """The attribute with the drop probability, whether it is that of keeping, mode and scaling."""
    if any(True for _ in module.parameters()) or any(True for _ in module.children()):
        return None
    if type(module).__module__.startswith("torch.nn"):
        return None
    clone: Any = copy.copy(module)
    clone.__dict__["training"] = True
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        clone.__dict__[hooks] = {}
    for name, value in module.__dict__.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name[0] == "_" or name == "training" or not (is_number or value is None):
            continue
        try:
            with _alone():
                for keeps in (False, True):
                    setattr(clone, name, 0.75 if keeps else 0.25)
                    drawn = _drawn(clone.forward, 0.25)
                    if drawn is not None:
                        return name, keeps, *_said(module, drawn)
        except Exception:  # it is something else, that does not take such a value or input
            pass
        setattr(clone, name, value)
    return None


def _said(module: Any, drawn: _Drawn) -> _Drawn:
    """What holds for every module of the class: an attribute that says it counts at every call."""
    mode, scaled = drawn
    if getattr(module, "mode", "") == mode:
        mode = ""
    if getattr(module, "scale_by_keep", not scaled) == scaled:
        scaled = True
    return _Drawn(mode, scaled)


def is_drop_path(module: object) -> bool:
    """Whether a module drops whole samples, or whole batches, with a probability that it holds."""
    if not isinstance(module, nn.Module):
        return False
    learn(module)
    return _DROP_PATHS.get(type(module)) is not None


def own_probability(drop: Any) -> float | None:
    """The drop probability that a module holds, however it is called; None if that is not known."""
    if type(drop) is nn.Identity:  # what libraries make of p = 0
        return 0.0
    if not is_compiling():  # patch() has tried it by then
        _learn_class(drop, _DROP_PATHS)
    found = _DROP_PATHS.get(type(drop))
    value = None if found is None else getattr(drop, found[0])
    if found is None or (isinstance(value, Tensor) and value.numel() != 1):
        return None
    p = 0.0 if value is None else float(value)
    return 1.0 - p if found[1] else p


def drop_law(drop: nn.Module) -> Law | None:
    """The law of a drop path module; None where only the module itself can tell what it does."""
    p = own_probability(drop) if is_bare(drop) else None
    if p is None:
        return None
    _, _, mode, scaled = _DROP_PATHS.get(type(drop)) or ("", False, "row", True)
    own_mode: Any = getattr(drop, "mode", mode)
    return Law(p, own_mode, getattr(drop, "scale_by_keep", scaled), drop.training)


def why_it_draws_itself(drop: nn.Module) -> str:
    """Where `drop_law` is None."""
    if type(drop) is not nn.Identity and _DROP_PATHS.get(type(drop)) is None:
        return f"the class of its drop path, {type(drop).__name__}, is not known"
    if "forward" in drop.__dict__:
        return "the forward of its drop path module was replaced"
    if not is_bare(drop):
        return "its drop path module has hooks"
    return "the drop probability of its drop path is not one number"


def drop_function_arguments(function: object, count: int, names: list[str]) -> list[str] | None:
    """The parameters that a call of a drop path function gives, None if it is something else.

    The first is the branch, one is called `training`, another is the drop probability.
    """
    if not isinstance(function, FunctionType):
        return None
    parameters = [*inspect.signature(function).parameters]
    given = [*parameters[:count], *names]
    options: dict[str, Any] = {"training": True}
    if "mode" in parameters:
        options["mode"] = "row"
    for name in given[1:]:
        if name in options or "training" not in given:
            continue
        try:
            with _alone():
                drawn = _drawn(lambda x, p=name: function(x, **{**options, p: 0.25}), 0.25)  # type: ignore[misc]
        except Exception:
            continue
        if drawn == _Drawn("row", True):
            return given
    return None


# Layer scales


def _try_layer_scale(module: nn.Module) -> tuple[str, bool] | None:
    """The parameter that a module multiplies by, and whether channels come first."""
    parameters = dict(module.named_parameters(recurse=False))
    if len(parameters) != 1 or any(True for _ in module.children()) or module._buffers:
        return None
    ((name, parameter),) = parameters.items()
    if parameter.dim() != 1 or type(module).__module__.startswith("torch.nn"):
        return None
    clone: Any = copy.copy(module)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        clone.__dict__[hooks] = {}
    try:
        with _alone():
            factor = torch.randn(len(parameter))
            clone.__dict__["_parameters"] = {name: nn.Parameter(factor)}
            for first in (False, True):
                shape = (2, len(factor), 5, 3) if first else (2, 5, 3, len(factor))
                x = torch.randn(shape)
                expected = x * (factor.view(-1, 1, 1) if first else factor)
                try:
                    if torch.equal(clone.forward(x.clone()), expected):
                        return name, first
                except RuntimeError:
                    continue
    except Exception:
        return None
    return None


def layer_scale_of(module: nn.Module) -> Tensor | None:
    """The tensor that a layer scale module multiplies by; None where it must be called instead."""
    if not is_compiling():
        _learn_class(module, _LAYER_SCALES)
    found = _LAYER_SCALES.get(type(module))
    if found is None or not is_bare(module):
        return None
    name, channels_first = found
    factor: Tensor = getattr(module, name)
    return factor.view(-1, 1, 1) if channels_first else factor


def is_layer_scale(module: nn.Module) -> bool:
    """Whether a module multiplies by a factor of its own, or does nothing."""
    learn(module)
    return type(module) is nn.Identity or _TRIED[_settings(module)]


def _learn_class(module: nn.Module, table: dict[Any, Any]) -> None:
    """Try out a module of a class that is not known, as after unpickling."""
    if type(module) not in table:
        learn(module)


def learn(module: nn.Module) -> None:
    """Try out what a module is, if none like it has been before."""
    kind = type(module)
    drop = _DROP_PATHS.get(kind)
    key = _settings(module, drop[0] if drop else "")
    if key in _TRIED:
        return
    drop, factor = _try_drop_path(module), _try_layer_scale(module)
    _TRIED[key] = _TRIED[_settings(module, drop[0] if drop else "")] = factor is not None
    # A class whose modules differ is called, as it cannot be told from the class what it does.
    _DROP_PATHS[kind] = drop if _DROP_PATHS.get(kind, drop) == drop else None
    _LAYER_SCALES[kind] = factor if _LAYER_SCALES.get(kind, factor) == factor else None
