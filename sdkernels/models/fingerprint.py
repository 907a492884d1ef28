"""Fingerprints of functions: whether a forward is one that was read when its patch was written."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

__all__ = ["fingerprint", "fingerprint_of_all", "function_of"]

# What changes how a function reads, or how a version of Python parses it, and not what it does.
_IGNORED = frozenset(
    ("annotation", "returns", "decorator_list", "type_comment", "type_params", "kind", "ctx")
)


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    match body:
        case [ast.Expr(value=ast.Constant(value=str())), *rest]:
            return rest
    return body


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
    if isinstance(node, ast.FunctionDef):
        fields["body"] = _without_docstring(node.body)
    inner = ",".join(f"{name}={_canonical(value)}" for name, value in sorted(fields.items()))
    return f"{type(node).__name__}({inner})"


def function_of(function: Callable[..., Any]) -> FunctionType | None:
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


@cache
def fingerprint(function: Callable[..., Any]) -> str | None:
    """A hash of what the function does, from its source; None where there is none to read."""
    plain = function_of(function)
    if plain is None:
        return None
    try:
        # The code object: of a function, getsource would show what a decorator wrapped.
        source = textwrap.dedent(inspect.getsource(plain.__code__))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return None
    return hashlib.sha256(_canonical(tree.body[0]).encode()).hexdigest()[:12]


def fingerprint_of_all(functions: Sequence[Any]) -> str | None:
    """One hash of what several functions do, in this order; None where one cannot be read."""
    found = [fingerprint(each) if callable(each) else None for each in functions]
    prints = [each for each in found if each is not None]
    if len(prints) != len(functions):
        return None
    if len(prints) == 1:
        return prints[0]
    return hashlib.sha256("".join(prints).encode()).hexdigest()[:12]
