"""Models of Hugging Face transformers with every layer that patch() knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.providers.libraries import import_module
from benchmarks.providers.zoo.net import DROP, Net
from benchmarks.providers.zoo.sizes import Sizes


def hugging_face(model: str, config: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = f"transformers.models.{model}"
        config_class: Any = getattr(import_module(module), config)
        return getattr(import_module(module), name)(config_class(**options))

    return make


def transformers_nets(sizes: Sizes) -> dict[str, Net]:
    vit = {
        "image_size": sizes.image,
        "num_hidden_layers": 2,
        "drop_path_rate": DROP,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **sizes.hugging_face_vit,
    }
    swin = {
        "image_size": sizes.image,
        "depths": [2, 2],
        "drop_path_rate": DROP,
        **sizes.hugging_face_swin,
    }
    stages = {
        "depths": [2, 2],
        "drop_path_rate": DROP,
        "layer_scale_init_value": 0.5,
        **sizes.hugging_face_stages,
    }
    convnext = {"num_stages": 2, **stages}
    return {
        "transformers-dinov2": Net(
            hugging_face("dinov2", "Dinov2Config", "Dinov2Model", **vit, layerscale_value=0.5),
            ("Dinov2Layer",),
        ),
        "transformers-dinov2-registers": Net(
            hugging_face(
                "dinov2_with_registers",
                "Dinov2WithRegistersConfig",
                "Dinov2WithRegistersModel",
                **vit,
                use_swiglu_ffn=True,
            ),
            ("Dinov2WithRegistersLayer",),
        ),
        "transformers-dinov3": Net(
            hugging_face("dinov3_vit", "DINOv3ViTConfig", "DINOv3ViTModel", **vit),
            ("DINOv3ViTLayer",),
        ),
        "transformers-beit": Net(
            hugging_face("beit", "BeitConfig", "BeitModel", **vit, use_relative_position_bias=True),
            ("BeitLayer",),
        ),
        "transformers-data2vec": Net(
            hugging_face(
                "data2vec",
                "Data2VecVisionConfig",
                "Data2VecVisionModel",
                **vit,
                use_shared_relative_position_bias=True,
            ),
            ("Data2VecVisionLayer",),
        ),
        "transformers-swin": Net(
            hugging_face("swin", "SwinConfig", "SwinModel", **swin), ("SwinLayer",), memory=0.7
        ),
        "transformers-donut-swin": Net(
            hugging_face("donut", "DonutSwinConfig", "DonutSwinModel", **swin),
            ("DonutSwinLayer",),
            memory=0.7,
        ),
        "transformers-swin-v2": Net(
            hugging_face("swinv2", "Swinv2Config", "Swinv2Model", **swin), ("Swinv2Layer",)
        ),
        "transformers-convnext": Net(
            hugging_face("convnext", "ConvNextConfig", "ConvNextModel", **convnext),
            ("ConvNextLayer",),
        ),
        "transformers-convnext-v2": Net(
            hugging_face("convnextv2", "ConvNextV2Config", "ConvNextV2Model", **convnext),
            ("ConvNextV2Layer",),
        ),
        "transformers-dinov3-convnext": Net(
            hugging_face(
                "dinov3_convnext", "DINOv3ConvNextConfig", "DINOv3ConvNextModel", **stages
            ),
            ("DINOv3ConvNextLayer",),
        ),
    }
