"""Packed: the kept rows of all crops as one tensor of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .backends.ops import is_compiling
from .building_blocks import STRIDED, check_tensor
from .empty import add_note

__all__ = ["Packed", "PackedBranch", "check_crops", "check_multiple_of", "padding_of"]


class Packed:
    """The tokens of all kept samples of several crops, one after the other.

    What a branch gets with ``packed=True``. Layers that treat tokens independently (norms, linear
    layers, an MLP) run once on `values`; what needs samples runs on :meth:`split`, one tensor a
    crop. :meth:`attention` does so; kernels for sequences of several lengths take `cu_seqlens`.

    Attributes:
        values: [T, C], crop after crop and in it sample after sample; zeros behind them where T was
            rounded up (``multiple_of``).
        shapes: the shape of each crop's part without its channels: (k, N), or (k, H, W).
        padding: how many of the T tokens are those zeros; None where nothing is rounded up.

    Example:
        >>> crops = [torch.ones(2, 3, 4), torch.zeros(1, 2, 4)]
        >>> packed = Packed.of(crops, multiple_of=16)
        >>> packed.values.shape
        torch.Size([16, 4])
        >>> packed.cu_seqlens_host.tolist()
        [0, 3, 6, 8, 16]
        >>> [part.shape for part in packed.split(packed.values)]
        [torch.Size([2, 3, 4]), torch.Size([1, 2, 4])]
    """

    __slots__ = ("_lengths", "padding", "shapes", "values")

    def __init__(
        self, values: Tensor, shapes: Sequence[tuple[int, ...]], padding: int | None = None
    ) -> None:
        self.values = values
        self.shapes = list(shapes)
        self.padding = padding
        self._lengths: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, crops: Sequence[Tensor], multiple_of: int = 1) -> Packed:
        """Pack crops [k, ..., C], zeros behind them up to a multiple.

        Args:
            crops: tensors of one width, dtype and device.
            multiple_of: what the number of tokens is rounded up to.

        Raises:
            TypeError, ValueError: the crops do not go together.
        """
        check_crops(crops)
        shapes = [tuple(crop.shape[:-1]) for crop in crops]
        return cls(_joined(crops, multiple_of), shapes, padding_of(shapes, multiple_of))

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"Packed(shapes={self.shapes}, values={tuple(self.values.shape)})"

    def with_values(self, values: Tensor) -> Packed:
        """Other values of the same tokens: [T, ...]."""
        _check_tokens(values, self.values.shape[0], "values")
        return type(self)(values, self.shapes, self.padding)

    def split(self, values: Tensor) -> list[Tensor]:
        """Each crop's part of [T, ...] as [k, N, ...]: views, without the padding."""
        _check_tokens(values, self.values.shape[0], "values")
        sizes = [prod(shape) for shape in self.shapes]
        if self.padding is not None:
            sizes.append(self.padding)
        parts = values.split(sizes)[: len(self.shapes)]
        return [
            part.view(*shape, *values.shape[1:])
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`: [k, N, ...] of each crop as [T, ...], zeros for padding."""
        if len(parts) != len(self.shapes):
            raise ValueError(f"parts: expected {len(self.shapes)}, one a crop, got {len(parts)}")
        flat = []
        for i, (part, shape) in enumerate(zip(parts, self.shapes, strict=True)):
            check_tensor(part, f"parts[{i}]")
            if tuple(part.shape[: len(shape)]) != shape:
                raise ValueError(
                    f"parts[{i}]: expected a tensor that starts with the shape {shape}, got "
                    f"{tuple(part.shape)}"
                )
            flat.append(part.flatten(0, len(shape) - 1))
        if self.padding is not None:
            flat.append(flat[0].new_zeros((self.padding, *flat[0].shape[1:])))
        return torch.cat(flat)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        varlen: bool = False,
    ) -> Tensor:
        """Softmax attention within every sample.

        Args:
            query, key, value: [T, heads, D], of the tokens of `values`.
            scale: of the products. Default: 1 / sqrt(D).
            varlen: one call of ``torch.nn.attention.varlen.varlen_attn`` for all crops, on a CUDA
                device in float16 or bfloat16. Default: ``scaled_dot_product_attention`` crop by
                crop, and a concatenation.

        Returns:
            [T, heads, D]. Nothing is said of the rows of the padding.

        Raises:
            TypeError, ValueError: tensors that do not belong to these tokens.
            RuntimeError: `varlen` where there is no such kernel.
        """
        tensors = {"query": query, "key": key, "value": value}
        for name, tensor in tensors.items():
            _check_tokens(tensor, self.values.shape[0], name)
            if tensor.dim() != 3:
                raise ValueError(f"{name}: expected [T, heads, D], got shape {tuple(tensor.shape)}")
        if varlen:
            attend = _varlen_attn(query)
            if query.shape[0] > 0:  # such kernels refuse an empty batch
                starts, longest = self.cu_seqlens, self.max_length
                options = {} if scale is None else {"scale": scale}
                out: Tensor = attend(query, key, value, starts, starts, longest, longest, **options)
                return out
        outs = []
        for parts in zip(*map(self.split, tensors.values()), strict=True):
            q, k, v = (part.flatten(1, -3).transpose(1, 2) for part in parts)
            out = scaled_dot_product_attention(q, k, v, scale=scale)
            outs.append(out.transpose(1, 2).reshape(*parts[0].shape[:-1], v.shape[-1]))
        return self.join(outs)

    @property
    def lengths(self) -> Tensor:
        """[S] int32: how many tokens each sample has; with ``multiple_of``, the padding last."""
        return self._of_device(self.values.device)[0]

    @property
    def cu_seqlens(self) -> Tensor:
        """[S + 1] int32: where each sample starts, and T: as attention kernels take it."""
        return self._of_device(self.values.device)[1]

    @property
    def lengths_host(self) -> Tensor:
        """`lengths` on the CPU."""
        return self._of_device(torch.device("cpu"))[0]

    @property
    def cu_seqlens_host(self) -> Tensor:
        """`cu_seqlens` on the CPU."""
        return self._of_device(torch.device("cpu"))[1]

    @property
    def max_length(self) -> int:
        """Tokens of the longest sample, the padding included."""
        longest = max(prod(shape[1:]) for shape in self.shapes)
        return longest if self.padding is None else max(longest, self.padding)

    def _of_device(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Computed where they are needed: nothing is copied to the device."""
        if device not in self._lengths:
            parts = [
                torch.full((shape[0],), prod(shape[1:]), dtype=torch.int32, device=device)
                for shape in self.shapes
            ]
            if self.padding is not None:
                parts.append(torch.full((1,), self.padding, dtype=torch.int32, device=device))
            lengths = torch.cat(parts)
            starts = lengths.cumsum(0, dtype=torch.int32)
            self._lengths[device] = lengths, torch.cat([starts.new_zeros(1), starts])
        return self._lengths[device]


def _varlen_attn(query: Tensor) -> Callable[..., Any]:
    """PyTorch's kernel for sequences of several lengths."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(
            "varlen: expected float16 or bfloat16 on a CUDA device, which PyTorch's varlen_attn is "
            f"for, got {query.dtype} on {query.device}"
        )
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise RuntimeError(
            f"varlen: expected a PyTorch with torch.nn.attention.varlen, got {torch.__version__}"
        ) from None
    return varlen_attn


def check_multiple_of(multiple_of: object) -> int:
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, Integral) or multiple_of < 1:
        raise ValueError(f"multiple_of: expected an integer of at least 1, got {multiple_of!r}")
    return int(multiple_of)


def padding_of(shapes: Sequence[tuple[int, ...]], multiple_of: int) -> int | None:
    if multiple_of == 1:
        return None
    return -sum(prod(shape) for shape in shapes) % multiple_of


def _joined(crops: Sequence[Tensor], multiple_of: int) -> Tensor:
    flat = [crop.flatten(0, -2) for crop in crops]
    padding = padding_of([tuple(crop.shape[:-1]) for crop in crops], multiple_of)
    if padding is not None:
        flat.append(flat[0].new_zeros((padding, flat[0].shape[1])))
    return torch.cat(flat)


def check_crops(crops: Sequence[Tensor]) -> None:
    first = crops[0]
    for crop in crops:
        if crop.dim() < 2:
            raise ValueError(
                "x: expected tensors [B, ..., C] with packed=True, got one of shape "
                f"{tuple(crop.shape)}"
            )
        if crop.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"x: expected tensors of one width with packed=True, got {first.shape[-1]} and "
                f"{crop.shape[-1]}"
            )
        if crop.dtype != first.dtype:
            raise TypeError(
                f"x: expected tensors of one dtype with packed=True, got {first.dtype} and "
                f"{crop.dtype}"
            )
        if crop.device != first.device:
            raise ValueError(
                f"x: expected tensors on one device with packed=True, got {first.device} and "
                f"{crop.device}"
            )


def _check_tokens(values: Any, tokens: int, name: str) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(values).__name__}")
    if values.layout is not STRIDED or values.is_nested:
        check_tensor(values, name)
    if values.dim() == 0 or values.shape[0] != tokens:
        raise ValueError(
            f"{name}: expected {tokens} tokens as went in, got shape {tuple(values.shape)}"
        )


class PackedBranch:
    """A branch of tokens as one of a list of crops."""

    def __init__(self, branch: Callable[..., Any], multiple_of: int) -> None:
        self.branch = branch
        self.multiple_of = multiple_of

    def __call__(self, crops: list[Tensor], *args: Any) -> list[Tensor]:
        packed = Packed.of(crops, self.multiple_of)
        return packed.split(self.run(packed, args))

    def run(self, packed: Packed, args: Sequence[Any]) -> Tensor:
        """The branch's output, [T, C]."""
        try:
            out = self.branch(packed, *args)
        except Exception as error:
            if not is_compiling() and isinstance(error, (TypeError, AttributeError)):
                add_note(error, _ON_PACKED)
            raise
        if isinstance(out, Packed):
            out = out.values
        _check_tokens(out, packed.values.shape[0], "branch output")
        return out  # type: ignore[no-any-return]


_ON_PACKED = (
    "sdkernels: with packed=True a branch gets a Packed, whose values are the tokens [T, C] of all "
    "crops, without a dimension for the samples; what needs one runs on packed.split(values)"
)
