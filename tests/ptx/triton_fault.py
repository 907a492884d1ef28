"""Copies 1000 elements in a block of 1024, with a mask and without one: prints what came of it."""

import torch
import triton
import triton.language as tl

from sdkernels.backends.triton.tiles import Tile

from .triton_plugin import Launcher


@triton.jit
def copy(y, x, length: tl.int64, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < length if MASKED else i >= 0
    tl.store(y + i, tl.load(x + i, inside), inside)


if __name__ == "__main__":
    launcher = Launcher()
    x = torch.randn(1000)
    for masked in (True, False):
        y = torch.empty(1000)
        try:
            launcher(copy, 1, 1, Tile(1, 1024, 4), x.device, y, x, 1000, masked, 1024)
            print("equal" if torch.equal(x, y) else "different")
        except RuntimeError as error:
            print(error)
