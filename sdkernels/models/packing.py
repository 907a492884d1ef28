"""timm's ViT and EVA blocks on a list of crops: all tokens packed, attention crop by crop.

The forward that patch() writes for them takes crops one after the other. This is what it computes
with norms, linear layers and MLPs run once. Parts that are not as they were read (of another
version, with hooks) still run crop by crop, and so do compiled blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..packed import Packed
from .dino import knows, per_sample
from .fingerprint import fingerprint

__all__ = ["packed_form"]

# Forwards of `Attention`, `AttentionRope` and `EvaAttention`: these layers of x, whatever there is
# between queries and values, proj, proj_drop.
ATTENTIONS = frozenset(("af758426be77", "d161bb62835b", "ace4c8f2254a"))
OF_INPUT = ("qkv", "q_proj", "k_proj", "v_proj", "gate")
# Those of `Mlp`, `GluMlp` and `SwiGLU`: layers of tokens.
MLPS = frozenset(("462101c969f3", "db8fa8a30593", "05ca205c7858"))


def packed_form(block: Any) -> Callable[..., list[Tensor]] | None:
    """The forward of a patched block for a list of crops: ``(block, add, xs, ...) -> xs``."""
    kind = block._original
    form, prints = FORMS.get(f"{kind.__module__}:{kind.__qualname__}", (None, ()))
    return form if form is not None and fingerprint(kind.forward) in prints else None


def _packed(
    block: Any, add: Any, x: list[Tensor], scales: Sequence[Any], is_causal: bool, **given: Any
) -> list[Tensor]:
    """The forward of both, with what attention is `given` for every crop or for all of them."""
    args = [_of_crops(value, x) for value in given.values()]

    def attend(packed: Packed, *each: Sequence[Any]) -> Tensor:
        crops = zip(*each, strict=True)
        options = [dict(zip(given, own, strict=True), is_causal=is_causal) for own in crops]
        return _attention(block.attn, packed, options)

    x = add.packed(0, x, attend, norm=block.norm1, layer_scale=scales[0], args=args)
    x = add.packed(1, x, _mlp(block), norm=block.norm2, layer_scale=scales[1])
    return x


def vit(
    block: Any, add: Any, x: list[Tensor], attn_mask: Any = None, is_causal: bool = False
) -> list[Tensor]:
    return _packed(block, add, x, (block.ls1, block.ls2), is_causal, attn_mask=attn_mask)


def eva(
    block: Any,
    add: Any,
    x: list[Tensor],
    rope: Any = None,
    attn_mask: Any = None,
    is_causal: bool = False,
) -> list[Tensor]:
    scales = (block.gamma_1, block.gamma_2)
    return _packed(block, add, x, scales, is_causal, rope=rope, attn_mask=attn_mask)


# Each with the fingerprints of the forwards that it stands for.
FORMS: dict[str, tuple[Callable[..., list[Tensor]], frozenset[str]]] = {
    "timm.models.vision_transformer:Block": (vit, frozenset(("940bb11dd7a8",))),
    "timm.models.eva:EvaBlock": (eva, frozenset(("4d56d864d16f",))),
}


def _of_crops(value: Any, xs: list[Tensor]) -> list[Any]:
    """An argument of each crop, or of all of them, as an entry of ``args``."""
    each = value if isinstance(value, list) and len(value) == len(xs) else [value] * len(xs)
    return [per_sample(own, x) for own, x in zip(each, xs, strict=True)]


def _attention(attn: Any, packed: Packed, options: list[dict[str, Any]]) -> Tensor:
    parts = packed.split(packed.values)
    pairs = zip(parts, options, strict=True)
    if not knows(attn, "forward", ATTENTIONS):
        return packed.join([attn(part, **own) for part, own in pairs])
    # The module's own forward, in a copy whose linear layers have their results already.
    given: list[dict[str, Any]] = [{"proj": _same, "proj_drop": _same} for _ in parts]
    for name in OF_INPUT:
        layer = getattr(attn, name, None)
        if layer is None or (name == "qkv" and getattr(attn, "q_bias", None) is not None):
            continue  # biases of their own are added to its weights' product by the forward
        for names, part in zip(given, packed.split(layer(packed.values)), strict=True):
            names[name] = _Given(part)
    outs = [
        type(attn).forward(_copy_with(attn, names), part, **own)
        for names, (part, own) in zip(given, pairs, strict=True)
    ]
    return attn.proj_drop(attn.proj(packed.join(outs)))  # type: ignore[no-any-return]


def _mlp(block: Any) -> Callable[[Packed], Tensor]:
    mlp = block.mlp

    def feed(packed: Packed) -> Tensor:
        if knows(mlp, "forward", MLPS):
            return mlp(packed.values[None])[0]  # type: ignore[no-any-return]
        return packed.join([mlp(part) for part in packed.split(packed.values)])

    return feed


class _Given:
    """In the place of a layer: what it has computed."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, x: Tensor) -> Tensor:
        return self.value


def _same(x: Tensor) -> Tensor:
    return x


def _copy_with(module: Any, names: dict[str, Any]) -> Any:
    """A module of the same parts, but for these: an instance's own names are found first."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(names)
    return copy
