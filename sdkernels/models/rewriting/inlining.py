"""Helper methods that hold a drop path, written out where they are called."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

from .source import Refusal, Swapped, function_tree, stored

__all__ = ["Inliner"]

_DEPTH = 3  # of helpers that call helpers


class Inliner:
    """Writes out the methods of a class that `holds_drop_path`.

    Their names get the method's in front of them, so that nothing of the caller is overwritten.
    """

    def __init__(
        self,
        original: type[nn.Module],
        holds_drop_path: Callable[[ast.AST], bool],
        resolve: Callable[[list[ast.stmt]], list[ast.stmt]],
    ) -> None:
        self.original = original
        self.holds_drop_path = holds_drop_path
        self.resolve = resolve
        self.count = 0

    def written_out(self, body: list[ast.stmt], depth: int = 0) -> list[ast.stmt]:
        done: list[ast.stmt] = []
        for statement in body:
            if isinstance(statement, (ast.If, ast.With)):
                statement.body = self.written_out(statement.body, depth)
                if isinstance(statement, ast.If):
                    statement.orelse = self.written_out(statement.orelse, depth)
            elif isinstance(statement, (ast.Assign, ast.Return, ast.Expr)):
                while depth < _DEPTH and (found := self._call(statement)) is not None:
                    call, tree = found
                    before, result = self._method_body(call, tree, depth)
                    done += before
                    Swapped({call: result}).visit(statement)
            done.append(statement)
        return done

    def _call(self, statement: ast.stmt) -> tuple[ast.Call, ast.FunctionDef] | None:
        """A call of a method that holds a drop path."""
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                method = self._method(node.func)
                if method is None:
                    continue
                try:
                    _, tree = function_tree(method)
                except Refusal:
                    continue
                if self.holds_drop_path(tree) or any(
                    self._call(each) is not None for each in tree.body
                ):
                    return node, tree
        return None

    def _method(self, function: ast.Attribute) -> Any:
        match function.value:
            case ast.Name(id="self"):
                found = inspect.getattr_static(self.original, function.attr, None)
                return found if isinstance(found, FunctionType) else None
            case ast.Call(func=ast.Name(id="super"), args=[]):
                for kind in self.original.__mro__[1:]:
                    if function.attr in kind.__dict__ and kind is not nn.Module:
                        return kind.__dict__[function.attr]
        return None

    def _method_body(
        self, call: ast.Call, tree: ast.FunctionDef, depth: int
    ) -> tuple[list[ast.stmt], ast.expr]:
        prefix = f"{tree.name}_{self.count}_" if self.count else f"{tree.name}_"
        self.count += 1
        given = _bound(call, tree)
        body = self.resolve(tree.body)
        returns = [n for each in body for n in ast.walk(each) if isinstance(n, ast.Return)]
        if not body or returns != body[-1:] or returns[0].value is None:
            raise Refusal(f"its helper {tree.name} does not return once, at its end", call)
        rename = _Prefixed(prefix, set(given) | stored(body))
        statements: list[ast.stmt] = []
        for name, value in given.items():
            target = ast.Name(prefix + name, ast.Store())
            statements.append(ast.copy_location(ast.Assign([target], value), call))
        statements += [rename.visit(each) for each in body]
        last = statements.pop()
        assert isinstance(last, ast.Return)
        assert last.value is not None
        result = ast.Name(f"{prefix}result", ast.Store())
        statements.append(ast.copy_location(ast.Assign([result], last.value), last))
        return self.written_out(statements, depth + 1), ast.Name(result.id, ast.Load())


def _bound(call: ast.Call, tree: ast.FunctionDef) -> dict[str, ast.expr]:
    """The values of a method's parameters in a call."""
    arguments = tree.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)][1:]
    starred = any(isinstance(a, ast.Starred) for a in call.args)
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or starred:
        raise Refusal(f"its helper {tree.name} takes any number of arguments", call)
    values = dict(zip(names, call.args, strict=False))
    values |= {keyword.arg or "": keyword.value for keyword in call.keywords}
    defaults = dict(zip(reversed(names), reversed(arguments.defaults), strict=False))
    for name in names:
        if name not in values:
            if not isinstance(defaults.get(name), ast.Constant):
                raise Refusal(f"the default of {name} of {tree.name} cannot be told", call)
            values[name] = defaults[name]
    if "" in values or len(values) != len(names):
        raise Refusal(f"its helper {tree.name} is called in a way that cannot be told", call)
    return {name: copy.deepcopy(values[name]) for name in names}


class _Prefixed(ast.NodeTransformer):
    def __init__(self, prefix: str, names: set[str]) -> None:
        self.prefix, self.names = prefix, names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.names:
            node.id = self.prefix + node.id
        return node
