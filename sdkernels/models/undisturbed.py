"""Random numbers as if what runs in between had not run: torch's, Python's and NumPy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["random_state_kept"]


@contextmanager
def random_state_kept(devices: Sequence[Any] = ()) -> Iterator[None]:
    """Args: devices: those of CUDA whose generators count, beside the CPU's."""
    numpy = sys.modules.get("numpy")
    own, others = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(others)
