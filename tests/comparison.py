"""Runs a case with the op and with naive masking in float64, and compares the two."""

from typing import Any

import torch
from cases import Inputs
from torch import Tensor

from sdkernels import fused_stochastic_depth
from sdkernels.reference import naive_masking


def collect(y: Tensor, inputs: Inputs) -> dict[str, Tensor | None]:
    """The result and, after the backward, every gradient."""
    y.backward(inputs.grad)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in inputs.leaves().items()}


def run_fused(inputs: Inputs, **options: Any) -> dict[str, Tensor | None]:
    return collect(
        fused_stochastic_depth(inputs.x, inputs.branch, 0.5, **inputs.call(), **options), inputs
    )


def run_reference(inputs: Inputs) -> dict[str, Tensor | None]:
    """Naive masking in float64."""
    wide = inputs.double()
    return collect(naive_masking(wide.x, wide.branch, 0.5, **wide.call()), wide)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "result") -> None:
    """`actual` is `expected` (float64) to within `tolerance` of its largest value."""
    assert actual.shape == expected.shape, name
    largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=tolerance,
        atol=tolerance * largest,
        msg=lambda message: f"{name}: {message}",
    )


def assert_same_results(
    actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] is not None, f"{name}: no gradient"
        assert_close(actual[name], value, tolerance, name)


def as_integers(x: Tensor) -> Tensor:
    """The bits of a floating point tensor, to compare NaN payloads and signed zeros."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(integer)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(as_integers(actual), as_integers(expected))
