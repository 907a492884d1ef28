"""Models of timm with every block that patch() knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.providers.libraries import import_module
from benchmarks.providers.zoo.net import DROP, Net, later
from benchmarks.providers.zoo.sizes import Sizes


@later
def timm_model(path: str, block: str | None = None, **options: Any) -> nn.Module:
    module, name = path.split(":")
    file = import_module(f"timm.models.{module}")
    arguments = {"num_classes": 5, "drop_path_rate": DROP, **options}
    if block:
        arguments["block" if name == "ResNet" else "block_fn"] = getattr(file, block)
    found: Any = getattr(file, name)
    return found(**arguments)


@later
def maxxvit(sizes: Sizes, **options: Any) -> nn.Module:
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


@later
def efficientnet(width: int, stages: list[list[str]]) -> nn.Module:
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


def timm_vit(sizes: Sizes, **options: Any) -> Callable[[], nn.Module]:
    path = "vision_transformer:VisionTransformer"
    return timm_model(path, img_size=sizes.image, **sizes.vit, **options)


def timm_nets(sizes: Sizes) -> dict[str, Net]:
    vit_options = {"img_size": sizes.image, **sizes.vit}
    swin_options = {"img_size": sizes.image, "window_size": sizes.window, **sizes.swin}
    convnext_options = {"depths": (1, 2, 1, 1), **sizes.convnext}
    rope = vit_options | {"use_rot_pos_emb": True}
    width, wider = sizes.efficientnet
    uir, down, last = (f"uir_r{n}_a3_k3_s{s}_e4_c{width}" for n, s in ((3, 2), (1, 2), (1, 1)))
    mqa = f"mqa_r1_k3_h2_s1_d{width}_c{width}"
    resnet_options = {"layers": (1, 2, 1, 1), "channels": sizes.resnet}
    bottleneck = resnet_options | {
        "channels": tuple(c // 4 for c in sizes.resnet),
        "block_args": {"attn_layer": "se"},
    }

    def vit(block: str = "Block", **options: Any) -> Net:
        return Net(timm_vit(sizes, block=block, **options), (block,))

    def net(path: str, *classes: str, **options: Any) -> Net:
        return Net(timm_model(path, **options), classes)

    def relpos(block: str, **options: Any) -> Net:
        path = "vision_transformer_relpos:VisionTransformerRelPos"
        return net(path, block, **vit_options, block=block, **options)

    def swin(path: str, block: str, **options: Any) -> Net:
        return net(path, block, **swin_options, **options)

    def mixed(*classes: str, batch_norm: bool = True, **options: Any) -> Net:
        return Net(maxxvit(sizes, **options), classes, batch_norm=batch_norm)

    def mobile(stages: list[list[str]], *classes: str) -> Net:
        return Net(efficientnet(width, stages), classes, batch_norm=True)

    def resnet(block: str, **options: Any) -> Net:
        make = timm_model("resnet:ResNet", block=block, **options)
        return Net(make, (block,), batch_norm=True)

    return {
        "timm-vit": vit(),
        "timm-deit3": vit(init_values=0.1, qk_norm=True),
        "timm-vit-post-norm": vit("ResPostBlock", init_values=0.5),
        "timm-vit-parallel": vit("ParallelScalingBlock", qk_norm=True),
        "timm-vit-things": vit("ParallelThingsBlock", init_values=0.1),
        "timm-relpos": relpos("RelPosBlock", init_values=0.1),
        "timm-relpos-post-norm": relpos(
            "ResPostRelPosBlock", shared_rel_pos=True, rel_pos_type="bias"
        ),
        "timm-eva": net("eva:Eva", "EvaBlock", **rope, init_values=0.1),
        "timm-eva-post-norm": net(
            "eva:Eva", "EvaBlockPostNorm", **rope, use_post_norm=True, swiglu_mlp=True
        ),
        "timm-eva-patch-drop": net(
            "eva:Eva", "EvaBlock", **rope, patch_drop_rate=0.5, qkv_fused=False
        ),
        "timm-beit": net(
            "beit:Beit", "Block", **vit_options, init_values=0.1, use_shared_rel_pos_bias=True
        ),
        "timm-beit-v2": net("beit:Beit", "Block", **vit_options, use_rel_pos_bias=True),
        "timm-cait": net("cait:Cait", "LayerScaleBlock", "LayerScaleBlockClassAttn", **vit_options),
        "timm-swin": swin("swin_transformer:SwinTransformer", "SwinTransformerBlock"),
        "timm-swin-v2": swin("swin_transformer_v2:SwinTransformerV2", "SwinTransformerV2Block"),
        "timm-swin-v2-cr": swin(
            "swin_transformer_v2_cr:SwinTransformerV2Cr",
            "SwinTransformerV2CrBlock",
            extra_norm_period=2,
        ),
        "timm-convnext": net("convnext:ConvNeXt", "ConvNeXtBlock", **convnext_options),
        "timm-convnext-v2": net(
            *("convnext:ConvNeXt", "ConvNeXtBlock"),
            **convnext_options,
            **{"use_grn": True, "conv_mlp": True, "ls_init_value": None},
        ),
        "timm-maxvit": mixed("MbConvBlock", "PartitionAttentionCl"),
        "timm-maxvit-2d": mixed(
            *("MbConvBlock", "PartitionAttention2d"),
            transformer={"use_nchw_attn": True, "init_values": 0.1},
        ),
        "timm-maxvit-parallel": mixed(
            "MbConvBlock", "ParallelPartitionAttention", kinds=("PM", "PM")
        ),
        "timm-coatnet": mixed(
            *("MbConvBlock", "TransformerBlock2d"),
            kinds=("C", "T"),
            transformer={"init_values": 0.1},
        ),
        "timm-maxxvit": mixed(
            *("ConvNeXtBlock", "PartitionAttentionCl"),
            batch_norm=False,
            conv={"block_type": "convnext", "init_values": 0.1},
        ),
        "timm-resnet": resnet("BasicBlock", **resnet_options),
        "timm-resnet-bottleneck": resnet("Bottleneck", **bottleneck),
        "timm-efficientnet": mobile([[f"ir_r4_k3_s2_e4_c{wider}_se0.25"]], "InvertedResidual"),
        "timm-efficientnet-separable": mobile(
            [[f"ds_r3_k3_s1_e1_c{width}_se0.25"]], "DepthwiseSeparableConv"
        ),
        "timm-efficientnet-edge": mobile([[f"er_r4_k3_s2_e2_c{wider}"]], "EdgeResidual"),
        "timm-efficientnet-conv": mobile([[f"cn_r3_k3_s1_c{width}_skip"]], "ConvBnAct"),
        "timm-mobilenet-v4": mobile(
            [[uir], [down, mqa, last]], "UniversalInvertedResidual", "MobileAttention"
        ),
    }
