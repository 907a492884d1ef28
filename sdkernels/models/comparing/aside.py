"""What runs in between leaves no trace: random state, gradients, hooks, autocast, dropout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from ..undisturbed import random_state_kept, seed

__all__ = ["aside"]

_DROPOUTS = frozenset((
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout,
))  # fmt: skip


class _WithoutDropout(TorchFunctionMode):
    """Dropout drops nothing: it would not draw the same for some of the rows as for all."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            if "dropout_p" in kwargs:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return function(*args, **kwargs)


@contextmanager
def aside(block: nn.Module, device: torch.device, in_own_dtypes: bool) -> Iterator[None]:
    """Gradients, random state, hooks, autocast and modes as if what runs here had not run."""
    names = [name for name in vars(hooks) if name.startswith("_global_") and name.endswith("hooks")]
    kept = {name: getattr(hooks, name) for name in names}
    devices = [device] if device.type == "cuda" else []
    gradients = [(parameter, parameter.grad) for parameter in block.parameters()]
    own_mode = block.training
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for name in names:
            setattr(hooks, name, type(kept[name])())
        with ExitStack() as stack:
            stack.enter_context(random_state_kept(devices))
            if not in_own_dtypes:
                stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t)
            )
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_WithoutDropout())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            seed(devices)
            yield
    finally:
        block.training = own_mode
        for name in names:
            setattr(hooks, name, kept[name])
        for parameter, gradient in gradients:
            parameter.grad = gradient
