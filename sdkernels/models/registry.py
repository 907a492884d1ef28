"""Which classes of blocks are known, and how their patched classes are made and found again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from .blocks import Branch, PatchedBlock, make_patched
from .fingerprint import fingerprint
from .parts import trust_norm

__all__ = [
    "LIBRARIES",
    "Known",
    "class_getter",
    "find_known",
    "obstacle",
    "original_class",
    "patched_class",
]

LIBRARIES = ("timm", "torchvision", "transformers")


class Known(NamedTuple):
    """A class of blocks, and what to do with it.

    Args:
        path: module and name of the class.
        body: its forward with the op (see :func:`sdkernels.models.blocks.make_patched`).
        branches: its residual branches, in the order of the indices that `body` uses; a function
            of the block where they vary.
        fingerprints: those of the forwards that `body` stands for, each with the versions of the
            library that have it.
        runs_empty: whether its branches run on a batch of zero samples. Convolutions and BatchNorm
            do; the reshapes of many attentions do not.
        without: why a block of the class has no branch to drop, None if it has one.
    """

    path: str
    body: Callable[..., Any]
    branches: tuple[Branch, ...] | Callable[[Any], tuple[Branch, ...]]
    fingerprints: Mapping[str, str]
    without: Callable[[Any], str | None] = lambda block: None
    runs_empty: bool = False

    @property
    def patched_name(self) -> str:
        """Under this name the patched class is an attribute of the library's file here."""
        module, name = self.path.split(":")
        return f"{module.rpartition('.')[2]}_{name}"

    def branches_of(self, block: nn.Module) -> tuple[Branch, ...]:
        return self.branches if isinstance(self.branches, tuple) else self.branches(block)


def _file_of(library: str) -> ModuleType:
    return importlib.import_module(f".{library}", __package__)


def find_known(kind: Any) -> Known | None:
    """The entry of a class, None if there is none: the one of its forward, if it has several."""
    library = kind.__module__.partition(".")[0]
    if library not in LIBRARIES:
        return None
    path = f"{kind.__module__}:{kind.__qualname__}"
    entries: list[Known] = [known for known in _file_of(library).KNOWN if known.path == path]
    there: Any = getattr(sys.modules[kind.__module__], kind.__name__, None)
    if not entries or there is not kind:
        return None
    read = fingerprint(kind.forward) or ""
    return next((known for known in entries if read in known.fingerprints), entries[0])


def library_version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "of unknown version"


def _class_obstacle(kind: Any) -> str | None:
    known = find_known(kind)
    if known is None:
        for base in kind.__mro__[1:]:
            if find_known(base) is not None:
                return (
                    f"subclass of {base.__module__}.{base.__name__}, whose forward may differ "
                    "(a wrapper such as fully_shard goes on after patch)"
                )
        return "unknown class"
    if (fingerprint(kind.forward) or "") in known.fingerprints:
        return None
    library = kind.__module__.partition(".")[0]
    versions = ", ".join(dict.fromkeys(known.fingerprints.values()))
    return (
        f"its forward is not one that is known: this is {library} {library_version(library)}, "
        f"known are those of {versions}"
    )


def original_class(block: nn.Module) -> type[nn.Module]:
    """The library's class of a block that may be patched."""
    kind = type(block)
    return kind._original if issubclass(kind, PatchedBlock) else kind


def obstacle(block: nn.Module) -> str | None:
    """Why a block cannot be patched, None if it can."""
    kind = original_class(block)
    reason = _class_obstacle(kind)
    if reason is not None:
        return reason
    if "forward" in block.__dict__:
        return "its forward was replaced"
    if getattr(block, "_compiled_call_impl", None) is not None:
        return "it was compiled: compile after patch"
    known = find_known(kind)
    return None if known is None else known.without(block)


_PATCHED: dict[type[nn.Module], type[nn.Module]] = {}


def patched_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class that blocks of a known class get; one for each, made when it is first asked for.

    The first to ask may be pickle, of a model that was patched with another version of the library.
    """
    if original not in _PATCHED:
        known, reason = find_known(original), _class_obstacle(original)
        if known is None or reason is not None:
            raise ValueError(f"a {original.__name__} cannot be patched: {reason}")
        library = original.__module__.partition(".")[0]
        file = _file_of(library)
        for norm in getattr(file, "NORMS", ()):
            module, _, name = norm.partition(":")
            trust_norm(getattr(importlib.import_module(module), name))
        name = known.patched_name
        _PATCHED[original] = make_patched(
            original, known.body, name, file.__name__, known.runs_empty
        )
    return _PATCHED[original]


def class_getter(file: str, table: Sequence[Known]) -> Callable[[str], type[nn.Module]]:
    """`__getattr__` of a library's file: pickle finds patched classes by name there."""

    def get(name: str) -> type[nn.Module]:
        for known in table:
            if known.patched_name == name:
                module, _, original = known.path.partition(":")
                return patched_class(getattr(importlib.import_module(module), original))
        raise AttributeError(f"module {file!r} has no attribute {name!r}")

    return get
