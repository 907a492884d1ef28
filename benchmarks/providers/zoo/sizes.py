"""How large the models are: tiny for the tests, wide enough to be timed."""

from __future__ import annotations

from types import SimpleNamespace

__all__ = ["TINY", "WIDE", "Sizes"]


class Sizes(SimpleNamespace):
    """Widths, depths and resolutions of all the models."""


TINY = Sizes(
    image=32,
    # Of timm, as far as no other library is named.
    vit={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    swin={"patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)},
    window=4,
    convnext={"dims": (8, 8, 16, 16), "patch_size": 2},
    resnet=(64, 64, 64, 64),  # channels of basic blocks; a quarter in bottlenecks
    torchvision_resnet=64,  # base width of bottlenecks
    maxxvit={"embed_dim": (16, 32), "stem_width": 8},
    maxxvit_head=8,
    maxxvit_window=2,
    efficientnet=(8, 16),  # channels
    torchvision_convnext=(16, 32),
    torchvision_swin=(2, 16, 3),  # patch, width, window
    torchvision_maxvit=(8, 2, [8, 16], 8),  # stem, partition, widths, head
    hugging_face_vit={
        "patch_size": 8,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    },
    hugging_face_swin={"patch_size": 2, "embed_dim": 16, "num_heads": [2, 2], "window_size": 3},
    hugging_face_stages={"hidden_sizes": [16, 32]},
)

# A training step on a batch of 20 takes tenths of a second on two CPU cores.
WIDE = Sizes(
    image=96,
    vit={"patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3},
    swin={"patch_size": 4, "embed_dim": 96, "depths": (2, 2), "num_heads": (3, 6)},
    window=6,
    convnext={"dims": (64, 128, 256, 512), "patch_size": 4},
    resnet=(64, 128, 256, 512),
    torchvision_resnet=64,
    maxxvit={"embed_dim": (48, 96), "stem_width": 24},
    maxxvit_head=16,
    maxxvit_window=6,
    efficientnet=(32, 64),
    torchvision_convnext=(96, 192),
    torchvision_swin=(4, 96, 6),
    torchvision_maxvit=(24, 6, [48, 96], 16),
    hugging_face_vit={
        "patch_size": 8,
        "hidden_size": 192,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    },
    hugging_face_swin={"patch_size": 4, "embed_dim": 96, "num_heads": [3, 6], "window_size": 6},
    hugging_face_stages={"hidden_sizes": [96, 192]},
)
