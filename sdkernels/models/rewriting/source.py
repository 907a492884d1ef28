"""The source of a forward as a tree that can be sliced, with its configuration resolved.

A test that the block's configuration answers
(``if self.gamma is None``) is replaced by the arm it leads to, and what was assumed is kept, to be
asked again at every call. A helper method that holds a drop path is written out where it is called.
``x += y`` becomes ``x = x + y`` where it adds a branch: the op does not write into the left side.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = [
    "Configuration",
    "Refusal",
    "Swapped",
    "attribute_path",
    "evaluate",
    "function_of",
    "function_tree",
    "names_of_self",
    "on_self_only",
    "parsed",
    "remade",
    "resolve",
    "stored",
]

# What a test may consist of to be answered once and for all.
_PURE = (
    ast.Attribute, ast.BoolOp, ast.BinOp, ast.Compare, ast.Constant, ast.List, ast.Load, ast.Name,
    ast.Subscript, ast.Tuple, ast.UnaryOp, ast.boolop, ast.cmpop, ast.operator, ast.unaryop,
    ast.Call, ast.keyword,
)  # fmt: skip
_PURE_CALLS = frozenset(("isinstance", "len", "getattr", "hasattr", "bool", "int", "float"))


class Refusal(Exception):
    """Why something is not rewritten, and in which line."""

    def __init__(self, reason: str, node: ast.AST | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line: int | None = getattr(node, "lineno", None)


_IDENTIFIERS = ("id", "attr", "arg", "name", "asname", "module", "rest")  # fields of nodes


def _is_of(code: CodeType, tree: ast.FunctionDef) -> bool:
    """Whether this may be the source of what runs: the file may have been edited since.

    By the names that the code uses. The bytecode of one function compiled by itself would be
    another, as it depends on what its module imports.
    """
    found: set[str] = {"__class__"}  # of super()
    for node in ast.walk(tree):
        found.update(getattr(node, "names", ()) if isinstance(node, ast.Global) else ())
        for field in _IDENTIFIERS:
            value = getattr(node, field, None)
            if isinstance(value, str):
                found |= {value, *value.split(".")}
    waiting, used = [code], set[str]()
    while waiting:
        each = waiting.pop()
        used.update(each.co_names, each.co_varnames, each.co_freevars, each.co_cellvars)
        waiting += [inner for inner in each.co_consts if isinstance(inner, CodeType)]
    # Names of the compiler's, and of pytest's assertions, are no identifiers; private ones get the
    # class in front.
    own = {re.sub(r"^_\w+?(__\w+)$", r"\1", name) for name in used if name.isidentifier()}
    return code.co_name == tree.name and own <= found


def function_of(function: Any) -> FunctionType | None:
    """The function whose code decides what a call does; None where that cannot be told.

    transformers wraps the forward of a layer in one that may checkpoint it, and nothing else. Any
    other wrapper may do anything, and is not looked through.
    """
    if not isinstance(function, FunctionType):
        return None
    if (
        function.__code__.co_name == "forward_with_checkpointing"
        and function.__globals__.get("__name__") == "transformers.modeling_layers"
    ):
        wrapped = getattr(function, "__wrapped__", None)
        return wrapped if isinstance(wrapped, FunctionType) else None
    return function


def remade(function: FunctionType, names: dict[str, Any], closure: Any) -> FunctionType:
    """The function with other globals and another closure."""
    code, defaults = function.__code__, function.__defaults__
    made = FunctionType(code, names, function.__name__, defaults, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@cache
def parsed(code: CodeType) -> ast.FunctionDef:
    """The tree of a function, which nobody may write into."""
    # The code object: of a function, getsource would show what a decorator wrapped.
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        raise Refusal("its source cannot be read") from None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise Refusal("it is not a plain function")
    if not _is_of(code, tree.body[0]):
        raise Refusal("its source has changed since it was imported")
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    return tree.body[0]


def function_tree(function: Any) -> tuple[FunctionType, ast.FunctionDef]:
    """The function whose code runs when this is called, and a tree of it with the file's lines."""
    plain = function_of(function)
    if plain is None:
        raise Refusal("it is not a Python function")
    tree = copy.deepcopy(parsed(plain.__code__))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal)):
            raise Refusal("it is a generator, or assigns to names outside of it", node)
    if isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
        del tree.body[0]
    tree.decorator_list = []
    return plain, tree


def attribute_path(node: ast.AST) -> str | None:
    """``"a.b.0"`` of ``self.a.b[0]``; None of anything else."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name
        case ast.Attribute(value=value, attr=name):
            before = attribute_path(value)
            return None if before is None else f"{before}.{name}"
        case ast.Subscript(value=value, slice=ast.Constant(value=int(number))):
            before = attribute_path(value)
            return None if before is None else f"{before}.{number}"
    return None


def names_of_self(node: ast.AST) -> Iterator[str]:
    """The attributes of ``self`` that a tree reads."""
    for each in ast.walk(node):
        match each:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                yield name


def on_self_only(node: ast.AST) -> bool:
    """Whether nothing but the block's own state can change what the expression is."""
    return any(True for _ in names_of_self(node)) and all(
        each.id == "self" for each in ast.walk(node) if isinstance(each, ast.Name)
    )


def evaluate(node: ast.expr, block: nn.Module, names: dict[str, Any]) -> Any:
    """The value of an expression of ``self`` and globals."""
    expression = ast.fix_missing_locations(ast.Expression(copy.deepcopy(node)))
    return eval(compile(expression, "<configuration>", "eval"), names, {"self": block})


@cache
def _set_by_forward(kind: type) -> frozenset[str]:
    """The attributes that the forward of a class, or a method that it calls, assigns to."""
    found: set[str] = set()
    waiting, seen = ["forward"], set[str]()
    while waiting:
        name = waiting.pop()
        method = inspect.getattr_static(kind, name, None)
        if name in seen or not isinstance(method, FunctionType):
            continue
        seen.add(name)
        try:
            tree = parsed((function_of(method) or method).__code__)
        except Refusal:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
                elif ast.unparse(node.value) == "self":
                    waiting.append(node.attr)
    return frozenset(found)


def stored(trees: Iterable[ast.AST]) -> set[str]:
    """The names that trees assign to."""
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}


class Swapped(ast.NodeTransformer):
    """Nodes of a tree for others, in which nodes may be swapped as well."""

    def __init__(self, new: Mapping[ast.AST, ast.AST]) -> None:
        self.new = new

    def visit(self, node: ast.AST) -> Any:
        return self.generic_visit(self.new.get(node, node))


class Configuration:
    """The answers of a block to the tests of its forward."""

    def __init__(
        self, block: nn.Module, names: dict[str, Any], local: set[str], is_drop: Callable[..., bool]
    ) -> None:
        self.block = block
        self.names = names  # the function's globals
        self.local = local
        self.is_drop = is_drop  # whether a path leads to a drop path, or to where one would be
        self.assumed: dict[str, bool] = {}

    def answer(self, test: ast.expr) -> bool | None:
        """What the test comes to; None where a call may change that."""
        if not self._is_pure(test) or "training" in names_of_self(test):
            return None
        match test:
            # A block without a drop path may be given a probability.
            case ast.Compare(left=left, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
                if self.is_drop(attribute_path(left)):
                    return True
            case ast.Attribute() if self.is_drop(attribute_path(test)):
                return True
        try:
            value = evaluate(test, self.block, self.names)
        except Exception:
            return None
        kind: Any = type(self.block)
        changing = _set_by_forward(kind).intersection(names_of_self(test))
        if not _asks_for_none(test) and changing:
            return None
        self.assumed[ast.unparse(test)] = bool(value)
        return bool(value)

    def _is_pure(self, test: ast.expr) -> bool:
        """Whether a test has no side effects and reads nothing that a call brings along."""
        for node in ast.walk(test):
            if not isinstance(node, _PURE):
                return False
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called not in _PURE_CALLS and called != "torch.jit.is_scripting":
                    return False
            if isinstance(node, ast.Name) and node.id != "self":
                known = node.id in self.names or hasattr(builtins, node.id)
                if node.id in self.local or not known:
                    return False
        return True


def _asks_for_none(test: ast.expr) -> bool:
    """Whether a test is about what a block has, not about a number that a call may set."""
    match test:
        case ast.Compare(ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return True
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _asks_for_none(operand)
    return False


class _Arms(ast.NodeTransformer):
    """``a if test else b`` -> the arm that the configuration leads to."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        answer = self.configuration.answer(node.test)
        if answer is None:
            return self.generic_visit(node)
        return self.visit(node.body if answer else node.orelse)  # type: ignore[no-any-return]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node


def _addition(statement: ast.AugAssign) -> ast.Assign | None:
    """``x += y`` as ``x = x + y``, which knows what it was."""
    match statement:
        case ast.AugAssign(target=ast.Name(id=name), op=ast.Add(), value=value):
            left = ast.copy_location(ast.Name(name, ast.Load()), statement)
            total = ast.copy_location(ast.BinOp(left, statement.op, value), statement)
            made = ast.copy_location(ast.Assign([statement.target], total), statement)
            made.in_place = statement  # type: ignore[attr-defined]
            return made
    return None


def resolve(body: list[ast.stmt], configuration: Configuration) -> list[ast.stmt]:
    """The statements that a block of this configuration runs."""
    done: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.If):
            answer = configuration.answer(statement.test)
            if answer is not None:
                done += resolve(statement.body if answer else statement.orelse, configuration)
            else:
                statement.body = resolve(statement.body, configuration) or [ast.Pass()]
                statement.orelse = resolve(statement.orelse, configuration)
                done.append(statement)
        elif isinstance(statement, ast.AugAssign) and (added := _addition(statement)) is not None:
            done.append(added)
        elif not isinstance(statement, ast.Pass):
            done.append(_Arms(configuration).visit(statement))
        if done and isinstance(done[-1], ast.Return):
            break
    return done
