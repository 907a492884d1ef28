"""What patch() did: which blocks it patched, which it left alone and why, and what that saves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..plan import DepthPlan
from .blocks import PatchedBlock
from .comparing.checking import Checked, check_blocks
from .plans import plan_for_step, probabilities, sample_plan, use
from .registry import original_class, rewriting_for
from .rewriting import Branch
from .undisturbed import in_evaluation

__all__ = ["LeftAlone", "PatchReport", "PatchedEntry"]


@dataclass(frozen=True)
class PatchedEntry:
    """A block that was patched."""

    name: str
    block: Any
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class LeftAlone:
    """A block with a drop path that runs as before."""

    name: str
    kind: type[nn.Module]
    reason: str


@dataclass(frozen=True, eq=False)
class PatchReport:
    """What :func:`sdkernels.patch` did. ``print(report)`` shows a table.

    Attributes:
        model: the model.
        patched: the blocks that were patched, in the order of plans.
        left: the blocks with a drop path that were left alone, each with the reason.
    """

    model: nn.Module
    patched: tuple[PatchedEntry, ...]
    left: tuple[LeftAlone, ...]

    @property
    def drop_probs(self) -> list[float]:
        """:func:`sdkernels.models.drop_probs` of the model."""
        return [p for entry in self.patched for p in _probabilities(entry)]

    @property
    def idle(self) -> tuple[PatchedEntry, ...]:
        """The patched blocks that run as before, because all their drop probabilities are 0 now."""
        return tuple(
            entry
            for entry in self.patched
            if not any(_probabilities(entry)) and _why_whole(entry) is None
        )

    @property
    def whole(self) -> tuple[LeftAlone, ...]:
        """The patched blocks that run as before now, each with the reason.

        One was found to differ from its original, has a drop path that got hooks or another class
        after :func:`sdkernels.patch`, or is not patched any more.
        """
        return tuple(
            LeftAlone(entry.name, original_class(entry.block), reason)
            for entry in self.patched
            if (reason := _why_whole(entry)) is not None
        )

    def plan(
        self,
        batch: int | Sequence[int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> DepthPlan[Any]:
        """:func:`sdkernels.models.sample_plan` with the model."""
        return sample_plan(self.model, batch, generator=generator, device=device)

    def plan_for_step(
        self,
        seed: int,
        step: int,
        batch: int | Sequence[int],
        *,
        rank: int | None = None,
        device: torch.device | str | None = None,
    ) -> DepthPlan[Any]:
        """:func:`sdkernels.models.plan_for_step` with the model."""
        return plan_for_step(self.model, seed, step, batch, rank=rank, device=device)

    def use(self, plan: Any) -> AbstractContextManager[None]:
        """:func:`sdkernels.models.use` with the model."""
        return use(self.model, plan)

    def source(self, name: str) -> str:
        """The forward that a patched block runs in training, as a diff against its own.

        Args:
            name: of the block in the model, as the report shows it.

        Raises:
            KeyError: no block of this name was patched.
        """
        for entry in self.patched:
            if entry.name == name and isinstance(entry.block, PatchedBlock):
                return rewriting_for(entry.block).diff()
        raise KeyError(f"no patched block has the name {name!r}")

    def check(self, *args: Any, **kwargs: Any) -> tuple[Checked, ...]:
        """Compare the forward of every patched block with its own, ahead of training.

        Args:
            args, kwargs: an input of the model, of two samples or more. The model runs once on it,
                in evaluation, to see what its blocks get; then each is compared on a copy, once
                for each class and configuration.

        Returns:
            What came of it for each block. Blocks that differ keep their own forward.

        Note:
            The model, its buffers, hooks and the random state are not touched. Do this before
            ``torch.compile``, ``DistributedDataParallel`` and ``fully_shard``, inside of which no
            block can be compared.
        """
        patched = [e for e in self.patched if isinstance(e.block, PatchedBlock)]
        for entry in patched:
            rewriting_for(entry.block)  # those of an unpickled model are found again
        return check_blocks(self.model, patched, args, kwargs)

    def expected_saving(self, *args: Any, **kwargs: Any) -> float:
        """The share of a training step's computation that dropped samples no longer cost.

        The expectation over the drop probabilities as they are now; the memory of activations
        follows it roughly.

        Args:
            args, kwargs: an input of the model (a batch of one will do). The model runs once on
                it, in evaluation, and its matrix products and convolutions are counted. Without
                an input, parameters are counted instead: close for transformers, too much for
                convolutional nets, whose last stages have most of the parameters.

        Returns:
            A number from 0 to 1.
        """
        counts = _flops(self.model, args, kwargs) if args or kwargs else None
        total, saved = _size(self.model, Branch(None, ("",)), counts), 0.0
        for entry in self.patched:
            if _why_whole(entry) is not None:
                continue
            drops = zip(entry.branches, probabilities(entry.block), strict=True)
            for index, (branch, p) in enumerate(drops):
                if p > 0.0 and not self._is_switched_off(entry.block, index):
                    # What is in which branch is not known of a forward written by hand.
                    alike = len(entry.branches) if branch.parts == ("",) else 1
                    saved += p * _size(entry.block, branch, counts) / alike
        return saved / total if total else 0.0

    def _is_switched_off(self, block: Any, branch: int) -> bool:
        """Whether the branch's drop path is in evaluation mode, where the model or block is not."""
        law = block._sdkernels.law(block, branch)
        return (self.model.training or block.training) and not law.training

    def __str__(self) -> str:
        states = [f"{len(self.idle)} of them run as before: p == 0"] if self.idle else []
        if self.whole:
            states.append(f"{len(self.whole)} of them run as before, see below")
        idle = f" ({'; '.join(states)})" if states else ""
        lines = [
            f"{len(self.patched)} blocks patched{idle}, {len(self.left)} left alone; expected "
            f"saving {self.expected_saving():.1%} of the computation (by parameters)"
        ]
        rows = [
            (entry.name or "(the model)", type(entry.block).__name__, _p_column(self, entry))
            for entry in self.patched
        ]
        rows += [
            (e.name or "(the model)", e.kind.__name__, f"left alone: {e.reason}") for e in self.left
        ]
        if rows:
            rows.insert(0, ("block", "class", "drop probability"))
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
        for name, kind, rest in rows:
            lines.append(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {rest}")
        return "\n".join(lines)


def refuse_left(left: Sequence[LeftAlone]) -> NoReturn:
    """What patch(strict=True) says of blocks that it would leave alone."""
    reasons = [f"{each.name or 'the model'} ({each.kind.__name__}): {each.reason}" for each in left]
    what = "; ".join(reasons) or "no block with a drop path was found"
    raise ValueError(f"model: strict=True, and {len(left)} blocks are left alone: {what}")


def _why_whole(entry: PatchedEntry) -> str | None:
    if not isinstance(entry.block, PatchedBlock):
        return "it was unpatched"
    return entry.block._sdkernels.why_whole(entry.block)  # type: ignore[arg-type]


def _probabilities(entry: PatchedEntry) -> list[float]:
    return probabilities(entry.block) if isinstance(entry.block, PatchedBlock) else []


def _p_column(report: PatchReport, entry: PatchedEntry) -> str:
    block = entry.block
    reason, values = _why_whole(entry), _probabilities(entry)
    if reason is not None:
        return f"{' '.join(f'{p:.4g}' for p in values)}, runs as before: {reason}"
    if not any(values):
        return "p == 0: runs as before, until a p rises"
    return " ".join(
        f"{p:.4g}" + (" (in evaluation)" if p and report._is_switched_off(block, branch) else "")
        for branch, p in enumerate(values)
    )


def _size(block: nn.Module, branch: Branch, counts: Mapping[int, int] | None) -> int:
    """The parameters of a branch, or the operations that were counted in its modules."""
    total = 0
    for path in branch.parts:
        part: Any = block
        for name in path.split(".") if path else ():
            part = getattr(part, name, None)
        if counts is not None:
            total += counts.get(id(part), 0)
        elif isinstance(part, nn.Parameter):
            total += part.numel()
        elif isinstance(part, nn.Module):
            total += sum(p.numel() for p in part.parameters() if not is_lazy(p))
    return total


def _flops(model: nn.Module, args: Any, kwargs: Any) -> Mapping[int, int]:
    """Operations in each module of the model, by the module's id, for one evaluation."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    counts: Counter[int] = Counter()
    # By module: one that raises, which the forward around it may catch, is never left.
    started: defaultdict[int, list[int]] = defaultdict(list)
    counter = FlopCounterMode(display=False)

    def enter(module: nn.Module, args: Any) -> None:
        started[id(module)].append(counter.get_total_flops())

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        counts[id(module)] += counter.get_total_flops() - started[id(module)].pop()

    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_pre_hook(enter))
            stack.enter_context(module.register_forward_hook(leave))
        stack.enter_context(in_evaluation(model))
        stack.enter_context(counter)
        model(*args, **kwargs)
    return counts
