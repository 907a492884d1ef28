"""A copy of a block for the comparison: in its own class, without hooks, chance and zeros."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from operator import attrgetter
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ...rows import KeptRows
from ..parametrized import give_class, plain_class
from ..parts import is_drop_path
from ..rewriting import Call
from ..rewriting.source import remade
from ..settings import EVERYBODY
from .contents import contents

__all__ = ["HOOKS", "Forced", "Unequal", "clone_of", "copied", "first_of", "train", "uncopied"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unequal(Exception):
    """The two forwards differ."""


class Forced(nn.Module):
    """In the place of a drop path: the masks of given rows, one call after another."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[KeptRows] = []
        self.calls = 0

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # under whatever name
        rows = self.rows[self.calls % len(self.rows)]  # a checkpoint begins anew
        self.calls += 1
        if x.shape[0] != rows.batch:
            raise Unequal(f"its drop path gets {x.shape[0]} rows for {rows.batch} samples")
        mask = (rows.slot >= 0).to(x.dtype) * rows.scale
        return x * mask.view(-1, *[1] * (x.dim() - 1))


def clone_of(block: Any, calls: Sequence[Call], dtype: torch.dtype | None) -> Any:
    """A copy with random parameters, of this dtype, and with drop paths that can be forced."""
    clone = copied(block)
    for module in clone.modules():
        if "_sdkernels" in module.__dict__:
            del module.__dict__["_sdkernels"]
            patched: Any = plain_class(module)
            give_class(module, patched._original)
        for name in HOOKS:
            hooks = module.__dict__[name]
            for number in [number for number, hook in hooks.items() if not _is_torchs(hook)]:
                del hooks[number]
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
        if "gradient_checkpointing" in module.__dict__:  # of transformers
            module.gradient_checkpointing = False
        if _keeps_statistics(module):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    if dtype is not None:
        clone._apply(lambda t: t.to(_like(t, dtype)))
    for parameter in _parameters_of(clone):
        parameter.grad = None
        if parameter.is_floating_point() or parameter.is_complex():
            spread = 0.3 if parameter.dim() <= 1 or parameter.numel() < 9 else 0.02
            small = parameter.abs().max() < 0.1 if parameter.numel() else False
            parameter.add_(torch.randn_like(parameter) * spread)
            if parameter.dim() <= 1 and small:
                parameter.add_(0.5)
    for call in calls:
        if call.drop is not None:
            owner, _, name = call.drop.rpartition(".")
            setattr(attrgetter(owner)(clone) if owner else clone, name, Forced())
    for module in clone.modules():
        if is_drop_path(module):  # one that stays, inside of a branch, is chance as a dropout is
            module.forward = first_of
    return clone


def first_of(*args: Any, **kwargs: Any) -> Any:
    """The forward of a drop path that drops nothing, under whatever name it gets its input."""
    return args[0] if args else next(iter(kwargs.values()))


def _parameters_of(clone: nn.Module) -> Iterator[Tensor]:
    yield from clone.parameters()
    for module in clone.modules():  # a replica of nn.DataParallel has its tensors here
        yield from module.__dict__.get("_former_parameters", {}).values()


def train(clone: nn.Module) -> None:
    """In training, but for norms over the batch, which use their running statistics."""
    clone.train()
    for module in clone.modules():
        if isinstance(module, _NormBase):
            module.training = not _keeps_statistics(module) and not _is_over_batch(module)


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.running_mean is not None


def _is_over_batch(module: nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def _is_torchs(hook: Any) -> bool:
    """Whether a hook computes a weight: those of torch.nn.utils.weight_norm and spectral_norm."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def _like(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype for a tensor: of the same kind of numbers."""
    if tensor.is_complex():
        return dtype.to_complex()
    return dtype if tensor.is_floating_point() else tensor.dtype


def copied(block: Any) -> Any:
    """A deep copy. What cannot be copied (a process group, a lock) is the same object in it."""
    memo: dict[int, Any] = {}
    own: list[Any] = []
    for module in block.modules():
        if "_sdkernels" in module.__dict__:
            memo[id(module.__dict__["_sdkernels"])] = None
        own += [value for name, value in module.__dict__.items() if name not in EVERYBODY]
    memo |= _copies([*own, *block.buffers()])
    try:
        made = dict(memo)
        clone = copy.deepcopy(block, made)
    except Exception:
        made = memo | uncopied(own, memo)
        clone = copy.deepcopy(block, made)
    for module in clone.modules():  # a forward in a closure, as of a checkpoint
        for name, value in module.__dict__.items():
            if isinstance(value, (FunctionType, functools.partial)):
                module.__dict__[name] = _rebound(value, made)
    return clone


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """A function that was made with modules, made with their copies."""
    if isinstance(value, (nn.Module, Tensor)):
        return copies.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebound(value.__self__, copies))
    if isinstance(value, functools.partial):
        args = [_rebound(each, copies) for each in value.args]
        return functools.partial(_rebound(value.func, copies), *args, **value.keywords)
    if isinstance(value, FunctionType) and value.__closure__:
        copies[id(value)] = value  # it may know itself
        cells = [
            CellType(_rebound(cell.cell_contents, copies)) if _is_new(cell, copies) else cell
            for cell in value.__closure__
        ]
        return remade(value, value.__globals__, tuple(cells))
    return value


def _is_new(cell: CellType, copies: dict[int, Any]) -> bool:
    try:
        content = cell.cell_contents
    except ValueError:  # empty yet
        return False
    return not (isinstance(content, FunctionType) and id(content) in copies)


def _copies(values: Sequence[Any]) -> dict[int, Tensor]:
    """Copies of the tensors that autograd made, which deepcopy refuses."""
    found = {id(value): value for each in values for _, value in contents(each)}
    tensors = {i: value for i, value in found.items() if isinstance(value, Tensor)}
    return {i: tensor.detach().clone() for i, tensor in tensors.items() if not tensor.is_leaf}


def uncopied(values: Sequence[Any], memo: dict[int, Any]) -> dict[int, Any]:
    """What of some values cannot be copied, as what stands for it in the memo of a copy."""
    found: dict[int, Any] = {}
    for value in values:
        try:
            copy.deepcopy(value, dict(memo))
        except Exception:
            found[id(value)] = value
    return found
