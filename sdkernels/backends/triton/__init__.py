"""The row ops as Triton kernels, for CUDA tensors.

Importing this package imports Triton: `sdkernels.backends.ops` does so at the first call of an op
that the Triton backend serves. Each function has the signature of the op of the same name
(``csrc/module.cpp``). compact_mask is not here: with k given, its PyTorch code waits for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import triton

from .norm_ops import compact_norm, compact_norm_backward, compact_norm_into
from .row_ops import (
    compact_rows,
    compact_rows_into,
    expand_rows,
    scatter_add_relu_rows,
    scatter_add_relu_rows_backward,
    scatter_add_rows,
    scatter_add_rows_,
    scatter_add_rows_backward,
    scatter_add_rows_backward_into,
    scatter_rows,
    scatter_rows_,
)

OPS: dict[str, Callable[..., object]] = {
    function.__name__: function
    for function in (
        compact_rows,
        compact_rows_into,
        expand_rows,
        scatter_rows,
        scatter_rows_,
        scatter_add_rows,
        scatter_add_rows_,
        scatter_add_rows_backward,
        scatter_add_rows_backward_into,
        scatter_add_relu_rows,
        scatter_add_relu_rows_backward,
        compact_norm,
        compact_norm_into,
        compact_norm_backward,
    )
}

OLDEST_CAPABILITY = (8, 0)


def why_unusable() -> str | None:
    """Why the kernels cannot run here; None where they can.

    Asking Triton for its target finds the driver, and compiles what Triton launches kernels with.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton cannot launch kernels: {error}"
    # One answer for the process, which may work on any device that it sees.
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            oldest, got = (".".join(map(str, pair)) for pair in (OLDEST_CAPABILITY, capability))
            return (
                f"the Triton kernels need compute capability {oldest} on every device in "
                f"CUDA_VISIBLE_DEVICES, got {got} on cuda:{device}"
            )
    return None
