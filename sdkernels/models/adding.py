"""The residual addition that a patched block's forward calls, and the state of the block."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ..arguments import PerSample, Shared
from ..empty import Empty
from ..functional import fused_stochastic_depth, per_tensor
from ..packed import Packed
from ..rows import KeptRows
from ..sampling import Mode, Rescale, Sampler
from .parts import Law, drop_law, is_bare, layer_scale_of, why_it_draws_itself
from .proof import TRUSTED, Asked, Leaf, Proof, entries, leaves, mapped
from .rewriting import Branch, Rewriting
from .settings import Stamp

__all__ = ["Add", "BlockState", "Options"]

Rows = KeptRows | list[KeptRows]
Token = tuple[tuple[KeptRows, int], ...]


@dataclass(frozen=True)
class Options:
    """The options of the op that hold for every branch of a model."""

    mode: Mode | None = None  # None: as the drop path module says
    sampler: Sampler = "bernoulli"
    rescale: Rescale = "train"
    empty: Empty = "run"
    inplace: bool | None = None  # None: where nobody can see it
    min_saving: float | str = 0.0
    check: str = "first"
    multiple_of: int = 1  # of the tokens of a list of crops that go packed

    def rescale_of(self, law: Law) -> str:
        """The rule for a branch: one that a library does not scale is not scaled in training."""
        return self.rescale if law.scaled or self.rescale != "train" else "none"


@dataclass
class BlockState:
    """What patch() leaves in a block, under the name ``_sdkernels``."""

    options: Options
    branches: tuple[Branch, ...]
    p: list[float | None]  # set by patch(drop_probs=...); None: what the module says
    rewriting: Rewriting | None = None  # None in an unpickled one that has not run yet
    rows: list[Rows | None] = field(init=False)  # of a plan, while `use` is in force
    user: int | None = field(init=False, default=None)  # the thread whose `use` that is
    # The forwards whose backward may still come: what they returned, and the rows they ran with.
    pending: list[tuple[weakref.ref[Tensor], Token]] = field(init=False, default_factory=list)
    recomputed: bool = field(init=False, default=False)  # in a backward since the last forward
    refused: Proof | None = field(init=False, default=None)  # why it keeps its own forward for good
    proofs: dict[Any, Proof] | None = field(init=False, default=None)  # by kinds of calls
    is_known: bool = field(init=False, default=False)  # whether it was compared before a release
    stamp: Stamp | None = field(init=False, default=None)  # of what both are about
    collected: bool = field(init=False, default=False)  # what is inside, in the last forward

    def __post_init__(self) -> None:
        self.rows = [None] * len(self.branches)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockState:
        made = replace(self, p=list(self.p))
        # What is known of a block holds for its copy, which may be compiled before it runs.
        made.refused, made.proofs, made.is_known = self.refused, self.proofs, self.is_known
        return made

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to no `use`, and has run no forward.
        given = [each.name for each in fields(self) if each.init and each.name != "rewriting"]
        return {name: getattr(self, name) for name in given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def token(self) -> Token:
        """The rows that a forward runs with now: the same objects, not written to since."""
        rows: list[KeptRows] = []
        for each in self.rows:
            rows += each if isinstance(each, list) else [] if each is None else [each]
        return tuple(
            (each, 0 if each.index.is_inference() else each.index._version) for each in rows
        )

    def remember(self, y: Any) -> None:
        """A forward has returned `y`."""
        if self.recomputed:  # the forwards before have had their backward
            self.pending, self.recomputed = [], False
        # Those whose result is gone have been given up.
        self.pending = [entry for entry in self.pending if entry[0]() is not None]
        first = y[0] if isinstance(y, (list, tuple)) and y else y
        if isinstance(first, Tensor):
            self.pending.append((weakref.ref(first), self.token()))

    def check_recomputation(self) -> None:
        """Refuse a recomputation in the backward that may run with other rows than its forward.

        Which of the forwards it belongs to cannot be told, so all of them must have had these rows.
        Rows that a block draws itself are the same again: checkpoint restores the generator.
        """
        token = self.token()
        if any(rows != token for _, rows in self.pending):
            raise RuntimeError(
                "plan: a checkpointed block is run again in the backward with other rows than a "
                "forward before it had; call backward() inside the with statement of its forward, "
                "before the next forward and before the plan is resampled"
            )
        self.recomputed = True

    def law(self, block: nn.Module, branch: int) -> Law | None:
        """How the branch draws now; None where only its own drop path module can tell."""
        p, drop, function_p = self.p[branch], self.drop_path(block, branch), self.branches[branch].p
        if function_p is not None:
            own_p = attrgetter(function_p)(block) if p is None else p
            return Law(float(own_p or 0.0), "row", True, block.training)
        if drop is None or (type(drop) is nn.Identity and is_bare(drop)):
            return Law(p or 0.0, "row", True, block.training)
        own = drop_law(drop)
        if p is None or own is None:
            return own
        return own._replace(p=p)

    def silences(self, branch: int) -> bool:
        """Whether patch() gave p = 0 to a branch whose own drop path may say something else."""
        own = self.branches[branch]
        return self.p[branch] == 0.0 and (own.drop is not None or own.p is not None)

    def drop_path(self, block: nn.Module, branch: int) -> nn.Module | None:
        name = self.branches[branch].drop
        return None if name is None else attrgetter(name)(block)

    def why_whole(self, block: nn.Module) -> str | None:
        """Why the block runs as before, whatever its probabilities; None if it does not."""
        if self.refused is not None:
            return self.refused.reason
        for branch in range(len(self.branches)):
            drop = self.drop_path(block, branch)
            if drop is not None and self.law(block, branch) is None:
                return why_it_draws_itself(drop)
        return None


def _is_everything(rows: object) -> bool:
    """Whether these are all the rows, as they are."""
    if not isinstance(rows, KeptRows):
        return False
    return rows.k == rows.batch and rows.scale == 1.0 and rows.weight is None


class Add:
    """``add(i, x, branch)`` is ``x + drop_path_i(branch(x))`` of a patched block, in one call.

    In place it writes into sums that it has made itself. What came into the block may be somebody
    else's too: saved by the activation before, kept among intermediate features. A sum is seen by
    nobody where the forward hands it to the next `add` and to nothing else (which `sums.py` reads
    from its source), and branches, with what hooks their modules, get a copy of the kept rows. What
    an activation returns is not one of them: it may be saved for the backward, and hooks get it.
    Where a branch runs on all rows, it gets the sum itself; into that the op does not write by
    default.
    """

    def __init__(
        self,
        block: Any,
        laws: list[Law],
        rewriting: Rewriting,
        proofs: Sequence[Proof],
        asked: bool = True,
    ) -> None:
        self.block = block
        self.laws = laws
        self.rewriting = rewriting
        self.proofs = proofs  # one for each tensor of a list, or for all
        self.asked = asked
        self.sums: list[Tensor] = []  # what it has made itself last, of every tensor of a list
        self.taken: list[tuple[int, Leaf]] = []  # inputs of which the kept rows were taken
        self.aside: dict[str, Any] = {}

    def __call__(
        self,
        index: int,
        x: Any,
        branch: Callable[..., Any],
        *,
        norm: nn.Module | None = None,
        layer_scale: Any = None,
        residual: Any = None,
        activation: nn.Module | None = None,
        args: Mapping[str, Any] | Sequence[Any] = (),
    ) -> Any:
        """``activation(residual + drop_path(layer_scale(branch(norm(x), *args))))``.

        A norm, a layer scale and a ReLU that the op knows are fused; others are called, norms and
        layer scales on the kept rows. `residual` is `x` by default. Inputs in a dict are compacted
        as the proof of the block says; those in a list, as the op does. The tensors of a list go
        one after the other.
        """
        around = self._around(branch, norm, layer_scale)
        rows = self._rows(index)
        if not isinstance(x, list):
            if isinstance(args, Mapping):
                args = self._inputs(index, self.proofs[0], x, args)
            totals = [self._one(index, x, around, residual, rows, args, activation)]
            self._made(totals, (x, residual), activation)
            return totals[0]
        count = len(x)
        residuals = per_tensor(residual, count, "residual")
        proofs = self.proofs if len(self.proofs) == count else [self.proofs[0]] * count
        totals = []
        for crop, own_rows in enumerate(per_tensor(rows, count, "rows")):
            given = entries(args, crop, count)
            if isinstance(args, Mapping):
                given = self._inputs(index, proofs[crop], x[crop], given)
            totals.append(
                self._one(index, x[crop], around, residuals[crop], own_rows, given, activation)
            )
        self._made(totals, (*x, *residuals), activation)
        return totals

    def packed(
        self,
        index: int,
        xs: list[Tensor],
        branch: Callable[..., Any],
        *,
        norm: nn.Module | None = None,
        layer_scale: Any = None,
        args: Sequence[Any] = (),
    ) -> list[Tensor]:
        """The same for a list, where the branch gets the tokens of all its tensors at once.

        As a :class:`sdkernels.Packed`; it returns [T, C].
        """
        called: Callable[..., Any] | None = norm
        if norm is not None and not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
            called = _OnTokens(norm)
        options, rows = self.block._sdkernels.options, self._rows(index)
        totals: list[Tensor] = self._op(
            index,
            xs,
            None if rows is None else per_tensor(rows, len(xs), "rows"),
            args=args,
            inplace=bool(options.inplace) and all(map(self._is_own, xs)),
            packed=True,
            multiple_of=options.multiple_of,
            **self._around(branch, called, layer_scale),
        )
        self._made(totals, xs)
        return totals

    def _rows(self, index: int) -> Any:
        return self.block._sdkernels.rows[index] if self.laws[index].training else None

    def _is_own(self, stream: Any) -> bool:
        """Whether it is a sum that nobody but the next addition sees."""
        return self.rewriting.hides_sums and any(stream is each for each in self.sums)

    def _made(
        self, totals: list[Tensor], given: Sequence[Any], activation: nn.Module | None = None
    ) -> None:
        """Remember sums. With empty="skip" one may be what came in."""
        if activation is not None:
            self.sums = []
            return
        own = [total for total in totals if not any(total is each for each in given)]
        if own:
            self.sums = own

    def _around(self, branch: Callable[..., Any], norm: Any, layer_scale: Any) -> dict[str, Any]:
        """The branch with what cannot be fused around it; the norm and the factor that can be."""
        before: list[Callable[..., Any]] = []
        after: list[Callable[..., Any]] = []
        fused_norm = norm if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) else None
        if norm is not None and fused_norm is None:
            before.append(norm)
        factor = layer_scale
        if isinstance(layer_scale, nn.Module):
            factor = layer_scale_of(layer_scale)
            if factor is None:
                after.append(layer_scale)
        if factor is not None and not isinstance(factor, Tensor):  # the number 1 for none
            after.append(functools.partial(operator.mul, factor))
            factor = None
        composed = _Composed([*before, branch, *after], len(before), self.block)
        return {"branch": composed, "norm": fused_norm, "layer_scale": factor}

    def _one(
        self,
        index: int,
        x: Tensor,
        around: dict[str, Any],
        residual: Tensor | None,
        rows: Any,
        args: Any,
        activation: nn.Module | None,
    ) -> Tensor:
        is_shared = residual is x  # the first of several branches of the same x
        stream = x if residual is None else residual
        scale = around["layer_scale"]
        if scale is not None and scale.dim() == stream.dim() and scale.shape[0] == 1:
            around = {**around, "layer_scale": scale[0]}
        is_relu = type(activation) is nn.ReLU and is_bare(activation) and not _has_any_global_hook()
        asked = self.block._sdkernels.options.inplace
        inplace: bool | None = False
        if asked is not False and not is_shared and self._is_own(stream):
            inplace = True if asked else _permitted(stream)
        total: Tensor = self._op(
            index,
            x,
            rows,
            args=args,
            inplace=inplace,
            residual=None if is_shared else residual,
            activation="relu" if is_relu else None,
            **around,
        )
        if activation is not None and not is_relu:
            # It may write in place. With empty="skip" the sum may be `x` itself, which others read.
            total = activation(total.clone() if total is stream else total)
        return total

    def _op(
        self, index: int, x: Any, rows: Any, *, branch: _Composed, **options_of_call: Any
    ) -> Any:
        law, options = self.laws[index], self.block._sdkernels.options
        everything = all(map(_is_everything, rows if isinstance(rows, list) else [rows]))
        return fused_stochastic_depth(
            x,
            branch,
            0.0 if everything else law.p,
            options.mode or law.mode,
            law.training,
            rows=None if everything else rows,
            sampler=options.sampler,
            rescale=options.rescale_of(law),
            empty="ones" if options.empty == "run" else options.empty,
            min_saving=options.min_saving,
            **options_of_call,
        )

    def _inputs(self, index: int, proof: Proof, x: Any, args: Mapping[str, Any]) -> list[Any]:
        """Further inputs for the op, with what belongs to samples marked, and what does not.

        Whose rows they have by chance is not asked: in the comparison nothing had by chance.
        """
        of_samples, stream = proof.of_samples, self.rewriting.positional[0]

        def mark(path: str, leaf: Tensor) -> Any:
            if leaf.dim() and leaf.shape[0] == x.shape[0]:
                where = (index, (path, leaf.dim()))
                trusted = proof is TRUSTED and path == stream
                if trusted or of_samples is None or where in of_samples:
                    self.taken.append(where)
                    return PerSample(leaf)
            return Shared(leaf)

        return [mapped(value, mark, name) for name, value in args.items()]

    def put_aside(self, name: str, value: Any) -> None:
        """What a branch computes and the forward hands on: nothing that is of some rows only."""
        if self.asked and any(True for _ in leaves(value)):
            raise Asked(name)
        self.aside[name] = mapped(value, lambda path, leaf: None)


class _Composed:
    """A branch with what could not be fused into the op around it."""

    def __init__(self, steps: Sequence[Callable[..., Any]], branch: int, block: nn.Module) -> None:
        self.steps = steps
        self.branch = branch  # position of the branch proper, which gets the extra arguments
        self.block = block  # whose modules these are

    def __call__(self, kept: Any, *args: Any) -> Any:
        for position, step in enumerate(self.steps):
            kept = step(kept, *args) if position == self.branch else step(kept)
        return kept


class _OnTokens:
    """A module of tokens, such as a norm, on packed ones."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, packed: Packed) -> Packed:
        return packed.with_values(self.module(packed.values))


def _permitted(total: Tensor) -> bool | None:
    """The op's `inplace` by default: None, which permits it, or False where a mode may keep sums.

    Selective checkpointing does: its dispatch mode gives them out of a cache later.
    """
    if is_compiling() or type(total) is not Tensor:  # a compiler cannot look at the stacks
        return False
    watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return False if watched else None
