"""Models of timm with every block that patch() knows."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.providers.libraries import import_module
from benchmarks.providers.zoo.net import DROP, Net
from benchmarks.providers.zoo.sizes import Sizes

COMMON = {"num_classes": 5, "drop_path_rate": DROP}


def timm_model(path: str, block: str | None = None, **options: Any) -> nn.Module:
    module, name = path.split(":")
    file = import_module(f"timm.models.{module}")
    if block:
        options["block" if name == "ResNet" else "block_fn"] = getattr(file, block)
    found: Any = getattr(file, name)
    return found(**COMMON, **options)


def maxxvit(
    sizes: Sizes, kinds: tuple[str, str] = ("M", "M"), conv: Any = None, transformer: Any = None
) -> nn.Module:
    m: Any = import_module("timm.models.maxxvit")
    (stem, head, window), (widths, _) = sizes.maxvit, sizes.maxvit_widths
    windows = {"window_size": (window, window), "grid_size": (window, window)}
    cfg = m.MaxxVitCfg(
        embed_dim=widths,
        stem_width=stem,
        depths=(1, 2),
        block_type=kinds,
        conv_cfg=m.MaxxVitConvCfg(**conv or {}),
        transformer_cfg=m.MaxxVitTransformerCfg(dim_head=head, **windows, **transformer or {}),
    )
    return m.MaxxVit(cfg, img_size=(sizes.image, sizes.image), **COMMON)


def efficientnet(width: int, stages: list[list[str]]) -> nn.Module:
    builder: Any = import_module("timm.models._efficientnet_builder")
    net: Any = import_module("timm.models.efficientnet")
    blocks = builder.decode_arch_def(stages)
    return net.EfficientNet(blocks, num_features=2 * width, stem_size=width, **COMMON)


def vit_options(sizes: Sizes) -> dict[str, Any]:
    width, heads, _ = sizes.vit
    shape = {"patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": heads}
    return {"img_size": sizes.image, **shape}


def timm_vit(sizes: Sizes, **options: Any) -> nn.Module:
    return timm_model("vision_transformer:VisionTransformer", **vit_options(sizes), **options)


def timm_nets(sizes: Sizes) -> dict[str, Net]:
    def net(path: str, *classes: str, **options: Any) -> Net:
        return Net(partial(timm_model, path, **options), classes)

    def vit(block: str = "Block", **options: Any) -> Net:
        return Net(partial(timm_vit, sizes, block=block, **options), (block,))

    def relpos(block: str, **options: Any) -> Net:
        path = "vision_transformer_relpos:VisionTransformerRelPos"
        return net(path, block, **vit_options(sizes), block=block, **options)

    def swin(path: str, **options: Any) -> Net:
        patch, width, heads = sizes.swin
        options |= {"img_size": sizes.image, "patch_size": patch, "window_size": sizes.windows[0]}
        options |= {"embed_dim": width, "depths": (2, 2), "num_heads": heads}
        return net(path, path.partition(":")[2] + "Block", **options)

    def mixed(attention: str, convolution: str = "MbConvBlock", **options: Any) -> Net:
        batch_norm, classes = convolution == "MbConvBlock", (convolution, attention)
        return Net(partial(maxxvit, sizes, **options), classes, batch_norm=batch_norm)

    def mobile(stages: list[list[str]], *classes: str) -> Net:
        return Net(partial(efficientnet, sizes.efficientnet[0], stages), classes, batch_norm=True)

    def resnet(block: str, widths: tuple[int, ...], **options: Any) -> Net:
        options |= {"layers": (1, 2, 1, 1), "channels": widths}
        make = partial(timm_model, "resnet:ResNet", block=block, **options)
        return Net(make, (block,), batch_norm=True)

    eva = partial(net, "eva:Eva", **vit_options(sizes), use_rot_pos_emb=True)
    beit = partial(net, "beit:Beit", "Block", **vit_options(sizes))
    patch, dims = sizes.convnext
    path, block = "convnext:ConvNeXt", "ConvNeXtBlock"
    convnext = partial(net, path, block, depths=(1, 2, 1, 1), dims=dims, patch_size=patch)
    width, wider = sizes.efficientnet
    uir, down, last = (f"uir_r{n}_a3_k3_s{s}_e4_c{width}" for n, s in ((3, 2), (1, 2), (1, 1)))
    mqa = f"mqa_r1_k3_h2_s1_d{width}_c{width}"
    narrow = tuple(channels // 4 for channels in sizes.resnet)
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
        "timm-eva": eva("EvaBlock", init_values=0.1),
        "timm-eva-post-norm": eva("EvaBlockPostNorm", use_post_norm=True, swiglu_mlp=True),
        "timm-eva-patch-drop": eva("EvaBlock", patch_drop_rate=0.5, qkv_fused=False),
        "timm-beit": beit(init_values=0.1, use_shared_rel_pos_bias=True),
        "timm-beit-v2": beit(use_rel_pos_bias=True),
        "timm-cait": net(
            "cait:Cait", "LayerScaleBlock", "LayerScaleBlockClassAttn", **vit_options(sizes)
        ),
        "timm-swin": swin("swin_transformer:SwinTransformer"),
        "timm-swin-v2": swin("swin_transformer_v2:SwinTransformerV2"),
        "timm-swin-v2-cr": swin("swin_transformer_v2_cr:SwinTransformerV2Cr", extra_norm_period=2),
        "timm-convnext": convnext(),
        "timm-convnext-v2": convnext(use_grn=True, conv_mlp=True, ls_init_value=None),
        "timm-maxvit": mixed("PartitionAttentionCl"),
        "timm-maxvit-2d": mixed(
            "PartitionAttention2d", transformer={"use_nchw_attn": True, "init_values": 0.1}
        ),
        "timm-maxvit-parallel": mixed("ParallelPartitionAttention", kinds=("PM", "PM")),
        "timm-coatnet": mixed(
            "TransformerBlock2d", kinds=("C", "T"), transformer={"init_values": 0.1}
        ),
        "timm-maxxvit": mixed(
            "PartitionAttentionCl",
            "ConvNeXtBlock",
            conv={"block_type": "convnext", "init_values": 0.1},
        ),
        "timm-resnet": resnet("BasicBlock", sizes.resnet),
        "timm-resnet-bottleneck": resnet("Bottleneck", narrow, block_args={"attn_layer": "se"}),
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
