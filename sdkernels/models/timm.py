"""The blocks of timm. Each function is the forward of a class with the op in place of drop path."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Add, Branch
from .branches import chain, per_sample
from .parts import is_bare, layer_scale_of
from .registry import Known, class_getter

# Norms that the op may fuse as if they were nn.LayerNorm, if their forward is a known one.
NORMS = ("timm.layers.norm:LayerNorm",)


# Vision transformers


def _attention(module: Any, is_causal: bool, **inputs: Any) -> Any:
    """The attention module as a branch of x and a mask; older ones do not know every argument."""
    if is_causal:
        inputs["is_causal"] = True

    def attend(kept: Tensor, mask: Tensor | None) -> Any:
        return module(kept, **inputs) if mask is None else module(kept, attn_mask=mask, **inputs)

    return attend


def vit(block: Any, add: Add, x: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
    mask = (per_sample(attn_mask, x),)
    attend = _attention(block.attn, is_causal)
    x = add(0, x, attend, norm=block.norm1, layer_scale=block.ls1, args=mask)
    return add(1, x, block.mlp, norm=block.norm2, layer_scale=block.ls2)


def vit_post_norm(
    block: Any, add: Add, x: Any, attn_mask: Any = None, is_causal: bool = False
) -> Any:
    mask = (per_sample(attn_mask, x),)
    x = add(0, x, _attention(block.attn, is_causal), post_norm=block.norm1, args=mask)
    return add(1, x, block.mlp, post_norm=block.norm2)


def vit_things(block: Any, add: Add, x: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
    """Several attentions side by side, all of the same x, then several MLPs."""
    mask = (per_sample(attn_mask, x),)
    inputs, branch = x, 0
    for part in block.attns:
        attend = _attention(part.attn, is_causal)
        x = add(branch, inputs, attend, norm=part.norm, layer_scale=part.ls, residual=x, args=mask)
        branch += 1
    inputs = x
    for part in block.ffns:
        x = add(branch, inputs, part.mlp, norm=part.norm, layer_scale=part.ls, residual=x)
        branch += 1
    return x


def things_branches(block: Any) -> tuple[Branch, ...]:
    parts = [f"{group}.{i}" for group in ("attns", "ffns") for i in range(block.num_parallel)]
    return tuple(Branch(f"{part}.drop_path", (part,)) for part in parts)


def vit_parallel(
    block: Any, add: Add, x: Any, attn_mask: Any = None, is_causal: bool = False
) -> Any:
    """Attention and MLP from one projection, in one branch."""

    def branch(kept: Tensor, mask: Tensor | None) -> Any:
        rows, tokens, width = kept.shape
        mlp, q, k, v = torch.split(block.in_proj(kept), block.in_split, dim=-1)
        if block.mlp_bias is not None:
            mlp = mlp + block.mlp_bias
        heads = (rows, tokens, block.num_heads, block.head_dim)
        q = block.q_norm(q.view(heads)).transpose(1, 2)
        k = block.k_norm(k.view(heads)).transpose(1, 2)
        attention = _attend(block, q, k, v.view(heads).transpose(1, 2), mask, is_causal)
        attention = attention.transpose(1, 2).reshape(rows, tokens, width)
        mlp = block.mlp_drop(block.mlp_act(mlp))
        if block.out_proj is not None:
            return block.out_proj(torch.cat((attention, mlp), dim=-1))
        return block.attn_out_proj(attention) + block.mlp_out_proj(mlp)

    mask = (per_sample(attn_mask, x),)
    return add(0, x, branch, norm=block.in_norm, layer_scale=block.ls, args=mask)


def _attend(
    block: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> Any:
    if block.fused_attn:
        dropout = block.attn_drop.p if block.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
        )
    timm = importlib.import_module("timm.layers.attention")
    scores = (q * block.scale) @ k.transpose(-2, -1)
    bias = timm.resolve_self_attn_mask(q.shape[-2], scores, mask, is_causal=is_causal)
    return block.attn_drop(timm.maybe_add_mask(scores, bias).softmax(dim=-1)) @ v


def vit_relpos(block: Any, add: Add, x: Any, shared_rel_pos: Tensor | None = None) -> Any:
    def attend(kept: Tensor) -> Any:
        return block.attn(kept, shared_rel_pos=shared_rel_pos)

    x = add(0, x, attend, norm=block.norm1, layer_scale=block.ls1)
    return add(1, x, block.mlp, norm=block.norm2, layer_scale=block.ls2)


def vit_relpos_post_norm(block: Any, add: Add, x: Any, shared_rel_pos: Tensor | None = None) -> Any:
    def attend(kept: Tensor) -> Any:
        return block.attn(kept, shared_rel_pos=shared_rel_pos)

    x = add(0, x, attend, post_norm=block.norm1)
    return add(1, x, block.mlp, post_norm=block.norm2)


def eva(
    block: Any,
    add: Add,
    x: Any,
    rope: Any = None,
    attn_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    def attend(kept: Tensor, rope: Tensor | None, mask: Tensor | None) -> Any:
        return _attention(block.attn, is_causal, rope=rope)(kept, mask)

    args = (per_sample(rope, x), per_sample(attn_mask, x))
    x = add(0, x, attend, norm=block.norm1, layer_scale=block.gamma_1, args=args)
    return add(1, x, block.mlp, norm=block.norm2, layer_scale=block.gamma_2)


def eva_post_norm(
    block: Any,
    add: Add,
    x: Any,
    rope: Any = None,
    attn_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    def attend(kept: Tensor, rope: Tensor | None, mask: Tensor | None) -> Any:
        return _attention(block.attn, is_causal, rope=rope)(kept, mask)

    args = (per_sample(rope, x), per_sample(attn_mask, x))
    x = add(0, x, attend, post_norm=block.norm1, args=args)
    return add(1, x, block.mlp, post_norm=block.norm2)


def beit(block: Any, add: Add, x: Any, shared_rel_pos_bias: Tensor | None = None) -> Any:
    def attend(kept: Tensor) -> Any:
        return block.attn(kept, shared_rel_pos_bias=shared_rel_pos_bias)

    x = add(0, x, attend, norm=block.norm1, layer_scale=block.gamma_1)
    return add(1, x, block.mlp, norm=block.norm2, layer_scale=block.gamma_2)


def cait(block: Any, add: Add, x: Any) -> Any:
    x = add(0, x, block.attn, norm=block.norm1, layer_scale=block.gamma_1)
    return add(1, x, block.mlp, norm=block.norm2, layer_scale=block.gamma_2)


def cait_class_attention(block: Any, add: Add, x: Tensor, x_cls: Tensor) -> Any:
    """Only the class token has a stream; its attention looks at all tokens."""
    tokens = torch.cat((x_cls, x), dim=1)
    x_cls = add(0, tokens, block.attn, norm=block.norm1, layer_scale=block.gamma_1, residual=x_cls)
    return add(1, x_cls, block.mlp, norm=block.norm2, layer_scale=block.gamma_2)


# Windows. They are made inside the branch, from a batch of whatever size.


def swin(block: Any, add: Add, x: Tensor) -> Any:
    shape = x.shape
    x = add(0, x, block._attn, norm=block.norm1).reshape(shape[0], -1, shape[-1])
    return add(1, x, block.mlp, norm=block.norm2).reshape(shape)


def swin_v2(block: Any, add: Add, x: Tensor) -> Any:
    shape = x.shape
    x = add(0, x, block._attn, post_norm=block.norm1).reshape(shape[0], -1, shape[-1])
    return add(1, x, block.mlp, post_norm=block.norm2).reshape(shape)


def swin_v2_cr(block: Any, add: Add, x: Tensor) -> Any:
    x = add(0, x, block._shifted_window_attn, post_norm=block.norm1)
    shape = x.shape
    x = add(1, x.reshape(shape[0], -1, shape[-1]), block.mlp, post_norm=block.norm2)
    return block.norm3(x).reshape(shape)


def partition(block: Any, add: Add, x: Tensor) -> Any:
    x = add(0, x, block._partition_attn, norm=block.norm1, layer_scale=block.ls1)
    return add(1, x, block.mlp, norm=block.norm2, layer_scale=block.ls2)


def transformer_2d(block: Any, add: Add, x: Tensor, shared_rel_pos: Tensor | None = None) -> Any:
    def attend(kept: Tensor) -> Any:
        return block.attn(kept, shared_rel_pos=shared_rel_pos)

    shortcut = _shortcut(block.shortcut, x)
    x = add(0, x, attend, norm=block.norm1, layer_scale=block.ls1, residual=shortcut)
    return add(1, x, block.mlp, norm=block.norm2, layer_scale=block.ls2)


# Convolutions


def _shortcut(module: nn.Module | None, x: Tensor) -> Tensor | None:
    """What the branch is added to; None for x itself."""
    if module is None or (type(module) is nn.Identity and is_bare(module)):
        return None
    shortcut: Tensor = module(x)
    return shortcut


def _channels_last(*modules: nn.Module) -> Any:
    def run(kept: Tensor) -> Any:
        return chain(modules)(kept.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return run


def convnext(block: Any, add: Add, x: Tensor) -> Any:
    if block.use_conv_mlp:
        steps = [block.conv_dw, block.norm, block.mlp]
    else:
        steps = [block.conv_dw, _channels_last(block.norm, block.mlp)]
    gamma = None if block.gamma is None else block.gamma.reshape(-1, 1, 1)
    residual = _shortcut(block.shortcut, x)
    return add(0, x, chain(steps), layer_scale=gamma, residual=residual)


def maxxvit_convnext(block: Any, add: Add, x: Tensor) -> Any:
    start, end, scale = [block.down, block.conv_dw], [block.norm, block.mlp], block.ls
    if not block.use_conv_mlp:
        gamma = layer_scale_of(block.ls)
        end = [_channels_last(*end, *([block.ls] if gamma is None else []))]
        scale = None if gamma is None else gamma.view(-1, 1, 1)
    residual = _shortcut(block.shortcut, x)
    return add(0, x, chain(start + end), layer_scale=scale, residual=residual)


def maxxvit_mbconv(block: Any, add: Add, x: Tensor) -> Any:
    steps = [block.pre_norm, block.down, block.conv1_1x1, block.norm1, block.conv2_kxk]
    steps += [block.se_early, block.norm2, block.se, block.conv3_1x1]
    return add(0, x, chain(steps), residual=_shortcut(block.shortcut, x))


def resnet_basic(block: Any, add: Add, x: Tensor) -> Any:
    steps = [block.conv1, block.bn1, block.drop_block, block.act1, block.aa]
    steps += [block.conv2, block.bn2, block.se]
    residual = _shortcut(block.downsample, x)
    return add.activated(0, x, chain(steps), block.act2, residual=residual)


def resnet_bottleneck(block: Any, add: Add, x: Tensor) -> Any:
    steps = [block.conv1, block.bn1, block.act1]
    steps += [block.conv2, block.bn2, block.drop_block, block.act2, block.aa]
    steps += [block.conv3, block.bn3, block.se]
    residual = _shortcut(block.downsample, x)
    return add.activated(0, x, chain(steps), block.act3, residual=residual)


def depthwise_separable(block: Any, add: Add, x: Tensor) -> Any:
    steps = [] if block.conv_s2d is None else [block.conv_s2d, block.bn_s2d]
    steps += [block.conv_dw, block.bn1, block.aa, block.se, block.conv_pw, block.bn2]
    return add(0, x, chain(steps))


def inverted_residual(block: Any, add: Add, x: Tensor) -> Any:
    steps = [] if block.conv_s2d is None else [block.conv_s2d, block.bn_s2d]
    steps += [block.conv_pw, block.bn1, block.conv_dw, block.bn2, block.aa, block.se]
    return add(0, x, chain([*steps, block.conv_pwl, block.bn3]))


def universal_inverted_residual(block: Any, add: Add, x: Tensor) -> Any:
    steps = [block.dw_start, block.pw_exp, block.dw_mid, block.se, block.pw_proj, block.dw_end]
    return add(0, x, chain(steps), layer_scale=block.layer_scale)


def mobile_attention(block: Any, add: Add, x: Tensor) -> Any:
    if block.conv_cpe_dw is not None:
        x = x + block.conv_cpe_dw(x)
    return add(0, x, chain([block.norm, block.attn]), layer_scale=block.layer_scale)


def edge_residual(block: Any, add: Add, x: Tensor) -> Any:
    steps = [block.conv_exp, block.bn1, block.aa, block.se, block.conv_pwl, block.bn2]
    return add(0, x, chain(steps))


def conv_bn_act(block: Any, add: Add, x: Tensor) -> Any:
    return add(0, x, chain([block.conv, block.bn1, block.aa]))


def no_skip(block: Any) -> str | None:
    return None if block.has_skip else "it has no skip connection, so its drop path is never used"


# The table


def two(first: str, second: str, drops: str = "drop_path1 drop_path2") -> tuple[Branch, ...]:
    names = drops.split()
    return Branch(names[0], tuple(first.split())), Branch(names[-1], tuple(second.split()))


ONE = (Branch("drop_path", ("",)),)
PRE_NORM = two("norm1 attn ls1", "norm2 mlp ls2")
POST_NORM = two("attn norm1", "mlp norm2")
GAMMAS = two("norm1 attn gamma_1", "norm2 mlp gamma_2")
CAIT = two("norm1 attn gamma_1", "norm2 mlp gamma_2", drops="drop_path")

VIT = "timm.models.vision_transformer"
RELPOS = "timm.models.vision_transformer_relpos"
MAXXVIT = "timm.models.maxxvit"
EFFICIENTNET = "timm.models._efficientnet_blocks"

KNOWN = (
    Known(
        f"{VIT}:Block",
        vit,
        PRE_NORM,
        {
            "257e910ea1aa": "1.0.9 to 1.0.15",
            "cb6dc2b12de0": "1.0.17 to 1.0.24",
            "940bb11dd7a8": "1.0.26 to 1.0.31",
        },
    ),
    Known(
        f"{VIT}:ResPostBlock",
        vit_post_norm,
        POST_NORM,
        {
            "28aaf7ff3560": "1.0.9 to 1.0.15",
            "045a9aa747f2": "1.0.17 to 1.0.24",
            "7b3cff7b7451": "1.0.26 to 1.0.31",
        },
    ),
    Known(f"{VIT}:ParallelScalingBlock", vit_parallel, ONE, {"aea4bca75f15": "1.0.26 to 1.0.31"}),
    Known(
        f"{VIT}:ParallelThingsBlock",
        vit_things,
        things_branches,
        {"1197bc16a62e": "1.0.17 to 1.0.24", "9e9b82399af9": "1.0.26 to 1.0.31"},
    ),
    Known(f"{RELPOS}:RelPosBlock", vit_relpos, PRE_NORM, {"c2f30f45b689": "1.0.9 to 1.0.31"}),
    Known(
        f"{RELPOS}:ResPostRelPosBlock",
        vit_relpos_post_norm,
        POST_NORM,
        {"c5103e797977": "1.0.9 to 1.0.31"},
    ),
    Known(
        "timm.models.eva:EvaBlock",
        eva,
        GAMMAS,
        {
            "a52e7efbc9d7": "1.0.17 to 1.0.24",
            "cf65c2513fb3": "1.0.26 to 1.0.28",
            "4d56d864d16f": "1.0.30 to 1.0.31",
        },
    ),
    Known(
        "timm.models.eva:EvaBlockPostNorm",
        eva_post_norm,
        POST_NORM,
        {"37ec27b98156": "1.0.17 to 1.0.24", "f0830bf3b86f": "1.0.26 to 1.0.31"},
    ),
    Known("timm.models.beit:Block", beit, GAMMAS, {"0c7be284298e": "1.0.9 to 1.0.31"}),
    Known("timm.models.cait:LayerScaleBlock", cait, CAIT, {"b5a910ce278e": "1.0.9 to 1.0.31"}),
    Known(
        "timm.models.cait:LayerScaleBlockClassAttn",
        cait_class_attention,
        CAIT,
        {"911b3fbdbe7a": "1.0.9 to 1.0.31"},
    ),
    Known(
        "timm.models.swin_transformer:SwinTransformerBlock",
        swin,
        two("norm1 attn", "norm2 mlp"),
        {"9bfdecb8db80": "1.0.9 to 1.0.31"},
    ),
    Known(
        "timm.models.swin_transformer_v2:SwinTransformerV2Block",
        swin_v2,
        POST_NORM,
        {"9303c08dc32f": "1.0.9 to 1.0.31"},
    ),
    Known(
        "timm.models.swin_transformer_v2_cr:SwinTransformerV2CrBlock",
        swin_v2_cr,
        POST_NORM,
        {"1af75b5bda2f": "1.0.9 to 1.0.31"},
    ),
    Known(
        f"{MAXXVIT}:PartitionAttentionCl", partition, PRE_NORM, {"34a730ad445b": "1.0.9 to 1.0.31"}
    ),
    Known(
        f"{MAXXVIT}:PartitionAttention2d", partition, PRE_NORM, {"34a730ad445b": "1.0.9 to 1.0.31"}
    ),
    Known(
        f"{MAXXVIT}:ParallelPartitionAttention",
        partition,
        two("norm1 attn_block attn_grid ls1", "norm2 mlp ls2"),
        {"34a730ad445b": "1.0.9 to 1.0.31"},
    ),
    Known(
        f"{MAXXVIT}:TransformerBlock2d",
        transformer_2d,
        PRE_NORM,
        {"0efc7d6fb44f": "1.0.9 to 1.0.31"},
    ),
    Known(
        f"{MAXXVIT}:MbConvBlock",
        maxxvit_mbconv,
        ONE,
        {"e92a6f53d897": "1.0.9 to 1.0.31"},
        runs_empty=True,
    ),
    Known(
        f"{MAXXVIT}:ConvNeXtBlock",
        maxxvit_convnext,
        ONE,
        {"ffc7701d88e6": "1.0.9 to 1.0.31"},
        runs_empty=True,
    ),
    Known(
        "timm.models.convnext:ConvNeXtBlock",
        convnext,
        ONE,
        {"29752f5d34d8": "1.0.9 to 1.0.31"},
        runs_empty=True,
    ),
    Known(
        "timm.models.resnet:BasicBlock",
        resnet_basic,
        ONE,
        {"690265f6684b": "1.0.9 to 1.0.31"},
        runs_empty=True,
    ),
    Known(
        "timm.models.resnet:Bottleneck",
        resnet_bottleneck,
        ONE,
        {"39fcc2a3b39e": "1.0.9 to 1.0.31"},
        runs_empty=True,
    ),
    Known(
        f"{EFFICIENTNET}:ConvBnAct",
        conv_bn_act,
        ONE,
        {"d6259b1da9ea": "1.0.9 to 1.0.31"},
        no_skip,
        runs_empty=True,
    ),
    Known(
        f"{EFFICIENTNET}:DepthwiseSeparableConv",
        depthwise_separable,
        ONE,
        {"ac8cab2e52d0": "1.0.9 to 1.0.31"},
        no_skip,
        runs_empty=True,
    ),
    Known(
        f"{EFFICIENTNET}:InvertedResidual",
        inverted_residual,
        ONE,
        {"25a74073d203": "1.0.9 to 1.0.31"},
        no_skip,
        runs_empty=True,
    ),
    Known(
        f"{EFFICIENTNET}:UniversalInvertedResidual",
        universal_inverted_residual,
        ONE,
        {"4977ce26c143": "1.0.9 to 1.0.31"},
        no_skip,
        runs_empty=True,
    ),
    Known(
        f"{EFFICIENTNET}:MobileAttention",
        mobile_attention,
        ONE,
        {"ddf1d62f039c": "1.0.9 to 1.0.31"},
        no_skip,
    ),
    Known(
        f"{EFFICIENTNET}:EdgeResidual",
        edge_residual,
        ONE,
        {"ce1679761305": "1.0.9 to 1.0.31"},
        no_skip,
        runs_empty=True,
    ),
)

__getattr__ = class_getter(__name__, KNOWN)
