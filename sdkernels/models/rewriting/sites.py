"""Where a drop path's result is added to a stream.

The values of a list of statements are followed: a drop path's result may be renamed, reshaped and
multiplied by what belongs to the block, as all of that commutes with leaving samples out, until it
is added to something. Any other use of it is a refusal.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .attributes import BlockParts, DropCall
from .flow import names_read
from .source import attribute_path, on_self_only, stored

__all__ = ["Addition", "additions", "draws_for_itself", "drop_calls", "moved"]

# Methods that move or scale elements within their sample.
_MOVES = frozenset((
    "contiguous", "flatten", "permute", "reshape", "squeeze", "to", "transpose", "type_as",
    "unflatten", "unsqueeze", "view",
))  # fmt: skip
_LINEAR = _MOVES | {"mul", "mul_"}


@dataclass(eq=False)
class Addition:
    """``residual + f(drop_path(branch))`` in statement number `at`."""

    at: int
    node: ast.BinOp
    branch: ast.expr
    residual: ast.expr
    drop: DropCall


def drop_calls(tree: ast.AST, parts: BlockParts) -> Iterator[DropCall]:
    """The calls of drop paths in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (found := parts.drop_call(node)) is not None:
            yield found


@dataclass
class _Follower:
    parts: BlockParts
    found: list[Addition] = field(default_factory=list)
    calls: list[DropCall] = field(default_factory=list)
    carried: dict[str, DropCall] = field(default_factory=dict)
    at: int = 0

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                drop = self.value(value)
                self.carried.pop(name, None)
                if drop is not None:
                    self.carried[name] = drop
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name())) as call):
                self.value(call)  # a method that writes into what a name holds
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.Return() | ast.Expr():
                for child in ast.iter_child_nodes(node):
                    self.use(child, node)
                self.forget(node)
            case _:
                for drop in drop_calls(node, self.parts):
                    drop.refuse(f"it is called inside of {_name(node)}", drop.call)
                    drop.at = self.at
                    self.calls.append(drop)
                self.mentions(node)

    def forget(self, node: ast.AST) -> None:
        """What a statement assigns to is a drop path's result no more."""
        for name in stored([node]):
            self.carried.pop(name, None)

    def mentions(self, node: ast.AST) -> None:
        """Statements within statements, whose order is not followed."""
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and each.id in self.carried:
                self.carried[each.id].refuse(f"its result is used inside of {_name(node)}", each)

    def use(self, node: ast.AST, where: ast.AST) -> None:
        """An expression whose value goes on to something that is not followed."""
        drop = self.value(node)
        if drop is None:
            return
        if isinstance(where, ast.Return):
            drop.refuse("its result is returned, and added to nothing here", where)
        else:
            drop.refuse(f"its result is used by {_name(where)}", where)

    def value(self, node: ast.AST) -> DropCall | None:
        """The drop path whose result the expression is, if it is one's."""
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                return self.carried.get(name)
            case ast.Call() if (drop := self.parts.drop_call(node)) is not None:
                drop.at = self.at
                self.calls.append(drop)
                inner = self.value(drop.argument)
                if inner is not None:
                    inner.refuse("its result goes into another drop path", node)
                return drop
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                self.sum(node, self.value(left), self.value(right))
                return None
            case ast.BinOp(op=ast.Mult(), left=left, right=right):
                for scaled, factor in ((left, right), (right, left)):
                    if on_self_only(factor) or isinstance(factor, ast.Constant):
                        return self.value(scaled)
            case ast.Call(func=ast.Attribute(value=value, attr=method), args=args):
                path = attribute_path(node.func)
                if len(args) == 1 and not node.keywords and self.parts.is_layer_scale(path):
                    return self.value(args[0])
                if method in _LINEAR and path is None:
                    for each in (*args, *node.keywords):
                        self.use(each, node)
                    if not method.startswith("mul") or all(map(on_self_only, args)):
                        return self.value(value)
        for child in ast.iter_child_nodes(node):
            self.use(child, node)
        return None

    def sum(self, node: ast.BinOp, left: DropCall | None, right: DropCall | None) -> None:
        if left is not None and right is not None:
            for each in (left, right):
                each.refuse("its result is added to that of another drop path", node)
        elif left is not None or right is not None:
            drop = left or right
            assert drop is not None
            branch, residual = (node.left, node.right) if left else (node.right, node.left)
            if drop.added:
                drop.refuse("its result is added twice", node)
            drop.added = True
            self.found.append(Addition(self.at, node, branch, residual, drop))


def additions(
    statements: Sequence[ast.stmt], parts: BlockParts
) -> tuple[list[Addition], list[DropCall]]:
    """The additions of a list of statements, and all calls of drop paths in it.

    Statements that have statements inside are followed by themselves, for what is added within.
    """
    follower = _Follower(parts)
    for number, statement in enumerate(statements):
        follower.at = number
        if isinstance(statement, (ast.If, ast.With)):
            follower.mentions(statement)
            follower.forget(statement)
        else:
            follower.statement(statement)
    for drop in follower.calls:
        if not drop.added:
            drop.refuse("its result is not added to anything", drop.call)
    return [each for each in follower.found if each.drop.refusal is None], follower.calls


def moved(value: ast.expr) -> str | None:
    """The name of what an expression is, or is a view of: ``x.reshape(B, -1, C)``."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if value.func.attr not in _MOVES:
            return None
        value = value.func.value
    return value.id if isinstance(value, ast.Name) else None


def draws_for_itself(statements: Sequence[ast.stmt]) -> ast.stmt | None:
    """The statement that draws random numbers which then multiply what is added to something.

    It may be a drop path that is written out; nothing else in a forward is of this form.
    """
    drawn: dict[str, ast.stmt] = {}
    nodes = [node for top in statements for node in ast.walk(top)]
    for statement in nodes:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                called = {n.attr for n in ast.walk(value) if isinstance(n, ast.Attribute)}
                sources = drawn.keys() & names_read(value)
                if called & {"rand", "bernoulli", "bernoulli_"}:
                    drawn[name] = statement
                elif sources and name not in drawn:
                    drawn[name] = drawn[min(sources)]
    for node in nodes:
        match node:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                for side in (left, right):
                    sources = drawn.keys() & names_read(side)
                    if sources and isinstance(side, ast.BinOp) and isinstance(side.op, ast.Mult):
                        return drawn[min(sources)]
    return None


def _name(node: ast.AST) -> str:
    match node:
        case ast.For() | ast.While():
            return "a loop"
        case ast.FunctionDef() | ast.Lambda():
            return "a function"
        case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.DictComp():
            return "a comprehension"
        case ast.stmt():
            return f"a {type(node).__name__.lower()} statement"
    text = ast.unparse(node)
    return f"{text[:60]}..." if len(text) > 63 else text
