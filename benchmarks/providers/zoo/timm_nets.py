"""Models of timm with every block that patch() knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.providers.libraries import import_module
from benchmarks.providers.zoo.net import DROP, Net
from benchmarks.providers.zoo.sizes import Sizes


def timm_model(path: str, block: str | None = None, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module, name = path.split(":")
        file = import_module(f"timm.models.{module}")
        arguments = {"num_classes": 5, "drop_path_rate": DROP, **options}
        if block:
            arguments["block" if name == "ResNet" else "block_fn"] = getattr(file, block)
        found: Any = getattr(file, name)
        return found(**arguments)

    return make


def maxxvit(sizes: Sizes, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        m: Any = import_module("timm.models.maxxvit")
        kinds = options.get("kinds", ("M", "M"))
        window = (sizes.maxxvit_window, sizes.maxxvit_window)
        transformer = m.MaxxVitTransformerCfg(
            dim_head=sizes.maxxvit_head,
            window_size=window,
            grid_size=window,
            **options.get("transformer", {}),
        )
        cfg = m.MaxxVitCfg(
            **sizes.maxxvit,
            depths=(1, 2),
            block_type=kinds,
            conv_cfg=m.MaxxVitConvCfg(**options.get("conv", {})),
            transformer_cfg=transformer,
        )
        image = (sizes.image, sizes.image)
        return m.MaxxVit(cfg, img_size=image, num_classes=5, drop_path_rate=DROP)

    return make


def efficientnet(width: int, stages: list[list[str]]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import_module("timm")
        builder: Any = import_module("timm.models._efficientnet_builder")
        net: Any = import_module("timm.models.efficientnet")
        return net.EfficientNet(
            builder.decode_arch_def(stages),
            num_classes=5,
            num_features=2 * width,
            stem_size=width,
            drop_path_rate=DROP,
        )

    return make


def timm_vit(sizes: Sizes, **options: Any) -> Callable[[], nn.Module]:
    path = "vision_transformer:VisionTransformer"
    return timm_model(path, img_size=sizes.image, **sizes.vit, **options)


def timm_nets(sizes: Sizes) -> dict[str, Net]:
    width, wider = sizes.efficientnet
    relpos = "vision_transformer_relpos:VisionTransformerRelPos"
    vit_options = {"img_size": sizes.image, **sizes.vit}
    swin_options = {"img_size": sizes.image, "window_size": sizes.window, **sizes.swin}
    uir, down, last = (f"uir_r{n}_a3_k3_s{s}_e4_c{width}" for n, s in ((3, 2), (1, 2), (1, 1)))
    mqa = f"mqa_r1_k3_h2_s1_d{width}_c{width}"
    convnext_options = {"depths": (1, 2, 1, 1), **sizes.convnext}
    return {
        "timm-vit": Net(timm_vit(sizes), ("Block",)),
        "timm-deit3": Net(timm_vit(sizes, init_values=0.1, qk_norm=True), ("Block",)),
        "timm-vit-post-norm": Net(
            timm_vit(sizes, block="ResPostBlock", init_values=0.5), ("ResPostBlock",)
        ),
        "timm-vit-parallel": Net(
            timm_vit(sizes, block="ParallelScalingBlock", qk_norm=True), ("ParallelScalingBlock",)
        ),
        "timm-vit-things": Net(
            timm_vit(sizes, block="ParallelThingsBlock", init_values=0.1), ("ParallelThingsBlock",)
        ),
        "timm-relpos": Net(
            timm_model(relpos, **vit_options, init_values=0.1),
            ("RelPosBlock",),
        ),
        "timm-relpos-post-norm": Net(
            timm_model(
                relpos,
                **vit_options,
                shared_rel_pos=True,
                rel_pos_type="bias",
                block="ResPostRelPosBlock",
            ),
            ("ResPostRelPosBlock",),
        ),
        "timm-eva": Net(
            timm_model("eva:Eva", **vit_options, use_rot_pos_emb=True, init_values=0.1),
            ("EvaBlock",),
        ),
        "timm-eva-post-norm": Net(
            timm_model(
                "eva:Eva", **vit_options, use_rot_pos_emb=True, use_post_norm=True, swiglu_mlp=True
            ),
            ("EvaBlockPostNorm",),
        ),
        "timm-eva-patch-drop": Net(
            timm_model(
                "eva:Eva", **vit_options, use_rot_pos_emb=True, patch_drop_rate=0.5, qkv_fused=False
            ),
            ("EvaBlock",),
        ),
        "timm-beit": Net(
            timm_model("beit:Beit", **vit_options, init_values=0.1, use_shared_rel_pos_bias=True),
            ("Block",),
        ),
        "timm-beit-v2": Net(
            timm_model("beit:Beit", **vit_options, use_rel_pos_bias=True), ("Block",)
        ),
        "timm-cait": Net(
            timm_model("cait:Cait", **vit_options), ("LayerScaleBlock", "LayerScaleBlockClassAttn")
        ),
        "timm-swin": Net(
            timm_model("swin_transformer:SwinTransformer", **swin_options),
            ("SwinTransformerBlock",),
        ),
        "timm-swin-v2": Net(
            timm_model("swin_transformer_v2:SwinTransformerV2", **swin_options),
            ("SwinTransformerV2Block",),
        ),
        "timm-swin-v2-cr": Net(
            timm_model(
                "swin_transformer_v2_cr:SwinTransformerV2Cr",
                **swin_options,
                extra_norm_period=2,
            ),
            ("SwinTransformerV2CrBlock",),
        ),
        "timm-convnext": Net(
            timm_model("convnext:ConvNeXt", **convnext_options),
            ("ConvNeXtBlock",),
        ),
        "timm-convnext-v2": Net(
            timm_model(
                "convnext:ConvNeXt",
                **convnext_options,
                use_grn=True,
                conv_mlp=True,
                ls_init_value=None,
            ),
            ("ConvNeXtBlock",),
        ),
        "timm-maxvit": Net(
            maxxvit(sizes), ("MbConvBlock", "PartitionAttentionCl"), batch_norm=True
        ),
        "timm-maxvit-2d": Net(
            maxxvit(sizes, transformer={"use_nchw_attn": True, "init_values": 0.1}),
            ("MbConvBlock", "PartitionAttention2d"),
            batch_norm=True,
        ),
        "timm-maxvit-parallel": Net(
            maxxvit(sizes, kinds=("PM", "PM")),
            ("MbConvBlock", "ParallelPartitionAttention"),
            batch_norm=True,
        ),
        "timm-coatnet": Net(
            maxxvit(sizes, kinds=("C", "T"), transformer={"init_values": 0.1}),
            ("MbConvBlock", "TransformerBlock2d"),
            batch_norm=True,
        ),
        "timm-maxxvit": Net(
            maxxvit(sizes, conv={"block_type": "convnext", "init_values": 0.1}),
            ("ConvNeXtBlock", "PartitionAttentionCl"),
        ),
        "timm-resnet": Net(
            timm_model(
                "resnet:ResNet",
                block="BasicBlock",
                layers=(1, 2, 1, 1),
                channels=sizes.resnet,
            ),
            ("BasicBlock",),
            batch_norm=True,
        ),
        "timm-resnet-bottleneck": Net(
            timm_model(
                "resnet:ResNet",
                block="Bottleneck",
                layers=(1, 2, 1, 1),
                channels=tuple(c // 4 for c in sizes.resnet),
                block_args={"attn_layer": "se"},
            ),
            ("Bottleneck",),
            batch_norm=True,
        ),
        "timm-efficientnet": Net(
            efficientnet(width, [[f"ir_r4_k3_s2_e4_c{wider}_se0.25"]]),
            ("InvertedResidual",),
            batch_norm=True,
        ),
        "timm-efficientnet-separable": Net(
            efficientnet(width, [[f"ds_r3_k3_s1_e1_c{width}_se0.25"]]),
            ("DepthwiseSeparableConv",),
            batch_norm=True,
        ),
        "timm-efficientnet-edge": Net(
            efficientnet(width, [[f"er_r4_k3_s2_e2_c{wider}"]]),
            ("EdgeResidual",),
            batch_norm=True,
        ),
        "timm-efficientnet-conv": Net(
            efficientnet(width, [[f"cn_r3_k3_s1_c{width}_skip"]]),
            ("ConvBnAct",),
            batch_norm=True,
        ),
        "timm-mobilenet-v4": Net(
            efficientnet(width, [[uir], [down, mqa, last]]),
            ("UniversalInvertedResidual", "MobileAttention"),
            batch_norm=True,
        ),
    }
