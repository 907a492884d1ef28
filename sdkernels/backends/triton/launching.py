"""How a kernel is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl

from .tiles import Tile, cdiv

ACC = {torch.float32: tl.float32, torch.float64: tl.float64}

# The second and third dimension of a grid end at 65535: rows are spread over both.
_MOST_ROWS = 65535

# debug: device_assert, which stops a kernel at a row number outside of the batch, works only with
# it (one comparison a program); the checks of integer overflow that come along are left out.
# enable_fp_fusion: its default differs between releases of Triton, and with it the last bits.
_OPTIONS = {"debug": True, "sanitize_overflow": False, "enable_fp_fusion": False}


def options(tile: Tile) -> dict[str, int | bool]:
    """What Triton is told beside the arguments."""
    # Three programs of four warps fit on an SM. Left to itself, ptxas aims at fewer registers, and
    # spills some.
    registers = min(168, 65536 // (32 * tile.warps))
    return {"num_warps": tile.warps, "maxnreg": registers, **_OPTIONS}


def launch(
    kernel: Any, tiles: int, rows: int, tile: Tile, device: torch.device, *arguments: object
) -> None:
    """Run `tiles` programs for each of the `rows`, on the current stream of the device."""
    with _on(device):
        kernel[grid(tiles, rows)](*arguments, **options(tile))


def grid(tiles: int, rows: int) -> tuple[int, int, int]:
    return tiles, min(rows, _MOST_ROWS), cdiv(rows, _MOST_ROWS)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
