"""Models of Hugging Face transformers with every layer that patch() knows."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.providers.libraries import import_module
from benchmarks.providers.zoo.net import DROP, Net
from benchmarks.providers.zoo.sizes import Sizes


def hugging_face(module: str, prefix: str, **options: Any) -> nn.Module:
    m: Any = import_module(f"transformers.models.{module}")
    return getattr(m, f"{prefix}Model")(getattr(m, f"{prefix}Config")(**options))


def transformers_nets(sizes: Sizes) -> dict[str, Net]:
    width, heads, inside = sizes.vit
    vit = {"image_size": sizes.image, "patch_size": 8, "num_hidden_layers": 2}
    vit |= {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": inside}
    vit |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    patch, width, heads = sizes.swin
    swin = {"image_size": sizes.image, "patch_size": patch, "window_size": sizes.windows[1]}
    swin |= {"embed_dim": width, "depths": [2, 2], "num_heads": list(heads)}
    stages = {"depths": [2, 2], "hidden_sizes": list(sizes.convnext_stages)}
    stages |= {"layer_scale_init_value": 0.5}

    def net(module: str, prefix: str, memory: float = Net.memory, **options: Any) -> Net:
        make = partial(hugging_face, module, prefix, drop_path_rate=DROP, **options)
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
        "transformers-convnext": net("convnext", "ConvNext", **stages, num_stages=2),
        "transformers-convnext-v2": net("convnextv2", "ConvNextV2", **stages, num_stages=2),
        "transformers-dinov3-convnext": net("dinov3_convnext", "DINOv3ConvNext", **stages),
    }
