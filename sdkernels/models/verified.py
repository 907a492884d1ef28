# ruff: noqa: E501
"""Classes whose rewriting was compared with the original by the tests: they run at once.

Written by ``python -m benchmarks.patch_coverage --write``.
"""

__all__ = ["VERIFIED"]

# Module and name of a class -> fingerprints of its forward, each with the version that has it.
VERIFIED: dict[str, dict[str, str]] = {
    "timm.models._efficientnet_blocks:ConvBnAct": {"d6259b1da9ea": "1.0.31"},
    "timm.models._efficientnet_blocks:DepthwiseSeparableConv": {"ac8cab2e52d0": "1.0.31"},
    "timm.models._efficientnet_blocks:EdgeResidual": {"ce1679761305": "1.0.31"},
    "timm.models._efficientnet_blocks:InvertedResidual": {"25a74073d203": "1.0.31"},
    "timm.models._efficientnet_blocks:MobileAttention": {"ddf1d62f039c": "1.0.31"},
    "timm.models._efficientnet_blocks:UniversalInvertedResidual": {"4977ce26c143": "1.0.31"},
    "timm.models.beit:Block": {"0c7be284298e": "1.0.31"},
    "timm.models.cait:LayerScaleBlock": {"b5a910ce278e": "1.0.31"},
    "timm.models.cait:LayerScaleBlockClassAttn": {"911b3fbdbe7a": "1.0.31"},
    "timm.models.convnext:ConvNeXtBlock": {"29752f5d34d8": "1.0.31"},
    "timm.models.eva:EvaBlock": {"4d56d864d16f": "1.0.31"},
    "timm.models.eva:EvaBlockPostNorm": {"f0830bf3b86f": "1.0.31"},
    "timm.models.maxxvit:ConvNeXtBlock": {"ffc7701d88e6": "1.0.31"},
    "timm.models.maxxvit:MbConvBlock": {"e92a6f53d897": "1.0.31"},
    "timm.models.maxxvit:ParallelPartitionAttention": {"34a730ad445b": "1.0.31"},
    "timm.models.maxxvit:PartitionAttention2d": {"34a730ad445b": "1.0.31"},
    "timm.models.maxxvit:PartitionAttentionCl": {"34a730ad445b": "1.0.31"},
    "timm.models.maxxvit:TransformerBlock2d": {"0efc7d6fb44f": "1.0.31"},
    "timm.models.resnet:BasicBlock": {"690265f6684b": "1.0.31"},
    "timm.models.resnet:Bottleneck": {"39fcc2a3b39e": "1.0.31"},
    "timm.models.swin_transformer:SwinTransformerBlock": {"9bfdecb8db80": "1.0.31"},
    "timm.models.swin_transformer_v2:SwinTransformerV2Block": {"9303c08dc32f": "1.0.31"},
    "timm.models.swin_transformer_v2_cr:SwinTransformerV2CrBlock": {"1af75b5bda2f": "1.0.31"},
    "timm.models.vision_transformer:Block": {"940bb11dd7a8": "1.0.31"},
    "timm.models.vision_transformer:ParallelScalingBlock": {"aea4bca75f15": "1.0.31"},
    "timm.models.vision_transformer:ResPostBlock": {"7b3cff7b7451": "1.0.31"},
    "timm.models.vision_transformer_relpos:RelPosBlock": {"c2f30f45b689": "1.0.31"},
    "timm.models.vision_transformer_relpos:ResPostRelPosBlock": {"c5103e797977": "1.0.31"},
    "torchvision.models.convnext:CNBlock": {"2130f34135bc": "0.28.0"},
    "torchvision.models.efficientnet:FusedMBConv": {"3e0d2dfbdbfa": "0.28.0"},
    "torchvision.models.efficientnet:MBConv": {"3e0d2dfbdbfa": "0.28.0"},
    "torchvision.models.maxvit:MBConv": {"86340cf55f63": "0.28.0"},
    "torchvision.models.maxvit:PartitionAttentionLayer": {"520e67f61751": "0.28.0"},
    "torchvision.models.swin_transformer:SwinTransformerBlock": {"f641634b26b1": "0.28.0"},
    "torchvision.models.swin_transformer:SwinTransformerBlockV2": {"b23d1bf26f2c": "0.28.0"},
    "transformers.models.beit.modeling_beit:BeitLayer": {"025d39c920c6": "5.24.0"},
    "transformers.models.convnext.modeling_convnext:ConvNextLayer": {"124f736ee850": "5.24.0"},
    "transformers.models.convnextv2.modeling_convnextv2:ConvNextV2Layer": {
        "a84f0b74fa13": "5.24.0"
    },
    "transformers.models.data2vec.modeling_data2vec_vision:Data2VecVisionLayer": {
        "7524d101994e": "5.24.0"
    },
    "transformers.models.dinov2.modeling_dinov2:Dinov2Layer": {"8247e3b0cb5c": "5.24.0"},
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers:Dinov2WithRegistersLayer": {
        "8247e3b0cb5c": "5.24.0"
    },
    "transformers.models.dinov3_convnext.modeling_dinov3_convnext:DINOv3ConvNextLayer": {
        "baf3ff347101": "5.24.0"
    },
    "transformers.models.dinov3_vit.modeling_dinov3_vit:DINOv3ViTLayer": {"e33bb022ab38": "5.24.0"},
    "transformers.models.donut.modeling_donut_swin:DonutSwinLayer": {"6a6864f3abb5": "5.24.0"},
    "transformers.models.swin.modeling_swin:SwinLayer": {"29de81fee056": "5.24.0"},
    "transformers.models.swinv2.modeling_swinv2:Swinv2Layer": {"f54c110f91c2": "5.24.0"},
}
