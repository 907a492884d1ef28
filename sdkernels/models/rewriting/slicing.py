"""The statements that only one residual branch needs, as a function of its stream."""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, field
from typing import Any

from .attributes import DropCall
from .flow import OUTSIDE, Flow, mutated, names_read, occurrences, shape_of
from .sites import Addition, moved
from .source import Refusal, Swapped

__all__ = ["Slice", "cut"]

Definition = tuple[str, int]


@dataclass
class Slice:
    """A branch: what its function is made of, and what the op is called with."""

    addition: Addition
    members: set[int]  # numbers of the statements that move into the function
    stream: Definition  # the name under which the function takes the kept rows
    residual: ast.expr | None  # what the branch is added to; None for the stream itself
    extras: dict[str, int]  # further inputs that may belong to samples, with their definitions
    fixed: dict[str, int]  # names whose values come along as they are, with their definitions
    # Names that the branch defines and the forward hands on, as an attention's weights, with the
    # number of leading entries that stay inside; and the statements that do so before the addition,
    # which wait for it.
    leaks: dict[str, int]
    postponed: set[int]
    body: list[ast.stmt]  # the function's statements, and what it returns
    result: ast.expr


def cut(flow: Flow, addition: Addition, others: set[int], parameter: str) -> Slice:
    """The branch of an addition.

    Args:
        flow: of the statements that the addition is in.
        others: the statements with other drop paths, which stay.
        parameter: the forward's first one, whose rows are the samples.
    """
    found = _Members(flow, addition, others)
    members = found.find()
    trees: list[ast.AST] = [*(flow.statements[n] for n in sorted(members)), addition.branch]
    if not any(node is addition.drop.call for tree in trees for node in ast.walk(tree)):
        raise Refusal("what it drops is used elsewhere too", addition.drop.call)
    frontier = _frontier(flow, addition, members)
    stream, residual = _stream(flow, addition, frontier, trees, parameter)
    extras: dict[str, int] = {}
    fixed: dict[str, int] = {}
    prologue: list[ast.stmt] = []
    for name, definition in frontier:
        if (name, definition) == stream:
            continue
        if name in (stream[0], *extras, *fixed):
            raise Refusal(f"its branch reads two values of {name}", addition.node)
        value = flow.values[name, definition]
        if value.kind == "value" and value.parameters and occurrences(name, trees):
            extras[name] = definition
            continue
        sizes = _sizes(flow, name, definition, stream) if value.kind == "size" else []
        prologue += sizes
        if not sizes or name in names_read(sizes):
            fixed[name] = definition
    _check_order(flow, addition, members)
    _check_writes(flow, members, stream)
    *body, result = (_copy(tree, addition.drop) for tree in trees)
    prologue = [
        s for n, s in enumerate(prologue) if ast.unparse(s) not in map(ast.unparse, prologue[:n])
    ]
    return Slice(
        addition,
        members,
        stream,
        residual,
        extras,
        fixed,
        found.leaks,
        found.postponed,
        prologue + body,
        result,
    )


# Which statements


@dataclass
class _Members:
    flow: Flow
    addition: Addition
    others: set[int]
    leaks: dict[str, int] = field(default_factory=dict)
    postponed: set[int] = field(default_factory=set)

    def find(self) -> set[int]:
        """Everything that leads to the branch, without what others need as well."""
        flow, members = self.flow, set[int]()
        reads = flow.reads[self.addition.at]
        waiting = [reads[name] for name in names_read(self.addition.branch) if name in reads]
        while waiting:
            number = waiting.pop()
            if number != OUTSIDE and number not in members and number not in self.others:
                members.add(number)
                waiting += flow.reads[number].values()
        while True:
            checks = {
                number
                for number, statement in enumerate(flow.statements[: self.addition.at])
                if _is_check(statement) and members & set(flow.reads[number].values())
            }
            self.leaks, self.postponed = {}, set()
            leaving = {
                number
                for number in members
                if _stays(flow.statements[number]) or self._is_needed(number, members | checks)
            }
            if not leaving:
                return members | checks
            members -= leaving

    def _is_needed(self, number: int, members: set[int]) -> bool:
        """Whether somebody else needs what a statement computes."""
        for name in self.flow.writes[number]:
            outside = self.flow.readers.get((name, number), set()) - members
            if self.addition.at in outside and name not in _rest_of(self.flow, self.addition):
                outside.remove(self.addition.at)
            if not outside:
                continue
            hidden = self._handed_on(name, outside)
            if hidden is None:
                return True
            self.leaks[name] = hidden
        return False

    def _handed_on(self, name: str, readers: set[int]) -> int | None:
        """How many leading entries nobody reads of a name that is only handed on; else None."""
        entries: set[int] = set()
        for reader in readers:
            if reader >= len(self.flow.statements):
                return None
            statement = self.flow.statements[reader]
            value = statement.value if isinstance(statement, (ast.Return, ast.Assign)) else None
            if value is None or not _packs(value, name, entries):
                return None
            if not all(_is_of_names(t) for t in getattr(statement, "targets", ())):
                return None
            if reader < self.addition.at:  # it has to wait for the addition
                later = self.addition.at + 1
                for other, definition in self.flow.reads[reader].items():
                    if other != name and self.flow.definition(other, later) != definition:
                        return None
                self.postponed.add(reader)
            if isinstance(statement, ast.Assign):  # what it goes into is handed on as well
                for other in self.flow.writes[reader]:
                    next_readers = self.flow.readers.get((other, reader), set())
                    if self._handed_on(other, next_readers) is None:
                        return None
        return min(entries, default=0)


def _is_of_names(target: ast.expr) -> bool:
    if isinstance(target, ast.Tuple):
        return all(map(_is_of_names, target.elts))
    return isinstance(target, ast.Name)


def _packs(node: ast.expr, name: str, entries: set[int]) -> bool:
    """Whether an expression puts a name into a tuple, and reads nothing else of it.

    `entries` gets the entries of it that are read; 0 where it is handed on whole.
    """
    if name not in names_read(node):
        return True
    match node:
        case ast.Name():
            entries.add(0)
            return True
        case ast.Subscript(value=ast.Name(id=found), slice=which) if found == name:
            first = which.lower if isinstance(which, ast.Slice) else which
            if isinstance(first, ast.Constant) and isinstance(first.value, int) and first.value > 0:
                entries.add(first.value)
                return True
            return False
        case ast.Tuple(elts=parts):
            return all(_packs(part, name, entries) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            both = isinstance(left, ast.Tuple) or isinstance(right, ast.Tuple)
            return both and _packs(left, name, entries) and _packs(right, name, entries)
        case ast.IfExp(test=test, body=left, orelse=right):
            if name in names_read(test):
                return False
            return _packs(left, name, entries) and _packs(right, name, entries)
    return False


def _rest_of(flow: Flow, addition: Addition) -> set[str]:
    """What the statement of an addition reads besides the branch."""
    inside = {id(node) for node in ast.walk(addition.branch)}
    return {
        node.id
        for node in ast.walk(flow.statements[addition.at])
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in inside
    }


def _stays(statement: ast.stmt) -> bool:
    """Whether a statement cannot move into a function."""
    if isinstance(statement, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.Delete)):
        return True
    for node in ast.walk(statement):
        if isinstance(node, ast.Return) and not isinstance(statement, ast.FunctionDef):
            return True
        if not isinstance(node, (ast.Attribute, ast.Subscript)) or isinstance(node.ctx, ast.Load):
            continue
        if "self" in names_read(node.value):
            return True
    return False


def _is_check(statement: ast.stmt) -> bool:
    """Whether a statement does nothing but look at what it reads."""
    match statement:
        case ast.Assert():
            return True
        case ast.Expr(value=ast.Call(func=function)):
            return ast.unparse(function) in ("torch._assert", "torch._check", "_assert")
    return False


# What comes in


def _frontier(flow: Flow, addition: Addition, members: set[int]) -> list[Definition]:
    """What comes into the branch from outside, in the order of its use."""
    found: dict[Definition, None] = {}
    trees = [(n, flow.statements[n]) for n in sorted(members)]
    for number, tree in [*trees, (addition.at, addition.branch)]:
        reads = flow.reads[number]
        names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        for name in dict.fromkeys(names):
            if name != "self" and name in reads and reads[name] not in members:
                found[name, reads[name]] = None
    return list(found)


def _stream(
    flow: Flow,
    addition: Addition,
    frontier: list[Definition],
    trees: list[ast.AST],
    parameter: str,
) -> tuple[Definition, ast.expr | None]:
    """Which of what comes in is compacted as the stream, and what the branch is added to."""
    tensors = [
        each
        for each in frontier
        if flow.values[each].kind == "value"
        and flow.values[each].parameters
        and occurrences(each[0], trees)
    ]
    tensors.sort(key=lambda each: parameter not in flow.values[each].parameters)
    if not tensors:
        raise Refusal("what it drops is used elsewhere too, or not computed here", addition.node)
    if isinstance(addition.residual, ast.Name):
        name = addition.residual.id
        own = flow.reads[addition.at].get(name)
        source = None if own is None else flow.resolve(name, own)
        for each in tensors:
            if flow.resolve(*each) == source:
                return each, None
    return tensors[0], addition.residual


def _sizes(flow: Flow, name: str, number: int, stream: Definition) -> list[ast.stmt]:
    """Statements that make a size what it is for the kept rows; none if it stays as it is."""
    if number == OUTSIDE:
        return []
    statement = flow.statements[number]
    assert isinstance(statement, ast.Assign)
    rows = f"{stream[0]}.shape[0]"
    read = shape_of(statement.value)
    if read is None:
        before: list[ast.stmt] = []
        for each, definition in flow.reads[number].items():
            if flow.values[each, definition].kind == "size":
                before += _sizes(flow, each, definition, stream)
        return [*before, copy.deepcopy(statement)] if before else []
    target, which = statement.targets[0], read[1]
    text = ""
    if which is None:
        if not isinstance(target, ast.Tuple):
            text = f"{name} = ({rows}, *{name}[1:])"
        elif isinstance(target.elts[0], ast.Name) and target.elts[0].id == name:
            text = f"{name} = {rows}"
    elif isinstance(which, ast.Constant) and which.value == 0:
        text = f"{name} = {rows}"
    elif not _is_beyond_rows(which):
        raise Refusal(f"it cannot be told what {name} is for some rows", statement)
    return ast.parse(text).body


def _is_beyond_rows(which: ast.expr) -> bool:
    """Whether an index of a shape leaves out its first entry."""
    first = which.lower if isinstance(which, ast.Slice) else which
    if isinstance(first, ast.UnaryOp):
        first = first.operand  # from the end
    return isinstance(first, ast.Constant) and isinstance(first.value, int) and first.value > 0


def _check_order(flow: Flow, addition: Addition, members: set[int]) -> None:
    """Refuse a name that stands for something else inside of the function than before."""
    inside: dict[str, int] = {}
    reads_of_branch = names_read(addition.branch)
    for number in [*sorted(members), addition.at]:
        for name, definition in flow.reads[number].items():
            if number == addition.at and name not in reads_of_branch:
                continue
            if inside.get(name, definition) != definition:
                raise Refusal(
                    f"its branch needs a {name} that is replaced before", flow.statements[number]
                )
        inside.update(dict.fromkeys(flow.writes[number], number))


def _check_writes(flow: Flow, members: set[int], stream: Definition) -> None:
    """Refuse a branch that writes into its stream: it would write into a copy of some rows."""
    own = {flow.resolve(*stream)}
    for number in sorted(members):
        statement = flow.statements[number]
        reads = {name: flow.resolve(name, at) for name, at in flow.reads[number].items()}
        written = mutated(getattr(statement, "in_place", statement))
        if any(reads.get(name) in own for name in written):
            raise Refusal("its branch writes into what comes in", statement)
        views = isinstance(statement, ast.Assign) and moved(statement.value)
        if views and reads.get(views) in own:
            own |= {(name, number) for name in flow.writes[number]}


def _copy(tree: ast.AST, drop: DropCall) -> Any:
    """A copy, with the drop path's argument in its place."""
    made = copy.deepcopy(tree, {id(drop.call): drop.call})
    return Swapped({drop.call: copy.deepcopy(drop.argument)}).visit(made)
