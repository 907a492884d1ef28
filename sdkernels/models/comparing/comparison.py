"""Whether a rewritten forward computes what the original does: both run, on a copy of the block.

The copy is in training, with random parameters, so that no zero hides a mistake, no dropout, and
batch norms that use their running statistics. It runs in double precision on as many rows as
nothing else has, with the drop paths of the original forced to the rows that the rewriting is
given: some, all and none. Outputs and the gradients of inputs and parameters must agree, samples
must not depend on each other, and nothing that the block holds may change. The block itself, its
buffers, its hooks and the random state are not touched.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ...rows import KeptRows
from ..parts import Law
from ..rewriting import Rewriting
from ..settings import settings
from .proof import Asked, Leaf, Proof, leaves, mapped

if TYPE_CHECKING:
    from ..blocks import Add

__all__ = ["prove"]

SCALE = 1.5  # of the rows; any number will do
# The largest difference, relative to the largest entry of a tensor.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_GROUPS = 4  # of arguments that look the same
_SIZES = (6, 8, 10, 14, 18, 22, 26, 34)  # numbers of rows; even, as what pairs samples needs


_DROPOUTS = frozenset((
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout,
))  # fmt: skip


class Forced(nn.Module):
    """In the place of a drop path: the masks of given rows, one call after another."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[KeptRows] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows[self.calls % len(self.rows)]  # a checkpoint begins anew
        self.calls += 1
        if x.shape[0] != rows.batch:
            raise Unequal(f"its drop path gets {x.shape[0]} rows for {rows.batch} samples")
        mask = (rows.slot >= 0).to(x.dtype) * rows.scale
        return x * mask.view(-1, *[1] * (x.dim() - 1))


class Unequal(Exception):
    """The two forwards differ."""


class _WithoutDropout(TorchFunctionMode):
    """Dropout drops nothing: it would not draw the same for some of the rows as for all."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            if "dropout_p" in kwargs:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return function(*args, **kwargs)


def _copy_of(block: Any, rewriting: Rewriting, dtype: torch.dtype | None) -> Any:
    """The block in its own class, without hooks, chance and zeros."""
    states = [m.__dict__.get("_sdkernels") for m in block.modules()]
    clone = copy.deepcopy(block, {id(state): None for state in states if state is not None})
    for module in clone.modules():
        if "_sdkernels" in module.__dict__:
            del module.__dict__["_sdkernels"]
            module.__class__ = type(module)._original
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                     "_backward_pre_hooks"):  # fmt: skip
            module.__dict__[name].clear()
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        if "gradient_checkpointing" in module.__dict__:  # of transformers
            module.gradient_checkpointing = False
        if isinstance(module, _BatchNorm):
            module.eval()
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
    if dtype is not None:
        clone.to(dtype)
    for parameter in clone.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            spread = 0.3 if parameter.dim() <= 1 or parameter.numel() < 9 else 0.02
            small = parameter.abs().max() < 0.1 if parameter.numel() else False
            parameter.add_(torch.randn_like(parameter) * spread)
            if parameter.dim() <= 1 and small:
                parameter.add_(0.5)
    for call in rewriting.calls:
        if call.drop is not None:
            owner, _, name = call.drop.rpartition(".")
            setattr(attrgetter(owner)(clone) if owner else clone, name, Forced())
    return clone


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Random state, hooks, autocast and gradient mode as if what runs here had not run."""
    names = [name for name in vars(hooks) if name.startswith("_global_") and name.endswith("hooks")]
    kept = {name: getattr(hooks, name) for name in names}
    devices = [device] if device.type == "cuda" else []
    try:
        for name in names:
            setattr(hooks, name, type(kept[name])())
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t)
            )
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_WithoutDropout())
            torch.manual_seed(0)
            yield
    finally:
        for name in names:
            setattr(hooks, name, kept[name])


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
    if any(_is_list_of(value, x) for value in named.values()):
        return Proof(False, "a list of numbers with as many entries as samples may belong to them")
    own_mode = block.training
    reason, last = "", None
    for dtype in dict.fromkeys((torch.float64, torch.float32, x.dtype)):
        if dtype == torch.float64 and x.device.type == "mps":
            continue
        try:
            with _aside(x.device):
                with torch.no_grad():
                    clone = _copy_of(block, rewriting, dtype)
                asked = rewriting.asked(block, named)
                comparison = _Comparison(clone, rewriting, named, x, dtype, doubtful, asked=asked)
                return comparison.run()
        except Unequal as unequal:
            return Proof(False, str(unequal))
        except Asked:  # by this model: of others nothing is known
            raise
        except Exception as error:  # of another dtype, perhaps
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            last = error
        finally:
            block.training = own_mode
    del last
    return Proof(False, f"it does not run on some of the rows ({reason})")


@dataclass
class _Comparison:
    clone: Any
    rewriting: Rewriting
    named: dict[str, Any]
    x: Tensor
    dtype: torch.dtype
    doubtful: Sequence[Leaf]
    of_samples: frozenset[Leaf] = frozenset()
    asked: bool = True  # for what a branch computes besides
    largest: float = 0.0
    inputs: list[Tensor] = field(default_factory=list)
    taken: list[tuple[int, Leaf]] = field(default_factory=list)

    def run(self) -> Proof:
        batch = self._rows()
        self.of_samples = self._choose()
        self.clone.train()
        for module in self.clone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        rows = self._cases(batch)[0]
        once = self._original(batch, rows)
        before = self._state()  # what follows from the inputs alone is set by now
        same = self._is_the_same_again(batch, rows, once)
        after = self._state()
        if before[0] != after[0] or not all(map(torch.equal, before[1], after[1])):
            raise Unequal("its forward changes what it or a module of it holds")
        if not same:
            raise Unequal("it computes something else in every run")
        self._check_mixing(batch)
        for rows in self._cases(batch):
            rewritten = self._rewritten(batch, rows)
            # What nobody asks for is None in the rewriting: it shall not count in the gradients.
            only = rewritten if self.rewriting.leaks and not self.asked else None
            expected = self._original(batch, rows, only)
            difference, what = self._difference(expected, rewritten)
            self.largest = max(self.largest, difference)
            if not difference <= TOLERANCES[self.dtype]:
                kept = rows[0].k
                raise Unequal(
                    f"{what} differs by {difference:.2g} of its largest entry from that of its own "
                    f"forward, with {kept} of {batch} rows"
                )
        return Proof(True, of_samples=frozenset(self.taken), difference=self.largest)

    def _state(self) -> tuple[Any, list[Tensor]]:
        """What a forward might change."""

        def is_forced(path: str, module: nn.Module) -> bool:
            return isinstance(module, Forced)

        return settings(self.clone, is_forced), [b.clone() for b in self.clone.buffers()]

    def _rows(self) -> int:
        """A number of rows that nothing else has."""
        sizes = {size for _, leaf in leaves(self.named) for size in leaf.shape}
        sizes |= {size for p in self.clone.parameters() for size in p.shape[:2]}  # no kernel's
        return next((size for size in _SIZES if size not in sizes), 23)

    def _taken(self, batch: int, of_samples: frozenset[Leaf]) -> dict[str, Any]:
        """The arguments for so many rows, with noise, as leaves of their own."""
        generator = torch.Generator().manual_seed(1)
        index = torch.arange(batch, device=self.x.device) % self.x.shape[0]
        self.inputs = []

        def change(path: str, leaf: Tensor) -> Tensor:
            belongs = leaf is self.x or (path, leaf.dim()) in of_samples
            taken = leaf.detach()
            if belongs:
                taken = taken[index]
            if not taken.is_floating_point():
                return _varied(taken) if (path, leaf.dim()) in self.doubtful else taken.clone()
            noise = torch.randn(taken.shape, generator=generator, dtype=torch.float64)
            if leaf is self.x:  # whatever the batch holds
                taken = taken.nan_to_num(0.0, 1.0, -1.0).clamp(-10.0, 10.0)
            taken = taken.to(self.dtype) + 0.3 * noise.to(taken.device, self.dtype)
            if belongs:
                taken.requires_grad_()
                self.inputs.append(taken)
            return taken

        return self._mapped(self.named, change)

    def _mapped(
        self, named: dict[str, Any], change: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Any]:
        return {name: mapped(value, change, name) for name, value in named.items()}

    def _choose(self) -> frozenset[Leaf]:
        """Which of the arguments belong to samples: those that have to be cut with them."""
        if not self.doubtful:
            return frozenset()
        full = self.x.shape[0]
        every = KeptRows.from_index(torch.arange(full), full).to(self.x.device)
        alike: dict[Any, list[Leaf]] = {}  # what looks the same belongs to the same
        tensors = {(path, t.dim()): t for path, t in self._all_leaves()}
        for each in self.doubtful:
            alike.setdefault((tensors[each].shape, tensors[each].dtype), []).append(each)
        groups = list(alike.values())
        if len(groups) > _GROUPS:
            raise Unequal("it cannot be told which of so many arguments belong to samples")
        for count in range(len(groups), -1, -1):
            for chosen in itertools.combinations(groups, count):
                some = frozenset(itertools.chain(*chosen))
                try:
                    if self._runs_alike(some, every):
                        return some
                except Unequal:
                    raise
                except Exception:
                    continue
        raise Unequal("it cannot be told which arguments belong to samples")

    def _all_leaves(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.named.items():
            yield from leaves(value, name)

    def _runs_alike(self, some: frozenset[Leaf], every: KeptRows) -> bool:
        """Whether the first rows of the batch are the same without the others."""
        full = self.x.shape[0]
        part = max(1, full - 1)
        rows = [every] * len(self.rewriting.calls)
        with torch.no_grad():
            self._force(rows, None)
            named = self._taken(full, frozenset(self.doubtful))
            whole = self._call_original(named)
            x = self.inputs[0]

            def cut(path: str, leaf: Tensor) -> Tensor:
                belongs = leaf is x or (path, leaf.dim()) in some
                return leaf[:part] if belongs else leaf

            named = self._mapped(named, cut)
            few = KeptRows.from_index(torch.arange(part), part).to(self.x.device)
            self._force([few] * len(self.rewriting.calls), None)
            cut_down = self._call_original(named)
        first = [t[:part] for _, t in leaves(whole)]
        second = [t for _, t in leaves(cut_down)]
        return len(first) == len(second) and all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3)
            for a, b in zip(first, second, strict=True)
        )

    def _cases(self, batch: int) -> list[list[KeptRows]]:
        """Rows for every call: some, others in each, of which one may be; all; none."""
        generator = torch.Generator().manual_seed(2)
        calls = len(self.rewriting.calls)

        def rows(index: Tensor) -> KeptRows:
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
            [rows(torch.arange(0))] * calls,
        ]

    def _force(self, rows: Sequence[KeptRows], only_left: bool | None) -> dict[str, Forced]:
        """Give the drop paths their rows; those of functions are returned."""
        functions: dict[str, Forced] = {}
        given: dict[int, list[KeptRows]] = {}
        for call, each in zip(self.rewriting.calls, rows, strict=True):
            if call.drop is not None:
                drop = attrgetter(call.drop)(self.clone)
            else:
                drop = functions.setdefault(call.function or "", Forced())
            queue = given.setdefault(id(drop), [])
            if not only_left or call.branch is None:
                queue.append(each)
            drop.rows, drop.calls = queue, 0
        return functions

    def _call_original(
        self, named: dict[str, Any], functions: dict[str, Forced] | None = None
    ) -> Any:
        forward = _with_functions(self.rewriting.original.forward, functions or {})
        return self._call(forward, (self.clone,), named)

    def _call(self, forward: Any, first: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Arguments by position as long as the signature has them, then by name."""
        values = dict(named)
        args = []
        for name in self.rewriting.positional:
            if name not in values:
                break
            args.append(values.pop(name))
        return forward(*first, *args, **values)

    def _original(
        self, batch: int, rows: Sequence[KeptRows], only: Container[str] | None = None
    ) -> dict[str, Tensor | None]:
        functions = self._force(rows, None)
        named = self._taken(batch, self.of_samples)
        return self._gradients(self._call_original(named, functions), only)

    def _rewritten(self, batch: int, rows: Sequence[KeptRows]) -> dict[str, Tensor | None]:
        from ..blocks import Add, BlockState, Options

        functions = self._force(rows, True)
        named = self._taken(batch, self.of_samples)
        branches = self.rewriting.branches
        state = BlockState(Options(), branches, [None] * len(branches), self.rewriting)
        for call, each in zip(self.rewriting.calls, rows, strict=True):
            if call.branch is not None:
                state.rows[call.branch] = each
        laws = [Law(0.5, "row", True, True)] * len(branches)
        self.clone.__dict__["_sdkernels"] = state
        try:
            # Nothing but what belongs to samples has as many rows here.
            trusted = (Proof(True, of_samples=None),)
            add: Add = Add(self.clone, laws, self.rewriting, trusted, self.asked)
            self.taken = add.taken
            forward = _with_functions(self.rewriting.forward, functions)
            return self._gradients(self._call(forward, (self.clone, add), named))
        finally:
            del self.clone.__dict__["_sdkernels"]

    def _gradients(
        self, result: Any, only: Container[str] | None = None
    ) -> dict[str, Tensor | None]:
        """Outputs, or only those of these names, and the gradients of inputs and parameters."""
        generator = torch.Generator().manual_seed(3)
        found: dict[str, Tensor | None] = {}
        _check_container(result)
        outputs: list[Tensor] = []
        seeds: list[Tensor] = []
        for path, leaf in leaves(result):
            if only is not None and f"output{path}" not in only:
                continue
            found[f"output{path}"] = leaf.detach()
            if leaf.requires_grad:
                seed = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
                outputs.append(leaf)
                seeds.append(seed.to(leaf.device, leaf.dtype))
        named = {n: p for n, p in self.clone.named_parameters() if p.requires_grad}
        wanted = [*self.inputs, *named.values()]
        if outputs and wanted:
            gradients = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
            names = [f"the gradient of input {n}" for n in range(len(self.inputs))]
            names += [f"the gradient of {name}" for name in named]
            found.update(zip(names, gradients, strict=True))
        return found

    def _difference(
        self, first: dict[str, Tensor | None], second: dict[str, Tensor | None]
    ) -> tuple[float, str]:
        """The largest relative difference, and of what."""
        if first.keys() != second.keys():
            return float("inf"), "the number of outputs"
        largest = (0.0, "nothing")
        floor = max(
            (
                float(t.abs().max())
                for n, t in first.items()
                if t is not None and t.numel() and n.startswith("the")
            ),
            default=0.0,
        )
        for name, a in first.items():
            b = second[name]
            if a is None or b is None:
                other = b if a is None else a
                difference = 0.0 if other is None or not other.any() else float("inf")
            elif a.shape != b.shape:
                difference = float("inf")
            else:
                difference = self._distance(a, b, 1e-6 * floor)
            if difference > largest[0]:
                largest = difference, name
        return largest

    def _distance(self, a: Tensor, b: Tensor, floor: float = 0.0) -> float:
        """The largest difference, relative to the largest entry."""
        if not a.numel():
            return 0.0
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        off = (a - b).abs().masked_fill(same, 0.0).max()
        scale = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
        distance = float(off) / max(scale, floor, 1e-30)
        return float("inf") if distance != distance else distance

    def _is_the_same_again(
        self, batch: int, rows: Sequence[KeptRows], once: dict[str, Tensor | None]
    ) -> bool:
        functions = self._force(rows, None)
        with torch.no_grad():
            again = self._call_original(self._taken(batch, self.of_samples), functions)
        outputs = [t for name, t in once.items() if name.startswith("output")]
        # Not to the last bit: where memory lies decides the order of sums in a matrix product.
        return all(
            first is not None and self._distance(first, second) <= TOLERANCES[self.dtype]
            for first, (_, second) in zip(outputs, leaves(again), strict=True)
        )

    def _check_mixing(self, batch: int) -> None:
        """Refuse a block whose samples depend on each other, which fewer of them would show."""
        every = self._cases(batch)[1]
        with torch.no_grad():
            functions = self._force(every, None)
            before = self._call_original(self._taken(batch, self.of_samples), functions)
            functions = self._force(every, None)
            named = self._taken(batch, self.of_samples)
            self.inputs[0][1].add_(1.0)
            after = self._call_original(named, functions)
        for (_, a), (_, b) in zip(leaves(before), leaves(after), strict=True):
            if a.dim() and a.shape[0] == batch:
                others = [0, *range(2, batch)]
                if not torch.allclose(a[others], b[others], rtol=1e-3, atol=1e-6, equal_nan=True):
                    raise Unequal("its samples depend on each other")


def _is_list_of(value: Any, x: Tensor) -> bool:
    """Whether numbers may be one for each sample: as many, and no sizes of the stream."""
    if isinstance(value, dict):
        return any(_is_list_of(each, x) for each in value.values())
    if not isinstance(value, (list, tuple)):
        return False
    if any(_is_list_of(each, x) for each in value):
        return True
    count = len(value)
    if count != x.shape[0] or count < 2 or not all(isinstance(v, (int, float)) for v in value):
        return False
    sizes = [tuple(x.shape[first : first + count]) for first in range(x.dim())]
    return tuple(value) not in sizes and math.prod(value) not in x.shape[1:]


def _check_container(result: Any) -> None:
    """Refuse an output that may hold tensors where they are not seen."""
    if isinstance(result, (list, tuple)):
        for each in result:
            _check_container(each)
    elif isinstance(result, dict):
        _check_container(list(result.values()))
    elif not (result is None or isinstance(result, (Tensor, bool, int, float, str))):
        raise Unequal(f"its output has a {type(result).__name__}, which may hold tensors unseen")


def _varied(numbers: Tensor) -> Tensor:
    """Numbers of which no two rows are the same, where they were: others will not be."""
    numbers = numbers.clone()
    if len(numbers) < 2 or not (numbers == numbers[:1]).all():
        return numbers
    if numbers.dtype == torch.bool:
        numbers.flatten(1)[1::2, -1:] ^= True
    else:
        numbers[1::2] -= (numbers[1::2] > 1).to(numbers.dtype)
    return numbers


def _with_functions(forward: Any, functions: dict[str, Forced]) -> Any:
    """The forward with other functions under these global names."""
    if not functions:
        return forward
    if not isinstance(forward, FunctionType) or any("." in name for name in functions):
        raise Unequal("its drop path function cannot be replaced for the comparison")

    def named(drop: Forced) -> Any:
        return lambda x, *args, **kwargs: drop(x)

    names = {**forward.__globals__, **{name: named(drop) for name, drop in functions.items()}}
    made = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made
