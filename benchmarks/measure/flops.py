"""Floating-point operations of a call, counted from the shapes of its matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry, shape_wrapper


def _convolution_backward(
    grad_shape: Any, x_shape: Any, weight_shape: Any, *given: Any, out_shape: Any = None
) -> int:
    """As much as the forward pass for each of the two gradients that are wanted.

    PyTorch's own rule forgets the groups (2.13), and a depthwise convolution counts many times.
    """
    *_, transposed, _output_padding, _groups, wanted = given
    if transposed:
        raise NotImplementedError("transposed convolutions are not counted")
    per_gradient: int = conv_flop_count(list(x_shape), list(weight_shape), list(grad_shape))
    return per_gradient * sum(wanted[:2])


_RULES: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.convolution_backward: shape_wrapper(_convolution_backward),
}


class _Counter(TorchDispatchMode):
    """PyTorch's FlopCounterMode follows modules too, and its hooks refuse ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in _RULES:
            self.total += _RULES[packet](*args, **(kwargs or {}), out_val=out)
        return out


def count(run: Callable[[], object]) -> int:
    """Operations of ``run()``: matrix products, convolutions and attention, a multiplication and an
    addition counted as two.

    Attention runs as plain matrix products here, because the fused one of a CPU is not counted.

    >>> a, b = torch.ones(2, 3), torch.ones(3, 4)
    >>> count(lambda: a @ b)
    48
    """
    counter = _Counter()
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.total
