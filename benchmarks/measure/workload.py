"""What a case is made of: what is timed, what is compared, and the pieces that cases share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from benchmarks.measure.environment import last_cache_bytes
from sdkernels import KeptRows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """What is timed for one provider of one case."""

    run: Callable[[], object]
    forward: Callable[[], Tensor] | None = None  # measured for memory where given
    parameters: tuple[Tensor, ...] = ()  # their storages are not activations
    # Entered around every turn of the provider, outside the clock.
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Comparison:
    """Values and gradients of one provider beside what they have to equal, by name."""

    provider: str
    got: dict[str, Tensor]
    expected: dict[str, Tensor]
    dtype: torch.dtype | None = None  # of the arithmetic, where it is narrower than the tensors'


class Case(Protocol):
    """A shape with its providers; ``presets.py`` lists the cases of every preset."""

    kind: ClassVar[str]
    baseline: ClassVar[str]
    floor: ClassVar[str | None]

    @property
    def name(self) -> str:
        """Unique among all cases: a filter is matched against it."""

    def describe(self) -> dict[str, Any]:
        """What the report has to know about the case, ready for JSON."""

    def providers(self, device: torch.device) -> dict[str, str | None]:
        """Every provider, with the reason why it cannot run here; None where it can."""

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider that can run here, on the same weights and inputs."""

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each of those providers against its reference."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept_rows(batch: int, keep: float, device: torch.device, seed: int) -> KeptRows:
    """A fixed count, so that the dense floor has a batch of exactly that size."""
    return KeptRows.sample(batch, 1 - keep, sampler="fixed", generator=seeded(seed), device=device)


def gradients(output: Tensor, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """The gradients of ``inputs`` by name; zeros where there is none."""
    grads = torch.autograd.grad(output, list(inputs.values()), grad, allow_unused=True)
    return {
        f"gradient of {name}": torch.zeros_like(tensor) if g is None else g
        for (name, tensor), g in zip(inputs.items(), grads, strict=True)
    }


def copies_past_the_cache(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs of that size to go round in, so that none is in the last cache when
    its turn comes again: together they are twice the cache. (Of tiny ones 256, which may be.)"""
    return min(max(-(-2 * last_cache_bytes(device) // max(set_bytes, 1)) + 1, 2), 256)


def matches(name: str, expression: str) -> bool:
    """Whether any of the comma-separated shell patterns occurs in ``name``.

    >>> matches("op-compact-fwd-fp32", "block, compact-*-fp32")
    True
    """
    patterns = [pattern.strip() for pattern in expression.split(",")]
    return any(fnmatchcase(name, f"*{pattern}*") for pattern in patterns if pattern)
