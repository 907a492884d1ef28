"""Whether two models compute the same: outputs and gradients beside what they have to equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["Differs", "compare", "full_precision", "without_batch_effects"]

# Through a whole model, relative to the largest entry of a tensor; a gradient that is zero but for
# rounding (of a key's bias, say) is held against the largest of all.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
FLOOR = 1e-3  # of the tolerance


class Differs(RuntimeError):
    """A tensor is not what it has to be; the message names it and the error."""


def compare(got: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    """The largest error of any tensor, relative to its largest entry.

    Names that begin with "gradient" may be None: the parameter takes no part.

    Raises:
        Differs: an error beyond what rounding through a model explains, or NaN.
    """
    numbers = [
        tensor for name, tensor in expected.items() if name.startswith("gradient") and _any(tensor)
    ]
    largest = max(
        (float(tensor.abs().max()) for tensor in numbers if tensor is not None), default=0.0
    )
    worst = 0.0
    for name, wanted in expected.items():
        found = got[name]
        if not _any(found) or not _any(wanted):
            # No gradient and one of zeros are the same.
            left = [t for t in (found, wanted) if _any(t) and t is not None and bool(t.any())]
            if left:
                raise Differs(f"{name} is missing in one of them")
            continue
        assert found is not None
        assert wanted is not None
        difference = float((found.double() - wanted.double()).abs().max())
        magnitude = float(wanted.abs().max())
        share = TOLERANCE.get(wanted.dtype, TOLERANCE[torch.float32])
        allowed = share * (magnitude + FLOOR * largest)
        if not difference <= allowed:  # so that NaN is refused too
            raise Differs(f"{name}: largest error {difference:.3g}, allowed {allowed:.3g}")
        if magnitude > FLOOR * largest:
            worst = max(worst, difference / magnitude)
    return worst


def _any(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.numel() > 0


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 without TF32: rounding to 10 bits, other algorithms for B rows than for k."""
    cudnn, products = torch.backends.cudnn, torch.get_float32_matmul_precision()
    allowed, cudnn.allow_tf32 = cudnn.allow_tf32, False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        cudnn.allow_tf32 = allowed
        torch.set_float32_matmul_precision(products)


def without_batch_effects(model: nn.Module) -> nn.Module:
    """The model without what differs with the rows in a batch, for good: batch norm takes its
    running statistics, dropout drops nothing."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
        elif isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model
