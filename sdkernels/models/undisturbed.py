"""Random numbers and training modes as if what runs in between had not run."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["in_evaluation", "random_state_kept", "seed"]


@contextmanager
def random_state_kept(devices: Sequence[Any] = ()) -> Iterator[None]:
    """Torch's, Python's and NumPy's.

    Args:
        devices: those of CUDA whose generators count, beside the CPU's.
    """
    numpy = sys.modules.get("numpy")
    own, others = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(others)


def seed(devices: Sequence[Any] = ()) -> None:
    """Seed torch's generators whose state is kept: torch.manual_seed would reach all devices."""
    torch.default_generator.manual_seed(0)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation; by their flag, as `eval` of some does more (merges weights)."""
    modules = [module for module in model.modules() if module.training]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True
