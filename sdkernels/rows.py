"""KeptRows: which rows of a batch run a branch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .backends import namespace
from .sampling import Mode, Rescale, Sampler, check_batch, check_generator, check_law, sample_rows
from .schedules import check_probability

__all__ = ["KeptRows"]


P = ParamSpec("P")
T = TypeVar("T")


def normal_tensors(make: Callable[P, T]) -> Callable[P, T]:
    """Rows drawn under torch.inference_mode are for training steps outside of it all the same."""

    @functools.wraps(make)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return make(*args, **kwargs)
        with torch.inference_mode(False):
            return make(*args, **kwargs)

    return outside


@dataclass(frozen=True, eq=False)
class KeptRows:
    """The rows of a batch that run a branch, and the factor on its output.

    Make one with :meth:`sample`, :meth:`from_mask` or :meth:`from_index`; the constructor checks
    types and sizes only (looking at the values of a CUDA tensor would stop the device), and the
    kernels refuse or trap on rows that do not fit together.

    Attributes:
        index: [k] int64, the kept row numbers, unique and ascending.
        slot: [batch] int64, the inverse map: ``slot[index[j]] == j``, and -1 for a dropped row.
        scale: factor on the branch's output.
        weight: [k] floating point, a further factor for each kept row, or None. It may require
            grad: a gate that decides from the input which rows run the branch (Mixture-of-Depths,
            SkipNet) is trained through it. It does not widen the dtype of the result.

    Raises:
        TypeError: `index` or `slot` is not an int64 tensor, `scale` no number, or `weight` not a
            floating point tensor.
        ValueError: they are not contiguous vectors on one device, keep more rows than there are, or
            `weight` does not have one entry a kept row.

    Example:
        >>> rows = KeptRows.from_index(torch.tensor([0, 2]), batch=4, scale=2.0)
        >>> rows.slot
        tensor([ 0, -1,  1, -1])
        >>> from dataclasses import replace
        >>> replace(rows, weight=torch.tensor([0.5, 1.0])).weight
        tensor([0.5000, 1.0000])
    """

    index: Tensor
    slot: Tensor
    scale: float = 1.0
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("index", self.index), ("slot", self.slot)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name}: expected an int64 tensor, got {got}")
            if tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: expected a contiguous tensor of one dimension, got shape "
                    f"{tuple(tensor.shape)} and strides {tensor.stride()}"
                )
        if self.index.device != self.slot.device:
            raise ValueError(
                f"index: expected the device of slot, {self.slot.device}, got {self.index.device}"
            )
        if self.index.shape[0] > self.slot.shape[0]:
            raise ValueError(
                f"index: {self.index.shape[0]} kept rows of a batch of {self.slot.shape[0]}"
            )
        if not isinstance(self.scale, Real):
            raise TypeError(f"scale: expected a number, got {type(self.scale).__name__}")
        if self.weight is not None:
            self._check_weight(self.weight)

    def _check_weight(self, weight: object) -> None:
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight: expected a floating point tensor, got {got}")
        if weight.shape != self.index.shape:
            raise ValueError(
                f"weight: expected shape [{self.k}], one entry a kept row, got {list(weight.shape)}"
            )
        if weight.device != self.index.device:
            raise ValueError(
                f"weight: expected the device of index, {self.index.device}, got {weight.device}"
            )

    @classmethod
    def _trusted(
        cls, index: Tensor, slot: Tensor, scale: float, weight: Tensor | None = None
    ) -> KeptRows:
        """Rows that this package has just drawn: no checks, this is on the path of every call."""
        rows = object.__new__(cls)
        fields = {"index": index, "slot": slot, "scale": scale, "weight": weight}
        if is_compiling():  # PyTorch before 2.13 does not trace the line below
            for name, value in fields.items():
                object.__setattr__(rows, name, value)
        else:
            rows.__dict__.update(fields)
        return rows

    @classmethod
    @normal_tensors
    def sample(
        cls,
        batch: int,
        p: float,
        *,
        mode: Mode = "row",
        sampler: Sampler = "bernoulli",
        rescale: Rescale = "train",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> KeptRows:
        """Draw the rows to keep.

        Rows are drawn on the host and sent to the device in one copy, without synchronisation: a
        seed gives the same rows on every device.

        Args:
            batch: number of rows B.
            p: drop probability.
            mode: "row" decides for each row, "batch" once for all.
            sampler: "bernoulli" keeps each row with probability 1 - p; "fixed" keeps exactly
                ``clamp(round(B * (1 - p)), 1, B)`` rows, every such subset equally likely;
                "rounded" rounds ``B * (1 - p)`` up with the probability of its fractional part,
                else down, and keeps that many rows, every such subset equally likely: each row with
                probability 1 - p, none of them where that is rounded to 0.
            rescale: "train" makes the scale 1 / (1 - p) (Bernoulli, rounded) or B / k (fixed);
                "eval" leaves it at 1 (times B * (1 - p) / k for the fixed count, which its rounding
                may put beside 1); "none" is 1.
            generator: CPU generator to draw from. Default: PyTorch's, which
                ``torch.manual_seed`` seeds and activation checkpointing restores.
            device: where `index` and `slot` go. Default: CPU.

        Returns:
            KeptRows of a batch of `batch` rows.

        Raises:
            TypeError: `p` is not a number.
            ValueError: `p` lies outside [0, 1], `batch` is no count, an unknown `mode`, `sampler`
                or `rescale`, "fixed" or "rounded" together with mode="batch", "balanced" (a
                plan's), or a generator that is not on the CPU.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> rows = KeptRows.sample(8, 0.5, sampler="fixed")
            >>> rows.k, rows.batch, rows.scale
            (4, 8, 2.0)
        """
        p = check_probability(p)
        check_law(mode, sampler, rescale)
        check_generator(generator)
        if device is not None:
            device = torch.device(device)
        return draw(check_batch(batch), p, mode, sampler, rescale, generator, device)

    @classmethod
    @normal_tensors
    def from_mask(
        cls,
        mask: Tensor,
        scale: float = 1.0,
        *,
        k: int | None = None,
        weight: Tensor | None = None,
    ) -> KeptRows:
        """The rows where a mask is true.

        Args:
            mask: [B] bool, true for a kept row.
            scale: factor on the branch's output.
            k: the number of true entries. Default: it is counted, which for a CUDA mask waits for
                the device.
            weight: [k] or [B] floating point, a factor for each kept row or, of which those of the
                kept rows are taken, for each row of the batch. Where k equals B both mean the same.

        Raises:
            TypeError: `mask` is not a bool tensor, `weight` not a floating point tensor, or `k` no
                integer.
            ValueError: `mask` does not have one dimension, `k` is not the number of its true
                entries (on CUDA a wrong one stops the kernel that finds out), or `weight` has
                another shape.

        Example:
            >>> KeptRows.from_mask(torch.tensor([True, False, True])).index
            tensor([0, 2])
            >>> gate = torch.tensor([0.9, 0.2, 0.7])
            >>> KeptRows.from_mask(gate > 0.5, weight=gate).weight
            tensor([0.9000, 0.7000])
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a bool tensor, got {got}")
        if mask.dim() != 1:
            raise ValueError(f"mask: expected shape [batch], got {tuple(mask.shape)}")
        if k is not None and (not isinstance(k, Integral) or isinstance(k, bool)):
            raise TypeError(f"k: expected an integer, got {type(k).__name__}")
        index, slot = namespace.ops.compact_mask(mask, k)
        return cls(index, slot, scale, _weight_of_kept(weight, index, slot))

    @classmethod
    @normal_tensors
    def from_index(
        cls, index: Tensor, batch: int, scale: float = 1.0, *, weight: Tensor | None = None
    ) -> KeptRows:
        """The rows with these numbers.

        Looking at a CUDA index waits for the device.

        Args:
            index: [k] int64, unique and ascending, each in [0, batch).
            batch: number of rows B.
            scale: factor on the branch's output.
            weight: [k] or [B] floating point, as in :meth:`from_mask`.

        Raises:
            TypeError: `index` is not an int64 tensor, or `weight` not a floating point tensor.
            ValueError: `index` is not a vector, not ascending, repeats a row or names one outside
                the batch, or `weight` has another shape.

        Example:
            >>> KeptRows.from_index(torch.tensor([1, 2]), batch=3).slot
            tensor([-1,  0,  1])
        """
        batch = check_batch(batch)
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index: expected an int64 tensor, got {got}")
        if index.dim() != 1:
            raise ValueError(f"index: expected shape [k], got {tuple(index.shape)}")
        index = index.clone() if index.is_inference() else index.contiguous()
        if index.shape[0]:
            first, last = index.amin().item(), index.amax().item()
            if first < 0 or last >= batch:
                raise ValueError(
                    f"index: expected row numbers from 0 to {batch - 1}, got {first} to {last}"
                )
            if not bool((index[1:] > index[:-1]).all()):
                raise ValueError(
                    f"index: expected unique, ascending row numbers, got {index.tolist()} "
                    "(KeptRows.from_mask takes rows in any order)"
                )
        slot = index.new_full((batch,), -1)
        slot[index] = torch.arange(index.shape[0], device=index.device)
        return cls(index, slot, scale, _weight_of_kept(weight, index, slot))

    @property
    def batch(self) -> int:
        """Number of rows B of the batch."""
        return self.slot.numel()

    @property
    def k(self) -> int:
        """Number of kept rows."""
        return self.index.numel()  # of one dimension; `shape` is slower

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> KeptRows:
        """The same rows on another device."""
        index, slot, weight = (
            None if tensor is None else tensor.to(device, non_blocking=non_blocking)
            for tensor in (self.index, self.slot, self.weight)
        )
        assert index is not None
        assert slot is not None
        return KeptRows._trusted(index, slot, self.scale, weight)


def _weight_of_kept(weight: Tensor | None, index: Tensor, slot: Tensor) -> Tensor | None:
    """The weights of the kept rows, from theirs or from those of the whole batch."""
    if isinstance(weight, Tensor) and weight.shape == slot.shape != index.shape:
        return weight.index_select(0, index)
    if isinstance(weight, Tensor) and weight.is_inference():
        return weight.clone()
    return weight


def draw(
    batch: int,
    p: float,
    mode: str,
    sampler: str,
    rescale: str,
    generator: torch.Generator | None,
    device: torch.device | None,
) -> KeptRows:
    """KeptRows.sample for a `batch`, `p` and `generator` that were looked at before."""
    index, slot, scale = sample_rows(batch, p, mode, sampler, rescale, generator, device)
    return KeptRows._trusted(index, slot, scale)
