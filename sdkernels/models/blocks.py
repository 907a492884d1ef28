"""What a patched block is made of: its state, and the residual addition that its forward calls."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ..building_blocks import Activation
from ..empty import Empty
from ..functional import fused_stochastic_depth, per_tensor
from ..rows import KeptRows
from ..sampling import Mode, Rescale, Sampler
from ..tracing import is_recorded, refuse_script
from .branches import Composed, entries, entry
from .parts import Law, drop_law, is_bare, layer_scale_of, why_it_draws_itself

__all__ = [
    "Add",
    "BlockState",
    "Branch",
    "Options",
    "PatchedBlock",
    "make_patched",
]

Rows = KeptRows | list[KeptRows]
Token = tuple[tuple[KeptRows, int], ...]


@dataclass(frozen=True)
class Branch:
    """One residual branch of a class of blocks.

    Args:
        drop: dotted name of the drop path module; None where the class has none.
        parts: names of the submodules and parameters that only this branch uses.
    """

    drop: str | None
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """The options of the op that hold for every branch of a model."""

    mode: Mode | None = None  # None: as the drop path module says
    sampler: Sampler = "bernoulli"
    rescale: Rescale = "train"
    empty: Empty = "run"
    inplace: bool | None = None  # None: where nobody can see it
    min_saving: float | str = 0.0

    def rescale_of(self, law: Law) -> str:
        """The rule for a branch: one that a library does not scale is not scaled in training."""
        return self.rescale if law.scaled or self.rescale != "train" else "none"


@dataclass
class BlockState:
    """What patch() leaves in a block, under the name ``_sdkernels``."""

    options: Options
    drops: tuple[str | None, ...]  # the drop path module of each branch
    p: list[float | None]  # set by patch(drop_probs=...); None: what the module says
    rows: list[Rows | None] = field(init=False)  # of a plan, while `use` is in force
    user: int | None = field(init=False)  # the thread whose `use` that is
    # The forwards whose backward may still come: what they returned, and the rows they ran with.
    pending: list[tuple[weakref.ref[Tensor], Token]] = field(init=False)
    recomputed: bool = field(init=False)  # in a backward since the last forward

    def __post_init__(self) -> None:
        self.rows = [None] * len(self.drops)
        self.user = None
        self.pending = []
        self.recomputed = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to no `use`, and has run no forward.
        return {"options": self.options, "drops": self.drops, "p": self.p}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

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
        p, drop = self.p[branch], self.drop_path(block, branch)
        if drop is None or (type(drop) is nn.Identity and is_bare(drop)):
            return Law(p or 0.0, "row", True, block.training)
        own = drop_law(drop)
        if p is None or own is None:
            return own
        return own._replace(p=p)

    def drop_path(self, block: nn.Module, branch: int) -> nn.Module | None:
        name = self.drops[branch]
        return None if name is None else attrgetter(name)(block)

    def why_whole(self, block: nn.Module) -> str | None:
        """Why the block runs as before, whatever its probabilities; None if it does not."""
        for branch in range(len(self.drops)):
            drop = self.drop_path(block, branch)
            if drop is not None and self.law(block, branch) is None:
                return why_it_draws_itself(drop)
        return None


class PatchedBlock:
    """Base of the classes that patch() gives to blocks: ``isinstance(block, PatchedBlock)``."""

    if TYPE_CHECKING:  # TorchScript reads annotations, and does not know these
        _sdkernels: BlockState
        _original: type[nn.Module]
        _runs_empty: bool

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script compiles the original forward, which cannot multiply by 1 - p."""
        if self._sdkernels.options.rescale == "eval":
            refuse_script(
                'a block patched with rescale="eval"',
                "script the model before patch or after unpatch",
            )
        _say_what_is_left_out(self)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        """nn.DataParallel's copy for a device: it draws for its share of the batch."""
        state = self._sdkernels
        if state.rows[0] is not None:
            raise RuntimeError(
                "plan: nn.DataParallel splits the batch, and the rows of a plan are of the whole "
                "one; let the replicas draw their own rows, or use DistributedDataParallel"
            )
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica._sdkernels = copy.copy(state)  # threads remember their forwards for themselves
        return replica


def _is_everything(rows: KeptRows) -> bool:
    """Whether these are all the rows, as they are."""
    return rows.k == rows.batch and rows.scale == 1.0 and rows.weight is None


class Add:
    """``add(i, x, branch)`` is ``x + drop_path_i(branch(x))`` of a patched block, in one call.

    In place it writes into sums that it has made itself. What came into the block may be somebody
    else's too: saved by the activation before, kept among intermediate features. A sum is seen by
    nobody: the forwards here hand it to the next `add` and to nothing else (the tests read their
    source), and branches, with what hooks their modules, get a copy of the kept rows. Where a
    branch runs on all rows, it gets the sum itself; into that the op does not write by default.
    """

    def __init__(self, block: Any, laws: list[Law]) -> None:
        self.block = block
        self.laws = laws
        self.sums: list[Tensor] = []  # what it has made itself last, of every tensor of a list

    def __call__(
        self,
        index: int,
        x: Any,
        branch: Callable[..., Any],
        *,
        norm: nn.Module | None = None,
        post_norm: nn.Module | None = None,
        layer_scale: nn.Module | Tensor | None = None,
        residual: Any = None,
        activation: Activation | None = None,
        args: Sequence[Any] = (),
    ) -> Any:
        """``residual + drop_path(layer_scale(post_norm(branch(norm(x), *args))))``.

        A norm and a layer scale that the op knows are fused; others are called on the kept rows.
        `residual` is `x` by default. The tensors of a list go one after the other.
        """
        before: list[Callable[..., Any]] = []
        after: list[Callable[..., Any]] = []
        fused_norm = norm if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) else None
        if norm is not None and fused_norm is None:
            before.append(norm)
        if post_norm is not None:
            after.append(post_norm)
        if isinstance(layer_scale, nn.Module):
            factor = layer_scale_of(layer_scale)
            if factor is None:
                after.append(layer_scale)
        else:
            factor = layer_scale
        composed = Composed([*before, branch, *after], len(before), self.block)
        rows = self.block._sdkernels.rows[index] if self.laws[index].training else None

        def one(x: Tensor, residual: Any, rows: Any, args: Sequence[Any]) -> Tensor:
            return self._one(
                index, composed, x, residual, rows, args, fused_norm, factor, activation
            )

        several = isinstance(x, list)
        xs = x if several else [x]
        residuals = per_tensor(residual, len(xs), "residual") if several else [residual]
        each_rows = per_tensor(rows, len(xs), "rows") if several else [rows]
        each_args = [entries(args, crop) for crop in range(len(xs))] if several else [args]
        totals = list(map(one, xs, residuals, each_rows, each_args))
        given = [*xs, *residuals]
        own = [total for total in totals if not any(total is each for each in given)]
        if own:  # with empty="skip" the sum may be what came in
            self.sums = own
        return totals if several else totals[0]

    def _one(
        self,
        index: int,
        branch: Composed,
        x: Tensor,
        residual: Tensor | None,
        rows: Any,
        args: Sequence[Any],
        norm: nn.LayerNorm | nn.RMSNorm | None,
        layer_scale: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        law, options, p = self.laws[index], self.block._sdkernels.options, self.laws[index].p
        if isinstance(rows, KeptRows) and _is_everything(rows):
            rows, p = None, 0.0
        needs_a_row = options.empty == "run" and not self.block._runs_empty
        is_shared = residual is x  # the first of several branches of the same x
        stream = x if residual is None else residual
        is_own = any(stream is each for each in self.sums)
        inplace: bool | None = False
        if options.inplace is not False and is_own and not is_shared:
            inplace = True if options.inplace else _permitted(stream)
        total: Tensor = fused_stochastic_depth(
            x,
            branch,
            p,
            options.mode or law.mode,
            law.training,
            args=args,
            norm=norm,
            layer_scale=layer_scale,
            residual=None if is_shared else residual,
            rows=rows,
            sampler=options.sampler,
            rescale=options.rescale_of(law),
            empty="ones" if needs_a_row else options.empty,
            inplace=inplace,
            min_saving=options.min_saving,
            activation=activation,
        )
        return total

    def activated(
        self,
        index: int,
        x: Tensor,
        branch: Callable[..., Any],
        activation: nn.Module,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``activation`` of the sum; a ReLU is fused, another is called and may write in place."""
        if type(activation) is nn.ReLU and is_bare(activation) and not _has_any_global_hook():
            fused: Tensor = self(index, x, branch, residual=residual, activation="relu")
            return fused
        total: Tensor = self(index, x, branch, residual=residual)
        # With empty="skip" the sum may be `x` or `residual` itself, which others read.
        result: Tensor = activation(
            total.clone() if total is (x if residual is None else residual) else total
        )
        return result


def _permitted(total: Tensor) -> bool | None:
    """The op's `inplace` by default: None, which permits it, or False where a mode may keep sums.

    Selective checkpointing does: its dispatch mode gives them out of a cache later.
    """
    if is_compiling() or type(total) is not Tensor:  # a compiler cannot look at the stacks
        return False
    watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return False if watched else None


def _say_what_is_left_out(block: Any) -> None:
    """Of what patch() was told, where the original forward is recorded instead."""
    state: BlockState = block._sdkernels
    if state.rows[0] is not None:
        raise RuntimeError(
            "plan: torch.jit and torch.fx would repeat its rows for ever; trace or script outside "
            "of the with statement, where a patched block runs its original forward"
        )
    options = state.options
    given = any(p is not None for p in state.p) or options.mode or options.rescale != "train"
    if block.training and given:
        warnings.warn(
            "sdkernels: a patched block that is traced or scripted in training is its original "
            "forward, without the drop_probs=, mode= and rescale= given to patch",
            stacklevel=3,
        )


Body = Callable[..., Any]


def make_patched(
    original: type[nn.Module], body: Body, name: str, module: str, runs_empty: bool
) -> type[nn.Module]:
    """A subclass of a library's class of blocks whose forward is `body` where that saves anything.

    `body` gets the block, an :class:`Add` and the arguments of the original forward. The class
    keeps the name of the original: what looks for blocks by name (wrapping policies) finds them.
    """
    own_forward = original.forward
    _, first, *_ = inspect.signature(own_forward).parameters  # its input, after self

    def call(self: Any, args: Any, kwargs: Any) -> Any:
        state = self._sdkernels
        if not is_compiling() and is_recorded(args, [*kwargs.values()]):
            return run_recorded(self, state, args, kwargs)
        if not self.training or is_compiling():
            return run(self, state, args, kwargs)
        if torch._C._current_graph_task_id() != -1:  # inside a backward: a checkpoint's second run
            state.check_recomputation()
            return run(self, state, args, kwargs)
        y = run(self, state, args, kwargs)
        state.remember(y)
        return y

    def run(self: Any, state: BlockState, args: Any, kwargs: Any) -> Any:
        bound = state.rows[0] is not None
        laws: Any = [state.law(self, branch) for branch in range(len(state.drops))]
        scaled_later = state.options.rescale == "eval"  # evaluation multiplies by 1 - p
        if None in laws:
            if bound:
                raise RuntimeError(
                    f"plan: a {original.__name__} draws its own rows: {state.why_whole(self)}"
                )
        elif any(
            # With a p of 0 from patch(): the module that the original calls may have another.
            law.p > 0.0 or p == 0.0 or (bound and law.training)
            for law, p in zip(laws, state.p, strict=True)
            if law.training or scaled_later
        ):
            return body(self, Add(self, laws), *args, **kwargs)
        return run_original(self, args, kwargs)

    def run_recorded(self: Any, state: BlockState, args: Any, kwargs: Any) -> Any:
        """Rows cannot be drawn in the graphs of torch.jit.trace and torch.fx."""
        if not self.training:
            return run(self, state, args, kwargs)
        _say_what_is_left_out(self)
        return run_original(self, args, kwargs)

    def run_original(self: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(first)
        if isinstance(x, list):
            return _each(own_forward, self, len(x), args, kwargs)
        return own_forward(self, *args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, args, kwargs)

    # TorchScript compiles the source of what is wrapped, with the globals of what wraps it.
    scriptable = FunctionType(
        forward.__code__, own_forward.__globals__, "forward", None, forward.__closure__
    )
    members = {
        "forward": functools.wraps(own_forward)(scriptable),
        "_original": original,
        "_runs_empty": runs_empty,
        "__module__": module,
        "__qualname__": name,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (PatchedBlock, original), members)


def _each(forward: Callable[..., Any], block: Any, crops: int, args: Any, kwargs: Any) -> list[Any]:
    """The original forward for every tensor of a list."""
    return [
        forward(
            block,
            *entries(args, crop),
            **{key: entry(value, crop) for key, value in kwargs.items()},
        )
        for crop in range(crops)
    ]
