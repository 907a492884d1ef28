"""Tiny models of timm, torchvision and transformers: together they have every supported block."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from libraries import load
from torch import Tensor, nn

from sdkernels import linear_decay

DROP = 0.5


@dataclass(frozen=True)
class Net:
    """How to make a model, what to feed it, and which classes of blocks it must have."""

    make: Callable[[], nn.Module]
    classes: tuple[str, ...]
    input: tuple[int, ...] = (3, 32, 32)
    batch_norm: bool = False
    drop_probs: Any = None
    # What a quarter of the rows may cost; blocks have shortcuts, and Swin in transformers an MLP
    # without drop path.
    memory: float = 0.55

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.make()
        randomize(model)
        return model.double()

    def inputs(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.input, dtype=torch.float64)


def randomize(model: nn.Module) -> None:
    """Parameters that start as zeros or tiny factors (layer scale, biases) would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 or parameter.abs().mean() < 1e-3:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)


def output_of(result: Any) -> Tensor:
    """The tensor to train on, of whatever a model returns."""
    return result if isinstance(result, Tensor) else result[0]


def timm_model(path: str, block: str | None = None, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module, name = path.split(":")
        file = load(f"timm.models.{module}")
        arguments = {"num_classes": 5, "drop_path_rate": DROP, **options}
        if block:
            arguments["block" if name == "ResNet" else "block_fn"] = getattr(file, block)
        found: Any = getattr(file, name)
        return found(**arguments)

    return make


TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def timm_vit(**options: Any) -> Callable[[], nn.Module]:
    return timm_model("vision_transformer:VisionTransformer", **TIMM_VIT, **options)


SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}


def maxxvit(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        m: Any = load("timm.models.maxxvit")
        kinds = options.get("kinds", ("M", "M"))
        transformer = m.MaxxVitTransformerCfg(
            dim_head=8, window_size=(2, 2), grid_size=(2, 2), **options.get("transformer", {})
        )
        cfg = m.MaxxVitCfg(
            embed_dim=(16, 32),
            depths=(1, 2),
            block_type=kinds,
            stem_width=8,
            conv_cfg=m.MaxxVitConvCfg(**options.get("conv", {})),
            transformer_cfg=transformer,
        )
        return m.MaxxVit(cfg, img_size=(32, 32), num_classes=5, drop_path_rate=DROP)

    return make


def efficientnet(stages: list[list[str]]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        load("timm")
        builder: Any = load("timm.models._efficientnet_builder")
        net: Any = load("timm.models.efficientnet")
        return net.EfficientNet(
            builder.decode_arch_def(stages),
            num_classes=5,
            num_features=16,
            stem_size=8,
            drop_path_rate=DROP,
        )

    return make


def torchvision_model(module: str, name: str, *args: Any, **options: Any) -> Callable[[], Any]:
    def make() -> nn.Module:
        found: Any = getattr(load(f"torchvision.models.{module}"), name)
        return found(*args, **{"num_classes": 5, "stochastic_depth_prob": DROP, **options})

    return make


def torchvision_swin(block: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        m: Any = load("torchvision.models.swin_transformer")
        merging = m.PatchMergingV2 if block.endswith("V2") else m.PatchMerging
        return m.SwinTransformer(
            [2, 2],
            16,
            [2, 2],
            [2, 2],
            [3, 3],
            stochastic_depth_prob=DROP,
            num_classes=5,
            block=getattr(m, block),
            downsample_layer=merging,
        )

    return make


def torchvision_convnext() -> nn.Module:
    m: Any = load("torchvision.models.convnext")
    setting = [m.CNBlockConfig(16, 32, 2), m.CNBlockConfig(32, None, 2)]
    return m.ConvNeXt(setting, stochastic_depth_prob=DROP, num_classes=5)


def torchvision_efficientnet() -> nn.Module:
    m: Any = load("torchvision.models.efficientnet")
    setting = [
        m.FusedMBConvConfig(1, 3, 1, 8, 8, 2),
        m.FusedMBConvConfig(2, 3, 1, 8, 8, 1),
        m.MBConvConfig(2, 3, 2, 8, 16, 2),
    ]
    return m.EfficientNet(
        setting, dropout=0.0, stochastic_depth_prob=DROP, num_classes=5, last_channel=16
    )


def torchvision_maxvit() -> nn.Module:
    m: Any = load("torchvision.models.maxvit")
    return m.MaxVit((32, 32), 8, 2, [8, 16], [1, 2], 8, DROP, num_classes=5)


def torchvision_resnet(block: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        m: Any = load("torchvision.models.resnet")
        return m.ResNet(getattr(m, block), [1, 2, 1, 1], num_classes=5)

    return make


def hugging_face(model: str, config: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = f"transformers.models.{model}"
        config_class: Any = getattr(load(module), config)
        return getattr(load(module), name)(config_class(**options))

    return make


HF_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "drop_path_rate": DROP,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
HF_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 3,
    "drop_path_rate": DROP,
}
HF_STAGES = {
    "hidden_sizes": [16, 32],
    "depths": [2, 2],
    "drop_path_rate": DROP,
    "layer_scale_init_value": 0.5,
}
HF_CONVNEXT = {"num_stages": 2, **HF_STAGES}

NETS: dict[str, Net] = {
    "timm-vit": Net(timm_vit(), ("Block",)),
    "timm-deit3": Net(timm_vit(init_values=0.1, qk_norm=True), ("Block",)),
    "timm-vit-post-norm": Net(timm_vit(block="ResPostBlock", init_values=0.5), ("ResPostBlock",)),
    "timm-vit-parallel": Net(
        timm_vit(block="ParallelScalingBlock", qk_norm=True), ("ParallelScalingBlock",)
    ),
    "timm-vit-things": Net(
        timm_vit(block="ParallelThingsBlock", init_values=0.1), ("ParallelThingsBlock",)
    ),
    "timm-relpos": Net(
        timm_model(
            "vision_transformer_relpos:VisionTransformerRelPos", **TIMM_VIT, init_values=0.1
        ),
        ("RelPosBlock",),
    ),
    "timm-relpos-post-norm": Net(
        timm_model(
            "vision_transformer_relpos:VisionTransformerRelPos",
            **TIMM_VIT,
            shared_rel_pos=True,
            rel_pos_type="bias",
            block="ResPostRelPosBlock",
        ),
        ("ResPostRelPosBlock",),
    ),
    "timm-eva": Net(
        timm_model("eva:Eva", **TIMM_VIT, use_rot_pos_emb=True, init_values=0.1), ("EvaBlock",)
    ),
    "timm-eva-post-norm": Net(
        timm_model(
            "eva:Eva", **TIMM_VIT, use_rot_pos_emb=True, use_post_norm=True, swiglu_mlp=True
        ),
        ("EvaBlockPostNorm",),
    ),
    "timm-eva-patch-drop": Net(
        timm_model(
            "eva:Eva", **TIMM_VIT, use_rot_pos_emb=True, patch_drop_rate=0.5, qkv_fused=False
        ),
        ("EvaBlock",),
    ),
    "timm-beit": Net(
        timm_model("beit:Beit", **TIMM_VIT, init_values=0.1, use_shared_rel_pos_bias=True),
        ("Block",),
    ),
    "timm-beit-v2": Net(timm_model("beit:Beit", **TIMM_VIT, use_rel_pos_bias=True), ("Block",)),
    "timm-cait": Net(
        timm_model("cait:Cait", **TIMM_VIT), ("LayerScaleBlock", "LayerScaleBlockClassAttn")
    ),
    "timm-swin": Net(
        timm_model("swin_transformer:SwinTransformer", **SWIN, window_size=4),
        ("SwinTransformerBlock",),
    ),
    "timm-swin-v2": Net(
        timm_model("swin_transformer_v2:SwinTransformerV2", **SWIN, window_size=4),
        ("SwinTransformerV2Block",),
    ),
    "timm-swin-v2-cr": Net(
        timm_model(
            "swin_transformer_v2_cr:SwinTransformerV2Cr",
            **SWIN,
            window_size=4,
            extra_norm_period=2,
        ),
        ("SwinTransformerV2CrBlock",),
    ),
    "timm-convnext": Net(
        timm_model("convnext:ConvNeXt", depths=(1, 2, 1, 1), dims=(8, 8, 16, 16), patch_size=2),
        ("ConvNeXtBlock",),
    ),
    "timm-convnext-v2": Net(
        timm_model(
            "convnext:ConvNeXt",
            depths=(1, 2, 1, 1),
            dims=(8, 8, 16, 16),
            patch_size=2,
            use_grn=True,
            conv_mlp=True,
            ls_init_value=None,
        ),
        ("ConvNeXtBlock",),
    ),
    "timm-maxvit": Net(maxxvit(), ("MbConvBlock", "PartitionAttentionCl"), batch_norm=True),
    "timm-maxvit-2d": Net(
        maxxvit(transformer={"use_nchw_attn": True, "init_values": 0.1}),
        ("MbConvBlock", "PartitionAttention2d"),
        batch_norm=True,
    ),
    "timm-maxvit-parallel": Net(
        maxxvit(kinds=("PM", "PM")), ("MbConvBlock", "ParallelPartitionAttention"), batch_norm=True
    ),
    "timm-coatnet": Net(
        maxxvit(kinds=("C", "T"), transformer={"init_values": 0.1}),
        ("MbConvBlock", "TransformerBlock2d"),
        batch_norm=True,
    ),
    "timm-maxxvit": Net(
        maxxvit(conv={"block_type": "convnext", "init_values": 0.1}),
        ("ConvNeXtBlock", "PartitionAttentionCl"),
    ),
    "timm-resnet": Net(
        timm_model(
            "resnet:ResNet",
            block="BasicBlock",
            layers=(1, 2, 1, 1),
            channels=(64, 64, 64, 64),
        ),
        ("BasicBlock",),
        batch_norm=True,
    ),
    "timm-resnet-bottleneck": Net(
        timm_model(
            "resnet:ResNet",
            block="Bottleneck",
            layers=(1, 2, 1, 1),
            channels=(16, 16, 16, 16),
            block_args={"attn_layer": "se"},
        ),
        ("Bottleneck",),
        batch_norm=True,
    ),
    "timm-efficientnet": Net(
        efficientnet(
            [
                ["ds_r2_k3_s1_e1_c8_se0.25"],
                ["ir_r2_k3_s2_e2_c16_se0.25"],
                ["er_r2_k3_s1_e2_c16"],
                ["cn_r2_k3_s1_c16_skip"],
            ]
        ),
        ("DepthwiseSeparableConv", "InvertedResidual", "EdgeResidual", "ConvBnAct"),
        batch_norm=True,
    ),
    "timm-mobilenet-v4": Net(
        efficientnet([["uir_r1_a3_k3_s1_e2_c8", "mqa_r1_k3_h2_s1_d8_c8", "uir_r1_a3_k3_s1_e2_c8"]]),
        ("UniversalInvertedResidual", "MobileAttention"),
        batch_norm=True,
    ),
    "torchvision-swin": Net(torchvision_swin("SwinTransformerBlock"), ("SwinTransformerBlock",)),
    "torchvision-swin-v2": Net(
        torchvision_swin("SwinTransformerBlockV2"), ("SwinTransformerBlockV2",)
    ),
    "torchvision-convnext": Net(torchvision_convnext, ("CNBlock",)),
    "torchvision-efficientnet": Net(
        torchvision_efficientnet, ("MBConv", "FusedMBConv"), batch_norm=True
    ),
    "torchvision-maxvit": Net(
        torchvision_maxvit, ("MBConv", "PartitionAttentionLayer"), batch_norm=True
    ),
    "torchvision-resnet": Net(
        torchvision_resnet("BasicBlock"),
        ("BasicBlock",),
        batch_norm=True,
        drop_probs=linear_decay(5, DROP),
    ),
    "torchvision-resnet-bottleneck": Net(
        torchvision_resnet("Bottleneck"),
        ("Bottleneck",),
        batch_norm=True,
        drop_probs=DROP,
        memory=0.7,
    ),
    "transformers-dinov2": Net(
        hugging_face("dinov2", "Dinov2Config", "Dinov2Model", **HF_VIT, layerscale_value=0.5),
        ("Dinov2Layer",),
    ),
    "transformers-dinov2-registers": Net(
        hugging_face(
            "dinov2_with_registers",
            "Dinov2WithRegistersConfig",
            "Dinov2WithRegistersModel",
            **HF_VIT,
            use_swiglu_ffn=True,
        ),
        ("Dinov2WithRegistersLayer",),
    ),
    "transformers-dinov3": Net(
        hugging_face("dinov3_vit", "DINOv3ViTConfig", "DINOv3ViTModel", **HF_VIT),
        ("DINOv3ViTLayer",),
    ),
    "transformers-beit": Net(
        hugging_face("beit", "BeitConfig", "BeitModel", **HF_VIT, use_relative_position_bias=True),
        ("BeitLayer",),
    ),
    "transformers-data2vec": Net(
        hugging_face(
            "data2vec",
            "Data2VecVisionConfig",
            "Data2VecVisionModel",
            **HF_VIT,
            use_shared_relative_position_bias=True,
        ),
        ("Data2VecVisionLayer",),
    ),
    "transformers-swin": Net(
        hugging_face("swin", "SwinConfig", "SwinModel", **HF_SWIN), ("SwinLayer",), memory=0.7
    ),
    "transformers-donut-swin": Net(
        hugging_face("donut", "DonutSwinConfig", "DonutSwinModel", **HF_SWIN),
        ("DonutSwinLayer",),
        memory=0.7,
    ),
    "transformers-swin-v2": Net(
        hugging_face("swinv2", "Swinv2Config", "Swinv2Model", **HF_SWIN), ("Swinv2Layer",)
    ),
    "transformers-convnext": Net(
        hugging_face("convnext", "ConvNextConfig", "ConvNextModel", **HF_CONVNEXT),
        ("ConvNextLayer",),
    ),
    "transformers-convnext-v2": Net(
        hugging_face("convnextv2", "ConvNextV2Config", "ConvNextV2Model", **HF_CONVNEXT),
        ("ConvNextV2Layer",),
    ),
    "transformers-dinov3-convnext": Net(
        hugging_face("dinov3_convnext", "DINOv3ConvNextConfig", "DINOv3ConvNextModel", **HF_STAGES),
        ("DINOv3ConvNextLayer",),
    ),
}
