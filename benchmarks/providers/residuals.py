"""How each provider computes ``x + drop_path(layer_scale * branch(norm(x)))``.

A *rule* takes what :func:`sdkernels.fused_stochastic_depth` takes. Given ``rows`` it keeps those;
without, it draws as its users' models draw in every step. Peers are written here from reading their
sources; ``benchmarks/README.md`` names them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import sdkernels
from sdkernels import KeptRows, reference
from sdkernels.backends import choice

Rule = Callable[..., Tensor]
Rows = Sequence[KeptRows | None]  # of the branches, which draw theirs where there are none


class Addition:
    """What one residual addition is given, as :func:`sdkernels.fused_stochastic_depth` is."""

    def __init__(
        self,
        x: Tensor,
        branch: Callable[..., Tensor],
        p: float = 0.0,
        *_law: Any,
        residual: Tensor | None = None,
        rows: KeptRows | None = None,
        norm: nn.Module | None = None,
        layer_scale: Tensor | None = None,
        args: Sequence[Any] = (),
        **_options: Any,
    ) -> None:
        self.x, self.branch, self.p, self.rows = x, branch, p, rows
        self.norm, self.layer_scale, self.args = norm, layer_scale, args
        self.stream = x if residual is None else residual

    def run(self, index: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """``layer_scale * branch(norm(x), *args)`` of all rows, those of ``index``, or ``kept``."""
        if kept is None:
            kept = self.x if index is None else self.x[index]
        args = [_argument(arg, index) for arg in self.args]
        out = self.branch(kept if self.norm is None else self.norm(kept), *args)
        return out if self.layer_scale is None else out * self.layer_scale

    def index_and_alpha(self) -> tuple[Tensor, float]:
        """Of the given rows; else DINOv2's and DINOv3's fixed count, and the factor that makes up
        for it."""
        if self.rows is not None:
            return self.rows.index, self.rows.scale
        batch = self.x.shape[0]
        kept = max(int(batch * (1 - self.p)), 1)
        return torch.randperm(batch, device=self.x.device)[:kept], batch / kept


def _argument(arg: Any, index: Tensor | None) -> Any:
    """A further input of a branch: of the rows that it runs on, unless all of them share it."""
    if isinstance(arg, (list, tuple)):
        return type(arg)(_argument(each, index) for each in arg)
    value = arg.value if isinstance(arg, (sdkernels.PerSample, sdkernels.Shared)) else arg
    shared = index is None or not isinstance(value, Tensor) or isinstance(arg, sdkernels.Shared)
    return value if shared else value[index]


def rule(add: Callable[[Addition], Tensor]) -> Rule:
    """A rule that adds; an activation follows in place, as the libraries' blocks write it."""

    @functools.wraps(add)
    def added(*given: Any, activation: str | None = None, **options: Any) -> Tensor:
        total = add(Addition(*given, **options))
        return total if activation is None else total.relu_()

    return added


def _masked(a: Addition) -> Tensor:
    """torchvision and timm: a mask of Bernoulli values, divided by the survival probability."""
    return reference.naive_masking(a.x, lambda _: a.run(), a.p, residual=a.stream, rows=a.rows)


naive = rule(_masked)


@rule
def dinov2(a: Addition) -> Tensor:
    """Gather, branch, ``index_add`` of flattened rows with alpha; masking up to p = 0.1."""
    if a.p <= 0.1:
        return _masked(a)
    index, alpha = a.index_and_alpha()
    out = a.run(index).to(a.stream.dtype)
    if not a.stream.is_contiguous():  # of images, channels last: flattening would copy them
        return torch.index_add(a.stream, 0, index, out, alpha=alpha)
    added = torch.index_add(a.stream.flatten(1), 0, index, out.flatten(1), alpha=alpha)
    return added.view_as(a.stream)


@rule
def dinov3(a: Addition) -> Tensor:
    """The same at every p > 0, on rows as they are: for a stream and a branch of one dtype."""
    if a.p == 0 and a.rows is None:
        return a.stream + a.run()
    index, alpha = a.index_and_alpha()
    return torch.index_add(a.stream, 0, index, a.run(index), alpha=alpha)


@rule
def xformers(a: Addition) -> Tensor:
    """DINOv2 with xFormers: its gather, and its fused layer scale and addition in place."""
    operators = importlib.import_module("xformers.ops")
    index, alpha = a.index_and_alpha()
    kept = operators.index_select_cat([a.x.flatten(1)], [index]).view(len(index), *a.x.shape[1:])
    scaling, a.layer_scale = a.layer_scale, None
    out = a.run(kept=kept).to(a.x.dtype)
    # A leaf can't be written into; in a model the stream of the first block is none.
    stream = a.x.clone() if a.x.is_leaf else a.x
    return operators.scaled_index_add(stream, index, out, scaling=scaling, alpha=alpha)


@rule
def dense(a: Addition) -> Tensor:
    """Nothing dropped. On a batch of only the kept rows it is the floor for every provider."""
    return a.stream + a.run()


class _FirstRows(torch.autograd.Function):
    """The first k rows of x, as a view. They take part in the graph, so that a branch computes the
    gradient of its input as it must, and that gradient is then dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        return x[:k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class _Beside(torch.autograd.Function):
    """A copy of the stream; what was computed beside it gets the gradient of its first rows."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, out: Tensor) -> Tensor:
        ctx.k = len(out)
        return stream.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad[: ctx.k]


@rule
def beside(a: Addition) -> Tensor:
    """The floor of a net whose stream holds all rows: the stream is passed on as a copy, and the
    branch runs beside it, on as many rows as are kept.

    These are the first ones, as views: nothing is gathered, added or merged with a gradient. A
    branch without kept rows is left out. What the net computes is worth nothing.
    """
    assert a.rows is not None
    if a.rows.k == 0:
        return a.stream.clone()
    return _Beside.apply(a.stream, a.run(kept=_FirstRows.apply(a.x, a.rows.k)))


@rule
def skipped(a: Addition) -> Tensor:
    """No branch at all: what is left of a model is its stem, its shortcuts and its head.

    The stream is passed on as a copy: an addition, too, writes it for every row.
    """
    return a.stream.clone()


def fused(**fixed: Any) -> Rule:
    """The op, with some of its options set."""

    def rule(x: Tensor, branch: Callable[..., Tensor], p: float, *law: Any, **given: Any) -> Tensor:
        return sdkernels.fused_stochastic_depth(x, branch, p, *law, **(given | fixed))

    return rule


def fused_inplace(x: Tensor, *call: Any, **given: Any) -> Tensor:
    """The op as patch() calls it for the branches after a block's first: into a sum that nobody
    else needs. What goes into a block is a leaf here, and stays as it is."""
    return fused()(x, *call, **given, inplace=False if x.is_leaf else None)


def why_missing(package: str, device: torch.device) -> str | None:
    """Why a peer of that name cannot be timed here; None where it can."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return None if device.type == "cuda" else "its kernels are for CUDA"


def other_backends(device: torch.device) -> dict[str, str | None]:
    """The backends that do not serve this device by default, with the reason if they cannot."""
    chosen = {c.backend for c in choice.backend_table() if c.device == device.type}
    candidates = ["triton"] * (device.type == "cuda") + ["traceable"]
    return {name: choice.missing(name, device.type) for name in candidates if name not in chosen}


@contextmanager
def backend(name: str, device: torch.device) -> Iterator[None]:
    """Every op of the package served by another backend on this device type."""
    served = importlib.import_module(f"sdkernels.backends.{name}")
    library = torch.library.Library("sdkernels", "IMPL")
    for op, function in served.OPS.items():
        choice.override(library, op, function, device.type)
    try:
        yield
    finally:
        library._destroy()


# name: (rule, whether it is timed without rows: it draws for itself, or has no use for them)
RULES: dict[str, tuple[Rule, bool]] = {
    "naive": (naive, True),
    "dinov2": (dinov2, True),
    "dinov3": (dinov3, True),
    "xformers": (xformers, True),
    "fused": (fused(), False),
    "fused-inplace": (fused_inplace, False),
    "fused-fixed": (fused(sampler="fixed"), True),
    "fused-bernoulli": (fused(), True),
    "fused-auto": (fused(sampler="fixed", min_saving="auto"), True),
    "dense": (dense, True),
    "beside": (beside, False),
}
