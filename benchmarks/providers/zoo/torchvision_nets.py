"""Models of torchvision with every block that patch() knows."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.providers.libraries import import_module
from benchmarks.providers.zoo.net import DROP, Net, later
from benchmarks.providers.zoo.sizes import Sizes
from sdkernels import linear_decay


@later
def torchvision_swin(sizes: Sizes, block: str) -> nn.Module:
    m: Any = import_module("torchvision.models.swin_transformer")
    merging = m.PatchMergingV2 if block.endswith("V2") else m.PatchMerging
    patch, width, window = sizes.torchvision_swin
    return m.SwinTransformer(
        [patch, patch],
        width,
        [2, 2],
        [2, 2],
        [window, window],
        stochastic_depth_prob=DROP,
        num_classes=5,
        block=getattr(m, block),
        downsample_layer=merging,
    )


@later
def torchvision_convnext(sizes: Sizes) -> nn.Module:
    m: Any = import_module("torchvision.models.convnext")
    first, second = sizes.torchvision_convnext
    setting = [m.CNBlockConfig(first, second, 2), m.CNBlockConfig(second, None, 2)]
    return m.ConvNeXt(setting, stochastic_depth_prob=DROP, num_classes=5)


@later
def torchvision_efficientnet(sizes: Sizes) -> nn.Module:
    m: Any = import_module("torchvision.models.efficientnet")
    first, second = sizes.efficientnet
    setting = [
        m.FusedMBConvConfig(1, 3, 1, first, first, 2),
        m.FusedMBConvConfig(2, 3, 1, first, first, 1),
        m.MBConvConfig(4, 3, 2, first, second, 3),
    ]
    return m.EfficientNet(
        setting, dropout=0.0, stochastic_depth_prob=DROP, num_classes=5, last_channel=16
    )


@later
def torchvision_maxvit(sizes: Sizes) -> nn.Module:
    m: Any = import_module("torchvision.models.maxvit")
    stem, partition, widths, head = sizes.torchvision_maxvit
    image = (sizes.image, sizes.image)
    return m.MaxVit(image, stem, partition, widths, [1, 2], head, DROP, num_classes=5)


@later
def torchvision_resnet(sizes: Sizes, block: str) -> nn.Module:
    m: Any = import_module("torchvision.models.resnet")
    width = sizes.torchvision_resnet
    return m.ResNet(getattr(m, block), [1, 2, 1, 1], num_classes=5, width_per_group=width)


def torchvision_nets(sizes: Sizes) -> dict[str, Net]:
    def swin(block: str) -> Net:
        return Net(torchvision_swin(sizes, block), (block,))

    def resnet(block: str, **options: Any) -> Net:
        return Net(torchvision_resnet(sizes, block), (block,), batch_norm=True, **options)

    return {
        "torchvision-swin": swin("SwinTransformerBlock"),
        "torchvision-swin-v2": swin("SwinTransformerBlockV2"),
        "torchvision-convnext": Net(torchvision_convnext(sizes), ("CNBlock",)),
        "torchvision-efficientnet": Net(
            torchvision_efficientnet(sizes), ("MBConv", "FusedMBConv"), batch_norm=True
        ),
        "torchvision-maxvit": Net(
            torchvision_maxvit(sizes), ("MBConv", "PartitionAttentionLayer"), batch_norm=True
        ),
        "torchvision-resnet": resnet("BasicBlock", drop_probs=linear_decay(5, DROP)),
        "torchvision-resnet-bottleneck": resnet("Bottleneck", drop_probs=DROP, memory=0.7),
    }
