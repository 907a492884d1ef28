"""How large the models are: tiny for the tests, wide enough to be timed."""

from __future__ import annotations

from types import SimpleNamespace


class Sizes(SimpleNamespace):
    """Widths and resolutions of all the models."""


TINY = Sizes(
    image=32,
    vit=(32, 2, 48),  # width, heads, and of transformers the width inside the MLP
    swin=(2, 16, (2, 2)),  # patch, width, heads
    windows=(4, 3),  # of Swin: timm's, the others'
    convnext=(2, (8, 8, 16, 16)),  # patch, widths
    convnext_stages=(16, 32),  # widths of the other libraries'
    resnet=(64, 64, 64, 64),  # channels of basic blocks; a quarter in bottlenecks
    efficientnet=(8, 16),  # channels
    maxvit=(8, 8, 2),  # stem, head, window
    maxvit_widths=((16, 32), (8, 16)),  # timm's, torchvision's
)

# A training step on a batch of 20 takes tenths of a second on two CPU cores.
WIDE = Sizes(
    image=96,
    vit=(192, 3, 768),
    swin=(4, 96, (3, 6)),
    windows=(6, 6),
    convnext=(4, (64, 128, 256, 512)),
    convnext_stages=(96, 192),
    resnet=(64, 128, 256, 512),
    efficientnet=(32, 64),
    maxvit=(24, 16, 6),
    maxvit_widths=((48, 96), (48, 96)),
)
