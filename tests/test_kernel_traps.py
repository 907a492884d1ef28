"""Rows that do not exist: the CUDA kernels trap, and touch nothing outside of their tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EMULATED = "SDKERNELS_EMULATED" in os.environ

# A program each, because a trap ends a CUDA context. x has four rows, kept rows are two.
SETUP = """
import torch, sdkernels
ops, device = torch.ops.sdkernels, {device!r}
x, kept = torch.randn(4, 40, device=device), torch.randn(2, 40, device=device)
bits = torch.zeros(4, 5, dtype=torch.uint8, device=device)
def rows(*numbers): return torch.tensor(numbers, device=device)
"""
CALLS = {
    "compact_rows": "ops.compact_rows(x, rows(0, 4))",
    "compact_rows-negative": "ops.compact_rows(x, rows(-1, 2))",
    "compact_rows_into": "ops.compact_rows_into(kept.clone(), x, rows(0, 4))",
    "expand_rows": "ops.expand_rows(kept, rows(0, 1), rows(0, 2, -1, -1))",
    "expand_rows-below": "ops.expand_rows(kept, rows(0, 1), rows(0, 1, -2, -1))",
    "scatter_rows": "ops.scatter_rows(x, kept, rows(0, 1), rows(2, 1, -1, -1))",
    "scatter_rows-below": "ops.scatter_rows(x, kept, rows(0, 1), rows(0, 1, -2, -1))",
    "scatter_rows_": "ops.scatter_rows_(x, kept, rows(0, 4), rows(0, 1, -1, -1))",
    "scatter_add_rows": "ops.scatter_add_rows(x, kept, rows(0, 1), rows(2, 1, -1, -1),"
    " None, None, 1.0)",
    "scatter_add_rows_": "ops.scatter_add_rows_(x, kept, rows(0, 4), rows(0, 1, -1, -1),"
    " None, None, 1.0)",
    "scatter_add_rows_backward": "ops.scatter_add_rows_backward(x, None, rows(0, 9), None, None,"
    " 1.0, torch.float32, [False, False])",
    "scatter_add_rows_backward-sums": "ops.scatter_add_rows_backward(x, kept, rows(0, 9),"
    " torch.ones(40, device=device), None, 1.0, torch.float32, [True, False])",
    "scatter_add_rows_backward_into": "ops.scatter_add_rows_backward_into(kept.clone(), x, None,"
    " rows(0, 9), None, None, 1.0, [False, False])",
    "scatter_add_relu_rows": "ops.scatter_add_relu_rows(x, kept, rows(0, 1), rows(2, 1, -1, -1),"
    " None, None, 1.0)",
    "scatter_add_relu_rows-below": "ops.scatter_add_relu_rows(x, kept, rows(0, 1),"
    " rows(0, 1, -1, -2), None, None, 1.0)",
    "scatter_add_relu_rows_backward": "ops.scatter_add_relu_rows_backward(x, bits, rows(0, 1),"
    " rows(0, -1, -1, 2), None, None, 1.0, x.dtype, torch.contiguous_format, True)",
    "compact_norm": "ops.compact_norm(x, rows(0, 4), [40], None, None, 0.1, False, x.dtype, True)",
    "compact_norm_into": "ops.compact_norm_into(kept.clone(), x, rows(0, 4), [40], None, None, 0.1,"
    " False, True)",
    "compact_norm_backward": "ops.compact_norm_backward(None, kept, kept, kept[:, 0].contiguous(),"
    " kept[:, 1].contiguous(), rows(0, 1), rows(0, 2, -1, -1), [40], None, False,"
    " [True, False, False])",
    "compact_mask-more": "ops.compact_mask(rows(1, 1, 0, 1) > 0, 2)",
    "compact_mask-fewer": "ops.compact_mask(rows(1, 0, 0, 0) > 0, 2)",
}


@pytest.mark.skipif(not EMULATED, reason="the CUDA kernels do not serve the CPU")
@pytest.mark.parametrize("name", CALLS)
def test_emulated_trap(name):
    with pytest.raises(RuntimeError, match="the kernel trapped"):
        exec(SETUP.format(device="cpu") + CALLS[name], {})


@pytest.mark.skipif(not EMULATED, reason="the CUDA kernels do not serve the CPU")
def test_no_kernel_image(monkeypatch):
    monkeypatch.setenv("SDKERNELS_EMULATION_NO_KERNEL_IMAGE", "1")
    message = (
        r"^sdkernels::compact_rows: sdkernels was built for the CUDA architectures 9\.0, "
        r"which do not cover device 0 \(12\.1\); "
        r"set TORCH_CUDA_ARCH_LIST=12\.1 and rebuild with: pip install"
    )
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sdkernels.compact_rows(torch.ones(2, 3), torch.tensor([1]))


@pytest.mark.skipif(not EMULATED, reason="the CUDA kernels do not serve the CPU")
def test_trap_of_an_earlier_kernel(monkeypatch):
    """It is met by the first call after it, which is not to blame, in the words that traps have."""
    monkeypatch.setenv("SDKERNELS_EMULATION_EARLIER_TRAP", "1")
    with pytest.raises(RuntimeError, match=r"^CUDA error: .*, met by sdkernels::compact_rows; it "):
        torch.ops.sdkernels.compact_rows(torch.ones(2, 3), torch.tensor([1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CALLS)
def test_trap(name):
    program = SETUP.format(device="cuda") + CALLS[name] + "\ntorch.cuda.synchronize()\n"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "CUDA error" in result.stderr
