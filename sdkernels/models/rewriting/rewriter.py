"""From a block to a forward that hands its branches to the op: read, slice, write."""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from .. import parts
from ..settings import settings
from .attributes import BlockParts, DropCall
from .flow import Flow, Value
from .inlining import Inliner
from .sites import Addition, additions, draws_for_itself, drop_calls
from .slicing import Slice, cut
from .source import Configuration, Refusal, function_tree, resolve, stored
from .sums import hides_sums
from .writing import ADD, compiled, written

__all__ = ["Branch", "Call", "Left", "Rewriting", "rewriting_of"]


@dataclass(frozen=True)
class Branch:
    """One residual branch of a class of blocks."""

    drop: str | None  # dotted name of the drop path module; None where the class has none
    parts: tuple[str, ...]  # names of the submodules and parameters that only this branch uses
    p: str | None = None  # dotted name of the drop probability, where a function drops


@dataclass(frozen=True)
class Left:
    """A call of a drop path that stays as it is."""

    drop: str | None
    reason: str


class Call(NamedTuple):
    """A call of a drop path in the original forward: what is called, and for which branch."""

    drop: str | None
    function: str | None
    branch: int | None


@dataclass(eq=False)
class Rewriting:
    """A forward with the op in the place of drop path, for blocks of one configuration."""

    original: type[nn.Module]
    forward: Callable[..., Any]  # takes the block, an Add and the arguments of the original
    branches: tuple[Branch, ...]  # in the order of their numbers
    left: tuple[Left, ...] = ()
    source: str = ""  # of the forward, and of the original's, as the interpreter reads them
    before: str = ""
    calls: tuple[Call, ...] = ()  # of drop paths in the original, in the order of their making
    positional: tuple[str, ...] = ()  # parameters of the original that take a position, after self
    derives: bool = False  # whether a branch gets more of its forward than parameters as they came
    # Tests of the block with the answers that the forward was written for.
    assumed: dict[str, bool] = field(default_factory=dict)
    leaks: bool = False  # whether the forward hands on what its branches compute
    hides_sums: bool = False  # whether nobody but the next addition sees a sum
    # What came of comparisons: by the settings of blocks, then by kinds of calls.
    proofs: dict[Any, dict[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own_forward: Any = self.original.forward  # what this was written for
        names = self.forward.__globals__ if isinstance(self.forward, FunctionType) else {}
        text = f"lambda self: ({''.join(f'bool({test}), ' for test in self.assumed)})"
        code = compile(text, f"<configuration of {self.original.__name__}>", "eval")
        self.ask: Callable[[Any], tuple[bool, ...]] = eval(code, names)
        self.answers = tuple(self.assumed.values())

    @property
    def text(self) -> tuple[Any, ...]:
        """What makes two of them the same: a block is compiled once for each."""
        own = (self.own_forward, self.source, self.branches, self.left, self.calls)
        return self.original, *own, tuple(self.assumed.items())

    @property
    def mark(self) -> str:
        """A hash of the original and of what was written from it."""
        return hashlib.sha256((self.before + self.source).encode()).hexdigest()[:12]

    def is_of_now(self) -> bool:
        """Whether the class still has the forward that this was written for."""
        return self.original.forward is self.own_forward

    def fits(self, block: nn.Module) -> bool:
        """Whether the block still has the configuration that this was written for."""
        return not self.answers or self.ask(block) == self.answers

    def asked(self, block: nn.Module, kwargs: Mapping[str, Any]) -> bool:
        """Whether somebody may ask for what a branch computes besides, as attention weights.

        Where nobody does, None is handed on: in transformers, which says so.
        """
        if not self.leaks or self.original.__module__.partition(".")[0] != "transformers":
            return True
        asked = kwargs.get("output_attentions")
        if asked is None:
            configs = (getattr(module, "config", None) for module in block.modules())
            asked = any(getattr(each, "output_attentions", False) for each in configs)
        return bool(asked)

    def diff(self) -> str:
        """The forward against the original's."""
        name = f"{self.original.__module__}.{self.original.__qualname__}.forward"
        lines = difflib.unified_diff(
            self.before.splitlines(), self.source.splitlines(), name, "patched", n=99, lineterm=""
        )
        return "\n".join(lines)


# All rewritings, by class and what the block is made of: blocks of a model share them.
_BY_BLOCK: dict[Any, Rewriting | Refusal | None] = {}
_BY_SOURCE: dict[Any, Rewriting] = {}
_MANY = 4096  # blocks to remember


def rewriting_of(block: nn.Module, original: type[nn.Module]) -> Rewriting | Refusal | None:
    """The rewriting of a block, why there is none, or None where no drop path is called.

    Args:
        original: the block's class, as it was before it was patched.
    """
    key = (original, original.forward, settings(block, parts.is_to_drop))
    if len(_BY_BLOCK) > _MANY:
        _BY_BLOCK.clear()
    if key not in _BY_BLOCK:
        try:
            made = _rewrite(block, original)
        except Refusal as refusal:
            refusal.__context__ = None  # whose frames hold the block, as do its own
            _BY_BLOCK[key] = refusal.with_traceback(None)
        else:
            _BY_BLOCK[key] = made if made is None else _BY_SOURCE.setdefault(made.text, made)
    return _BY_BLOCK[key]


def _rewrite(block: nn.Module, original: type[nn.Module]) -> Rewriting | None:
    try:
        function, tree = function_tree(original.forward)
    except Refusal:
        if any(map(parts.is_drop_path, block.children())):
            raise
        return None
    attributes = BlockParts(block, function.__globals__)
    before = ast.unparse(tree) + "\n"
    arguments = tree.args
    parameters = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    if parameters[:1] != ["self"] and any(map(parts.is_drop_path, block.children())):
        raise Refusal("the first parameter of its forward is not called self", tree)
    configuration = Configuration(
        block, function.__globals__, stored([tree]) | {*parameters[1:]}, attributes.is_drop
    )

    def holds_drop_path(node: ast.AST) -> bool:
        return any(True for _ in drop_calls(node, attributes))

    def resolved(statements: list[ast.stmt]) -> list[ast.stmt]:
        return resolve(statements, configuration)

    body = Inliner(original, holds_drop_path, resolved).written_out(resolved(tree.body))
    if not any(map(holds_drop_path, body)):
        drawn = draws_for_itself(body)
        if drawn is not None:
            raise Refusal(f"it draws a mask of its own (line {drawn.lineno})", drawn)
        return None
    if arguments.posonlyargs or parameters[:1] != ["self"] or len(arguments.args) < 2:
        raise Refusal("its forward does not name its parameters", tree)
    parameters += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    outside = {
        name: Value("value", frozenset((name,)), is_parameter=True) for name in parameters[1:]
    }
    outside["self"] = Value("own")
    maker = _Maker(attributes, parameters[1])
    statements = maker.rewritten(body, outside, 0)
    if not maker.branches:
        raise Refusal("; ".join(each.reason for each in maker.left))
    name = f"{original.__qualname__}.forward"
    forward, source = compiled(function, tree, statements, name)
    return Rewriting(
        original,
        forward,
        tuple(maker.branches[n] for n in sorted(maker.branches)),
        tuple(maker.left),
        source,
        before,
        tuple(maker.calls),
        tuple(a.arg for a in arguments.args[1:]),
        maker.derives,
        configuration.assumed,
        maker.leaks,
        hides_sums(statements, ADD),
    )


class _Maker:
    """Rewrites a list of statements, and the lists within its statements."""

    def __init__(self, attributes: BlockParts, parameter: str) -> None:
        self.attributes = attributes
        self.parameter = parameter
        self.branches: dict[int, Branch] = {}
        self.left: list[Left] = []
        self.calls: list[Call] = []
        self.derives = False
        self.leaks = False
        self.next = 0

    def rewritten(
        self, body: list[ast.stmt], outside: dict[str, Value], first: int, lives_on: bool = False
    ) -> list[ast.stmt]:
        """The rewritten list, whose branches have numbers from `first` on."""
        flow = Flow(body, outside, lives_on)
        found, calls = additions(body, self.attributes)
        slices = self._slices(flow, found)
        numbered: list[tuple[int, Slice]] = []
        self.next = first
        for at, statement in enumerate(body):
            if isinstance(statement, (ast.If, ast.With)):
                self._within(statement, flow, at)
            for drop in calls:
                if drop.at != at:
                    continue
                if drop in slices:
                    numbered.append((self.next, slices[drop]))
                    self.calls.append(Call(drop.drop, drop.function, self.next))
                    self.next += 1
                else:
                    self._leave(drop)
        result, used = written(flow, numbered, self.attributes)
        for (number, each), names in zip(numbered, used, strict=True):
            drop = each.addition.drop
            mine = tuple(name for name in names if name not in (drop.drop, drop.p))
            self.branches[number] = Branch(drop.drop, mine, drop.p)
            self.leaks |= bool(each.leaks)
            for name, definition in each.extras.items():
                value = flow.values[name, definition]
                is_parameter = value.parameters == {name} and value.is_parameter
                self.derives |= not is_parameter
        return result

    def _slices(self, flow: Flow, found: list[Addition]) -> dict[DropCall, Slice]:
        """The branches that can be cut out of a list of statements."""
        held = [[d.call for d in drop_calls(s, self.attributes)] for s in flow.statements]
        slices: dict[DropCall, Slice] = {}
        for addition in found:
            drop = addition.drop
            others = {n for n, calls in enumerate(held) if calls and calls != [drop.call]}
            others |= {each.at for each in found} - {addition.at}
            try:
                each = cut(flow, addition, others, self.parameter)
                if not self._computes([*each.body, each.result], drop, flow):
                    raise Refusal("what it drops is computed for others too", addition.node)
                slices[drop] = each
                self._forget_residual(flow, each)
            except Refusal as refusal:
                drop.refusal = refusal.reason, ast.Pass(lineno=refusal.line or addition.node.lineno)
        return slices

    def _forget_residual(self, flow: Flow, branch: Slice) -> None:
        """``shortcut = x`` keeps a sum alive for nothing where the op adds to x itself."""
        residual = branch.addition.residual
        if branch.residual is None and isinstance(residual, ast.Name):
            statement = flow.statements[branch.addition.at]
            nodes = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
            loads = [n for n in nodes if n.id == residual.id and isinstance(n.ctx, ast.Load)]
            if len(loads) == 1 and residual.id != branch.stream[0]:
                flow.forget(residual.id, branch.addition.at)

    def _computes(self, trees: Sequence[ast.AST], drop: DropCall, flow: Flow) -> bool:
        """Whether a branch uses a part of the block, or calls a function that may."""
        if any(name != drop.drop for tree in trees for name in self.attributes.used(tree)):
            return True
        local = {name for name, _ in flow.values}
        return any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in local
            for tree in trees
            for node in ast.walk(tree)
        )

    def _leave(self, drop: DropCall) -> None:
        reason, node = drop.refusal or ("it cannot be compacted", drop.call)
        name = drop.drop or drop.function
        self.left.append(Left(drop.drop, f"{name}: {reason} (line {getattr(node, 'lineno', '?')})"))
        self.calls.append(Call(drop.drop, drop.function, None))

    def _within(self, statement: ast.If | ast.With, flow: Flow, at: int) -> None:
        """The lists of a statement. Arms with the same drop paths have the same branches."""
        outside = flow.before(at)
        first, calls, before = self.next, len(self.calls), set(self.branches)
        statement.body = self.rewritten(statement.body, outside, first, True)
        if not isinstance(statement, ast.If) or not statement.orelse:
            return
        own = {n: b for n, b in self.branches.items() if n not in before}
        after, made = self.next, len(self.calls)
        statement.orelse = self.rewritten(statement.orelse, outside, first if own else after, True)
        if own and len(self.calls) > made:
            if self.calls[calls:made] != self.calls[made:]:
                raise Refusal("the arms of an if drop different things", statement)
            del self.calls[made:]
            for number, branch in own.items():
                both = dict.fromkeys((*branch.parts, *self.branches[number].parts))
                self.branches[number] = Branch(branch.drop, tuple(both), branch.p)
        self.next = max(after, self.next)
