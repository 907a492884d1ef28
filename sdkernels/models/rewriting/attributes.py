"""What the attributes of a block are: its drop paths, norms, layer scales and activations."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from operator import attrgetter
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from .. import parts
from .source import Refusal, attribute_path, evaluate, function_tree

__all__ = ["BlockParts", "DropCall"]


@dataclass(eq=False)
class DropCall:
    """A call of a drop path."""

    call: ast.Call
    argument: ast.expr  # of the call: the branch
    drop: str | None  # dotted name of the module; None where a function is called
    p: str | None = None  # dotted name of the function's drop probability
    function: str | None = None  # the function's name
    refusal: tuple[str, ast.AST] | None = None  # why it stays, and the node that says so
    added: bool = False
    at: int = 0  # the number of its statement

    def refuse(self, reason: str, node: ast.AST) -> None:
        if self.refusal is None:
            self.refusal = reason, node


class BlockParts:
    """What the attributes of a block are, as the slicer asks for it."""

    def __init__(self, block: nn.Module, names: dict[str, Any]) -> None:
        self.block = block
        self.names = names

    def at(self, path: str | None) -> Any:
        if path is None:
            return None
        try:
            return attrgetter(path)(self.block)
        except AttributeError:
            return None

    def is_drop(self, path: str | None) -> bool:
        return path is not None and parts.may_drop(path, self.at(path))

    def drop_call(self, call: ast.Call) -> DropCall | None:
        path = attribute_path(call.func)
        if path is not None:
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            if not self.is_drop(path) or not given:
                return None
            drop = DropCall(call, given[0], path)
            if len(given) != 1:
                drop.refuse("it is called with further arguments", call)
            elif isinstance(given[0], ast.Starred) or not (call.args or call.keywords[0].arg):
                drop.refuse("its arguments are unpacked in the call", call)
            return drop
        return self._drop_function(call)

    def _drop_function(self, call: ast.Call) -> DropCall | None:
        name = ast.unparse(call.func)
        last = name.rpartition(".")[2]
        drops_layers = parts.sounds_like_layer_drop(last)
        if not (call.args or call.keywords):
            return None
        if not (drops_layers or parts.sounds_like_drop_path(last)):
            return None
        try:
            function = evaluate(call.func, self.block, self.names)
        except Exception:
            return None
        if not isinstance(function, FunctionType):
            return None
        first = next(iter(inspect.signature(function).parameters), "")
        keywords = sorted(call.keywords, key=lambda keyword: keyword.arg != first)
        arguments = [*call.args, *(keyword.value for keyword in keywords)]
        names = [keyword.arg or "" for keyword in keywords]
        given = parts.drop_function_arguments(function, len(call.args), names)
        drop = DropCall(call, arguments[0], None, function=name)
        if given is None or drops_layers:
            drop.refuse(f"it cannot be told what {name} does", call)
            return drop
        values = dict(zip(given, arguments, strict=True))
        for parameter, value in list(values.items())[1:]:
            path = attribute_path(value)
            if parameter == "training" and path == "training":
                continue
            if parameter == "mode" and isinstance(value, ast.Constant) and value.value == "row":
                continue
            if path is not None and parameter not in ("training", "mode") and drop.p is None:
                drop.p = path
                continue
            drop.refuse(f"{parameter} of {name} is not the block's own", call)
        return drop

    def is_layer_scale(self, path: str | None) -> bool:
        module = self.at(path)
        return isinstance(module, nn.Module) and parts.is_layer_scale(module)

    def is_factor(self, node: ast.expr) -> bool:
        """Whether an expression is a tensor to multiply by, or a layer scale."""
        if self.is_layer_scale(attribute_path(node)):
            return True
        try:
            value = evaluate(node, self.block, self.names)
        except Exception:
            return False
        return isinstance(value, Tensor) and value.dim() > 0

    def is_norm(self, path: str | None) -> bool:
        return isinstance(self.at(path), (nn.LayerNorm, nn.RMSNorm))

    def is_relu(self, path: str | None) -> bool:
        return type(self.at(path)) is nn.ReLU

    def used(self, tree: ast.AST, methods: bool = True) -> list[str]:
        """The dotted names of the modules and parameters that a tree uses, by helpers too."""
        path = attribute_path(tree)
        if path is None:
            children = ast.iter_child_nodes(tree)
            return [name for child in children for name in self.used(child, methods)]
        found = self.at(path)
        if inspect.ismethod(found) and methods:
            try:
                return self.used(function_tree(found.__func__)[1], False)
            except Refusal:
                return []
        while path and not isinstance(found, (nn.Module, Tensor)):
            path = path.rpartition(".")[0]
            found = self.at(path or None)
        return [path] if path else []
