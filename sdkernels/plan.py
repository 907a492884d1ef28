"""DepthPlan: the kept rows of every branch of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, cast, overload

import torch
from torch import Tensor

from .backends.balanced import sample_balanced_plan
from .backends.ops import host, is_compiling
from .backends.sampler import StepKey
from .rows import KeptRows, normal_tensors
from .sampling import (
    PLAN_SAMPLERS,
    Mode,
    PlanSampler,
    Rescale,
    Rounded,
    check_batch,
    check_generator,
    check_law,
    is_capturing,
    law,
    refuse_capture,
)
from .schedules import check_probability
from .tracing import fake_mode, outlasting, refuse_fixed_rows

__all__ = ["BranchLaw", "DepthPlan"]


class BranchLaw(NamedTuple):
    """How the rows of a branch are drawn, and by what rule their scale is made."""

    p: float
    mode: str
    sampler: str
    rescale: str


def _branch_laws(drop_probs: object, mode: str, sampler: str, rescale: str) -> list[BranchLaw]:
    check_law(mode, sampler, rescale, PLAN_SAMPLERS)
    if not isinstance(drop_probs, Iterable) or isinstance(drop_probs, str):
        raise TypeError(
            f"drop_probs: expected a list of probabilities, got {type(drop_probs).__name__}"
        )
    return [
        BranchLaw(check_probability(p, "drop_probs"), mode, sampler, rescale) for p in drop_probs
    ]


def _check_kinds(kinds: object, sampler: str) -> int:
    if not isinstance(kinds, Integral) or isinstance(kinds, bool) or kinds < 1:
        raise ValueError(f"kinds: expected a number of kinds of branches from 1, got {kinds!r}")
    if kinds != 1 and sampler != "balanced":
        raise ValueError(f'kinds: expected sampler="balanced" beside it, got sampler="{sampler}"')
    return int(kinds)


# In place of a rank: what is drawn with it is the same on all of them.
_ALL_RANKS = 2**32 - 1


def step_key(seed: object, step: object, rank: object) -> tuple[int, int, int]:
    """What the rows of a step are drawn from, the rank by default that of this process."""
    return (
        _check_counter("seed", seed, 64),
        _check_counter("step", step, 64),
        _check_counter("rank", _process_rank() if rank is None else rank, 32),
    )


def _check_batches(batch: object) -> list[int]:
    if not isinstance(batch, (list, tuple)):
        return [check_batch(batch)]
    if not batch:
        raise ValueError("batch: expected at least one number of rows, got an empty list")
    return [check_batch(each) for each in batch]


def _check_counter(name: str, value: object, bits: int) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 2**bits:
        return int(value)
    raise ValueError(f"{name}: expected an integer from 0 to 2**{bits} - 1, got {value!r}")


def _process_rank() -> int:
    """This process' rank in torch.distributed's default group; 0 where there is none."""
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if started else 0


# KeptRows; of a plan for a list of batches, a list of them.
if TYPE_CHECKING:
    from typing_extensions import TypeVar

    R = TypeVar("R", bound=KeptRows | list[KeptRows], default=KeptRows)
else:
    from typing import TypeVar

    R = TypeVar("R")  # the standard library's has no default before Python 3.13


class DepthPlan(Generic[R]):
    """The kept rows of every branch of a step, drawn together and sent to the device in one copy.

    Make one with :meth:`sample` or :meth:`for_step`. ``len(plan)`` is the number of branches and
    ``plan[i]`` the :class:`KeptRows` of branch i; of a plan for a list of batches (multi-crop), the
    list of their KeptRows. :meth:`resample_` draws the next step's rows into the same memory: with
    ``sampler="fixed"`` shapes and addresses stay as they are, which is what a captured CUDA graph
    needs.
    """

    @normal_tensors
    def __init__(
        self,
        batch: int | Sequence[int],
        branches: Sequence[BranchLaw],
        device: torch.device | str | None,
        generator: torch.Generator | None = None,
        step: tuple[int, int, int] | None = None,
        kinds: int = 1,
    ) -> None:
        self._batches = _check_batches(batch)
        self._is_list = isinstance(batch, (list, tuple))
        check_generator(generator)
        self._branches = tuple(branches)
        # One list for each branch, with one entry for each batch.
        self._laws = [[law(batch, *branch) for batch in self._batches] for branch in self._branches]
        samplers = {branch.sampler for branch in self._branches}
        if step is not None and step[2] == _ALL_RANKS and samplers & {"rounded", "balanced"}:
            raise ValueError(
                'rank: expected an integer from 0 to 2**32 - 2 with sampler="rounded" or '
                '"balanced", which draw what all ranks share with the number above'
            )
        self._kinds = kinds
        self._counts_vary = any(branch.sampler != "fixed" for branch in self._branches)
        self._generator = generator
        self._step = step
        self._views: dict[int, list[KeptRows]] = {}
        target = torch.device("cpu" if device is None else device)
        refuse_capture()
        fake = fake_mode()
        rows, self._kept = self._draw(target, fake)
        # [branches, 2, rows of all batches]: slot, then index, batch after batch; of the space for
        # the index of a batch, the first kept[branch][batch] entries are used.
        if fake is None:
            self._rows = outlasting(lambda: rows.to(target, non_blocking=True))
        else:  # the mode has devices that are not there
            self._rows = rows.to(target, non_blocking=True)

    @overload
    @classmethod
    def sample(
        cls,
        batch: int,
        drop_probs: Iterable[float],
        *,
        mode: Mode = "row",
        sampler: PlanSampler = "bernoulli",
        rescale: Rescale = "train",
        kinds: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> DepthPlan[KeptRows]: ...

    @overload
    @classmethod
    def sample(
        cls,
        batch: Sequence[int],
        drop_probs: Iterable[float],
        *,
        mode: Mode = "row",
        sampler: PlanSampler = "bernoulli",
        rescale: Rescale = "train",
        kinds: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> DepthPlan[list[KeptRows]]: ...

    @classmethod
    def sample(
        cls,
        batch: int | Sequence[int],
        drop_probs: Iterable[float],
        *,
        mode: Mode = "row",
        sampler: PlanSampler = "bernoulli",
        rescale: Rescale = "train",
        kinds: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> DepthPlan[Any]:
        """Draw the rows of every branch.

        Args:
            batch: number of rows B; or a list of them, for branches that take a list of tensors
                (multi-crop).
            drop_probs: one drop probability a branch, for example from
                :func:`sdkernels.linear_decay`.
            mode, rescale, device: as in :meth:`KeptRows.sample`.
            sampler: as there, or "balanced": each row of each branch is kept with probability 1 - p
                of the branch, and all branches together keep ``sum(B * (1 - p))`` rows, rounded up
                or down at random. How many a single branch keeps varies nearly as under
                "bernoulli". (Systematic sampling of the pairs of a branch and a row, in a random
                order.) The scale is Bernoulli's.
            kinds: of "balanced": branches i, i + kinds, ... cost the same, and each of these groups
                has its sum. 2 where attention and MLP take turns.
            generator: CPU generator to draw from, by :meth:`resample_` too. Default: PyTorch's.

        Returns:
            A plan of ``len(drop_probs)`` branches. Branches and batches are independent; under
            "balanced", batches are, and the fixed sum makes any two pairs of a branch and a row
            exclude each other slightly, with a correlation of about -1 / (their number).

        Raises:
            TypeError, ValueError: as :meth:`KeptRows.sample`, an empty list of batches, or `kinds`
                below 1 or with another sampler.

        Example:
            >>> plan = DepthPlan.sample(8, [0.25, 0.5], sampler="fixed")
            >>> [rows.k for rows in plan]
            [6, 4]
            >>> crops = DepthPlan.sample([8, 20], [0.25, 0.5], sampler="fixed")
            >>> [[rows.k for rows in branch] for branch in crops]
            [[6, 15], [4, 10]]
        """
        branches = _branch_laws(drop_probs, mode, sampler, rescale)
        kinds = _check_kinds(kinds, sampler)
        return cls(batch, branches, device, generator, kinds=kinds)

    @overload
    @classmethod
    def for_step(
        cls,
        seed: int,
        step: int,
        batch: int,
        drop_probs: Iterable[float],
        *,
        rank: int | None = None,
        mode: Mode = "row",
        sampler: PlanSampler = "bernoulli",
        rescale: Rescale = "train",
        kinds: int = 1,
        device: torch.device | str | None = None,
    ) -> DepthPlan[KeptRows]: ...

    @overload
    @classmethod
    def for_step(
        cls,
        seed: int,
        step: int,
        batch: Sequence[int],
        drop_probs: Iterable[float],
        *,
        rank: int | None = None,
        mode: Mode = "row",
        sampler: PlanSampler = "bernoulli",
        rescale: Rescale = "train",
        kinds: int = 1,
        device: torch.device | str | None = None,
    ) -> DepthPlan[list[KeptRows]]: ...

    @classmethod
    def for_step(
        cls,
        seed: int,
        step: int,
        batch: int | Sequence[int],
        drop_probs: Iterable[float],
        *,
        rank: int | None = None,
        mode: Mode = "row",
        sampler: PlanSampler = "bernoulli",
        rescale: Rescale = "train",
        kinds: int = 1,
        device: torch.device | str | None = None,
    ) -> DepthPlan[Any]:
        """Draw the rows of a training step as a function of its number.

        The rows follow from the arguments alone, whatever else has drawn random numbers before
        (data loading, dropout, an interrupted run), and on every device. No generator is read or
        advanced. :meth:`resample_` goes on to ``step + 1``.

        Args:
            seed: seed of the run, from 0 to 2**64 - 1.
            step: number of the step, from 0 to 2**64 - 1; with gradient accumulation, of the
                forward pass.
            batch, drop_probs, mode, rescale, kinds, device: as in :meth:`sample`.
            sampler: as there. What "rounded" and "balanced" round goes the same way on all ranks:
                with the same `batch` and `drop_probs`, all of them keep as many rows in each
                branch ("rounded") or in each kind of branches together ("balanced").
            rank: which of the processes that train on different samples this is, from 0 to
                2**32 - 1 (2**32 - 2 for "rounded" and "balanced"); each has rows of its own.
                Default: the rank in torch.distributed's default process group, 0 where there is
                none. Processes that share a batch (tensor or pipeline parallel) must be given the
                same number.

        Returns:
            A plan of ``len(drop_probs)`` branches. Plans of other seeds, steps or ranks are
            independent of it (but for what ranks round alike): the numbers come from the
            counter-based generator Philox4x32-10, with the seed as key and the step and the rank in
            its counter, so that no two streams of a seed overlap.

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
        key = step_key(seed, step, rank)
        branches = _branch_laws(drop_probs, mode, sampler, rescale)
        return cls(batch, branches, device, step=key, kinds=_check_kinds(kinds, sampler))

    def resample_(self) -> DepthPlan[R]:
        """Draw new rows for every branch, in place; returns self.

        A plan of :meth:`for_step` goes on to the next step. KeptRows taken from the plan before
        share its memory: they change with it for the fixed sampler, and are out of date for the
        others, whose number of rows changes. A graph whose backward has not run yet refuses
        rows that were refreshed under it, as PyTorch refuses any saved tensor that was modified in
        place.
        """
        refuse_capture()
        now = self._step
        if now is not None:
            seed, step, rank = now
            self._step = (seed, (step + 1) % 2**64, rank)
        try:
            # A plan stays what it was made as: fake, or with rows in memory under any mode.
            rows, kept = self._draw(self.device, getattr(self._rows, "fake_mode", None))
            outlasting(lambda: self._rows.copy_(rows, non_blocking=True))
        except BaseException:
            self._step = now
            raise
        if kept != self._kept:
            self._views.clear()
        self._kept = kept
        return self

    @property
    def batch(self) -> int | list[int]:
        """Number of rows B of the batch; of a plan for a list of batches, the list of theirs."""
        return list(self._batches) if self._is_list else self._batches[0]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._rows.device

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, branch: int) -> R:
        if not isinstance(branch, int) or isinstance(branch, bool):
            raise TypeError(f"plan indices must be integers, got {type(branch).__name__}")
        if is_compiling():
            # Views that a graph remembers between calls are a reason to compile it again.
            views = self._views_of(branch)
        else:
            if self._counts_vary and is_capturing():
                raise RuntimeError(
                    'plan: expected sampler="fixed" while a CUDA graph is being captured: the '
                    "number of other rows changes with resample_(), and the shapes of a graph "
                    "cannot"
                )
            if branch not in self._views:
                self._views[branch] = outlasting(lambda: self._views_of(branch))
            views = self._views[branch]
        # The list is the caller's; the rows in it are frozen.
        return cast("R", list(views) if self._is_list else views[0])

    def __iter__(self) -> Iterator[R]:
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

    def _draw(self, device: torch.device, fake: Any) -> tuple[Tensor, list[list[int]]]:
        """The rows on the host, or such of a FakeTensorMode; and how many each branch keeps."""
        refuse_fixed_rows()
        pin_memory = device.type == "cuda" and fake is None
        rows, kept = outlasting(lambda: self._draw_on_host(pin_memory))
        return rows if fake is None else fake.from_tensor(rows, static_shapes=True), kept

    def _draw_on_host(self, pin_memory: bool) -> tuple[Tensor, list[list[int]]]:
        if any(branch.sampler == "balanced" for branch in self._branches):
            rows, kept = self._draw_balanced(pin_memory)
        else:
            step = None if self._step is None else host.StepKey(*self._step)
            rows, kept = host.sample_plan(
                self._batches, self._draws(), self._generator, step, pin_memory
            )
        crops = len(self._batches)
        return rows, [kept[i : i + crops] for i in range(0, len(kept), crops)]

    def _draws(self) -> list[host.Draw]:
        """What is drawn for each branch and batch; which way a number is rounded is drawn here."""
        laws = [law for laws in self._laws for law, _ in laws]
        ups = [law.up for law in laws if isinstance(law, Rounded)]
        if not ups:
            return laws  # type: ignore[return-value]  # all of them are draws
        step = None if self._step is None else host.StepKey(*self._step[:2], _ALL_RANKS)
        _, rounded_up = host.sample_plan([1], ups, self._generator, step, False)
        next_up = iter(rounded_up)
        return [law.draw(next(next_up) == 1) if isinstance(law, Rounded) else law for law in laws]

    def _draw_balanced(self, pin_memory: bool) -> tuple[Tensor, list[int]]:
        steps = None
        if self._step is not None:
            steps = StepKey(*self._step), StepKey(*self._step[:2], _ALL_RANKS)
        keeps = [1.0 - branch.p for branch in self._branches]
        return sample_balanced_plan(
            self._batches, keeps, self._kinds, self._generator, steps, pin_memory
        )
