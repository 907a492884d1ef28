"""The blocks of torchvision, whose drop path is torchvision.ops.StochasticDepth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Add, Branch
from .branches import chain
from .parts import is_bare
from .registry import Known, class_getter


def swin(block: Any, add: Add, x: Tensor) -> Any:
    x = add(0, x, block.attn, norm=block.norm1)
    return add(1, x, block.mlp, norm=block.norm2)


def swin_v2(block: Any, add: Add, x: Tensor) -> Any:
    x = add(0, x, block.attn, post_norm=block.norm1)
    return add(1, x, block.mlp, post_norm=block.norm2)


def convnext(block: Any, add: Add, input: Tensor) -> Any:
    return add(0, input, block.block, layer_scale=block.layer_scale)


def mbconv(block: Any, add: Add, input: Tensor) -> Any:
    return add(0, input, block.block)


def maxvit_mbconv(block: Any, add: Add, x: Tensor) -> Any:
    is_identity = type(block.proj) is nn.Identity and is_bare(block.proj)
    residual = None if is_identity else block.proj(x)
    return add(0, x, block.layers, residual=residual)


def _pre_norm(layers: nn.Sequential) -> tuple[Any, nn.Module | None]:
    """The layers after the norm at their head, and that norm, where the two can be told apart."""
    if type(layers) is not nn.Sequential or not is_bare(layers):
        return layers, None
    norm, *rest = layers
    return chain(rest), norm


def maxvit_partition(block: Any, add: Add, x: Tensor) -> Any:
    heights, widths = block.grid_size[0] // block.p, block.grid_size[1] // block.p
    torch._assert(
        block.grid_size[0] % block.p == 0 and block.grid_size[1] % block.p == 0,
        f"Grid size must be divisible by partition size. Got grid size of {block.grid_size} and "
        f"partition size of {block.p}",
    )
    x = block.partition_swap(block.partition_op(x, block.p))
    for branch, layers in enumerate((block.attn_layer, block.mlp_layer)):
        rest, norm = _pre_norm(layers)
        x = add(branch, x, rest, norm=norm)
    return block.departition_op(block.departition_swap(x), block.p, heights, widths)


def resnet_basic(block: Any, add: Add, x: Tensor) -> Any:
    steps = [block.conv1, block.bn1, block.relu, block.conv2, block.bn2]
    residual = None if block.downsample is None else block.downsample(x)
    return add.activated(0, x, chain(steps), block.relu, residual=residual)


def resnet_bottleneck(block: Any, add: Add, x: Tensor) -> Any:
    steps = [block.conv1, block.bn1, block.relu, block.conv2, block.bn2, block.relu]
    steps += [block.conv3, block.bn3]
    residual = None if block.downsample is None else block.downsample(x)
    return add.activated(0, x, chain(steps), block.relu, residual=residual)


def no_skip(block: Any) -> str | None:
    if block.use_res_connect:
        return None
    return "it has no skip connection, so its drop path is never used"


DROP = "stochastic_depth"
ONE = (Branch(DROP, ("",)),)
SWIN = (Branch(DROP, ("norm1", "attn")), Branch(DROP, ("norm2", "mlp")))
PARTITION = (
    Branch("stochastic_dropout", ("attn_layer",)),
    Branch("stochastic_dropout", ("mlp_layer",)),
)
WITHOUT_DROP_PATH = (Branch(None, ("",)),)

KNOWN = (
    Known(
        "torchvision.models.swin_transformer:SwinTransformerBlock",
        swin,
        SWIN,
        {"f641634b26b1": "0.25.0 to 0.28.0"},
    ),
    Known(
        "torchvision.models.swin_transformer:SwinTransformerBlockV2",
        swin_v2,
        SWIN,
        {"b23d1bf26f2c": "0.25.0 to 0.28.0"},
    ),
    Known(
        "torchvision.models.convnext:CNBlock",
        convnext,
        ONE,
        {"2130f34135bc": "0.25.0 to 0.28.0"},
        runs_empty=True,
    ),
    Known(
        "torchvision.models.efficientnet:MBConv",
        mbconv,
        ONE,
        {"3e0d2dfbdbfa": "0.25.0 to 0.28.0"},
        no_skip,
        runs_empty=True,
    ),
    Known(
        "torchvision.models.efficientnet:FusedMBConv",
        mbconv,
        ONE,
        {"3e0d2dfbdbfa": "0.25.0 to 0.28.0"},
        no_skip,
        runs_empty=True,
    ),
    Known(
        "torchvision.models.maxvit:MBConv",
        maxvit_mbconv,
        ONE,
        {"86340cf55f63": "0.25.0 to 0.28.0"},
        runs_empty=True,
    ),
    Known(
        "torchvision.models.maxvit:PartitionAttentionLayer",
        maxvit_partition,
        PARTITION,
        {"520e67f61751": "0.25.0 to 0.28.0"},
    ),
    Known(
        "torchvision.models.resnet:BasicBlock",
        resnet_basic,
        WITHOUT_DROP_PATH,
        {"836796ccf4ec": "0.25.0 to 0.28.0"},
        runs_empty=True,
    ),
    Known(
        "torchvision.models.resnet:Bottleneck",
        resnet_bottleneck,
        WITHOUT_DROP_PATH,
        {"10f3850da4b4": "0.25.0 to 0.28.0"},
        runs_empty=True,
    ),
)

__getattr__ = class_getter(__name__, KNOWN)
