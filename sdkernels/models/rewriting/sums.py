"""Whether a forward keeps its sums to itself: then the next branch may be added in place."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import TypeGuard

from .flow import Flow, occurrences
from .sites import moved

__all__ = ["hides_sums", "is_add"]


def hides_sums(statements: Sequence[ast.stmt], add: str) -> bool:
    """Whether every sum to which a branch is added is read by that addition and nothing else.

    Its sizes may be read: they stay. What lies inside of an ``if`` or a loop is not followed.

    Args:
        statements: of the forward.
        add: the name of what adds a branch.
    """
    flow = Flow(statements, {})
    calls = [_adds(each, add) for each in statements]
    last = max((number for number, each in enumerate(calls) if each), default=-1)
    for number, statement in enumerate(statements):
        if not calls[number] or (number == last and len(calls[number]) == 1):
            continue
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if _is_chain(value, add):
                pass
            case ast.Return(value=ast.expr() as value) if _is_chain(value, add):
                continue
            case _:
                return False
        if not _is_handed_on(flow, name, number, last, add):
            return False
    return True


def is_add(node: ast.AST, add: str) -> TypeGuard[ast.Call]:
    """Whether it is a call of what adds a branch."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == add


def _adds(tree: ast.AST, add: str) -> list[ast.AST]:
    return [node for node in ast.walk(tree) if is_add(node, add)]


def _streams(call: ast.AST, add: str) -> list[ast.expr]:
    """What a call may write into."""
    if not is_add(call, add):
        return []
    return [call.args[1], *(k.value for k in call.keywords if k.arg == "residual")]


def _is_chain(value: ast.AST, add: str) -> bool:
    """Whether it is a call of `add` whose streams are names and such calls."""
    streams = _streams(value, add)
    inner = sum(len(_adds(each, add)) for each in streams if _is_chain(each, add))
    return bool(streams) and len(_adds(value, add)) == 1 + inner


def _is_handed_on(flow: Flow, name: str, number: int, last: int, add: str) -> bool:
    """Whether a sum goes into one addition, and only sizes of it are read besides."""
    additions = others = 0
    after = False
    for reader in flow.readers.get((name, number), ()):
        statement = flow.statements[reader]
        match statement:
            case ast.Assign(targets=[ast.Name(id=other)], value=value) if (
                moved(value) == name and len(occurrences(name, [value])) == 1
            ):
                additions += 1
                if not _is_handed_on(flow, other, reader, last, add):
                    return False
                continue
        nodes = list(ast.walk(statement))
        streams = {id(each) for node in nodes for each in _streams(node, add)}
        for node in occurrences(name, [statement]):
            if not isinstance(node.ctx, ast.Load):
                continue
            if id(node) in streams:
                additions += 1
            elif reader > last:
                after = True
            else:
                others += 1
    return others == 0 and additions <= 1 and not (additions and after)
