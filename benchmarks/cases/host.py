"""What one call costs on a tensor so small that only the call is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import sdkernels
from benchmarks.measure.workload import Case, Comparison, Workload, kept_rows, seeded, values
from sdkernels import KeptRows, reference

HostFunction = Callable[[Tensor, float, KeptRows], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


# "-rows" runs on kept rows drawn beforehand; the others draw in every call, as peers' naive masking
# always does.
HOST_PROVIDERS: dict[str, HostFunction] = {
    "plain": lambda x, p, rows: x + _identity(x),
    "naive": lambda x, p, rows: reference.naive_masking(x, _identity, p),
    "index_add-rows": lambda x, p, rows: reference.index_add(x, _identity, rows=rows),
    "fused-rows": lambda x, p, rows: sdkernels.fused_stochastic_depth(x, _identity, p, rows=rows),
    "fused": lambda x, p, rows: sdkernels.fused_stochastic_depth(x, _identity, p),
}


@dataclass(frozen=True)
class HostCase(Case):
    """Forward and backward. What counts is the extra over ``plain``, which is ``x + branch(x)``
    with the identity for a branch."""

    shape: tuple[int, ...] = (8, 4, 16)
    keep: float = 0.5

    kind, baseline, floor = "host", "naive", "plain"

    @property
    def name(self) -> str:
        return "host-identity-" + "x".join(str(n) for n in self.shape)

    def providers(self, device: torch.device) -> dict[str, str | None]:
        return dict.fromkeys(HOST_PROVIDERS)

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"direction": "fwd+bwd", "dtype": "fp32"}

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, KeptRows]:
        generator = seeded()
        x = torch.randn(self.shape, generator=generator).to(device).requires_grad_()
        grad = torch.randn(self.shape, generator=generator).to(device)
        return x, grad, kept_rows(self.shape[0], self.keep, device, seed=1)

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        x, grad, rows = self.inputs(device)

        def workload(function: HostFunction) -> Workload:
            return Workload(lambda: torch.autograd.grad(function(x, 1 - self.keep, rows), x, grad))

        return {provider: workload(function) for provider, function in HOST_PROVIDERS.items()}

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against naive masking with the same kept rows.

        A provider that draws its own rows shows in its output which ones it kept, and naive masking
        repeats them.
        """
        x, grad, rows = self.inputs(device)
        p = 1 - self.keep
        for provider, function in HOST_PROVIDERS.items():
            if provider == "plain":
                continue
            output, kept = function(x, p, rows), rows
            if not provider.endswith("-rows"):
                mask = (output != x).flatten(1).any(1)
                kept = KeptRows.from_mask(mask, scale=1 / self.keep)
            expected = reference.naive_masking(x, _identity, p, rows=kept)
            got, expected = (values(y, {"x": x}, grad) for y in (output, expected))
            yield Comparison(provider, got, expected)
