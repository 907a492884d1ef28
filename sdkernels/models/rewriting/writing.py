"""A forward with its branches handed to the op, as source and as a function.

It runs with the globals and the closure of the forward that it was written from, and is found by
tracebacks, debuggers and ``inspect.getsource``.
"""

from __future__ import annotations

import ast
import copy
import itertools
import linecache
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import TypeGuard

from .attributes import BlockParts
from .flow import Flow, names_written
from .peeling import Peeled, peel
from .slicing import Slice
from .source import Swapped, attribute_path
from .sums import is_add

__all__ = ["ADD", "compiled", "written"]

ADD = "add_branch"  # the parameter that adds a branch: an instance of blocks.Add
_numbers = itertools.count()


def written(
    flow: Flow, slices: Sequence[tuple[int, Slice]], parts: BlockParts
) -> tuple[list[ast.stmt], list[tuple[str, ...]]]:
    """The statements with every branch as a function of its own.

    Args:
        slices: the branches, each with its number.

    Returns:
        The statements, and for each branch the attributes of the block that it uses.
    """
    gone = flow.dead | {n for _, each in slices for n in (*each.members, *each.postponed)}
    saved: dict[int, list[ast.stmt]] = {}  # by the statement that they follow
    done: dict[int, list[ast.stmt]] = {}  # by the statement that they come before
    after: dict[int, list[ast.stmt]] = {}
    replaced: dict[ast.AST, ast.Call] = {}
    used: list[tuple[str, ...]] = []
    for number, each in slices:
        at = each.addition.at

        def value_of(name: str, own: int, at: int = at) -> str:
            """The name that holds a definition where the branch is added."""
            if flow.definition(name, at, gone) == own:
                return name
            copied = f"{name}_before_{at}"
            keep = ast.parse(f"{copied} = {name}").body
            saved.setdefault(own, []).extend(keep)
            return copied

        peeled = peel(each, parts)
        function, made = _function(number, each, peeled, value_of)
        call = _call(number, each, peeled, function, value_of)
        done.setdefault(at, []).extend(made)
        replaced[each.addition.node] = call
        for name, hidden in each.leaks.items():
            text = f"{name} = {ADD}.aside.get({name!r})"
            if hidden:
                text = f"{name} = ({'None, ' * hidden}*{ADD}.aside.get({name!r}, ()))"
            after.setdefault(at, []).extend(ast.parse(text).body)
        after.setdefault(at, []).extend(flow.statements[n] for n in sorted(each.postponed))
        trees = [*each.body, each.result, *peeled.options.values()]
        used.append(tuple(dict.fromkeys(p for t in trees for p in parts.used(t))))
    result = list(saved.get(-1, []))
    for number, statement in enumerate(flow.statements):
        if number in gone:
            continue
        added = [e for _, e in slices if e.addition.at == number]
        result += done.get(number, [])
        if added:
            Swapped(replaced).visit(statement)
            if after.get(number):  # what the branch hands on is there once it has been added
                total = added[-1].addition
                name = f"sum_{number}"
                call = replaced[total.node]
                hoisted = ast.Assign([ast.Name(name, ast.Store())], call)
                Swapped({call: ast.Name(name, ast.Load())}).visit(statement)
                result += [hoisted, *after.pop(number)]
        elif hasattr(statement, "in_place"):
            statement = statement.in_place
        result.append(statement)
        result += saved.get(number, [])
    return _with_activation(result, parts), used


def _function(
    number: int, branch: Slice, peeled: Peeled, value_of: Callable[[str, int], str]
) -> tuple[ast.expr, list[ast.stmt]]:
    """The branch as an expression, and the statement that defines it if there is one."""
    match peeled:
        case Peeled(body=[], result=ast.Call(func=called, args=[ast.Name(id=name)], keywords=[])):
            if name == peeled.stream and attribute_path(called) and not branch.extras:
                return called, []
    inside = set().union(*map(names_written, peeled.body)) if peeled.body else set()
    defaults: list[tuple[str, str]] = []
    for name, own in branch.fixed.items():
        value = value_of(name, own)
        if value != name or name in inside:
            defaults.append((name, value))
    names = [peeled.stream, *branch.extras]
    parameters = ", ".join([*names, *(f"{name}={value}" for name, value in defaults)])
    definition = ast.parse(f"def branch_{number}({parameters}): pass").body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.body = list(peeled.body)
    for name, hidden in branch.leaks.items():
        text = f"{name}[{hidden}:]" if hidden else name
        definition.body += ast.parse(f"{ADD}.put_aside({name!r}, {text})").body
    definition.body.append(ast.Return(peeled.result))
    return ast.Name(definition.name, ast.Load()), [definition]


def _call(
    number: int,
    branch: Slice,
    peeled: Peeled,
    function: ast.expr,
    value_of: Callable[[str, int], str],
) -> ast.Call:
    stream = value_of(*branch.stream)
    keywords = [ast.keyword(name, value) for name, value in peeled.options.items()]
    if branch.residual is not None:
        keywords.append(ast.keyword("residual", branch.residual))
    if branch.extras:
        keys: list[ast.expr | None] = [ast.Constant(name) for name in branch.extras]
        values: list[ast.expr] = [
            ast.Name(value_of(name, own), ast.Load()) for name, own in branch.extras.items()
        ]
        keywords.append(ast.keyword("args", ast.Dict(keys, values)))
    arguments: list[ast.expr] = [ast.Constant(number), ast.Name(stream, ast.Load()), function]
    return ast.Call(ast.Name(ADD, ast.Load()), arguments, keywords)


def _with_activation(statements: list[ast.stmt], parts: BlockParts) -> list[ast.stmt]:
    """``relu(add(...))`` -> ``add(..., activation=relu)``, also in two statements."""
    result: list[ast.stmt] = []
    for statement in statements:
        match (result[-1:], statement):
            case (
                [ast.Assign(targets=[ast.Name(id=name)], value=call)],
                ast.Assign(value=ast.Call(args=[ast.Name(id=read)]) as outer)
                | ast.Return(value=ast.Call(args=[ast.Name(id=read)]) as outer),
            ) if name == read and _takes_activation(call) and _is_relu(outer, parts):
                if isinstance(statement, ast.Return) or names_written(statement) == {name}:
                    result.pop()
                    outer.args = [call]
        fused: dict[ast.AST, ast.AST] = {}
        for node in ast.walk(statement):
            match node:
                case ast.Call(func=function, args=[ast.Call() as inner]):
                    if _takes_activation(inner) and _is_relu(node, parts):
                        inner.keywords.append(ast.keyword("activation", function))
                        fused[node] = inner
        result.append(Swapped(fused).visit(statement))
    return result


def _takes_activation(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether it adds a branch, with no activation behind the sum yet."""
    return is_add(node, ADD) and all(each.arg != "activation" for each in node.keywords)


def _is_relu(call: ast.Call, parts: BlockParts) -> bool:
    return not call.keywords and parts.is_relu(attribute_path(call.func))


def compiled(
    original: FunctionType, tree: ast.FunctionDef, body: list[ast.stmt], name: str
) -> tuple[FunctionType, str]:
    """The function of these statements, and its source.

    It takes what adds a branch after ``self``.
    """
    definition = copy.copy(tree)
    definition.args = copy.deepcopy(tree.args)
    definition.args.args.insert(1, ast.arg(ADD))
    definition.body = body or [ast.Pass()]
    source = ast.unparse(ast.fix_missing_locations(definition)) + "\n"
    file = f"<sdkernels {next(_numbers)}: {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    free = [each for each in original.__code__.co_freevars if each.isidentifier()]
    # Names of the closure are free in a function within one that has them.
    inner = "".join(f"    {line}\n" for line in source.splitlines())
    text = f"def closure({', '.join(free)}):\n{inner}" if free else source
    code: CodeType = compile(text, file, "exec")
    if free:
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        code = next(c for c in code.co_consts if isinstance(c, CodeType))
    code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == tree.name)
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    function = FunctionType(
        code,
        original.__globals__,
        original.__name__,
        original.__defaults__,
        tuple(cells[each] for each in code.co_freevars),
    )
    function.__kwdefaults__ = original.__kwdefaults__
    function.__qualname__ = original.__qualname__
    function.__module__ = original.__module__
    return function, source
