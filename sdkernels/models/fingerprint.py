"""Fingerprints of functions: whether a forward is one that was read when its patch was written."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from .rewriting.source import Refusal, function_of, parsed

__all__ = ["fingerprint", "fingerprint_of_all"]

# What changes how a function reads, or how a version of Python parses it, and not what it does.
_IGNORED = frozenset(
    ("annotation", "returns", "decorator_list", "type_comment", "type_params", "kind", "ctx")
)


def _canonical(node: Any) -> str:
    """The tree as text, without positions, annotations and docstrings; the same in every Python."""
    if isinstance(node, list):
        return "[" + ",".join(map(_canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {
        name: value
        for name, value in ast.iter_fields(node)
        if name not in _IGNORED and value is not None and value != []
    }
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    inner = ",".join(f"{name}={_canonical(value)}" for name, value in sorted(fields.items()))
    return f"{type(node).__name__}({inner})"


@cache
def fingerprint(function: Callable[..., Any]) -> str | None:
    """A hash of what the function does, from its source; None where there is none to read."""
    plain = function_of(function)
    try:
        tree = None if plain is None else parsed(plain.__code__)
    except Refusal:
        return None
    return None if tree is None else _hash(_canonical(tree))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint_of_all(functions: Sequence[Any]) -> str | None:
    """One hash of what several functions do, in this order; None where one cannot be read."""
    found = [fingerprint(each) if callable(each) else None for each in functions]
    prints = [each for each in found if each is not None]
    if len(prints) != len(functions):
        return None
    return prints[0] if len(prints) == 1 else _hash("".join(prints))
