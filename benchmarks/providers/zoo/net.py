"""A model with every block of some classes, and what to feed it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers.zoo.sizes import TINY

DROP = 0.5


@dataclass(frozen=True)
class Net:
    """How to make a model, what to feed it, and which classes of blocks it must have."""

    make: Callable[[], nn.Module]
    classes: tuple[str, ...]
    image: int = TINY.image  # height and width of an input
    batch_norm: bool = False
    drop_probs: Any = None
    # What a quarter of the rows may cost; blocks have shortcuts, and Swin in transformers an MLP
    # without drop path.
    memory: float = 0.55

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model, in evaluation mode or not as the library makes it; always the same weights."""
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.make()
        randomize(model)
        return model.to(dtype)

    def inputs(self, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(batch, 3, self.image, self.image, dtype=dtype)


def randomize(model: nn.Module) -> None:
    """Parameters that start as zeros or tiny factors (layer scale, biases) would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 or parameter.abs().mean() < 1e-3:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)


def output_of(result: Any) -> Tensor:
    """The tensor to train on, of whatever a model returns."""
    return result if isinstance(result, Tensor) else result[0]
