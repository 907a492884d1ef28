"""The layers of Hugging Face transformers' vision models."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from ..arguments import PerSample, holds_tensors
from .blocks import Add, Branch
from .branches import chain, per_sample
from .registry import Known, class_getter


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuse a tensor of which it is not known whether it belongs to the samples."""
    for name, value in kwargs.items():
        if name == "position_embeddings" and all(each.dim() == 2 for each in value):
            continue  # DINOv3's cos and sin, [tokens, width], are those of all samples
        if holds_tensors(value):
            raise ValueError(
                f"{name}: a tensor, possibly of the batch, that a patched layer does not know; "
                "unpatch the model to use it"
            )


def _mask(mask: Any, x: Any, attention: nn.Module) -> Any:
    """Flash attention's masks, [B, tokens], belong to the samples as well."""
    if isinstance(mask, list) and isinstance(x, list):
        return [_mask(each, crop, attention) for each, crop in zip(mask, x, strict=True)]
    if isinstance(mask, Tensor) and mask.dim() == 2 and _is_flash(attention):
        return PerSample(mask)
    return per_sample(mask, x)


def _is_flash(attention: nn.Module) -> bool:
    configs = [getattr(module, "config", None) for module in attention.modules()]
    return any("flash" in str(getattr(c, "_attn_implementation", "")) for c in configs)


def dinov2(
    block: Any, add: Add, hidden_states: Any, attention_mask: Any = None, **kwargs: Any
) -> Any:
    """DINOv2's layer, and DINOv3's, which passes position embeddings through."""

    def attend(kept: Tensor, mask: Tensor | None) -> Any:
        masked = {} if mask is None else {"attention_mask": mask}
        out = block.attention(kept, **masked, **kwargs)
        return out if isinstance(out, Tensor) else out[0]  # a tensor in older versions

    mask = (_mask(attention_mask, hidden_states, block.attention),)
    _check_kwargs(kwargs)
    hidden_states = add(
        0, hidden_states, attend, norm=block.norm1, layer_scale=block.layer_scale1, args=mask
    )
    return add(1, hidden_states, block.mlp, norm=block.norm2, layer_scale=block.layer_scale2)


def beit(
    block: Any,
    add: Add,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: Any = None,
    **kwargs: Any,
) -> Any:
    if block.relative_position_bias is not None:
        height, width = resolution
        window_size = (height // block.patch_size, width // block.patch_size)
        bias = block.relative_position_bias(
            window_size, interpolate_pos_encoding, dim_size=hidden_states.shape[1]
        )
        attention_mask = bias if attention_mask is None else bias + attention_mask

    def attend(kept: Tensor, mask: Tensor | None) -> Any:
        return block.dropout(block.attention(kept, attention_mask=mask, **kwargs)[0])

    _check_kwargs(kwargs)
    hidden_states = add(
        0,
        hidden_states,
        attend,
        norm=block.layernorm_before,
        layer_scale=_factor(block.lambda_1),
        args=(_mask(attention_mask, hidden_states, block.attention),),
    )
    return add(
        1,
        hidden_states,
        chain([block.mlp, block.dropout]),
        norm=block.layernorm_after,
        layer_scale=_factor(block.lambda_2),
    )


def _factor(value: Any) -> Tensor | None:
    """BEiT's layer scale is the number 1 where it has none."""
    return value if isinstance(value, Tensor) else None


def data2vec(
    block: Any,
    add: Add,
    hidden_states: Tensor,
    output_attentions: bool = False,
    relative_position_bias: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: Any = None,
) -> Any:
    _refuse_attentions(output_attentions)

    def attend(kept: Tensor, bias: Tensor | None) -> Any:
        return block.attention(
            kept,
            relative_position_bias=bias,
            interpolate_pos_encoding=interpolate_pos_encoding,
            resolution=resolution,
        )[0]

    hidden_states = add(
        0,
        hidden_states,
        attend,
        norm=block.layernorm_before,
        layer_scale=block.lambda_1,
        args=(per_sample(relative_position_bias, hidden_states),),
    )
    hidden_states = add(
        1,
        hidden_states,
        chain([block.intermediate, block.output]),
        norm=block.layernorm_after,
        layer_scale=block.lambda_2,
    )
    return (hidden_states,)


def _refuse_attentions(asked: bool | None) -> None:
    if asked:
        raise ValueError(
            "output_attentions: a patched layer computes attention for the kept samples only; "
            "unpatch the model, or ask in evaluation"
        )


def _windows(block: Any, attention: Any, shape: Any) -> Any:
    """Windowed attention on [k, height * width, channels], as Swin's layers write it."""
    height, width = shape
    functions = importlib.import_module(type(block)._original.__module__)

    def branch(kept: Tensor) -> Any:
        rows, _, channels = kept.shape
        kept = kept.view(rows, height, width, channels)
        kept, pad_values = block.maybe_pad(kept, height, width)
        _, padded_height, padded_width, _ = kept.shape
        size, shift = block.window_size, block.shift_size
        if shift > 0:
            kept = kept.roll((-shift, -shift), (1, 2))
        windows = functions.window_partition(kept, size).view(-1, size * size, channels)
        mask = block.get_attn_mask(
            padded_height, padded_width, dtype=kept.dtype, device=windows.device
        )
        out = attention(windows, mask).view(-1, size, size, channels)
        out = functions.window_reverse(out, size, padded_height, padded_width)
        if shift > 0:
            out = out.roll((shift, shift), (1, 2))
        if pad_values[3] > 0 or pad_values[5] > 0:
            out = out[:, :height, :width, :].contiguous()
        return out.view(rows, height * width, channels)

    return branch


def swin(
    block: Any,
    add: Add,
    hidden_states: Tensor,
    input_dimensions: Any,
    always_partition: bool = False,
    **kwargs: Any,
) -> Any:
    """Only the attention of this layer has a drop path. No attention weights are returned."""
    config = getattr(block.attention, "config", None)
    asked = getattr(config, "output_attentions", False)
    _refuse_attentions(kwargs.get("output_attentions", asked))
    if not always_partition:
        block.set_shift_and_window_size(input_dimensions)
    _check_kwargs(kwargs)

    def attention(windows: Tensor, mask: Tensor | None) -> Any:
        return block.dropout(block.attention(windows, mask, **kwargs)[0])

    branch = _windows(block, attention, input_dimensions)
    hidden_states = add(0, hidden_states, branch, norm=block.layernorm_before)
    out = block.dropout(block.mlp(block.layernorm_after(hidden_states)))
    return out + hidden_states, None


def donut_swin(
    block: Any,
    add: Add,
    hidden_states: Tensor,
    input_dimensions: Any,
    output_attentions: bool | None = False,
    always_partition: bool | None = False,
) -> Any:
    """Only the attention of this layer has a drop path."""
    _refuse_attentions(output_attentions)
    if not always_partition:
        block.set_shift_and_window_size(input_dimensions)
    branch = _windows(block, lambda w, mask: block.attention(w, mask)[0], input_dimensions)
    hidden_states = add(0, hidden_states, branch, norm=block.layernorm_before)
    out = block.output(block.intermediate(block.layernorm_after(hidden_states)))
    return (hidden_states + out,)


def swin_v2(
    block: Any,
    add: Add,
    hidden_states: Tensor,
    input_dimensions: Any,
    output_attentions: bool | None = False,
) -> Any:
    _refuse_attentions(output_attentions)
    branch = _windows(block, lambda w, mask: block.attention(w, mask)[0], input_dimensions)
    hidden_states = add(0, hidden_states, branch, post_norm=block.layernorm_before)
    mlp = chain([block.intermediate, block.output])
    return (add(1, hidden_states, mlp, post_norm=block.layernorm_after),)


def _convnext(add: Add, x: Tensor, dwconv: nn.Module, steps: list[Any], gamma: Any) -> Any:
    def branch(kept: Tensor) -> Any:
        kept = dwconv(kept).permute(0, 2, 3, 1)
        return chain(steps)(kept).permute(0, 3, 1, 2)

    return add(0, x, branch, layer_scale=None if gamma is None else gamma.view(-1, 1, 1))


def convnext(block: Any, add: Add, features: Tensor) -> Any:
    steps = [block.layernorm, block.pwconv1, block.act, block.pwconv2]
    return _convnext(add, features, block.dwconv, steps, block.layer_scale_parameter)


def convnext_v2(block: Any, add: Add, features: Tensor) -> Any:
    steps = [block.layernorm, block.pwconv1, block.act, block.grn, block.pwconv2]
    return _convnext(add, features, block.dwconv, steps, None)


def dinov3_convnext(block: Any, add: Add, features: Tensor) -> Any:
    steps = [block.layer_norm, block.pointwise_conv1, block.activation_fn, block.pointwise_conv2]
    return _convnext(add, features, block.depthwise_conv, steps, block.gamma)


def two(first: str, second: str) -> tuple[Branch, ...]:
    return Branch("drop_path", tuple(first.split())), Branch("drop_path", tuple(second.split()))


ONE = (Branch("drop_path", ("",)),)
DINOV2 = two("norm1 attention layer_scale1", "norm2 mlp layer_scale2")
BEIT = two("layernorm_before attention lambda_1", "layernorm_after mlp lambda_2")
DATA2VEC = two(
    "layernorm_before attention lambda_1", "layernorm_after intermediate output lambda_2"
)
SWIN = (Branch("drop_path", ("layernorm_before", "attention")),)
SWIN_V2 = two("attention layernorm_before", "intermediate output layernorm_after")


def _path(model: str, layer: str) -> str:
    return f"transformers.models.{model}.modeling_{model}:{layer}"


KNOWN = (
    Known(
        _path("dinov2", "Dinov2Layer"),
        dinov2,
        DINOV2,
        {"876b1e20e5b6": "5.0.0 to 5.14.0", "8247e3b0cb5c": "5.20.0 to 5.24.0"},
    ),
    Known(
        _path("dinov2_with_registers", "Dinov2WithRegistersLayer"),
        dinov2,
        DINOV2,
        {"876b1e20e5b6": "5.0.0 to 5.14.0", "8247e3b0cb5c": "5.20.0 to 5.24.0"},
    ),
    Known(
        _path("dinov3_vit", "DINOv3ViTLayer"),
        dinov2,
        DINOV2,
        {"773f654c43bc": "5.0.0", "e33bb022ab38": "5.8.0 to 5.24.0"},
    ),
    Known(_path("beit", "BeitLayer"), data2vec, DATA2VEC, {"7524d101994e": "5.0.0 to 5.8.0"}),
    Known(_path("beit", "BeitLayer"), beit, BEIT, {"025d39c920c6": "5.14.0 to 5.24.0"}),
    Known(
        "transformers.models.data2vec.modeling_data2vec_vision:Data2VecVisionLayer",
        data2vec,
        DATA2VEC,
        {"7524d101994e": "5.0.0 to 5.24.0"},
    ),
    Known(_path("swin", "SwinLayer"), swin, SWIN, {"29de81fee056": "5.14.0 to 5.24.0"}),
    Known(_path("swin", "SwinLayer"), donut_swin, SWIN, {"6a6864f3abb5": "5.0.0 to 5.8.0"}),
    Known(
        _path("donut", "DonutSwinLayer").replace("modeling_donut", "modeling_donut_swin"),
        donut_swin,
        SWIN,
        {"6a6864f3abb5": "5.0.0 to 5.24.0"},
    ),
    Known(_path("swinv2", "Swinv2Layer"), swin_v2, SWIN_V2, {"f54c110f91c2": "5.20.0 to 5.24.0"}),
    Known(
        _path("convnext", "ConvNextLayer"),
        convnext,
        ONE,
        {"124f736ee850": "4.57.6 to 5.24.0"},
        runs_empty=True,
    ),
    Known(
        _path("convnextv2", "ConvNextV2Layer"),
        convnext_v2,
        ONE,
        {"a84f0b74fa13": "4.57.6 to 5.24.0"},
        runs_empty=True,
    ),
    Known(
        _path("dinov3_convnext", "DINOv3ConvNextLayer"),
        dinov3_convnext,
        ONE,
        {"baf3ff347101": "4.57.6 to 5.24.0"},
        runs_empty=True,
    ),
)

__getattr__ = class_getter(__name__, KNOWN)
