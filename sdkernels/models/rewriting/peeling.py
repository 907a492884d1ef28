"""What the op takes over from the ends of a branch: its first norm, and its last factor."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from .attributes import BlockParts
from .flow import occurrences
from .slicing import Slice
from .source import Swapped, attribute_path, on_self_only

__all__ = ["Peeled", "peel"]


@dataclass
class Peeled:
    """A branch without its ends, which the op is given as options."""

    stream: str  # the name of what comes in
    body: list[ast.stmt]
    result: ast.expr
    options: dict[str, ast.expr] = field(default_factory=dict)


def peel(branch: Slice, parts: BlockParts) -> Peeled:
    body = [each for each in branch.body if not _is_no_change(each)]
    peeled = Peeled(branch.stream[0], body, branch.result)
    if not branch.leaks:
        _take_layer_scale(peeled, parts)
    _take_norm(peeled, parts)
    _rename_first(peeled)
    if not branch.leaks:
        _join_last(peeled)
    return peeled


def _rename_first(peeled: Peeled) -> None:
    """``def branch(x): y = x; return f(y)`` -> ``def branch(y): return f(y)``."""
    match peeled.body:
        case [ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=value)), *rest] if (
            value == peeled.stream
        ):
            nodes = [node for tree in (*rest, peeled.result) for node in ast.walk(tree)]
            if not any(isinstance(node, ast.Name) and node.id == value for node in nodes):
                peeled.stream, peeled.body = name, rest


def _join_last(peeled: Peeled) -> bool:
    """``x = f(x); return x`` -> ``return f(x)``."""
    match peeled:
        case Peeled(
            body=[*rest, ast.Assign(targets=[ast.Name(id=name)], value=value)],
            result=ast.Name(id=result),
        ) if name == result:
            peeled.body, peeled.result = rest, value
            return True
    return False


def _take_layer_scale(peeled: Peeled, parts: BlockParts) -> None:
    """``gamma * f(x)``, ``f(x).mul(gamma)`` and ``ls(f(x))`` at the end of a branch."""
    before = list(peeled.body), peeled.result
    while True:
        match peeled.result:
            case ast.BinOp(left=left, op=ast.Mult(), right=right) if on_self_only(left):
                inner, factor = right, left
            case ast.BinOp(left=left, op=ast.Mult(), right=right) if on_self_only(right):
                inner, factor = left, right
            case ast.Call(func=ast.Attribute(value=value, attr="mul"), args=[argument]) if (
                on_self_only(argument)
            ):
                inner, factor = value, argument
            case ast.Call(func=function, args=[argument], keywords=[]) if parts.is_layer_scale(
                attribute_path(function)
            ):
                inner, factor = argument, function
            case _:
                if _join_last(peeled):
                    continue
                peeled.body, peeled.result = before
                return
        if parts.is_factor(factor):
            peeled.result = inner
            peeled.options["layer_scale"] = factor
        else:
            peeled.body, peeled.result = before
        return


def _take_norm(peeled: Peeled, parts: BlockParts) -> None:
    """``norm(x)`` where the branch reads nothing else of its input."""
    trees: list[ast.AST] = [*peeled.body, peeled.result]
    stream, reads = peeled.stream, 0
    for tree in trees:
        found = occurrences(stream, [tree])
        reads += sum(isinstance(node.ctx, ast.Load) for node in found)
        if any(not isinstance(node.ctx, ast.Load) for node in found):
            trees_of_input = trees[: trees.index(tree) + 1]
            break  # it is another value from here on
    else:
        trees_of_input = trees
    if reads != 1:
        return
    for number, tree in enumerate(trees_of_input):
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=function, args=[ast.Name(id=name)], keywords=[]) if (
                    name == stream and parts.is_norm(attribute_path(function))
                ):
                    if any(isinstance(n, (ast.If, ast.For, ast.While)) for n in ast.walk(tree)):
                        return
                    trees[number] = Swapped({node: node.args[0]}).visit(tree)
                    *body, peeled.result = trees  # type: ignore[assignment]
                    peeled.body = [e for e in body if not _is_no_change(e)]  # type: ignore[misc]
                    peeled.options = {"norm": function, **peeled.options}
                    return


def _is_no_change(statement: ast.AST) -> bool:
    """``x = x``."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=value)):
            return name == value
    return False
