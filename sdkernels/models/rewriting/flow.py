"""Which statement of a list defines what another reads."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from .source import stored

__all__ = [
    "OUTSIDE",
    "Flow",
    "Value",
    "mutated",
    "names_read",
    "names_written",
    "occurrences",
    "shape_of",
]

OUTSIDE = -1  # the definition of what comes into a list of statements

_FIXED = (
    ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Tuple, ast.List, ast.IfExp,
    ast.Subscript, ast.Slice, ast.Attribute, ast.Name, ast.Load, ast.operator, ast.unaryop,
    ast.cmpop, ast.boolop,
)  # fmt: skip


def names_read(nodes: ast.AST | Iterable[ast.AST]) -> set[str]:
    """The names that a tree reads, those that it writes first itself included.

    What a function or a comprehension inside binds is its own.
    """
    if not isinstance(nodes, ast.AST):
        return set().union(*map(names_read, nodes))
    if isinstance(nodes, ast.Name):
        return {nodes.id} if isinstance(nodes.ctx, ast.Load) else set()
    found = names_read(ast.iter_child_nodes(nodes))
    if isinstance(nodes, (ast.FunctionDef, ast.Lambda)):
        arguments = nodes.args
        bound = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        bound += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        found -= {a.arg for a in bound}
        if isinstance(nodes, ast.FunctionDef):
            found -= set().union(*map(names_written, nodes.body)) - names_read(arguments.defaults)
    elif isinstance(nodes, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        targets = [n for each in nodes.generators for n in ast.walk(each.target)]
        outer = names_read(nodes.generators[0].iter)
        found -= {n.id for n in targets if isinstance(n, ast.Name)} - outer
    return found


def names_written(statement: ast.stmt) -> set[str]:
    """The names that a statement defines or writes into."""
    if isinstance(statement, ast.FunctionDef):
        return {statement.name}
    found = mutated(statement) | stored([statement])
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
    return found


def mutated(statement: ast.stmt) -> set[str]:
    """The names whose objects a statement writes into, as ``x.add_(y)`` and ``x[i] = y`` do.

    A method called for nothing but its effect counts whatever its name is.
    """
    found: set[str] = set()
    for node in ast.walk(statement):
        target: ast.expr | None = None
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            target = node.value.func.value if isinstance(node.value.func, ast.Attribute) else None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            target = node.func.value if name.endswith("_") and not name.endswith("__") else None
        elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            target = node.value
        elif isinstance(node, ast.AugAssign):
            target = node.target
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        if isinstance(target, ast.Name) and target.id != "self":
            found.add(target.id)
    return found


def _only_maybe(statement: ast.stmt) -> bool:
    """Whether a statement may leave what it writes as it was before."""
    return not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.FunctionDef))


def shape_of(node: ast.expr) -> tuple[str, ast.expr | None] | None:
    """The name whose sizes an expression reads, and which of them (None: all)."""
    match node:
        case ast.Call(func=ast.Name(id="len"), args=[ast.Name(id=name)]):
            return name, ast.Constant(0)
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="size"), args=args):
            return name, args[0] if args else None
        case ast.Attribute(value=ast.Name(id=name), attr="shape"):
            return name, None
        case ast.Subscript(value=value, slice=which):
            inner = shape_of(value)
            return None if inner is None or inner[1] is not None else (inner[0], which)
    return None


def occurrences(name: str, trees: Iterable[ast.AST]) -> list[ast.Name]:
    """Where a name is read or written for more than its sizes."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    sizes: set[ast.AST] = set()
    for each in nodes:
        if isinstance(each, (ast.Attribute, ast.Call)):
            found = shape_of(each)
            if found is not None and found[0] == name:
                sizes.update(ast.walk(each))
    return [n for n in nodes if isinstance(n, ast.Name) and n.id == name and n not in sizes]


@dataclass(frozen=True)
class Value:
    """What is known of a definition of a name."""

    kind: str  # "size" (of the shape of a tensor), "own" (of the block alone), or "value"
    parameters: frozenset[str] = frozenset()  # those of the forward that it was computed from
    alias: tuple[str, int] | None = None  # of what definition it is another name
    is_parameter: bool = False  # as it came in


@dataclass
class Flow:
    """Definitions and uses in a list of statements."""

    statements: Sequence[ast.stmt]
    outside: dict[str, Value]  # the names that come into the list
    lives_on: bool = False  # whether what it defines may be read after its end
    reads: list[dict[str, int]] = field(default_factory=list)  # name -> number of its definition
    writes: list[set[str]] = field(default_factory=list)
    values: dict[tuple[str, int], Value] = field(default_factory=dict)
    readers: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        current = dict.fromkeys(self.outside, OUTSIDE)
        self.values = {(name, OUTSIDE): value for name, value in self.outside.items()}
        for number, statement in enumerate(self.statements):
            written = names_written(statement)
            read = names_read(statement) | mutated(statement)
            if _only_maybe(statement):
                read |= written
            self.reads.append({name: current[name] for name in read if name in current})
            for name, definition in self.reads[-1].items():
                self.readers.setdefault((name, definition), set()).add(number)
            self.writes.append(written)
            value = self._value(statement, self.reads[-1])
            for name in written:
                self.values[name, number] = value
                current[name] = number
        if self.lives_on:
            for name, definition in current.items():
                self.readers.setdefault((name, definition), set()).add(len(self.statements))
        self._forget_dead()

    def forget(self, name: str, reader: int) -> None:
        """A statement does not read a name any more."""
        definition = self.reads[reader][name]
        self.readers[name, definition].discard(reader)
        self._forget_dead()

    def _forget_dead(self) -> None:
        """Assignments without calls that nobody reads, which a resolved configuration leaves."""
        while True:
            dead = {
                number
                for number, statement in enumerate(self.statements)
                if isinstance(statement, ast.Assign)
                and number not in self.dead
                and not any(self.readers.get((n, number)) for n in self.writes[number])
                and all(isinstance(t, (ast.Name, ast.Tuple)) for t in statement.targets)
                and not mutated(statement)
                and not any(isinstance(n, ast.Call) for n in ast.walk(statement))
            }
            if not dead:
                return
            self.dead |= dead
            for number in dead:
                for name, definition in self.reads[number].items():
                    self.readers[name, definition].discard(number)

    def _value(self, statement: ast.stmt, reads: dict[str, int]) -> Value:
        known = {name: self.values[name, number] for name, number in reads.items()}
        parameters = frozenset().union(*(value.parameters for value in known.values()))
        value = getattr(statement, "value", None)
        if not isinstance(statement, ast.Assign) or not isinstance(value, ast.expr):
            return Value("value" if parameters else "own", parameters)
        if isinstance(value, ast.Name) and value.id in reads:
            source = (value.id, reads[value.id])
            before = self.values[source]
            return Value(before.kind, before.parameters, self.resolve(*source))
        values = value.elts if isinstance(value, ast.Tuple) else [value]
        if all(self._is_size(each, known) for each in values):
            return Value("size", parameters)
        return Value("value" if parameters else "own", parameters)

    def _is_size(self, node: ast.expr, known: dict[str, Value]) -> bool:
        if shape_of(node) is not None:
            return True
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        return (
            any(known[name].kind == "size" for name in names if name in known)
            and all(known[name].kind != "value" for name in names if name in known)
            and all(isinstance(each, _FIXED) for each in ast.walk(node))
        )

    def resolve(self, name: str, definition: int) -> tuple[str, int]:
        """The definition that this one is another name of, or itself."""
        return self.values[name, definition].alias or (name, definition)

    def before(self, at: int) -> dict[str, Value]:
        """What is known of the names that a statement may read."""
        found = {name: (name, self.definition(name, at)) for name, _ in self.values}
        return {name: self.values[key] for name, key in found.items() if key in self.values}

    def definition(self, name: str, at: int, gone: Collection[int] = ()) -> int:
        """The definition of a name that a statement at `at` would read without those `gone`."""
        found = (i for i in range(at) if name in self.writes[i] and i not in gone)
        return max(found, default=OUTSIDE)
