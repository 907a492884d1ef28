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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sdkernels
from sdkernels import KeptRows, reference
from sdkernels.backends import choice, traceable

Rule = Callable[..., Tensor]


def _run(
    x: Tensor,
    branch: Callable[..., Tensor],
    index: Tensor | None = None,
    norm: nn.Module | None = None,
    layer_scale: Tensor | None = None,
    args: Sequence[Any] = (),
    **_: Any,
) -> Tensor:
    """``layer_scale * branch(norm(x), *args)``, of the rows ``index`` where it is given."""
    kept = x if index is None else x[index]
    out = branch(kept if norm is None else norm(kept), *(_argument(arg, index) for arg in args))
    return out if layer_scale is None else out * layer_scale


def _argument(arg: Any, index: Tensor | None) -> Any:
    """A further input of a branch: of the rows that it runs on, unless all of them share it."""
    value = arg.value if isinstance(arg, (sdkernels.PerSample, sdkernels.Shared)) else arg
    shared = index is None or not isinstance(value, Tensor) or isinstance(arg, sdkernels.Shared)
    return value if shared else value[index]


def _index_and_alpha(x: Tensor, p: float, rows: KeptRows | None) -> tuple[Tensor, float]:
    """Of the given rows; else DINOv2's and DINOv3's fixed count, and the factor that makes up for
    it."""
    if rows is not None:
        return rows.index, rows.scale
    kept = max(int(x.shape[0] * (1 - p)), 1)
    return torch.randperm(x.shape[0], device=x.device)[:kept], x.shape[0] / kept


def activated(rule: Rule) -> Rule:
    """A rule that adds; an activation follows in place, as the libraries' blocks write it."""

    @functools.wraps(rule)
    def add(*given: Any, activation: str | None = None, **options: Any) -> Tensor:
        total = rule(*given, **options)
        return total if activation is None else total.relu_()

    return add


@activated
def naive(
    x: Tensor,
    branch: Callable[..., Tensor],
    p: float,
    *_: Any,
    residual: Tensor | None = None,
    rows: KeptRows | None = None,
    **given: Any,
) -> Tensor:
    """torchvision: a mask of Bernoulli values, divided by the survival probability."""
    run = partial(_run, branch=branch, **given)
    return reference.naive_masking(x, run, p, residual=residual, rows=rows)


@activated
def naive_timm(
    x: Tensor,
    branch: Callable[..., Tensor],
    p: float,
    *_: Any,
    residual: Tensor | None = None,
    rows: KeptRows | None = None,
    **given: Any,
) -> Tensor:
    """timm: the same, drawn into a new tensor of the branch's dtype."""
    if p == 0 and rows is None:
        return dense(x, branch, residual=residual, **given)
    out = _run(x, branch, **given)
    size = (out.shape[0],) + (1,) * (out.ndim - 1)
    if rows is None:
        mask = out.new_empty(size).bernoulli_(1 - p)
        if p < 1:
            mask.div_(1 - p)
    else:
        mask = ((rows.slot >= 0).to(out.dtype) * rows.scale).view(size)
    return (x if residual is None else residual) + out * mask


@activated
def dinov2(
    x: Tensor,
    branch: Callable[..., Tensor],
    p: float,
    *_: Any,
    residual: Tensor | None = None,
    rows: KeptRows | None = None,
    **given: Any,
) -> Tensor:
    """Gather, branch, ``index_add`` of flattened rows with alpha; masking up to p = 0.1."""
    if p <= 0.1:
        return naive_timm(x, branch, p, residual=residual, rows=rows, **given)
    index, alpha = _index_and_alpha(x, p, rows)
    stream = x if residual is None else residual
    out = _run(x, branch, index, **given).to(stream.dtype)
    if not stream.is_contiguous():  # of images, channels last: flattening would copy them
        return torch.index_add(stream, 0, index, out, alpha=alpha)
    added = torch.index_add(stream.flatten(1), 0, index, out.flatten(1), alpha=alpha)
    return added.view_as(stream)


@activated
def dinov3(
    x: Tensor,
    branch: Callable[..., Tensor],
    p: float,
    *_: Any,
    residual: Tensor | None = None,
    rows: KeptRows | None = None,
    **given: Any,
) -> Tensor:
    """The same at every p > 0, on rows as they are: for a stream and a branch of one dtype."""
    if p == 0 and rows is None:
        return dense(x, branch, residual=residual, **given)
    index, alpha = _index_and_alpha(x, p, rows)
    out = _run(x, branch, index, **given)
    return torch.index_add(x if residual is None else residual, 0, index, out, alpha=alpha)


@activated
def xformers(
    x: Tensor,
    branch: Callable[..., Tensor],
    p: float,
    *_: Any,
    layer_scale: Tensor | None = None,
    rows: KeptRows | None = None,
    **given: Any,
) -> Tensor:
    """DINOv2 with xFormers: its gather, and its fused layer scale and addition in place."""
    operators = importlib.import_module("xformers.ops")
    index, alpha = _index_and_alpha(x, p, rows)
    kept = operators.index_select_cat([x.flatten(1)], [index]).view(len(index), *x.shape[1:])
    out = _run(kept, branch, **given)
    # A leaf can't be written into; in a model the stream of the first block is none.
    stream = x.clone() if x.is_leaf else x
    total: Tensor = operators.scaled_index_add(
        stream, index, out.to(stream.dtype), scaling=layer_scale, alpha=alpha
    )
    return total


@activated
def dense(
    x: Tensor,
    branch: Callable[..., Tensor],
    *_: Any,
    residual: Tensor | None = None,
    **given: Any,
) -> Tensor:
    """Nothing dropped. On a batch of only the kept rows it is the floor for every provider."""
    return (x if residual is None else residual) + _run(x, branch, **given)


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


@activated
def beside(
    x: Tensor,
    branch: Callable[..., Tensor],
    p: float,
    *_: Any,
    residual: Tensor | None = None,
    rows: KeptRows,
    **given: Any,
) -> Tensor:
    """The floor of a net whose stream holds all rows: the stream is passed on as a copy, and the
    branch runs beside it, on as many rows as are kept.

    These are the first ones, as views: nothing is gathered, added or merged with a gradient. A
    branch without kept rows is left out. What the net computes is worth nothing.
    """
    if rows.k == 0:
        return skipped(x, branch, p, residual=residual)
    out = _run(_FirstRows.apply(x, rows.k), branch, **given)
    stream: Tensor = _Beside.apply(x if residual is None else residual, out)
    return stream


@activated
def skipped(x: Tensor, branch: Callable[..., Tensor], p: float, *_: Any, **options: Any) -> Tensor:
    """No branch at all: what is left of a model is its stem, its shortcuts and its head.

    The stream is passed on as a copy: an addition, too, writes it for every row.
    """
    residual: Tensor | None = options.get("residual")
    return (x if residual is None else residual).clone()


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
    functions = (
        importlib.import_module("sdkernels.backends.triton").OPS
        if name == "triton"
        else traceable.OPS
    )
    library = torch.library.Library("sdkernels", "IMPL")
    for op, function in functions.items():
        choice.override(library, op, function, device.type)
    try:
        yield
    finally:
        library._destroy()


# name: (rule, whether it draws for itself while it is timed)
RULES: dict[str, tuple[Rule, bool]] = {
    "naive": (naive, True),
    "naive-timm": (naive_timm, True),
    "dinov2": (dinov2, True),
    "dinov3": (dinov3, True),
    "xformers": (xformers, True),
    "fused": (fused(), False),
    "fused-inplace": (fused_inplace, False),
    "fused-fixed": (fused(sampler="fixed"), True),
    "fused-bernoulli": (fused(), True),
    "fused-auto": (fused(sampler="fixed", min_saving="auto"), True),
    "dense": (dense, False),
    "beside": (beside, False),
}
