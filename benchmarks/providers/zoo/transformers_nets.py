"""Models of Hugging Face transformers with every layer that patch() knows."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.providers.libraries import import_module
from benchmarks.providers.zoo.net import DROP, Net, later
from benchmarks.providers.zoo.sizes import Sizes


@later
def hugging_face(model: str, config: str, name: str, **options: Any) -> nn.Module:
    module = f"transformers.models.{model}"
    config_class: Any = getattr(import_module(module), config)
    return getattr(import_module(module), name)(config_class(**options))


def transformers_nets(sizes: Sizes) -> dict[str, Net]:
    common = {"image_size": sizes.image, "drop_path_rate": DROP}
    vit = {
        **common,
        "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **sizes.hugging_face_vit,
    }
    swin = {**common, "depths": [2, 2], **sizes.hugging_face_swin}
    stages = {
        "depths": [2, 2],
        "drop_path_rate": DROP,
        "layer_scale_init_value": 0.5,
        **sizes.hugging_face_stages,
    }
    convnext = {"num_stages": 2, **stages}

    def net(module: str, prefix: str, memory: float = Net.memory, **options: Any) -> Net:
        make = hugging_face(module, f"{prefix}Config", f"{prefix}Model", **options)
        return Net(make, (f"{prefix}Layer",), memory=memory)

    return {
        "transformers-dinov2": net("dinov2", "Dinov2", **vit, layerscale_value=0.5),
        "transformers-dinov2-registers": net(
            "dinov2_with_registers", "Dinov2WithRegisters", **vit, use_swiglu_ffn=True
        ),
        "transformers-dinov3": net("dinov3_vit", "DINOv3ViT", **vit),
        "transformers-beit": net("beit", "Beit", **vit, use_relative_position_bias=True),
        "transformers-data2vec": net(
            "data2vec", "Data2VecVision", **vit, use_shared_relative_position_bias=True
        ),
        "transformers-swin": net("swin", "Swin", **swin, memory=0.7),
        "transformers-donut-swin": net("donut", "DonutSwin", **swin, memory=0.7),
        "transformers-swin-v2": net("swinv2", "Swinv2", **swin),
        "transformers-convnext": net("convnext", "ConvNext", **convnext),
        "transformers-convnext-v2": net("convnextv2", "ConvNextV2", **convnext),
        "transformers-dinov3-convnext": net("dinov3_convnext", "DINOv3ConvNext", **stages),
    }
