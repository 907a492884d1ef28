"""When a rewritten forward is compared with the original, and what of it is remembered."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parameter import is_lazy

from ...sampling import at_trace_time
from ..parts import is_to_drop
from ..proof import REPLACED, TRUSTED, Leaf, Proof, entries, leaves
from ..rewriting import Rewriting
from ..settings import Stamp, settings
from .comparison import prove
from .verified import VERIFIED

__all__ = ["CHECKS", "proofs_of", "recall", "warn"]

CHECKS = ("first", "always", "never")
_KINDS = 32  # of calls, in each of which a block is compared
_SETTINGS = 256  # to remember for each forward that was written


def _named(rewriting: Rewriting, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names of the parameters, in their order."""
    named = {**dict(zip(rewriting.positional, args, strict=False)), **kwargs}
    own = {name: named[name] for name in rewriting.positional if name in named}
    return own | {name: named[name] for name in sorted(named) if name not in own}


def _stream(named: dict[str, Any]) -> Any:
    return next(iter(named.values()), None)


def _doubtful(named: dict[str, Any]) -> tuple[Leaf, ...]:
    """The tensors besides the stream that may belong to its samples, by their size."""
    x = _stream(named)
    if len(named) == 1 or not isinstance(x, Tensor) or x.dim() == 0:
        return ()
    return tuple(
        (f"{name}{path}", leaf.dim())
        for name, value in named.items()
        for path, leaf in leaves(value)
        if leaf is not x and leaf.dim() and leaf.shape[0] == x.shape[0]
    )


def _kind(value: Any, rows: int) -> Any:
    """What of an argument may lead a forward another way. Sizes are trusted not to."""
    if isinstance(value, Tensor):
        floats = value.is_floating_point()
        return value.dim(), floats, bool(value.dim() > 0 and value.shape[0] == rows)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):  # as flags are given, too
        return type(value).__name__, value
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(_kind(each, rows) for each in value)
    if isinstance(value, dict):
        return type(value).__name__, tuple((k, _kind(v, rows)) for k, v in value.items())
    return type(value).__qualname__


def _kind_of_call(block: Any, rewriting: Rewriting, named: dict[str, Any]) -> Any:
    rows = _rows(named)
    kinds = tuple((name, _kind(value, rows)) for name, value in named.items())
    attentions = _attentions(block) if rewriting.leaks or len(named) > 1 else ()
    return kinds, bool(rows == 1), rewriting.asked(block, named), attentions


def _rows(named: dict[str, Any]) -> int:
    x = _stream(named)
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else 1


def _attentions(block: Any) -> tuple[str, ...]:
    """The kinds of attention of a block of transformers, which decide how a mask is read."""
    configs = [getattr(module, "config", None) for module in block.modules()]
    return tuple(str(getattr(each, "_attn_implementation", "")) for each in configs if each)


def proofs_of(
    block: Any, rewriting: Rewriting, check: str, args: Any, kwargs: Any
) -> tuple[Proof, ...]:
    """What is known of a rewriting for such arguments; compares where that is still to be done.

    One for each tensor of a list, up to the first that does not hold.
    """
    if not rewriting.is_of_now():
        return (REPLACED,)
    if not rewriting.fits(block):
        return (Proof(False, "its configuration is not the one that it was patched with"),)
    if not rewriting.source:  # written by hand
        return (TRUSTED,)
    if check == "never":
        return (Proof(True, of_samples=None),)
    if not is_compiling():
        stamp = block._sdkernels.stamp
        if stamp is None or not stamp.holds():
            recall(block, rewriting)
            if block._sdkernels.stamp is None:
                return (Proof(False, "its lazy modules have no parameters yet", lasts=False),)
    plain = len(args) == 1 and not kwargs and not (rewriting.derives or rewriting.leaks)
    if plain and check == "first" and block._sdkernels.is_known:
        return (TRUSTED,)
    named = _named(rewriting, args, kwargs)
    x = _stream(named)
    crops = [named]
    if isinstance(x, list):
        crops = [entries(named, crop, len(x)) for crop in range(len(x))]
    found: list[Proof] = []
    for named in crops:
        found.append(_proof_of_one(block, rewriting, check, named))
        if not found[-1].holds:
            break
    return tuple(found)


def _proof_of_one(block: Any, rewriting: Rewriting, check: str, named: dict[str, Any]) -> Proof:
    state = block._sdkernels
    doubtful = _doubtful(named)
    derives = rewriting.derives or rewriting.leaks
    if state.is_known and not (doubtful or derives) and check != "always":
        return TRUSTED
    kind = _kind_of_call(block, rewriting, named)
    proofs = {} if state.proofs is None else state.proofs  # none known yet where it is compiled
    found: Proof | None = proofs.get(kind)
    if found is not None:
        return found
    if is_compiling():
        _say_uncompared(rewriting.original.__module__, rewriting.original.__qualname__)
    if is_compiling() or torch.is_inference_mode_enabled():
        return Proof(False, "it was not compared with its original yet: report.check(*inputs) does")
    if len(proofs) >= _KINDS:
        return Proof(False, f"its arguments are of more than {_KINDS} kinds", lasts=False)
    found = prove(block, rewriting, named, doubtful)
    if _rows(named) == 1:  # of others nothing is known
        found = replace(found, lasts=False)
    proofs[kind] = found
    if not found.holds:
        warn(rewriting, found)
    return found


def recall(block: Any, rewriting: Rewriting) -> None:
    """Find what is known of blocks that are set to the same."""
    own = tuple(each.p.partition(".")[0] for each in rewriting.branches if each.p)
    state = block._sdkernels
    if len(rewriting.proofs) > _SETTINGS:
        rewriting.proofs.clear()
    state.proofs = rewriting.proofs.setdefault(settings(block, is_to_drop, own), {})
    kind = rewriting.original
    marks = VERIFIED.get(f"{kind.__module__}:{kind.__qualname__}", {})
    state.is_known = rewriting.mark in marks and _is_all_of_libraries(block, kind)
    state.stamp = None
    if not any(map(is_lazy, itertools.chain(block.parameters(), block.buffers()))):
        state.stamp = Stamp(m for path, m in block.named_modules() if not is_to_drop(path, m))


def _is_all_of_libraries(block: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether everything in a block is torch's or its own library's, as it was when compared."""
    own = ("torch", "sdkernels", kind.__module__.partition(".")[0])

    def is_own(module: Any) -> bool:
        kind = type(module)
        names = kind.__module__, getattr(kind.forward, "__module__", None) or ""
        # What torch.compile makes of a module holds it, and is not imported for this.
        is_compiled = kind.__module__ == "torch._dynamo.eval_frame"
        replaced = "forward" in module.__dict__ and not is_compiled
        return not replaced and all(name.partition(".")[0] in own for name in names)

    return all(map(is_own, block.modules()))


def warn(rewriting: Rewriting, proof: Proof) -> None:
    kind = rewriting.original
    warnings.warn(
        f"{kind.__module__}.{kind.__qualname__} keeps its own forward, and computes what it drops: "
        f"{proof.reason}",
        stacklevel=2,
    )


@at_trace_time
def _say_uncompared(module: str, name: str) -> None:
    warnings.warn(
        f"{module}.{name} is compiled with its own forward, which computes what it drops: the "
        "other one was not compared with it yet; call report.check(*inputs) before you compile",
        stacklevel=2,
    )
