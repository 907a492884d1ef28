"""Refuses to time a provider whose values or gradients are not those of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.measure.workload import Case
from sdkernels.measure.comparing import full_precision

# Largest error allowed, relative to the largest entry of the expected tensor: a few roundings of
# the dtype, with room for the other order of summation in weight gradients over thousands of rows.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class ProviderMismatch(RuntimeError):
    """A provider's result differs from the reference by more than rounding."""


def largest_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry of ``expected``; NaN if either holds one."""
    if expected.numel() == 0:
        return 0.0
    got, expected = got.double(), expected.double()
    difference = (got - expected).abs().max()
    magnitude = expected.abs().max()
    return (difference / magnitude).item() if magnitude > 0 else difference.item()


@full_precision()
def check(case: Case, device: torch.device) -> int:
    """Compares every provider of ``case`` with its reference; returns the number of tensors
    compared.

    Raises:
        ProviderMismatch: names the case, the provider, the tensor and the error.
    """
    compared = 0
    for comparison in case.comparisons(device):
        subject = f"{case.name}: provider {comparison.provider!r}"
        if comparison.got.keys() != comparison.expected.keys():
            raise ProviderMismatch(
                f"{subject} returned {sorted(comparison.got)}, not {sorted(comparison.expected)}"
            )
        for name, expected in comparison.expected.items():
            got = comparison.got[name]
            if got.shape != expected.shape or got.dtype != expected.dtype:
                raise ProviderMismatch(
                    f"{subject}, {name}: expected {tuple(expected.shape)} {expected.dtype}, "
                    f"got {tuple(got.shape)} {got.dtype}"
                )
            error = largest_error(got, expected)
            allowed = TOLERANCE[comparison.dtype or expected.dtype]
            if not error <= allowed:  # so that NaN is refused too
                raise ProviderMismatch(
                    f"{subject} differs from the reference in its {name}: "
                    f"largest error {error:.3g} of the largest entry, allowed {allowed:.3g}"
                )
            compared += 1
    return compared
