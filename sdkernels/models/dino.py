"""Blocks of DINOv2 and DINOv3: one tensor, or a list of crops whose tokens go packed.

Both repositories have no drop path in these blocks: they take some of the samples themselves, run
the branch on them and add the result. A list of crops is one flat tensor there, but for attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..arguments import PerSample, Shared
from ..packed import Packed
from .fingerprint import fingerprint
from .parts import is_bare

__all__ = [
    "dinov2",
    "dinov2_nested",
    "dinov3",
    "has_xformers",
    "knows",
    "learn_dinov2",
    "learn_dinov3",
    "per_sample",
]

# Forwards of DINOv2's `Attention` and `MemEffAttention`: qkv, attention by sample, proj, proj_drop.
ATTENTIONS = frozenset(
    ("b273b0a53621", "e9e1425e7fa6", "2ca1f103337c", "934a974cf87c", "d8eaa4dde68e")
)
# `forward_list` of DINOv3's `SelfAttention`: qkv, compute_attention by crop, proj; and of its MLPs:
# their forward on the flat tokens.
LIST_ATTENTIONS = frozenset(("dd02a81c4bac",))
LIST_MLPS = frozenset(("d7305cd382a8",))

# What was found for a class; patch() fills it, compiled code only reads it.
_KNOWN: dict[tuple[type[nn.Module], str], bool] = {}


def learn(module: nn.Module, method: str, prints: frozenset[str]) -> None:
    own = [kind.__dict__ for kind in type(module).__mro__[:-1] if kind is not nn.Module]
    bodies = [names[method] for names in own if method in names]
    found = bool(bodies) and all(fingerprint(body) in prints for body in bodies)
    _KNOWN[type(module), method] = found


def knows(module: nn.Module, method: str, prints: frozenset[str]) -> bool:
    """Whether a method is one that was read, in every class that has it; hooks want the module."""
    if (type(module), method) not in _KNOWN and not is_compiling():
        learn(module, method, prints)
    known = _KNOWN.get((type(module), method), False)
    return known and method not in module.__dict__ and is_bare(module)


def per_sample(value: Any, x: Tensor | list[Tensor]) -> Any:
    """What attention broadcasts against [B, heads, N, ...], as an entry of ``args``.

    A tensor of four dimensions belongs to the samples, unless it has one row for all of them; with
    fewer, its first dimension is heads or tokens, whatever its size.
    """
    if isinstance(value, list) and isinstance(x, list):
        return [per_sample(each, crop) for each, crop in zip(value, x, strict=True)]
    if not isinstance(value, Tensor):
        return value
    return PerSample(value) if value.dim() == 4 and value.shape[0] != 1 else Shared(value)


# DINOv2


def learn_dinov2(block: Any) -> None:
    learn(block.attn, "forward", ATTENTIONS)


def has_xformers(kind: Any) -> bool:
    """Whether the module of a class of blocks has found what its list form needs."""
    return bool(kind.forward.__globals__.get("XFORMERS_AVAILABLE", False))


def dinov2(block: Any, add: Any, x: Any) -> Any:
    if not isinstance(x, list):
        x = add(0, x, block.attn, norm=block.norm1, layer_scale=block.ls1)
        return add(1, x, block.mlp, norm=block.norm2, layer_scale=block.ls2)
    attn, mlp = block.attn, block.mlp
    knows_attention = knows(attn, "forward", ATTENTIONS) and not _drops(attn.attn_drop)

    def attend(packed: Packed) -> Tensor:
        if not knows_attention:
            return packed.join([attn(part) for part in packed.split(packed.values)])
        qkv = attn.qkv(packed.values).unflatten(-1, (3, attn.num_heads, -1))
        out = packed.attention(*qkv.unbind(1)).flatten(1)
        return attn.proj_drop(attn.proj(out))  # type: ignore[no-any-return]

    def feed(packed: Packed) -> Tensor:
        return mlp(packed.values[None])[0]  # type: ignore[no-any-return]

    x = add.packed(0, x, attend, norm=block.norm1, layer_scale=block.ls1)
    return add.packed(1, x, feed, norm=block.norm2, layer_scale=block.ls2)


def dinov2_nested(block: Any, add: Any, x_or_x_list: Any) -> Any:
    return dinov2(block, add, x_or_x_list)


def _drops(dropout: Any) -> bool:
    """Whether attention drops entries: xFormers' does not, so that the module itself must run."""
    p = dropout.p if isinstance(dropout, nn.Dropout) else dropout  # as versions have it
    return bool(p > 0.0)


# DINOv3

Rope = tuple[Tensor, Tensor] | None


def learn_dinov3(block: Any) -> None:
    learn(block.attn, "forward_list", LIST_ATTENTIONS)
    learn(block.mlp, "forward_list", LIST_MLPS)


def dinov3(block: Any, add: Any, x_or_x_list: Any, rope_or_rope_list: Any = None) -> Any:
    """What differs from the repository's list form is called as that does: by `forward_list`.

    It leaves out the dropout behind the projection, in training.
    """
    x, rope, attn, mlp = x_or_x_list, rope_or_rope_list, block.attn, block.mlp
    knows_attention = knows(attn, "forward_list", LIST_ATTENTIONS)
    knows_mlp = knows(mlp, "forward_list", LIST_MLPS)

    def attend(kept: Tensor, rope: Rope) -> Any:
        if not knows_attention:
            return attn.forward_list([kept], rope_list=[rope])[0]
        return attn.proj(attn.compute_attention(attn.qkv(kept), rope=rope))

    def attend_packed(packed: Packed, ropes: Sequence[Rope]) -> Any:
        if not knows_attention:
            parts = packed.split(packed.values)
            return packed.join(attn.forward_list(parts, rope_list=ropes))
        pairs = zip(packed.split(attn.qkv(packed.values)), ropes, strict=True)
        outs = [attn.compute_attention(part, rope=own) for part, own in pairs]
        return attn.proj(packed.join(outs))

    def feed_packed(packed: Packed) -> Any:
        if knows_mlp:
            return mlp(packed.values)
        return packed.join(mlp.forward_list(packed.split(packed.values)))

    feed: Callable[[Tensor], Any] = mlp if knows_mlp else lambda kept: mlp.forward_list([kept])[0]
    if not isinstance(x, list):
        x = add(0, x, attend, norm=block.norm1, layer_scale=block.ls1, args=[_rope(rope, x)])
        return add(1, x, feed, norm=block.norm2, layer_scale=block.ls2)
    ropes = [None] * len(x) if rope is None else list(rope)
    args = [[_rope(own, crop) for own, crop in zip(ropes, x, strict=True)]]
    x = add.packed(0, x, attend_packed, norm=block.norm1, layer_scale=block.ls1, args=args)
    return add.packed(1, x, feed_packed, norm=block.norm2, layer_scale=block.ls2)


def _rope(rope: Any, x: Tensor) -> Any:
    """Sine and cosine: of the samples with four dimensions, of all of them with fewer."""
    if rope is None:
        return None
    sin, cos = rope
    return per_sample(sin, x), per_sample(cos, x)
