"""Refuses to time a provider whose values or gradients are not those of the reference."""

from __future__ import annotations

from collections.abc import Mapping

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


def compare(
    subject: str,
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    arithmetic: torch.dtype | None = None,
) -> int:
    """Returns the number of tensors compared.

    Args:
        arithmetic: its dtype, where it is narrower than the tensors'.

    Raises:
        ProviderMismatch: names the subject, the tensor and the error.
    """
    if got.keys() != expected.keys():
        raise ProviderMismatch(f"{subject} returned {sorted(got)}, not {sorted(expected)}")
    for name, wanted in expected.items():
        found = got[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ProviderMismatch(
                f"{subject}, {name}: expected {tuple(wanted.shape)} {wanted.dtype}, "
                f"got {tuple(found.shape)} {found.dtype}"
            )
        error = largest_error(found, wanted)
        allowed = TOLERANCE[arithmetic or wanted.dtype]
        if not error <= allowed:  # so that NaN is refused too
            raise ProviderMismatch(
                f"{subject} differs from the reference in its {name}: "
                f"largest error {error:.3g} of the largest entry, allowed {allowed:.3g}"
            )
    return len(expected)


@full_precision()
def check(case: Case, device: torch.device) -> int:
    """Compares every provider of ``case`` with its reference, like ``compare``."""
    return sum(
        compare(f"{case.name}: provider {each.provider!r}", each.got, each.expected, each.dtype)
        for each in case.comparisons(device)
    )
