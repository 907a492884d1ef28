"""Models of torchvision with every block that patch() knows."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.providers.libraries import import_module
from benchmarks.providers.zoo.net import DROP, Net
from benchmarks.providers.zoo.sizes import Sizes
from sdkernels import linear_decay

COMMON = {"num_classes": 5, "stochastic_depth_prob": DROP}


def swin_of(sizes: Sizes, block: str) -> nn.Module:
    m: Any = import_module("torchvision.models.swin_transformer")
    merging = m.PatchMergingV2 if block.endswith("V2") else m.PatchMerging
    patch, width, _ = sizes.swin
    _, window = sizes.windows
    shape = ([patch, patch], width, [2, 2], [2, 2], [window, window])
    return m.SwinTransformer(*shape, block=getattr(m, block), downsample_layer=merging, **COMMON)


def convnext(sizes: Sizes) -> nn.Module:
    m: Any = import_module("torchvision.models.convnext")
    first, second = sizes.convnext_stages
    return m.ConvNeXt(
        [m.CNBlockConfig(first, second, 2), m.CNBlockConfig(second, None, 2)], **COMMON
    )


def efficientnet(sizes: Sizes) -> nn.Module:
    m: Any = import_module("torchvision.models.efficientnet")
    first, second = sizes.efficientnet
    setting = [
        m.FusedMBConvConfig(1, 3, 1, first, first, 2),
        m.FusedMBConvConfig(2, 3, 1, first, first, 1),
        m.MBConvConfig(4, 3, 2, first, second, 3),
    ]
    return m.EfficientNet(setting, dropout=0.0, last_channel=16, **COMMON)


def maxvit(sizes: Sizes) -> nn.Module:
    m: Any = import_module("torchvision.models.maxvit")
    (stem, head, partition), (_, widths) = sizes.maxvit, sizes.maxvit_widths
    shape = ((sizes.image, sizes.image), stem, partition, list(widths), [1, 2], head)
    return m.MaxVit(*shape, **COMMON)


def resnet_of(block: str) -> nn.Module:
    m: Any = import_module("torchvision.models.resnet")
    return m.ResNet(getattr(m, block), [1, 2, 1, 1], num_classes=5)


def torchvision_nets(sizes: Sizes) -> dict[str, Net]:
    def swin(block: str) -> Net:
        return Net(partial(swin_of, sizes, block), (block,))

    def resnet(block: str, **options: Any) -> Net:
        return Net(partial(resnet_of, block), (block,), batch_norm=True, **options)

    return {
        "torchvision-swin": swin("SwinTransformerBlock"),
        "torchvision-swin-v2": swin("SwinTransformerBlockV2"),
        "torchvision-convnext": Net(partial(convnext, sizes), ("CNBlock",)),
        "torchvision-efficientnet": Net(
            partial(efficientnet, sizes), ("MBConv", "FusedMBConv"), batch_norm=True
        ),
        "torchvision-maxvit": Net(
            partial(maxvit, sizes), ("MBConv", "PartitionAttentionLayer"), batch_norm=True
        ),
        "torchvision-resnet": resnet("BasicBlock", drop_probs=linear_decay(5, DROP)),
        "torchvision-resnet-bottleneck": resnet("Bottleneck", drop_probs=DROP, memory=0.7),
    }
