"""What a net's drop path schedule saves, by counted FLOPs: ``python docs/figures/saving.py``.

Everything in a block of these nets is in a branch, so the share is the sum of p times the FLOPs of
the block, over all blocks, divided by the FLOPs of the net.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

NETS = (
    ("vit_small_patch16_224", 0.1),
    ("vit_small_patch16_224", 0.4),
    ("convnext_base", 0.5),
    ("swin_tiny_patch4_window7_224", 0.2),
)


@torch.no_grad()
def expected_saving(model: nn.Module, image: Sequence[int] = (1, 3, 224, 224)) -> float:
    """Share of the forward's FLOPs that compaction saves on average."""
    blocks = {
        name: [m.drop_prob for m in block.modules() if type(m).__name__ == "DropPath"]
        for name, block in model.named_modules()
        if type(block).__name__ in ("Block", "ConvNeXtBlock", "SwinTransformerBlock")
    }
    counter = FlopCounterMode(display=False)
    model.eval()
    with counter:
        model(torch.zeros(image))
    counts = counter.get_flop_counts()
    total = sum(counts["Global"].values())
    saved = 0.0
    for name, probabilities in blocks.items():
        if probabilities:  # all branches of a block have the same
            saved += probabilities[0] * sum(counts[f"{type(model).__name__}.{name}"].values())
    return saved / total


if __name__ == "__main__":
    import timm

    for name, rate in NETS:
        model = timm.create_model(name, drop_path_rate=rate)
        print(f"{name}  drop_path_rate={rate}  {expected_saving(model):.1%}")
