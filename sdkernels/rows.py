"""Which rows run a branch: KeptRows, the samplers, and DepthPlan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from sdkernels.ops import C, is_compiling
from sdkernels.schedules import check_probability

__all__ = ["DepthPlan", "KeptRows"]

P = ParamSpec("P")
T = TypeVar("T")

MODES = ("row", "batch")
SAMPLERS = ("bernoulli", "fixed")
RESCALES = ("train", "eval", "none")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def check_law(mode: object, sampler: object, rescale: object) -> None:
    """The options that say what is drawn, and how it is scaled."""
    check_choice("mode", mode, MODES)
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("rescale", rescale, RESCALES)
    if sampler == "fixed" and mode == "batch":
        raise ValueError(
            'sampler: "fixed" keeps a fixed number of rows, which mode="batch" has no choice of; '
            'use sampler="bernoulli"'
        )


def _check_batch(batch: object) -> int:
    if not isinstance(batch, Integral) or isinstance(batch, bool) or batch < 0:
        raise ValueError(f"batch: expected the number of rows of the batch, got {batch!r}")
    return int(batch)


def _check_batches(batch: object) -> list[int]:
    if not isinstance(batch, (list, tuple)):
        return [_check_batch(batch)]
    if not batch:
        raise ValueError("batch: expected at least one number of rows, got an empty list")
    return [_check_batch(each) for each in batch]


def _check_counter(name: str, value: object, bits: int) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 2**bits:
        return int(value)
    raise ValueError(f"{name}: expected an integer from 0 to 2**{bits} - 1, got {value!r}")


def _process_rank() -> int:
    """This process' rank in torch.distributed's default group; 0 where there is none."""
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if started else 0


def check_generator(generator: object) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(
            "generator: expected a CPU generator (rows are drawn on the host, so that a seed gives "
            f"the same rows on every device), got one on {generator.device}"
        )


def fixed_count(batch: int, p: float) -> int:
    """The rows that ``sampler="fixed"`` keeps: ``clamp(round(batch * (1 - p)), 1, batch)``.

    Computed exactly from the decimal text of `p`, so that binary rounding cannot change it
    (``int(10 * (1 - 0.8))`` is 1); a half is rounded to even, as Python's ``round`` does.

    >>> fixed_count(10, 0.8), fixed_count(2, 0.9), fixed_count(0, 0.5)
    (2, 1, 0)
    """
    return min(max(round(batch * (1 - Fraction(repr(p)))), 1), batch)


@lru_cache(maxsize=4096)
def _law(batch: int, p: float, mode: str, sampler: str, rescale: str) -> tuple[C.Draw, float]:
    """What to draw, and the scale of the kept rows; the arguments were looked at before."""
    count = fixed_count(batch, p) if sampler == "fixed" else -1
    draw = C.Draw(1.0 - p, count, sampler == "bernoulli" and mode == "batch")
    return draw, _scale(batch, count, p, sampler, rescale)


def _scale(batch: int, count: int, p: float, sampler: str, rescale: str) -> float:
    """The scale of the kept rows, of which "fixed" keeps `count`."""
    keep = 1.0 - p
    if sampler == "fixed":
        # Every row is kept with probability count / batch. "eval" multiplies by keep in evaluation,
        # so training must average to keep as well: 1 but for the rounding of count.
        inverse = batch / count if count else 1.0
        return {"train": inverse, "eval": keep * inverse, "none": 1.0}[rescale]
    return 1.0 / keep if rescale == "train" and keep > 0 else 1.0


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
        rows.__dict__.update(index=index, slot=slot, scale=scale, weight=weight)
        return rows

    @classmethod
    def sample(
        cls,
        batch: int,
        p: float,
        *,
        mode: str = "row",
        sampler: str = "bernoulli",
        rescale: str = "train",
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
                ``clamp(round(B * (1 - p)), 1, B)`` rows, every such subset equally likely.
            rescale: "train" makes the scale 1 / (1 - p) (Bernoulli) or B / k (fixed); "eval" leaves
                it at 1 (times B * (1 - p) / k for the fixed count, which its rounding may put
                beside 1); "none" is 1.
            generator: CPU generator to draw from. Default: PyTorch's, which
                ``torch.manual_seed`` seeds and activation checkpointing restores.
            device: where `index` and `slot` go. Default: CPU.

        Returns:
            KeptRows of a batch of `batch` rows.

        Raises:
            TypeError: `p` is not a number.
            ValueError: `p` lies outside [0, 1], `batch` is no count, an unknown `mode`, `sampler`
                or `rescale`, "fixed" together with mode="batch", or a generator that is not on the
                CPU.

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
        return draw(_check_batch(batch), p, mode, sampler, rescale, generator, device)

    @classmethod
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
        index, slot = torch.ops.sdkernels.compact_mask(mask, k)
        return cls(index, slot, scale, _weight_of_kept(weight, index, slot))

    @classmethod
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
        batch = _check_batch(batch)
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index: expected an int64 tensor, got {got}")
        if index.dim() != 1:
            raise ValueError(f"index: expected shape [k], got {tuple(index.shape)}")
        index = index.contiguous()
        if index.shape[0]:
            first, last = index.amin().item(), index.amax().item()
            if first < 0 or last >= batch:
                raise ValueError(
                    f"index: expected row numbers from 0 to {batch - 1}, got {first} to {last}"
                )
            if not bool((index[1:] > index[:-1]).all()):
                raise ValueError(
                    f"index: expected unique, ascending row numbers, got {index.tolist()}"
                )
        slot = index.new_full((batch,), -1)
        slot[index] = torch.arange(index.shape[0], device=index.device)
        return cls(index, slot, scale, _weight_of_kept(weight, index, slot))

    @property
    def batch(self) -> int:
        """Number of rows B of the batch."""
        return self.slot.shape[0]

    @property
    def k(self) -> int:
        """Number of kept rows."""
        return self.index.shape[0]

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
    if is_compiling():
        return _draw_in_graph(batch, p, mode, sampler, rescale, generator, device)
    law, scale = _law(batch, p, mode, sampler, rescale)
    index, slot = C.sample_rows(batch, law, generator, device)
    return KeptRows._trusted(index, slot, scale)


def _draw_in_graph(
    batch: int,
    p: float,
    mode: str,
    sampler: str,
    rescale: str,
    generator: torch.Generator | None,
    device: torch.device | None,
) -> KeptRows:
    host = torch.device("cpu")
    device = host if device is None else device
    if generator is None:
        index, slot = torch.ops.sdkernels.sample_rows(
            batch, p, mode, sampler, _next_draw(), device.type == "cuda", device=host
        )
    else:
        _warn_of_graph_break("rows from a generator= of their own")
        index, slot = _sample_outside_graph(batch, p, mode, sampler, generator)
    rows = KeptRows._trusted(index, slot, _scale(batch, index.shape[0], p, sampler, rescale))
    return rows if device == host else rows.to(device, non_blocking=True)


def _at_trace_time(function: Callable[P, T]) -> Callable[P, T]:
    """Has torch.compile call the function while it traces, and take the result for a constant.

    It is ``torch.compiler.assume_constant_result``, which loads the compiler when it is called.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


_draws = count()


@_at_trace_time
def _next_draw() -> int:
    """A number of its own for each draw of a graph: PyTorch merges calls with equal arguments."""
    return next(_draws)


_warned: set[str] = set()


@_at_trace_time
def _warn_of_graph_break(what: str) -> None:
    """Once for each reason."""
    if what not in _warned:
        _warned.add(what)
        warnings.warn(
            f"sdkernels: drawing {what} inside a compiled region breaks its graph at every draw; "
            'draw a DepthPlan outside and pass rows=, or use sampler="fixed" and the default '
            "generator (the README's section on torch.compile has more)",
            stacklevel=2,
        )


# The sampler as an op: an op of a graph runs at every call, where Python code has run when it was
# traced. Its rows are those that eager code draws from the same seed. PyTorch saves and restores
# the generator of `device` around an op that a checkpoint runs twice: rows are drawn on the host.
# A CUDA graph would replay the rows that it has seen, so Inductor leaves the op out of them.
@torch.library.custom_op(
    "sdkernels::sample_rows",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def _sample_rows(
    batch: int,
    p: float,
    mode: str,
    sampler: str,
    draw: int,
    pin_memory: bool,
    *,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    law, _ = _law(batch, p, mode, sampler, "none")
    index, slot = C.sample_rows(batch, law, None, device)
    return (index.pin_memory(), slot.pin_memory()) if pin_memory else (index, slot)


@_sample_rows.register_fake
def _(
    batch: int,
    p: float,
    mode: str,
    sampler: str,
    draw: int,
    pin_memory: bool,
    *,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    kept: int | torch.SymInt
    if sampler == "fixed":
        # Exact for a known number of rows only: a symbolic one becomes a constant of the graph.
        kept = fixed_count(int(batch), p)
    else:
        try:
            kept = torch.library.get_ctx().new_dynamic_size()
        except RuntimeError:  # without fullgraph=True, PyTorch leaves such an op out of the graph
            _warn_of_graph_break("Bernoulli rows, whose number is not known beforehand,")
            raise
        torch._check(kept <= batch)
    index = torch.empty(kept, dtype=torch.int64, device=device)
    return index, torch.empty(batch, dtype=torch.int64, device=device)


@torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable loads the compiler
def _sample_outside_graph(
    batch: int, p: float, mode: str, sampler: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    law, _ = _law(batch, p, mode, sampler, "none")
    return C.sample_rows(batch, law, generator, None)


class DepthPlan:
    """The kept rows of every branch of a step, drawn together and sent to the device in one copy.

    Make one with :meth:`sample` or :meth:`for_step`. ``len(plan)`` is the number of branches and
    ``plan[i]`` the :class:`KeptRows` of branch i; of a plan for a list of batches (multi-crop), the
    list of their KeptRows. :meth:`resample_` draws the next step's rows into the same memory: with
    ``sampler="fixed"`` shapes and addresses stay as they are, which is what a captured CUDA graph
    needs.
    """

    def __init__(
        self,
        batch: int | Sequence[int],
        drop_probs: Iterable[float],
        mode: str,
        sampler: str,
        rescale: str,
        device: torch.device | str | None,
        generator: torch.Generator | None = None,
        step: tuple[int, int, int] | None = None,
    ) -> None:
        self._batches = _check_batches(batch)
        self._is_list = isinstance(batch, (list, tuple))
        check_law(mode, sampler, rescale)
        check_generator(generator)
        if not isinstance(drop_probs, Iterable) or isinstance(drop_probs, str):
            raise TypeError(
                f"drop_probs: expected a list of probabilities, got {type(drop_probs).__name__}"
            )
        # One list for each branch, with one entry for each batch.
        self._laws = [
            [_law(batch, check_probability(p), mode, sampler, rescale) for batch in self._batches]
            for p in drop_probs
        ]
        self._generator = generator
        self._step = step
        self._views: dict[int, KeptRows | list[KeptRows]] = {}
        target = torch.device("cpu" if device is None else device)
        rows, self._kept = self._draw(target)
        # [branches, 2, rows of all batches]: slot, then index, batch after batch; of the space for
        # the index of a batch, the first kept[branch][batch] entries are used.
        self._rows = rows.to(target, non_blocking=True)

    @classmethod
    def sample(
        cls,
        batch: int | Sequence[int],
        drop_probs: Iterable[float],
        *,
        mode: str = "row",
        sampler: str = "bernoulli",
        rescale: str = "train",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> DepthPlan:
        """Draw the rows of every branch.

        Args:
            batch: number of rows B; or a list of them, for branches that take a list of tensors
                (multi-crop).
            drop_probs: one drop probability a branch, for example from
                :func:`sdkernels.linear_decay`.
            mode, sampler, rescale, device: as in :meth:`KeptRows.sample`.
            generator: CPU generator to draw from, by :meth:`resample_` too. Default: PyTorch's.

        Returns:
            A plan of ``len(drop_probs)`` branches; rows, branches and batches are independent.

        Raises:
            TypeError, ValueError: as :meth:`KeptRows.sample`, or an empty list of batches.

        Example:
            >>> plan = DepthPlan.sample(8, [0.25, 0.5], sampler="fixed")
            >>> [rows.k for rows in plan]
            [6, 4]
            >>> crops = DepthPlan.sample([8, 20], [0.25, 0.5], sampler="fixed")
            >>> [[rows.k for rows in branch] for branch in crops]
            [[6, 15], [4, 10]]
        """
        return cls(batch, drop_probs, mode, sampler, rescale, device, generator)

    @classmethod
    def for_step(
        cls,
        seed: int,
        step: int,
        batch: int | Sequence[int],
        drop_probs: Iterable[float],
        *,
        rank: int | None = None,
        mode: str = "row",
        sampler: str = "bernoulli",
        rescale: str = "train",
        device: torch.device | str | None = None,
    ) -> DepthPlan:
        """Draw the rows of a training step as a function of its number.

        The rows follow from the arguments alone, whatever else has drawn random numbers before
        (data loading, dropout, an interrupted run), and on every device. No generator is read or
        advanced. :meth:`resample_` goes on to ``step + 1``.

        Args:
            seed: seed of the run, from 0 to 2**64 - 1.
            step: number of the step, from 0 to 2**64 - 1; with gradient accumulation, of the
                forward pass.
            batch, drop_probs, mode, sampler, rescale, device: as in :meth:`sample`.
            rank: which of the processes that train on different samples this is, from 0 to
                2**32 - 1; each has rows of its own. Default: the rank in torch.distributed's
                default process group, 0 where there is none. Processes that share a batch (tensor
                or pipeline parallel) must be given the same number.

        Returns:
            A plan of ``len(drop_probs)`` branches. Plans of other seeds, steps or ranks are
            independent of it: the numbers come from the counter-based generator Philox4x32-10,
            with the seed as key and the step and the rank in its counter, so that no two streams of
            a seed overlap.

        Raises:
            TypeError, ValueError: as :meth:`sample`, or a `seed`, `step` or `rank` out of range.

        Reference:
            Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

        Example:
            >>> plan = DepthPlan.for_step(seed=1, step=1000, batch=8, drop_probs=[0.25, 0.5])
            >>> again = DepthPlan.for_step(seed=1, step=999, batch=8, drop_probs=[0.25, 0.5])
            >>> again = again.resample_()
            >>> all(torch.equal(a.slot, b.slot) for a, b in zip(plan, again))
            True
        """
        key = (
            _check_counter("seed", seed, 64),
            _check_counter("step", step, 64),
            _check_counter("rank", _process_rank() if rank is None else rank, 32),
        )
        return cls(batch, drop_probs, mode, sampler, rescale, device, step=key)

    def resample_(self) -> DepthPlan:
        """Draw new rows for every branch, in place; returns self.

        A plan of :meth:`for_step` goes on to the next step. KeptRows taken from the plan before
        share its memory: they change with it for the fixed sampler, and are out of date for the
        Bernoulli one, whose number of rows changes. A graph whose backward has not run yet refuses
        rows that were refreshed under it, as PyTorch refuses any saved tensor that was modified in
        place.
        """
        if self._step is not None:
            seed, step, rank = self._step
            self._step = (seed, (step + 1) % 2**64, rank)
        rows, kept = self._draw(self.device)
        self._rows.copy_(rows, non_blocking=True)
        if kept != self._kept:
            self._views.clear()
        self._kept = kept
        return self

    @property
    def batch(self) -> Any:
        """Number of rows B of the batch; of a plan for a list of batches, the list of theirs."""
        return list(self._batches) if self._is_list else self._batches[0]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._rows.device

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, branch: int) -> Any:
        if not isinstance(branch, int):
            raise TypeError(f"plan indices must be integers, got {type(branch).__name__}")
        if is_compiling():
            # Views that a graph remembers between calls are a reason to compile it again.
            views = self._views_of(branch)
            return views if self._is_list else views[0]
        view = self._views.get(branch)
        if view is None:
            views = self._views_of(branch)
            view = self._views[branch] = views if self._is_list else views[0]
        # The list is the caller's; the rows in it are frozen.
        return list(view) if isinstance(view, list) else view

    def __iter__(self) -> Iterator[Any]:
        return (self[branch] for branch in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        # Views that were pickled would come back with memory of their own.
        return {**self.__dict__, "_views": {}}

    def __repr__(self) -> str:
        kept = self._kept if self._is_list else [k for (k,) in self._kept]
        return f"DepthPlan(batch={self.batch}, kept={kept}, device={str(self.device)!r})"

    def _views_of(self, branch: int) -> list[KeptRows]:
        kept, laws = self._kept[branch], self._laws[branch]
        slot, index = self._rows[branch].unbind()
        views = []
        start = 0
        for batch, k, (_, scale) in zip(self._batches, kept, laws, strict=True):
            rows = KeptRows._trusted(index[start : start + k], slot[start : start + batch], scale)
            views.append(rows)
            start += batch
        return views

    def _draw(self, device: torch.device) -> tuple[Tensor, list[list[int]]]:
        draws = [law for laws in self._laws for law, _ in laws]
        step = None if self._step is None else C.StepKey(*self._step)
        pin_memory = device.type == "cuda"
        rows, kept = C.sample_plan(self._batches, draws, self._generator, step, pin_memory)
        crops = len(self._batches)
        return rows, [kept[i : i + crops] for i in range(0, len(kept), crops)]
