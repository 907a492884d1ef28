"""One building block, forward or backward, against its PyTorch equivalent and a plain copy."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sdkernels
from benchmarks.cases.rows import RowCase, Tensors
from benchmarks.measure.workload import Comparison, Workload, copies_past_the_cache, seeded
from benchmarks.providers.residuals import why_missing
from sdkernels import reference

Outputs = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensor | Outputs]


@dataclass(frozen=True)
class Op:
    """One building block: its differentiable inputs, what it gives, and the rows it has to move.

    Traffic is (rows of the batch, kept rows, kept rows of the branch's dtype), reads and writes
    together, in multiples of B, k and k, after the budgets in the design; what a provider moves
    beyond that counts against it.
    """

    inputs: str  # names in Tensors
    outputs: str  # whose rows each has: "batch", "kept"
    fwd: tuple[int, int, int]
    bwd: tuple[int, int, int]
    tokens: bool = True  # whether models have it on rows of tokens,
    images: bool = True  # and on images


OPS = {
    "compact": Op("x", "kept", (0, 2, 0), (1, 1, 0)),
    "compact_layer_norm": Op("x weight bias", "kept", (0, 2, 0), (1, 2, 0), images=False),
    "compact_rms_norm": Op("x weight", "kept", (0, 2, 0), (1, 2, 0), images=False),
    # The gradient of x is the incoming gradient itself, so the backward moves only the kept rows.
    "scatter_add": Op("x out", "batch", (2, 0, 1), (0, 1, 1)),
    "scatter_add_layer_scale": Op("x out layer_scale", "batch", (2, 0, 1), (0, 1, 2)),
    # The bits that are kept for the backward, hundredths of a row, are left out of the traffic.
    "scatter_add_relu": Op("x out", "batch", (2, 0, 1), (2, 0, 1), tokens=False),
    # All that stochastic depth puts around a branch, with nothing in between; its backward adds the
    # stream's gradient in the same pass.
    "residual_layer_norm": Op(
        "x weight bias layer_scale", "batch", (2, 3, 0), (2, 5, 0), images=False
    ),
    # From one branch's output to the next one's input.
    "scatter_add_then_norm": Op(
        "x out weight bias", "batch kept", (2, 2, 1), (2, 3, 1), images=False
    ),
}


def _identity(x: Tensor) -> Tensor:
    return x


def _xformers_compact(t: Tensors) -> Tensor:
    operators = importlib.import_module("xformers.ops")
    flat = operators.index_select_cat([t.x.flatten(1)], [t.rows.index])
    return flat.view(t.rows.k, *t.x.shape[1:])


def _xformers_scatter_add(t: Tensors, layer_scale: Tensor | None = None) -> Tensor:
    """In place; on a copy, because the inputs serve every sample. Its traffic is ours then."""
    operators = importlib.import_module("xformers.ops")
    return operators.scaled_index_add(t.x.clone(), t.rows.index, t.out, layer_scale, t.rows.scale)


def _index_add(t: Tensors, out: Tensor) -> Tensor:
    return torch.index_add(t.x, 0, t.rows.index, out.to(t.x.dtype), alpha=t.rows.scale)


def _kept(t: Tensors) -> Tensor:
    return t.x.index_select(0, t.rows.index)


def _torch_scatter_norm(t: Tensors) -> Outputs:
    y = _index_add(t, t.out)
    return y, F.layer_norm(y.index_select(0, t.next_rows.index), t.width, t.weight, t.bias)


def _fused_scatter_norm(t: Tensors) -> Outputs:
    y = sdkernels.scatter_add_rows(t.x, t.out, t.rows)
    return y, sdkernels.compact_layer_norm(y, t.next_rows, t.width, t.weight, t.bias)


def _flash_attn_scatter_norm(t: Tensors) -> Outputs:
    """Adds and normalizes all rows in one pass, dropped ones times zero: the branch has run on
    all of them. Its output is given as zeros there, and the norm's kept rows are taken after."""
    layer_norm = importlib.import_module("flash_attn.ops.triton.layer_norm").layer_norm_fn
    out = t.x.new_zeros(t.x.shape).index_copy(0, t.rows.index, t.out)
    rowscale = (t.rows.slot >= 0).to(t.x.dtype) * t.rows.scale
    rowscale = rowscale.view(-1, *[1] * (t.x.dim() - 2)).expand(t.x.shape[:-1]).contiguous()
    normed, y = layer_norm(
        out, t.weight, t.bias, residual=t.x, rowscale=rowscale, eps=t.norm.eps, prenorm=True
    )
    return y, normed.index_select(0, t.next_rows.index)


PROVIDERS: dict[str, dict[str, Function]] = {
    "compact": {
        "fused": lambda t: sdkernels.compact_rows(t.x, t.rows),
        "torch": _kept,
        "xformers": _xformers_compact,
    },
    "compact_layer_norm": {
        "fused": lambda t: sdkernels.compact_layer_norm(t.x, t.rows, t.width, t.weight, t.bias),
        "torch": lambda t: F.layer_norm(_kept(t), t.width, t.weight, t.bias),
    },
    "compact_rms_norm": {
        "fused": lambda t: sdkernels.compact_rms_norm(t.x, t.rows, t.width, t.weight, 1e-6),
        "torch": lambda t: F.rms_norm(_kept(t), t.width, t.weight, 1e-6),
    },
    "scatter_add": {
        "fused": lambda t: sdkernels.scatter_add_rows(t.x, t.out, t.rows),
        "torch": lambda t: _index_add(t, t.out),
        "xformers": _xformers_scatter_add,
    },
    "scatter_add_layer_scale": {
        "fused": lambda t: sdkernels.scatter_add_rows(t.x, t.out, t.rows, t.layer_scale),
        "torch": lambda t: _index_add(t, t.out * t.layer_scale),
        "xformers": lambda t: _xformers_scatter_add(t, t.layer_scale),
    },
    "scatter_add_relu": {
        "fused": lambda t: sdkernels.scatter_add_rows(t.x, t.out, t.rows, activation="relu"),
        "torch": lambda t: _index_add(t, t.out).relu_(),
    },
    "residual_layer_norm": {
        "fused": lambda t: sdkernels.fused_stochastic_depth(
            t.x, _identity, 0.5, norm=t.norm, layer_scale=t.layer_scale, rows=t.rows
        ),
        "torch": lambda t: reference.index_add(
            t.x, _identity, norm=t.norm, layer_scale=t.layer_scale, rows=t.rows
        ),
    },
    "scatter_add_then_norm": {
        "fused": _fused_scatter_norm,
        "torch": _torch_scatter_norm,
        "flash_attn": _flash_attn_scatter_norm,
    },
}


@dataclass(frozen=True)
class OpCase(RowCase):
    """One op, one direction, one dtype; beside it the plain copy (``clone``) of the same tensor.

    Inputs go round in as many copies as do not fit the last cache. A backward pass is reached
    through the autograd engine, whose call costs as much as moving a megabyte or two. ``empty``
    times that call alone (the backward of a view); bandwidths are taken net of it.

    Args:
        rows: the model whose rows these are.
    """

    op: str
    direction: str  # "fwd" or "bwd"
    dtype: str
    rows: str = "ViT-S"
    shape: tuple[int, ...] = (64, 197, 384)
    k: int = 32

    kind, baseline, floor = "op", "torch", "copy"

    @property
    def name(self) -> str:
        return f"op-{self.op}-{self.direction}-{self.dtype}-{self.shape_name}-k{self.k}"

    def describe(self) -> dict[str, Any]:
        traffic = getattr(OPS[self.op], self.direction)
        return asdict(self) | {"channels_last": self.is_image} | self.bytes_of(traffic)

    def providers(self, device: torch.device) -> dict[str, str | None]:
        reasons = dict.fromkeys([*PROVIDERS[self.op], "copy"])
        if self.direction == "bwd":
            reasons["empty"] = None
        for peer in reasons.keys() & {"xformers", "flash_attn"}:
            reasons[peer] = why_missing(peer, device)
            if self.dtype == "mixed":
                reasons[peer] = "takes one dtype"
            elif peer == "xformers" and self.is_image:
                reasons[peer] = reasons[peer] or "takes rows of two dimensions only"
        return reasons

    def _functions(self, device: torch.device) -> dict[str, Function]:
        usable = self.usable(device)
        return {name: call for name, call in PROVIDERS[self.op].items() if name in usable}

    def _inputs(
        self, device: torch.device, dtype: torch.dtype | None = None
    ) -> tuple[Tensors, Outputs]:
        """Inputs, and a gradient for every output."""
        of, generator, stream = {"batch": self.shape[0], "kept": self.k}, seeded(1), self.dtypes[0]
        grads = (self.random(of[rows], stream, generator) for rows in OPS[self.op].outputs.split())
        inputs = self.tensors(device, dtype).trained()
        return inputs, tuple(grad.to(device, dtype or stream) for grad in grads)

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """On shared inputs that go round past the last cache."""
        first = self._inputs(device)
        held = sum(t.nbytes for t in (first[0].x, first[0].out, *first[1]))
        sets = [first]
        for _ in range(copies_past_the_cache(held, device) - 1):
            sets.append((first[0].copy().trained(), tuple(grad.clone() for grad in first[1])))
        wanted = OPS[self.op].inputs.split()
        derive = partial(torch.autograd.grad, retain_graph=True)

        def forward(function: Function) -> Workload:
            turn = itertools.cycle(inputs for inputs, _ in sets)
            return Workload(lambda: function(next(turn)), warm_up=len(sets))

        def backward(function: Function) -> Workload:
            ready = [
                (function(inputs), [getattr(inputs, name) for name in wanted], grads)
                for inputs, grads in sets
            ]
            turn = itertools.cycle(ready)
            return Workload(lambda: derive(*next(turn)), warm_up=len(sets))

        build = forward if self.direction == "fwd" else backward
        loads = {name: build(function) for name, function in self._functions(device).items()}
        loads["copy"] = forward(lambda inputs: inputs.x.clone())
        if self.direction == "bwd":
            inputs, (grad, *_) = first
            source = inputs.out if grad.shape == inputs.out.shape else inputs.x
            view, grad = source.view_as(source), grad.to(source.dtype)
            loads["empty"] = Workload(lambda: derive(view, source, grad))
        return loads

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against the PyTorch equivalent in float64.

        PyTorch's own bfloat16 is no reference: on CPU, its LayerNorm sums the gradients of weight
        and bias in bfloat16 and misses them by a tenth. It is timed as it is.
        """
        names = OPS[self.op].inputs.split()

        def evaluate(function: Function, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
            inputs, grads = self._inputs(device, dtype)
            outputs = function(inputs)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            wanted = [getattr(inputs, name) for name in names]
            got = torch.autograd.grad(outputs, wanted, grads)
            values = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
            return values | {f"gradient of {n}": g for n, g in zip(names, got, strict=True)}

        exact = evaluate(PROVIDERS[self.op]["torch"], torch.float64)
        for provider, function in self._functions(device).items():
            if provider != "torch":
                got = evaluate(function)
                expected = {name: tensor.to(got[name].dtype) for name, tensor in exact.items()}
                yield Comparison(provider, got, expected, self.arithmetic)
