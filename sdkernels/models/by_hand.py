"""Forwards written by hand, where an addition of a branch cannot be read from the source.

torchvision's ResNet has no drop path, so that nothing says which addition is meant. timm's blocks
of parallel branches stack what their branch modules return, and add the sum. Those of DINOv2 and
DINOv3 take the samples themselves (``dino.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .dino import (
    dinov2,
    dinov2_nested,
    dinov3,
    has_xformers,
    learn_dinov2,
    learn_dinov3,
    per_sample,
)
from .fingerprint import fingerprint_of_all
from .rewriting import Branch

__all__ = ["BY_HAND", "ByHand"]


class ByHand(NamedTuple):
    """A forward for the blocks of a class."""

    forward: Callable[..., Any]  # takes the block, an Add and the arguments of the original
    branches: Callable[[Any], tuple[Branch, ...]]  # of a block, in the order of their numbers
    # Those of the originals that it stands for, each with the versions that have it; None for any.
    fingerprints: Mapping[str, str] | None = None
    hides_sums: bool = False  # whether it hands them to the next addition and to nothing else
    reads: tuple[str, ...] = ()  # what else they are of: names in the class, or in its module
    takes_lists: Callable[[Any], bool] | None = None  # whether the original of a class does

    def stands_for(self, kind: Any) -> bool:
        """Whether the forward of a class is one that was read when this was written."""
        if self.fingerprints is None:
            return True
        functions = [kind.forward, *(_read(kind, name) for name in self.reads)]
        return fingerprint_of_all(functions) in self.fingerprints


def _read(kind: Any, name: str) -> Any:
    first, *rest = name.split(".")
    found = getattr(kind, first, None) or kind.forward.__globals__.get(first)
    for each in rest:
        found = getattr(found, each, None)
    return found


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
    def branch(kept: Tensor) -> Any:
        kept = block.relu(block.bn1(block.conv1(kept)))
        return block.bn2(block.conv2(kept))

    residual = None if block.downsample is None else block.downsample(x)
    return add(0, x, branch, residual=residual, activation=block.relu)


def resnet_bottleneck(block: Any, add: Any, x: Tensor) -> Any:
    def branch(kept: Tensor) -> Any:
        kept = block.relu(block.bn1(block.conv1(kept)))
        kept = block.relu(block.bn2(block.conv2(kept)))
        return block.bn3(block.conv3(kept))

    residual = None if block.downsample is None else block.downsample(x)
    return add(0, x, branch, residual=residual, activation=block.relu)


def resnet_branches(block: nn.Module) -> tuple[Branch, ...]:
    own = [name for name, _ in block.named_children() if name not in ("downsample", "relu")]
    return (Branch(None, tuple(own)),)


def dinov2_branches(block: Any) -> tuple[Branch, ...]:
    learn_dinov2(block)
    return (
        Branch("drop_path1", ("norm1", "attn", "ls1"), "sample_drop_ratio"),
        Branch("drop_path2", ("norm2", "mlp", "ls2"), "sample_drop_ratio"),
    )


def dinov3_branches(block: Any) -> tuple[Branch, ...]:
    learn_dinov3(block)
    return (
        Branch(None, ("norm1", "attn", "ls1"), "sample_drop_ratio"),
        Branch(None, ("norm2", "mlp", "ls2"), "sample_drop_ratio"),
    )


BY_HAND = {
    "dinov2.layers.block:Block": ByHand(
        dinov2,
        dinov2_branches,
        {"a201912e32f6": "April 2023 to August 2025"},
        hides_sums=True,
        reads=("drop_add_residual_stochastic_depth",),
    ),
    "dinov2.layers.block:NestedTensorBlock": ByHand(
        dinov2_nested,
        dinov2_branches,
        {"7239e07117c3": "April to August 2023", "b32217a47fa3": "August 2023 to August 2025"},
        hides_sums=True,
        reads=(
            "Block.forward",
            "forward_nested",
            "drop_add_residual_stochastic_depth",
            "drop_add_residual_stochastic_depth_list",
            "get_branges_scales",
            "get_attn_bias_and_cat",
            "add_residual",
        ),
        takes_lists=has_xformers,
    ),
    "dinov3.layers.block:SelfAttentionBlock": ByHand(
        dinov3,
        dinov3_branches,
        {"f6aba9c5df1b": "August 2025 to July 2026"},
        hides_sums=True,
        reads=("_forward_list", "_maybe_index_rope"),
        takes_lists=lambda kind: True,
    ),
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
