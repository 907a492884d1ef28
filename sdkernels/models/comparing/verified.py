# ruff: noqa: E501
"""Written forwards that were compared with their originals before a release: they run at once.

Written by ``python -m benchmarks patch-coverage --write``.
"""

__all__ = ["VERIFIED"]

# Module and name of a class -> marks of what was written for it, each with the version it is of.
VERIFIED: dict[str, dict[str, str]] = {
    "timm.models._efficientnet_blocks:ConvBnAct": {"0158f8ccd1e4": "1.0.31"},
    "timm.models._efficientnet_blocks:DepthwiseSeparableConv": {"e66aef815b3c": "1.0.31"},
    "timm.models._efficientnet_blocks:EdgeResidual": {"0ee36fa38473": "1.0.31"},
    "timm.models._efficientnet_blocks:InvertedResidual": {"360da3b7c7aa": "1.0.31"},
    "timm.models._efficientnet_blocks:MobileAttention": {"1787238c2170": "1.0.31"},
    "timm.models._efficientnet_blocks:UniversalInvertedResidual": {"911bc894d937": "1.0.31"},
    "timm.models.beit:Block": {"50af43641991": "1.0.31", "d4269b0cccbf": "1.0.31"},
    "timm.models.byobnet:BottleneckBlock": {"4d595e210f6e": "1.0.31"},
    "timm.models.cait:LayerScaleBlock": {"c06df240e3fe": "1.0.31"},
    "timm.models.cait:LayerScaleBlockClassAttn": {"284685ff44f6": "1.0.31"},
    "timm.models.convnext:ConvNeXtBlock": {"f12e02ab1fcb": "1.0.31", "dfefde79fe9b": "1.0.31"},
    "timm.models.eva:EvaBlock": {"691bce8a6474": "1.0.31", "8d815639e0f7": "1.0.31"},
    "timm.models.eva:EvaBlockPostNorm": {"c1d75224a63d": "1.0.31"},
    "timm.models.maxxvit:ConvNeXtBlock": {"50a91fad9cd7": "1.0.31"},
    "timm.models.maxxvit:MbConvBlock": {"a46c658ef7bb": "1.0.31"},
    "timm.models.maxxvit:ParallelPartitionAttention": {"270a04fc4e1f": "1.0.31"},
    "timm.models.maxxvit:PartitionAttention2d": {"270a04fc4e1f": "1.0.31"},
    "timm.models.maxxvit:PartitionAttentionCl": {"f4fe45bb7240": "1.0.31"},
    "timm.models.maxxvit:TransformerBlock2d": {"2050d024ae40": "1.0.31", "f62c54d35496": "1.0.31"},
    "timm.models.nfnet:NormFreeBlock": {
        "3c2235662189": "1.0.31",
        "e45f37e9fa54": "1.0.31",
        "824a2efe002a": "1.0.31",
        "83d802380e94": "1.0.31",
    },
    "timm.models.resnet:BasicBlock": {"35515feb2336": "1.0.31", "9f7db27cc6aa": "1.0.31"},
    "timm.models.resnet:Bottleneck": {
        "189cac1b9aa4": "1.0.31",
        "bff6171d3bbe": "1.0.31",
        "1a73f6ddc1eb": "1.0.31",
        "8f981f47df0c": "1.0.31",
    },
    "timm.models.swin_transformer:SwinTransformerBlock": {"b08e1cc56b44": "1.0.31"},
    "timm.models.swin_transformer_v2:SwinTransformerV2Block": {"97ea26dd83fc": "1.0.31"},
    "timm.models.swin_transformer_v2_cr:SwinTransformerV2CrBlock": {"de1095d375c1": "1.0.31"},
    "timm.models.vision_transformer:Block": {"b98dc41eb5ae": "1.0.31"},
    "timm.models.vision_transformer:ParallelScalingBlock": {"cc00dfb2404a": "1.0.31"},
    "timm.models.vision_transformer:ResPostBlock": {"a5a7d0501973": "1.0.31"},
    "timm.models.vision_transformer_relpos:RelPosBlock": {"86c059cd7192": "1.0.31"},
    "timm.models.vision_transformer_relpos:ResPostRelPosBlock": {"3a604a69e963": "1.0.31"},
    "torchvision.models.convnext:CNBlock": {"0d198d6431e2": "0.28.0"},
    "torchvision.models.efficientnet:FusedMBConv": {"aeb3d42a7a55": "0.28.0"},
    "torchvision.models.efficientnet:MBConv": {"aeb3d42a7a55": "0.28.0"},
    "torchvision.models.maxvit:MBConv": {"3f278631390e": "0.28.0"},
    "torchvision.models.maxvit:PartitionAttentionLayer": {"c90760264771": "0.28.0"},
    "torchvision.models.swin_transformer:SwinTransformerBlock": {"6e29e9026423": "0.28.0"},
    "torchvision.models.swin_transformer:SwinTransformerBlockV2": {"9404b4983644": "0.28.0"},
    "transformers.models.beit.modeling_beit:BeitLayer": {"a8651dbee30c": "5.24.0"},
    "transformers.models.convnext.modeling_convnext:ConvNextLayer": {"d1976ca26a44": "5.24.0"},
    "transformers.models.convnextv2.modeling_convnextv2:ConvNextV2Layer": {
        "a2abdcae3261": "5.24.0"
    },
    "transformers.models.data2vec.modeling_data2vec_vision:Data2VecVisionLayer": {
        "55d9a935f03e": "5.24.0"
    },
    "transformers.models.dinov2.modeling_dinov2:Dinov2Layer": {"6f87203c4cdc": "5.24.0"},
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers:Dinov2WithRegistersLayer": {
        "6f87203c4cdc": "5.24.0"
    },
    "transformers.models.dinov3_convnext.modeling_dinov3_convnext:DINOv3ConvNextLayer": {
        "72172694118e": "5.24.0"
    },
    "transformers.models.dinov3_vit.modeling_dinov3_vit:DINOv3ViTLayer": {"f15760887a95": "5.24.0"},
    "transformers.models.donut.modeling_donut_swin:DonutSwinLayer": {"ebbaf9c5c56a": "5.24.0"},
    "transformers.models.swin.modeling_swin:SwinLayer": {"1b627d0317eb": "5.24.0"},
    "transformers.models.swinv2.modeling_swinv2:Swinv2Layer": {
        "92c94d5b5655": "5.24.0",
        "b8f964656e98": "5.24.0",
    },
}
