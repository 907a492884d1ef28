"""What a patched block is made of: its state, and the residual addition that its forward calls."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ..functional import Shared, fused_stochastic_depth
from ..rows import KeptRows
from .branches import NeverEmpty, entries, entry
from .parts import Law, drop_law, is_bare, layer_scale_of
from .proof import TRUSTED, Asked, Proof, leaves
from .proving import proof_of, warn
from .rewriting import Branch, Rewriting

__all__ = ["Add", "BlockState", "Options", "PatchedBlock", "make_patched"]

Rows = KeptRows | list[KeptRows]
Token = tuple[tuple[KeptRows, int], ...]


@dataclass(frozen=True)
class Options:
    """The options of the op that hold for every branch of a model."""

    mode: str | None = None  # None: as the drop path module says
    sampler: str = "bernoulli"
    rescale: str = "train"
    empty: str = "run"
    inplace: bool | None = None  # None: where nobody can see it
    min_saving: float | str = 0.0
    check: str = "first"

    def rescale_of(self, law: Law) -> str:
        """The rule for a branch: one that a library does not scale is not scaled in training."""
        return self.rescale if law.scaled or self.rescale != "train" else "none"


@dataclass
class BlockState:
    """What patch() leaves in a block, under the name ``_sdkernels``."""

    options: Options
    branches: tuple[Branch, ...]
    p: list[float | None]  # set by patch(drop_probs=...); None: what the module says
    rewriting: Rewriting | None = None  # None in a copy that has not run yet
    rows: list[Rows | None] = field(init=False)  # of a plan, while `use` is in force
    user: int | None = field(init=False)  # the thread whose `use` that is
    # The forwards whose backward may still come: what they returned, and the rows they ran with.
    pending: list[tuple[weakref.ref[Tensor], Token]] = field(init=False)
    recomputed: bool = field(init=False)  # in a backward since the last forward
    asked: Proof | None = field(init=False, default=None)  # somebody wants what a branch computes

    def __post_init__(self) -> None:
        self.rows = [None] * len(self.branches)
        self.user = None
        self.pending = []
        self.recomputed = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to no `use`, and has run no forward.
        return {"options": self.options, "branches": self.branches, "p": self.p}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.rewriting = None
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def drops(self) -> tuple[str | None, ...]:
        """The dotted names of the branches' drop path modules."""
        return tuple(branch.drop for branch in self.branches)

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

    def _where(self, branch: int) -> tuple[str | None, str | None]:
        return self.branches[branch].drop, self.branches[branch].p

    def law(self, block: nn.Module, branch: int) -> Law | None:
        """How the branch draws now; None where only its own drop path module can tell."""
        p, name, function_p = self.p[branch], *self._where(branch)
        if function_p is not None:
            own_p = attrgetter(function_p)(block) if p is None else p
            return Law(float(own_p or 0.0), "row", True, block.training)
        drop = None if name is None else attrgetter(name)(block)
        if drop is None or type(drop) is nn.Identity:  # what libraries make of p = 0
            return Law(p or 0.0, "row", True, block.training)
        own = drop_law(drop)
        if p is None or own is None:
            return own
        return own._replace(p=p)


class PatchedBlock:
    """Base of the classes that patch() gives to blocks: ``isinstance(block, PatchedBlock)``."""

    _sdkernels: BlockState
    _original: type[nn.Module]

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


def _holds(total: Any, stream: Any) -> bool:
    """Whether a sum is the stream itself, or has a tensor of it."""
    if isinstance(total, list):
        return any(a is b for a, b in zip(total, stream, strict=True))
    return total is stream


class Add:
    """``add(i, x, branch)`` is ``x + drop_path_i(branch(x))`` of a patched block, in one call.

    In place it writes into sums that it has made itself. What came into the block may be somebody
    else's too: saved by the activation before, kept among intermediate features. By default it
    writes into a sum only if nothing holds it but a variable of the forward. (So a forward that
    needs a sum later keeps it in a variable of another name, or in a view; a container that holds
    it in the variable's place would not be noticed.)
    """

    def __init__(
        self,
        block: Any,
        laws: list[Law],
        rewriting: Rewriting | None = None,
        proof: Proof = TRUSTED,
    ) -> None:
        self.block = block
        self.laws = laws
        self.rewriting = rewriting
        self.proof = proof
        self.sum: Any = None  # the last one
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
        as the proof of the block says; those in a list, as the op does.
        """
        state, law = self.block._sdkernels, self.laws[index]
        options = state.options
        p, rows = law.p, state.rows[index] if law.training else None
        if isinstance(rows, KeptRows) and _is_everything(rows):
            rows, p = None, 0.0
        if isinstance(args, Mapping):
            args = self._inputs(index, x, args)

        before: list[Callable[..., Any]] = []
        after: list[Callable[..., Any]] = []
        fused_norm = norm if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) else None
        if norm is not None and fused_norm is None:
            before.append(norm)
        is_shared = residual is x  # the first of several branches of the same x
        stream = x if residual is None else residual
        factor = layer_scale
        if isinstance(layer_scale, nn.Module):
            factor = layer_scale_of(layer_scale)
            if factor is None:
                after.append(layer_scale)
        if isinstance(factor, Tensor) and isinstance(stream, Tensor):
            if factor.dim() == stream.dim() and factor.shape[0] == 1:
                factor = factor[0]
        elif factor is not None and not isinstance(factor, Tensor):  # the number 1 for none
            after.append(functools.partial(operator.mul, factor))
            factor = None
        is_relu = type(activation) is nn.ReLU and is_bare(activation) and not _has_any_global_hook()
        inplace: bool | None = False
        if options.inplace is not False and stream is self.sum and not is_shared:
            given = (norm, layer_scale, residual, activation)
            shape = "residual" if residual is not None else "keywords"
            if not args and all(each is None for each in given):
                shape = "positional"
            inplace = True if options.inplace else self._permitted(stream, shape)
        total = fused_stochastic_depth(
            x,
            NeverEmpty([*before, branch, *after], len(before), args, self.block),
            p,
            options.mode or law.mode,
            law.training,
            args=args,
            norm=fused_norm,
            layer_scale=factor,
            residual=None if is_shared else residual,
            rows=rows,
            sampler=options.sampler,
            rescale=options.rescale_of(law),
            empty=options.empty,
            inplace=inplace,
            min_saving=options.min_saving,
            activation="relu" if is_relu else None,
        )
        if activation is not None and not is_relu:
            # It may write in place. With empty="skip" the sum may be `x` itself, which others read.
            total = activation(total.clone() if total is stream else total)
        if not _holds(total, stream):  # as with empty="skip"
            self.sum = total
        return total

    def _permitted(self, stream: Any, shape: str) -> bool | None:
        """The op's `inplace` for a sum: None, which permits it, where nobody can see it.

        Whoever could holds it. A dispatch mode may hold it later: selective checkpointing gives
        results out of a cache. `shape` says how the sum came: see below.
        """
        if type(stream) is not Tensor or is_compiling() or torch._C._len_torch_dispatch_stack():
            return False
        held, lone = _holders(stream), _holders_of_a_lone_sum()[shape]
        return None if all(a <= b for a, b in zip(held, lone, strict=True)) else False

    def _inputs(self, index: int, x: Any, args: Mapping[str, Any]) -> list[Any]:
        """Further inputs for the op: what does not belong to samples is marked."""
        assert self.rewriting is not None
        origins = self.rewriting.origins
        return [self._input(v, name, origins.get((index, name)), x) for name, v in args.items()]

    def _input(self, value: Any, path: str, origin: frozenset[str] | None, x: Any) -> Any:
        if isinstance(value, Tensor):
            if isinstance(x, Tensor) and value.dim() and value.shape[0] == x.shape[0]:
                leaf = (path, value.dim())
                assert self.rewriting is not None
                if self.proof.belongs_to_samples(leaf, origin, self.rewriting.positional[0]):
                    return value
            return Shared(value)
        if isinstance(value, list) and isinstance(x, list) and len(value) == len(x):
            pairs = zip(value, x, strict=True)
            return [self._input(each, path, origin, crop) for each, crop in pairs]
        if isinstance(value, (list, tuple)):
            items = [self._input(v, f"{path}.{n}", origin, x) for n, v in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if type(value) is dict:
            return {k: self._input(v, f"{path}.{k}", origin, x) for k, v in value.items()}
        return value

    def put_aside(self, name: str, value: Any) -> None:
        """What a branch computes and the forward hands on: nothing that is of some rows only."""
        if any(True for _ in leaves(value)):
            raise Asked(name)
        self.aside[name] = value


def _holders(total: Tensor) -> tuple[int, int, int]:
    """How many hold it: in Python (a list, a hook), in C++ (what autograd saved), and its memory (a
    view, a result that its own node saved)."""
    memory = torch._C._storage_Use_Count(total.untyped_storage()._cdata)
    return sys.getrefcount(total), total._use_count(), memory  # type: ignore[attr-defined]


@functools.cache
def _holders_of_a_lone_sum() -> dict[str, tuple[int, int, int]]:
    """The same of a sum that nothing but a variable of the forward holds.

    Interpreter and PyTorch hold it too while it is passed on: how often depends on their versions,
    and on whether it comes beside keywords or as one. So this is counted where it counts, in a
    block like any other.
    """
    counted: dict[str, tuple[int, int, int]] = {}

    class Counting(Add):
        def _permitted(self, stream: Any, shape: str) -> bool | None:
            counted[shape] = _holders(stream)
            return False

    def body(add: Add, x: Tensor) -> None:
        total = add(0, x, torch.neg)
        total = add(1, total, torch.neg)
        total = add(2, total, torch.neg, layer_scale=x[0])
        add(3, x, torch.neg, residual=total)

    state = BlockState(Options(), (Branch(None, ()),) * 4, [None] * 4)
    rows = KeptRows.from_index(torch.tensor([0], device="cpu"), batch=2, scale=1.0)
    state.rows = [rows] * 4
    block = SimpleNamespace(_sdkernels=state)
    with torch.no_grad():
        laws = [Law(0.5, "row", True, True)] * 4
        body(Counting(block, laws), torch.zeros(2, 1, device="cpu"))
    return counted


def make_patched(original: type[nn.Module], name: str, module: str) -> type[nn.Module]:
    """A subclass of a class of blocks that runs the block's rewriting where that saves anything.

    The class keeps the name of the original: what looks for blocks by name (wrapping policies)
    finds them.
    """
    own_forward = original.forward
    _, first, *_ = inspect.signature(own_forward).parameters  # its input, after self

    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self._sdkernels
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
        laws: Any = [state.law(self, branch) for branch in range(len(state.branches))]
        scaled_later = state.options.rescale == "eval"  # evaluation multiplies by 1 - p
        if None in laws:
            if bound:
                raise RuntimeError(
                    f"plan: the drop path of a {original.__name__} has hooks or a class that is "
                    "not known, so it draws for itself"
                )
        elif any(
            # With a p of 0 from patch(): the module that the original calls may have another.
            law.p > 0.0 or p == 0.0 or (bound and law.training)
            for law, p in zip(laws, state.p, strict=True)
            if law.training or scaled_later
        ):
            rewriting = state.rewriting or _found_again(self, state)
            proof = state.asked
            if proof is None:
                try:
                    proof = proof_of(self, rewriting, state.options.check, args, kwargs)
                    if proof.holds:
                        add = Add(self, laws, rewriting, proof)
                        return rewriting.forward(self, add, *args, **kwargs)
                except Asked as asked:
                    proof = state.asked = Proof(False, asked.reason)
                    warn(rewriting, proof)
            if bound:
                raise RuntimeError(
                    f"plan: a {original.__name__} draws for itself, as its own forward runs: "
                    f"{proof.reason}"
                )
        x = args[0] if args else kwargs.get(first)
        if isinstance(x, list):
            return _each(own_forward, self, len(x), args, kwargs)
        return own_forward(self, *args, **kwargs)

    members = {
        "forward": forward,
        "_original": original,
        "__module__": module,
        "__qualname__": name,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (PatchedBlock, original), members)


def _found_again(block: Any, state: BlockState) -> Rewriting:
    """The rewriting of a block that was copied or unpickled."""
    from .registry import find_rewriting

    found = find_rewriting(block)
    if not isinstance(found, Rewriting) or len(found.branches) != len(state.branches):
        raise RuntimeError(
            f"a {type(block).__name__} was patched where its forward was another one; patch the "
            "model again"
        )
    state.rewriting = found
    return found


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
