"""The small modules that every library has a copy of: drop path, layer scale, norm.

Drop paths and layer scales are known by what they compute: a module is tried out, on a copy, once
for each class and setting of its attributes.
"""

from __future__ import annotations

import copy
import enum
import inspect
import numbers
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

from ..sampling import Mode
from .settings import EVERYBODY, key_of
from .undisturbed import random_state_kept, seed

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

    mode: Mode
    scaled: bool


class _DropPaths(NamedTuple):
    """A class of drop paths."""

    name: str  # of the attribute with the probability
    keeps: bool  # whether that is the one of keeping
    others: tuple[str, ...]  # attributes besides, which may decide what a module does
    plain: tuple[str, ...]  # those of them that are numbers and strings, which compiled code reads
    drawn: dict[tuple[Any, ...], _Drawn | None]  # what modules were seen to do, by the values of
    compiled: dict[tuple[Any, ...], _Drawn | None]  # the former and the latter; None: they differ


class _Found(NamedTuple):
    """What a module was found to be."""

    drop: tuple[str, bool, _Drawn] | None  # the first two as of its class
    factor: tuple[str, bool] | None  # of a layer scale


# What was found for a class, in dicts that torch.compile reads without looking further: patch()
# has filled them by then.
_DROP_PATHS: dict[Any, _DropPaths] = {}
_LAYER_SCALES: dict[Any, tuple[str, bool] | None] = {}
_TRIED: dict[Any, _Found] = {}  # by settings
_RETRIED: dict[Any, int] = {}  # how often modules of a class were tried out as they were called
_MANY = 512  # of that: what is set to something new in every step is not kept up with
_LONG = 32  # entries of a container: longer ones are not compared in each call, only their length
_NUMBERS = frozenset((bool, int, float, str, type(None)))
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")  # fully_shard sets them everywhere


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


def _setting(value: Any) -> Any:
    if type(value) in _NUMBERS:
        return value
    by_value = (numbers.Number, str, enum.Enum, tuple, list, dict, set)
    return key_of(value) if isinstance(value, by_value) else type(value)


def _settings(module: nn.Module, but: str = "") -> tuple[Any, ...]:
    own = [(k, v) for k, v in module.__dict__.items() if k not in EVERYBODY and k != but]
    # 1, 1.0 and True equal each other, and may be read as different things.
    return (type(module), *((k, type(v), _setting(v)) for k, v in own))


@contextmanager
def _alone() -> Iterator[None]:
    """Random numbers, default device and modes as if what runs here had not run."""
    with random_state_kept(), _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        seed()  # and not those of CUDA, which draw nothing here
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
    modes: set[Mode] = set()
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
    mode: Mode = "row" if "row" in modes else "batch"
    if not 0.0 < kept < 1.0 or abs(kept - (1 - p)) > (0.1 if mode == "row" else 0.3):
        return None
    factor = factors.pop()
    for scaled, expected in ((True, 1 / (1 - p)), (False, 1.0)):
        if abs(factor - expected) < 1e-3:
            return _Drawn(mode, scaled)
    return None


def _try_drop_path(module: nn.Module) -> tuple[str, bool, _Drawn] | None:
    """The attribute with the drop probability, whether it is that of keeping, and what is drawn."""
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
                        return name, keeps, drawn
        except Exception:  # it is something else, that does not take such a value or input
            pass
        setattr(clone, name, value)
    return None


def _others(
    drop: nn.Module, name: str, names: tuple[str, ...], only_plain: bool
) -> tuple[Any, ...]:
    """The attributes of these names, which may decide what a drop path does; how many it has.

    Args:
        name: of the probability: "p" stands for what equals it, or 1 - p.
        only_plain: of others than numbers and strings, which compiled code cannot compare, nothing.
    """
    own = drop.__dict__
    p = own.get(name)
    number = p if type(p) is float else 2.0

    def value(name: str) -> Any:
        found = own.get(name, ...)
        if type(found) is float and min(abs(found - number), abs(1.0 - found - number)) < 1e-9:
            return "p"  # what is held twice changes twice
        if type(found) is bool:
            return (found,)  # 1 equals True
        if type(found) in _NUMBERS:
            return found
        if only_plain or found is ...:
            return ...
        is_long = isinstance(found, (list, tuple, dict, set)) and len(found) > _LONG
        return (type(found), len(found)) if is_long else _setting(found)

    count = len(own) - sum([mark in own for mark in _MARKS])
    return (count, *[value(name) for name in names])


def _known_of(drop: nn.Module) -> _Drawn | None:
    kind = _DROP_PATHS.get(type(drop))
    if kind is None:
        return None
    if is_compiling():
        names, table, only_plain = kind.plain, kind.compiled, True
    else:
        names, table, only_plain = kind.others, kind.drawn, False
    found = table.get(_others(drop, kind.name, names, only_plain))
    return table.get(_others(drop, "", names, only_plain)) if found is None else found


def _drawn_by(drop: nn.Module) -> _Drawn | None:
    """What a drop path does, set as it is now; None if that is not known."""
    cls = type(drop)
    found = _known_of(drop)
    if found is None and not is_compiling() and _RETRIED.get(cls, 0) < _MANY:
        before = len(_TRIED)
        learn(drop)  # set to something else since patch(), or unpickled
        _RETRIED[cls] = _RETRIED.get(cls, 0) + (len(_TRIED) > before)
        found = _known_of(drop)
    return found


def is_drop_path(module: object) -> bool:
    """Whether a module drops whole samples, or whole batches, with a probability that it holds."""
    return isinstance(module, nn.Module) and learn(module).drop is not None


def own_probability(drop: Any) -> float | None:
    """The drop probability that a module holds, however it is called; None if that is not known."""
    if type(drop) is nn.Identity:  # what libraries make of p = 0
        return 0.0
    if not is_compiling() and type(drop) not in _DROP_PATHS:  # patch() has tried it by then
        learn(drop)
    kind = _DROP_PATHS.get(type(drop))
    value = None if kind is None else getattr(drop, kind.name)
    if kind is None or (isinstance(value, Tensor) and value.numel() != 1):
        return None
    p = 0.0 if value is None else float(value)
    return 1.0 - p if kind.keeps else p


def drop_law(drop: nn.Module) -> Law | None:
    """The law of a drop path module; None where only the module itself can tell what it does."""
    p = own_probability(drop) if is_bare(drop) else None
    if p is None:
        return None
    drawn = _Drawn("row", True) if type(drop) is nn.Identity else _drawn_by(drop)
    return None if drawn is None else Law(p, *drawn, drop.training)


def why_it_draws_itself(drop: nn.Module) -> str:
    """Where `drop_law` is None."""
    name = type(drop).__name__
    if type(drop) is not nn.Identity and type(drop) not in _DROP_PATHS:
        return f"the class of its drop path, {name}, is not known"
    if "forward" in drop.__dict__:
        return "the forward of its drop path module was replaced"
    if not is_bare(drop):
        return "its drop path module has hooks"
    if type(drop) is not nn.Identity and _drawn_by(drop) is None:
        return (
            f"what its drop path, a {name}, does with the attributes that it has now is not known"
        )
    return "the drop probability of its drop path is not one number"


def drop_function_arguments(function: object, count: int, names: list[str]) -> list[str] | None:
    """The parameters that a call of a drop path function gives, None if it is something else.

    The first is the branch, one is called `training`, another is the drop probability.
    """
    if not isinstance(function, FunctionType):
        return None
    parameters = [*inspect.signature(function).parameters]
    given = [*parameters[:count], *names]
    if given[:1] != parameters[:1]:
        return None
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
    if is_lazy(parameter) or parameter.dim() != 1:
        return None
    if type(module).__module__.startswith("torch.nn"):
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
    if not is_compiling() and type(module) not in _LAYER_SCALES:  # as after unpickling
        learn(module)
    found = _LAYER_SCALES.get(type(module))
    if found is None or not is_bare(module):
        return None
    name, channels_first = found
    factor: Tensor = getattr(module, name)
    return factor.view(-1, 1, 1) if channels_first else factor


def is_layer_scale(module: nn.Module) -> bool:
    """Whether a module multiplies by a factor of its own, or does nothing."""
    return type(module) is nn.Identity or learn(module).factor is not None


def learn(module: nn.Module) -> _Found:
    """What a module is: it is tried out, if none like it has been before."""
    cls = type(module)
    kind = _DROP_PATHS.get(cls)
    key = _settings(module, kind.name if kind else "")
    if key not in _TRIED:
        drop, factor = _try_drop_path(module), _try_layer_scale(module)
        if drop is not None:
            kind = _DROP_PATHS.setdefault(cls, _DropPaths(*drop[:2], (), (), {}, {}))
            if drop[:2] != kind[:2]:  # elsewhere than in others of the class
                drop = None
            key = _settings(module, kind.name)
        _TRIED[key] = _Found(drop, factor)
        # A class whose modules differ is called, as it cannot be told from it what they do.
        _LAYER_SCALES[cls] = factor if _LAYER_SCALES.get(cls, factor) == factor else None
    found = _TRIED[key]
    if kind is not None and found.drop is not None:
        _remember(module, kind, found.drop[2])
    return found


def _remember(drop: nn.Module, kind: _DropPaths, drawn: _Drawn) -> None:
    """Note what a drop path does under the values of all attributes that any of its class has."""
    known = (*kind.others, kind.name, *EVERYBODY, *_MARKS)
    more = [n for n, v in drop.__dict__.items() if n not in known and not isinstance(v, Tensor)]
    if more:  # which those before do not have
        plain = [name for name in more if type(drop.__dict__[name]) in _NUMBERS]
        kind = _DropPaths(
            kind.name,
            kind.keeps,
            (*kind.others, *more),
            (*kind.plain, *plain),
            {(*key, *[...] * len(more)): value for key, value in kind.drawn.items()},
            {(*key, *[...] * len(plain)): value for key, value in kind.compiled.items()},
        )
        _DROP_PATHS[type(drop)] = kind
    p = drop.__dict__.get(kind.name)
    held = (kind.name, "") if type(p) is float and 0.0 < p < 1.0 else ("",)  # 1.0 may be a factor
    for name in held:
        for names, table in ((kind.others, kind.drawn), (kind.plain, kind.compiled)):
            key = _others(drop, name, names, table is kind.compiled)
            table[key] = drawn if table.get(key, drawn) == drawn else None
