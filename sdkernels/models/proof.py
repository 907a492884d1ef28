"""What is known of a rewritten forward, and the tensors that it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["REPLACED", "TRUSTED", "Asked", "Leaf", "Proof", "entries", "leaves", "mapped"]

Leaf = tuple[str, int]  # where a tensor is in the arguments, and its number of dimensions


class Asked(Exception):
    """Somebody may want what a branch computes: it would be there for the kept rows only."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.reason = (
            f"it hands on {name}, which its branch would compute for the kept rows only (patch the "
            "model again when nobody asks for it)"
        )


@dataclass(frozen=True)
class Proof:
    """What came of the comparison."""

    holds: bool  # whether the rewriting may run
    reason: str = ""  # why not
    # The inputs of branches that belong to samples, each with the number of the branch; None: all
    # whose first dimension is the number of rows.
    of_samples: frozenset[tuple[int, Leaf]] | None = frozenset()
    difference: float | None = None  # the largest relative one that was measured
    lasts: bool = True  # whether a refusal is for all calls from now on, and not for such alone


TRUSTED = Proof(True)
REPLACED = Proof(
    False, "the forward of its class was replaced after it was patched (patch the model again)"
)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in lists, tuples and dicts, with where they are."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from leaves(each, f"{path}.{number}")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, f"{path}.{key}")


def mapped(value: Any, change: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """The value with its tensors changed."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, (list, tuple)):
        items = [mapped(v, change, f"{path}.{n}") for n, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        made = {k: mapped(v, change, f"{path}.{k}") for k, v in value.items()}
        return made if type(value) is dict else type(value)(**made)
    return value


def entries(args: Any, crop: int, crops: int) -> Any:
    """What of each argument belongs to one tensor of a list."""

    def own(arg: Any) -> Any:
        return arg[crop] if isinstance(arg, list) and len(arg) == crops else arg

    if isinstance(args, Mapping):
        return {name: own(arg) for name, arg in args.items()}
    return [own(arg) for arg in args]
