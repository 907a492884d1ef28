"""Whether a rewritten forward computes what the original does: both run, on copies of the block.

The copies are in training, with random parameters, so that no zero hides a mistake, no dropout, and
batch norms that use their running statistics. One runs the original, with its drop paths forced to
the rows that the rewriting is given in the other: some and all, of as many as nothing else has,
one, and none. Outputs and the gradients of inputs and parameters must agree, and what the modules
hold afterwards; with all rows, two samples are others for the rewriting once more, which the rest
must not notice. The block itself, its buffers, its hooks and the random state are not touched.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ...rows import KeptRows
from ..adding import Add, BlockState, Options
from ..parts import Law
from ..proof import Asked, Leaf, Proof, leaves
from ..rewriting import Rewriting
from ..rewriting.source import remade
from .arguments import all_leaves, cloned, doubled, held_by, is_list_of, varied, with_tensors
from .aside import aside
from .clones import Forced, Unequal, clone_of, copied, train
from .results import (
    CHANGED,
    State,
    distance_between,
    largest_entry,
    of_unchanged,
    other_state,
    outputs_of,
    state_of,
)

__all__ = ["prove"]

SCALE = 1.5  # of the rows; any number will do
# The largest difference, relative to the largest entry of a tensor; and how far below the largest
# gradient the largest entry of one counts as that: what cancels out leaves rounding behind.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_FLOORS = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}
_GROUPS = 4  # of arguments that look the same
_SIZES = (6, 8, 10, 14, 18, 22, 26, 34)  # numbers of rows; even, as what pairs samples needs
_SPIKE = 30.0
_MANY = 16  # samples, from which on what mixes is looked for among so many, too


def prove(
    block: Any, rewriting: Rewriting, named: dict[str, Any], doubtful: Sequence[Leaf]
) -> Proof:
    """Compare a rewriting with the original on such arguments, given by name.

    Args:
        doubtful: the tensors among the arguments that may belong to samples.
    """
    x = next(iter(named.values()), None)
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
        return Proof(False, "its first argument is not a tensor of numbers")
    if any(is_list_of(value, x) for value in named.values()):
        return Proof(False, "a list of numbers with as many entries as samples may belong to them")
    reason = ""
    unequal: Proof | None = None
    for dtype in _dtypes(block, x):
        if dtype is None and unequal:
            break
        try:
            with aside(block, x.device, in_own_dtypes=dtype is None):
                with torch.no_grad():
                    clone = clone_of(block, rewriting.calls, dtype)
                asked = rewriting.asked(block, named)
                return _Comparison(clone, rewriting, named, x, dtype, doubtful, asked).run()
        except Unequal as found:
            unequal = Proof(False, str(found))
            if dtype != torch.float32:  # else by its rounding, perhaps
                return unequal
        except Asked:  # by this model: of others nothing is known
            raise
        except Exception as error:  # of another dtype, perhaps
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return unequal or Proof(False, f"it does not run on some of the rows ({reason})")


def _dtypes(block: nn.Module, x: Tensor) -> Iterator[torch.dtype | None]:
    """What to compare in, until the two agree: None for the block's own dtypes."""
    own = next((p.dtype for p in block.parameters() if p.is_floating_point()), x.dtype)
    if own != torch.float64:
        yield torch.float32
    if x.device.type != "mps":
        yield torch.float64
    yield None


class _Comparison:
    """Of a rewriting with the original, which runs in `clone`; the rewriting does in a copy."""

    def __init__(
        self,
        clone: Any,
        rewriting: Rewriting,
        named: dict[str, Any],
        x: Tensor,
        dtype: torch.dtype | None,
        doubtful: Sequence[Leaf],
        asked: bool,
    ) -> None:
        train(clone)
        self.clone = clone
        self.rewriting = rewriting
        self.named, self.x = (named, x) if x.shape[0] > 1 else doubled(named, doubtful)
        self.dtype = dtype
        self.doubtful = doubtful
        self.asked = asked  # for what a branch computes besides
        self.inputs: list[Tensor] = []
        self.taken: list[tuple[int, Leaf]] = []
        # With as many rows as nothing else has, what has as many belongs to samples; with two of
        # them that is known already.
        self.proof = Proof(True, of_samples=None)
        dtypes = {x.dtype, *(p.dtype for p in clone.parameters())} & TOLERANCES.keys()
        coarsest = max(dtypes or {torch.float32}, key=TOLERANCES.__getitem__)
        self.tolerance = TOLERANCES[dtype or coarsest]
        self.floor = _FLOORS[dtype or coarsest]
        self.batch = self._rows()
        self.of_samples: frozenset[Leaf] = frozenset()

    def run(self) -> Proof:
        self.of_samples = self._choose()
        first, second = self.clone, copied(self.clone)
        some, every, none, one = self._cases()
        only: frozenset[str] | None = None
        state: State | None = None
        difference, third, whole = 0.0, second, {}
        for rows in (some, one, every, none):  # none last: from it buffers take no statistics
            if rows is every:
                third = copied(second)
            found = self._gradients(second, self._rewritten(second, rows), only)
            if self.proof.of_samples is None:
                self.proof = Proof(True, of_samples=frozenset(self.taken))
                # What nobody asks for is None in the rewriting: it shall not count in the
                # gradients.
                only = frozenset(found) if self.rewriting.leaks and not self.asked else None
            original = self._original(first, rows, watch=rows is some)
            expected = self._gradients(first, original, only)
            difference = max(difference, self._compare(expected, found, rows))
            where: str | None = None
            if state is None:
                state = state_of(first)
                where = other_state(state, state_of(second), self.tolerance)
            if rows is every:
                where = other_state(state, state_of(first))
                whole = outputs_of(original, only)
            if where is not None:
                raise Unequal(f"its forward changes what it or a module of it holds ({where})")
        with torch.no_grad():
            others = outputs_of(self._rewritten(third, every, changed=True), only)
            pair = (of_unchanged(each, self.batch) for each in (whole, others))
            distance, what = self._difference(*pair)
            if not distance <= self.tolerance:
                self._check_mixing(self.batch)
                raise Unequal(self._text(what, distance, every))
        if self.x.shape[0] >= _MANY:  # which may lead another way
            self._check_mixing(min(self.x.shape[0], 2 * _MANY))
        return replace(self.proof, difference=max(difference, distance))

    def _compare(
        self,
        expected: dict[str, Tensor | None],
        found: dict[str, Tensor | None],
        rows: Sequence[KeptRows],
    ) -> float:
        """The largest difference, which is small enough."""
        difference, what = self._difference(expected, found)
        if not difference <= self.tolerance:
            self._explain(rows, expected)
            raise Unequal(self._text(what, difference, rows))
        return difference

    def _text(self, what: str, difference: float, rows: Sequence[KeptRows]) -> str:
        return (
            f"{what} differs by {difference:.2g} of its largest entry from that of its own "
            f"forward, with {rows[0].k} of {rows[0].batch} rows"
        )

    # The two forwards

    def _original(
        self, clone: Any, rows: Sequence[KeptRows], changed: bool = False, watch: bool = False
    ) -> Any:
        functions = self._force(clone, rows, None)
        named = self._arguments(rows[0].batch, self.of_samples, changed)
        before = held_by(named) if watch else None
        result = self._call_original(clone, named, functions)
        if before is not None and before != held_by(named):
            raise Unequal("its forward writes into an argument, list or object that it is given")
        return result

    def _rewritten(self, clone: Any, rows: Sequence[KeptRows], changed: bool = False) -> Any:
        functions = self._force(clone, rows, True)
        named = self._arguments(rows[0].batch, self.of_samples, changed)
        branches = self.rewriting.branches
        state = BlockState(Options(), branches, [None] * len(branches), self.rewriting)
        for call, each in zip(self.rewriting.calls, rows, strict=True):
            if call.branch is not None:
                state.rows[call.branch] = each
        laws = [Law(0.5, "row", True, True)] * len(branches)
        clone.__dict__["_sdkernels"] = state
        try:
            add = Add(clone, laws, self.rewriting, (self.proof,), self.asked)
            self.taken = add.taken
            forward = _with_functions(self.rewriting.forward, functions)
            return self._call(forward, (clone, add), named)
        finally:
            del clone.__dict__["_sdkernels"]

    def _call_original(
        self, clone: Any, named: dict[str, Any], functions: dict[str, Forced] | None = None
    ) -> Any:
        forward = _with_functions(self.rewriting.original.forward, functions or {})
        return self._call(forward, (clone,), named)

    def _call(self, forward: Any, first: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Arguments by position as long as the signature has them, then by name."""
        values = dict(named)
        args = []
        for name in self.rewriting.positional:
            if name not in values:
                break
            args.append(values.pop(name))
        return forward(*first, *args, **values)

    def _force(
        self, clone: Any, rows: Sequence[KeptRows], only_left: bool | None
    ) -> dict[str, Forced]:
        """Give the drop paths their rows; those of functions are returned."""
        functions: dict[str, Forced] = {}
        given: dict[int, list[KeptRows]] = {}
        for call, each in zip(self.rewriting.calls, rows, strict=True):
            if call.drop is not None:
                drop = attrgetter(call.drop)(clone)
            else:
                drop = functions.setdefault(call.function or "", Forced())
            queue = given.setdefault(id(drop), [])
            if not only_left or call.branch is None:
                queue.append(each)
            drop.rows, drop.calls = queue, 0
        return functions

    # Rows and arguments

    def _rows(self) -> int:
        """A number of rows that nothing else has."""
        sizes = {size for _, leaf in leaves(self.named) for size in leaf.shape}
        sizes |= {size for p in self.clone.parameters() for size in p.shape[:2]}  # no kernel's
        return next((size for size in _SIZES if size not in sizes), 23)

    def _cases(self) -> list[list[KeptRows]]:
        """Rows for every call: some, others in each; all; none and one, of two: that is cheaper."""
        generator = torch.Generator().manual_seed(2)
        calls, batch = len(self.rewriting.calls), self.batch

        def rows(index: Tensor, batch: int = batch) -> KeptRows:
            return KeptRows.from_index(index.sort().values, batch, SCALE).to(self.x.device)

        some = []
        for number in range(calls):
            # Without one of the first two, so that kept rows come to stand where others were.
            others = [row for row in range(batch) if row != number % 2]
            chosen = torch.randperm(batch - 1, generator=generator)[: batch // 2 + number % 2]
            some.append(rows(torch.tensor(others)[chosen]))
        return [
            some,
            [rows(torch.arange(batch))] * calls,
            [rows(torch.arange(0), 2)] * calls,
            [rows(torch.tensor([(number + 1) % 2]), 2) for number in range(calls)],
        ]

    def _arguments(
        self, batch: int, of_samples: frozenset[Leaf], changed: bool = False
    ) -> dict[str, Any]:
        """Copies of the arguments for so many rows, with noise; what needs gradients as a clone.

        Args:
            changed: whether two of the samples are others.
        """
        generator = torch.Generator().manual_seed(1)
        index = torch.arange(batch, device=self.x.device) % self.x.shape[0]
        self.inputs = []

        def change(path: str, leaf: Tensor) -> Tensor:
            belongs = leaf is self.x or (path, leaf.dim()) in of_samples
            taken = leaf.detach()
            if belongs:
                taken = taken[index]
            if not (taken.is_floating_point() or taken.is_complex()):
                return varied(taken) if (path, leaf.dim()) in self.doubtful else taken.clone()
            noise = torch.randn(taken.shape, generator=generator)
            if leaf is self.x:  # whatever the batch holds
                taken = taken.nan_to_num(0.0, 1.0, -1.0).clamp(-10.0, 10.0)
            dtype = self.dtype or taken.dtype
            if taken.is_complex():
                dtype = dtype if self.dtype is None else dtype.to_complex()
            taken = taken.to(dtype) + 0.3 * noise.to(taken.device, dtype)
            if changed and leaf is self.x:
                one, two = CHANGED
                other = torch.Generator().manual_seed(4)
                taken[one] = torch.randn(taken.shape[1:], generator=other).to(taken)
                taken[(two, *(size // 2 for size in taken.shape[1:]))] = _SPIKE
            if not belongs:
                return taken
            self.inputs.append(taken.requires_grad_())
            return taken.clone()  # a block may write into it

        return with_tensors(self.named, change)

    # Which arguments belong to samples

    def _choose(self) -> frozenset[Leaf]:
        """Those that have to be cut with them."""
        if not self.doubtful:
            return frozenset()
        alike: dict[Any, list[Leaf]] = {}  # what looks the same belongs to the same
        tensors = {(path, t.dim()): t for path, t in all_leaves(self.named)}
        for each in self.doubtful:
            alike.setdefault((tensors[each].shape, tensors[each].dtype), []).append(each)
        groups = list(alike.values())
        if len(groups) > _GROUPS:
            raise Unequal("it cannot be told which of so many arguments belong to samples")
        with torch.no_grad():
            clone = copied(self.clone)
            runs = self._first_rows(clone)
            for count in range(len(groups), -1, -1):
                for chosen in itertools.combinations(groups, count):
                    some = frozenset(itertools.chain(*chosen))
                    try:
                        if runs(some):
                            return some
                    except Unequal:
                        raise
                    except Exception:
                        continue
        raise Unequal("it cannot be told which arguments belong to samples")

    def _first_rows(self, clone: Any) -> Callable[[frozenset[Leaf]], bool]:
        """Whether the first rows of the batch come out the same, with these arguments cut."""
        full = self.x.shape[0]
        part = max(1, full - 1)
        calls = len(self.rewriting.calls)
        every, few = (
            KeptRows.from_index(torch.arange(n), n).to(self.x.device) for n in (full, part)
        )
        arguments = self._arguments(full, frozenset(self.doubtful))
        functions = self._force(clone, [every] * calls, None)
        whole = self._call_original(clone, with_tensors(arguments, cloned), functions)
        first = [t[:part] for _, t in leaves(whole)]
        stream = self.rewriting.positional[0]

        def run(some: frozenset[Leaf]) -> bool:
            def cut(path: str, leaf: Tensor) -> Tensor:
                belongs = path == stream or (path, leaf.dim()) in some
                return (leaf[:part] if belongs else leaf).clone()

            functions = self._force(clone, [few] * calls, None)
            cut_down = self._call_original(clone, with_tensors(arguments, cut), functions)
            second = [t for _, t in leaves(cut_down)]
            return len(first) == len(second) and all(
                a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3)
                for a, b in zip(first, second, strict=True)
            )

        return run

    # What must agree

    def _explain(self, rows: Sequence[KeptRows], once: dict[str, Tensor | None]) -> None:
        """Raise what is behind a difference, if the original shows it too."""
        with torch.no_grad():
            again = outputs_of(self._original(self.clone, rows))
        if not self._difference({n: t for n, t in once.items() if n in again}, again)[0] <= 1e-3:
            raise Unequal("it computes something else in every run")
        self._check_mixing(self.batch)

    def _check_mixing(self, batch: int) -> None:
        """Raise where samples depend on each other, which fewer of them would show."""
        rows = KeptRows.from_index(torch.arange(batch), batch, SCALE).to(self.x.device)
        every, other = [rows] * len(self.rewriting.calls), copied(self.clone)
        with torch.no_grad():
            before = outputs_of(self._original(other, every))
            after = outputs_of(self._original(self.clone, every, changed=True))
        unchanged = [of_unchanged(each, batch) for each in (before, after)]
        if not self._difference(*unchanged)[0] <= self.tolerance:
            raise Unequal("its samples depend on each other")

    def _gradients(
        self, clone: nn.Module, result: Any, only: Container[str] | None = None
    ) -> dict[str, Tensor | None]:
        """Outputs, or only those of these names, and the gradients of inputs and parameters."""
        generator = torch.Generator().manual_seed(3)
        found = outputs_of(result, only)
        outputs: list[Tensor] = []
        seeds: list[Tensor] = []
        for path, leaf in leaves(result):
            if f"output{path}" in found and leaf.requires_grad:
                seed = torch.randn(leaf.shape, generator=generator)
                outputs.append(leaf)
                seeds.append(seed.to(leaf.device, leaf.dtype))
        if outputs:  # not torch.autograd.grad, of which a reentrant checkpoint knows nothing
            torch.autograd.backward(outputs, seeds)
        for number, leaf in enumerate(self.inputs):
            found[f"the gradient of input {number}"] = leaf.grad
        for name, parameter in clone.named_parameters():
            if parameter.requires_grad:
                found[f"the gradient of {name}"] = parameter.grad
                parameter.grad = None
        return found

    def _difference(
        self, first: dict[str, Tensor | None], second: dict[str, Tensor | None]
    ) -> tuple[float, str]:
        """The largest relative difference, and of what."""
        if first.keys() != second.keys():
            return float("inf"), "the number of outputs"
        largest = (0.0, "nothing")
        scales = {name: largest_entry(t) for name, t in first.items() if t is not None}
        gradients = [scale for name, scale in scales.items() if name.startswith("the")]
        floor = self.floor * max(gradients, default=0.0)
        for name, a in first.items():
            b = second[name]
            if a is None or b is None:
                other = b if a is None else a
                difference = 0.0 if other is None or not other.any() else float("inf")
            elif a.shape != b.shape:
                difference = float("inf")
            else:
                least = floor if name.startswith("the") else 0.0
                difference = distance_between(a, b, max(scales[name], least))
            if difference > largest[0]:
                largest = difference, name
        return largest


def _with_functions(forward: Any, functions: dict[str, Forced]) -> Any:
    """The forward with other functions under these global names."""
    if not functions:
        return forward
    if not isinstance(forward, FunctionType) or any("." in name for name in functions):
        raise Unequal("its drop path function cannot be replaced for the comparison")

    def standing_in(name: str, drop: Forced) -> Any:
        first = next(iter(inspect.signature(forward.__globals__[name]).parameters))
        return lambda *args, **kwargs: drop(args[0] if args else kwargs[first])

    made = {name: standing_in(name, drop) for name, drop in functions.items()}
    return remade(forward, {**forward.__globals__, **made}, forward.__closure__)
