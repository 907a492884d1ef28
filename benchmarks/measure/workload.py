"""What a case is made of: what is timed, what is compared, and the pieces that cases share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.measure.environment import last_cache_bytes
from sdkernels import KeptRows

Context = Callable[[], AbstractContextManager[Any]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """What is timed for one provider of one case."""

    run: Callable[[], object]
    forward: Callable[[], Tensor] | None = None  # measured for memory where given
    parameters: tuple[Tensor, ...] = ()  # their storages are not activations
    # Entered around every turn of the provider, outside the clock.
    context: Context = contextlib.nullcontext
    # Calls before the clock starts: the caches hold what the previous provider read, and what it
    # wrote waits there to be written back at the cost of whoever comes next.
    warm_up: int = 1


@dataclass(frozen=True)
class Comparison:
    """Values and gradients of one provider beside what they have to equal, by name."""

    provider: str
    got: dict[str, Tensor]
    expected: dict[str, Tensor]
    dtype: torch.dtype | None = None  # of the arithmetic, where it is narrower than the tensors'


class Case(ABC):
    """A shape with its providers; ``presets.py`` lists the cases of every preset."""

    kind: ClassVar[str]
    baseline: ClassVar[str]
    floor: ClassVar[str | None]

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique among all cases: a filter is matched against it."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the report has to know about the case, ready for JSON."""

    @abstractmethod
    def providers(self, device: torch.device) -> dict[str, str | None]:
        """Every provider, with the reason why it cannot run here; None where it can."""

    @abstractmethod
    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider that can run here, on the same weights and inputs."""

    @abstractmethod
    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each of those providers against its reference."""

    def usable(self, device: torch.device) -> list[str]:
        """The providers that can run here."""
        return [name for name, reason in self.providers(device).items() if reason is None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept_rows(batch: int, keep: float, device: torch.device, seed: int) -> KeptRows:
    """A fixed count, so that the dense floor has a batch of exactly that size."""
    return KeptRows.sample(batch, 1 - keep, sampler="fixed", generator=seeded(seed), device=device)


def everything(batch: int, device: torch.device) -> KeptRows:
    """All rows kept, at scale 1."""
    return KeptRows.from_mask(torch.ones(batch, dtype=torch.bool)).to(device)


def nothing(batch: int, device: torch.device) -> KeptRows:
    return KeptRows.from_mask(torch.zeros(batch, dtype=torch.bool)).to(device)


def first_rows(k: int, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What the dense floor is timed on: k rows of an input, a leaf, and of an output's gradient."""
    return x.detach()[:k].clone().requires_grad_(), grad[:k].clone()


def step(
    forward: Callable[[], Tensor],
    wanted: tuple[Tensor, ...],
    grad: Tensor,
    parameters: tuple[Tensor, ...] = (),
    context: Context = contextlib.nullcontext,
) -> Workload:
    """Forward, and the gradients of ``wanted`` for that of the output."""
    return Workload(
        lambda: torch.autograd.grad(forward(), wanted, grad), forward, parameters, context
    )


def values(output: Tensor, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of ``inputs``, by name; zeros where there is none."""
    grads = torch.autograd.grad(output, list(inputs.values()), grad, allow_unused=True)
    return {"output": output.detach()} | {
        f"gradient of {name}": torch.zeros_like(tensor) if g is None else g
        for (name, tensor), g in zip(inputs.items(), grads, strict=True)
    }


# A virtual machine names the last cache of its host, hundreds of MiB: to go round past that takes
# seconds a case.
MOST_OF_A_CACHE = 2**26


def copies_past_the_cache(set_bytes: int, device: torch.device, whole: bool = False) -> int:
    """How many sets of inputs of that size to go round in, so that none is in the last cache when
    its turn comes again: together they are twice the cache, and of a CPU's, but for ``whole``,
    twice MOST_OF_A_CACHE at most. (Of tiny ones 256, which may be in it.)"""
    cache = last_cache_bytes(device)
    if device.type == "cpu" and not whole:
        cache = min(cache, MOST_OF_A_CACHE)
    return min(max(-(-2 * cache // max(set_bytes, 1)) + 1, 2), 256)


def matches(name: str, expression: str) -> bool:
    """Whether any of the comma-separated shell patterns occurs in ``name``.

    >>> matches("op-compact-fwd-fp32", "block, compact-*-fp32")
    True
    """
    patterns = [pattern.strip() for pattern in expression.split(",")]
    return any(fnmatchcase(name, f"*{pattern}*") for pattern in patterns if pattern)
