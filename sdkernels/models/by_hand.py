"""Forwards written by hand, where an addition of a branch cannot be read from the source.

torchvision's ResNet has no drop path, so that nothing says which addition is meant. timm's blocks
of parallel branches stack what their branch modules return, and add the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .branches import chain, per_sample
from .rewriting import Branch

__all__ = ["BY_HAND", "ByHand"]


class ByHand(NamedTuple):
    """A forward for the blocks of a class.

    Args:
        forward: takes the block, what adds a branch (:class:`sdkernels.models.blocks.Add`) and the
            arguments of the original.
        branches: of a block, in the order of the numbers that `forward` uses.
        fingerprints: those of the originals that it stands for, each with the versions that have
            it; None for any.
        hides_sums: whether it hands its sums to the next addition and to nothing else.
    """

    forward: Callable[..., Any]
    branches: Callable[[Any], tuple[Branch, ...]]
    fingerprints: Mapping[str, str] | None = None
    hides_sums: bool = False


def vit_things(block: Any, add: Any, x: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
    """Several attentions side by side, all of the same x, then several MLPs."""
    options = {"is_causal": True} if is_causal else {}
    mask = (per_sample(attn_mask, x),)
    inputs, number = x, 0
    for part in block.attns:

        def attend(kept: Tensor, mask: Tensor | None, attn: Any = part.attn) -> Any:
            return attn(kept, **options) if mask is None else attn(kept, attn_mask=mask, **options)

        x = add(number, inputs, attend, norm=part.norm, layer_scale=part.ls, residual=x, args=mask)
        number += 1
    inputs = x
    for part in block.ffns:
        x = add(number, inputs, part.mlp, norm=part.norm, layer_scale=part.ls, residual=x)
        number += 1
    return x


def things_branches(block: Any) -> tuple[Branch, ...]:
    parts = [f"{group}.{i}" for group in ("attns", "ffns") for i in range(block.num_parallel)]
    return tuple(Branch(f"{part}.drop_path", (part,)) for part in parts)


def resnet_basic(block: Any, add: Any, x: Tensor) -> Any:
    steps = [block.conv1, block.bn1, block.relu, block.conv2, block.bn2]
    residual = None if block.downsample is None else block.downsample(x)
    return add(0, x, chain(steps), residual=residual, activation=block.relu)


def resnet_bottleneck(block: Any, add: Any, x: Tensor) -> Any:
    steps = [block.conv1, block.bn1, block.relu, block.conv2, block.bn2, block.relu]
    steps += [block.conv3, block.bn3]
    residual = None if block.downsample is None else block.downsample(x)
    return add(0, x, chain(steps), residual=residual, activation=block.relu)


def resnet_branches(block: nn.Module) -> tuple[Branch, ...]:
    own = [name for name, _ in block.named_children() if name not in ("downsample", "relu")]
    return (Branch(None, tuple(own)),)


BY_HAND = {
    "timm.models.vision_transformer:ParallelThingsBlock": ByHand(
        vit_things,
        things_branches,
        {"1197bc16a62e": "1.0.17 to 1.0.24", "9e9b82399af9": "1.0.26 to 1.0.31"},
        hides_sums=True,
    ),
    "torchvision.models.resnet:BasicBlock": ByHand(
        resnet_basic, resnet_branches, {"836796ccf4ec": "0.25.0 to 0.28.0"}
    ),
    "torchvision.models.resnet:Bottleneck": ByHand(
        resnet_bottleneck, resnet_branches, {"10f3850da4b4": "0.25.0 to 0.28.0"}
    ),
}
