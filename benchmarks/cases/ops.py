"""One building block, forward or backward, against its PyTorch equivalent and a plain copy."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdkernels
from benchmarks.measure.workload import (
    DTYPES,
    Comparison,
    Workload,
    copies_past_the_cache,
    kept_rows,
    seeded,
)
from benchmarks.providers.residuals import why_missing
from sdkernels import KeptRows, reference


@dataclass(frozen=True)
class OpInputs:
    """Everything an op may take; B rows in ``x``, k in ``out``."""

    x: Tensor  # [B, ...]
    out: Tensor  # [k, ...]
    norm: nn.LayerNorm  # of the last dimension; its parameters serve the RMS norm too
    layer_scale: Tensor  # [D], or [C, 1, 1] for images
    rows: KeptRows
    next_rows: KeptRows  # of the branch that follows

    def copy(self) -> OpInputs:
        """The same numbers in memory of its own."""
        x, out, layer_scale = (
            tensor.detach().clone().requires_grad_()
            for tensor in (self.x, self.out, self.layer_scale)
        )
        return OpInputs(x, out, copy.deepcopy(self.norm), layer_scale, self.rows, self.next_rows)

    @property
    def weight(self) -> Tensor:
        return self.norm.weight

    @property
    def bias(self) -> Tensor:
        return self.norm.bias

    @property
    def width(self) -> tuple[int]:
        return (self.x.shape[-1],)


Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Op:
    """One building block: its providers, its differentiable inputs, and the rows it has to move.

    Traffic is (rows of the batch, kept rows, kept rows of the branch's dtype), reads and writes
    together, in multiples of B, k and k, after the budgets in the design; what a provider moves
    beyond that counts against it.
    """

    providers: dict[str, Callable[[OpInputs], Outputs]]
    inputs: tuple[str, ...]
    traffic: dict[str, tuple[int, int, int]]
    outputs: tuple[str, ...]  # whose rows: "batch", "kept"
    tokens: bool = True  # whether models have it on rows of tokens,
    images: bool = True  # and on images


def _identity(x: Tensor) -> Tensor:
    return x


def _xformers(name: str) -> Callable[..., Tensor]:
    return getattr(importlib.import_module("xformers.ops"), name)  # type: ignore[no-any-return]


def _xformers_compact(t: OpInputs) -> Outputs:
    flat = _xformers("index_select_cat")([t.x.flatten(1)], [t.rows.index])
    return (flat.view(t.rows.k, *t.x.shape[1:]),)


def _xformers_scatter_add(t: OpInputs) -> Outputs:
    """In place; on a copy, because the inputs serve every sample. Its traffic is ours then."""
    return (_xformers("scaled_index_add")(t.x.clone(), t.rows.index, t.out, None, t.rows.scale),)


def _xformers_scatter_add_layer_scale(t: OpInputs) -> Outputs:
    add = _xformers("scaled_index_add")
    return (add(t.x.clone(), t.rows.index, t.out, t.layer_scale, t.rows.scale),)


def _torch_scatter_norm(t: OpInputs) -> Outputs:
    y = torch.index_add(t.x, 0, t.rows.index, t.out.to(t.x.dtype), alpha=t.rows.scale)
    kept = y.index_select(0, t.next_rows.index)
    return y, F.layer_norm(kept, t.width, t.weight, t.bias)


def _fused_scatter_norm(t: OpInputs) -> Outputs:
    y = sdkernels.scatter_add_rows(t.x, t.out, t.rows)
    return y, sdkernels.compact_layer_norm(y, t.next_rows, t.width, t.weight, t.bias)


def _flash_attn_scatter_norm(t: OpInputs) -> Outputs:
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


OPS: dict[str, Op] = {
    "compact": Op(
        providers={
            "fused": lambda t: (sdkernels.compact_rows(t.x, t.rows),),
            "torch": lambda t: (t.x.index_select(0, t.rows.index),),
            "xformers": _xformers_compact,
        },
        inputs=("x",),
        traffic={"fwd": (0, 2, 0), "bwd": (1, 1, 0)},
        outputs=("kept",),
    ),
    "compact_layer_norm": Op(
        providers={
            "fused": lambda t: (
                sdkernels.compact_layer_norm(t.x, t.rows, t.width, t.weight, t.bias),
            ),
            "torch": lambda t: (
                F.layer_norm(t.x.index_select(0, t.rows.index), t.width, t.weight, t.bias),
            ),
        },
        inputs=("x", "weight", "bias"),
        traffic={"fwd": (0, 2, 0), "bwd": (1, 2, 0)},
        outputs=("kept",),
        images=False,
    ),
    "compact_rms_norm": Op(
        providers={
            "fused": lambda t: (sdkernels.compact_rms_norm(t.x, t.rows, t.width, t.weight, 1e-6),),
            "torch": lambda t: (
                F.rms_norm(t.x.index_select(0, t.rows.index), t.width, t.weight, 1e-6),
            ),
        },
        inputs=("x", "weight"),
        traffic={"fwd": (0, 2, 0), "bwd": (1, 2, 0)},
        outputs=("kept",),
        images=False,
    ),
    # The gradient of x is the incoming gradient itself, so the backward moves only the kept rows.
    "scatter_add": Op(
        providers={
            "fused": lambda t: (sdkernels.scatter_add_rows(t.x, t.out, t.rows),),
            "torch": lambda t: (
                torch.index_add(t.x, 0, t.rows.index, t.out.to(t.x.dtype), alpha=t.rows.scale),
            ),
            "xformers": _xformers_scatter_add,
        },
        inputs=("x", "out"),
        traffic={"fwd": (2, 0, 1), "bwd": (0, 1, 1)},
        outputs=("batch",),
    ),
    "scatter_add_layer_scale": Op(
        providers={
            "fused": lambda t: (sdkernels.scatter_add_rows(t.x, t.out, t.rows, t.layer_scale),),
            "torch": lambda t: (
                torch.index_add(
                    t.x, 0, t.rows.index, (t.out * t.layer_scale).to(t.x.dtype), alpha=t.rows.scale
                ),
            ),
            "xformers": _xformers_scatter_add_layer_scale,
        },
        inputs=("x", "out", "layer_scale"),
        traffic={"fwd": (2, 0, 1), "bwd": (0, 1, 2)},
        outputs=("batch",),
    ),
    # The bits that are kept for the backward, hundredths of a row, are left out of the traffic.
    "scatter_add_relu": Op(
        providers={
            "fused": lambda t: (sdkernels.scatter_add_rows(t.x, t.out, t.rows, activation="relu"),),
            "torch": lambda t: (
                torch.index_add(
                    t.x, 0, t.rows.index, t.out.to(t.x.dtype), alpha=t.rows.scale
                ).relu_(),
            ),
        },
        inputs=("x", "out"),
        traffic={"fwd": (2, 0, 1), "bwd": (2, 0, 1)},
        outputs=("batch",),
        tokens=False,
    ),
    # All that stochastic depth puts around a branch, with nothing in between; its backward adds the
    # stream's gradient in the same pass.
    "residual_layer_norm": Op(
        providers={
            "fused": lambda t: (
                sdkernels.fused_stochastic_depth(
                    t.x, _identity, 0.5, norm=t.norm, layer_scale=t.layer_scale, rows=t.rows
                ),
            ),
            "torch": lambda t: (
                reference.index_add(
                    t.x, _identity, norm=t.norm, layer_scale=t.layer_scale, rows=t.rows
                ),
            ),
        },
        inputs=("x", "weight", "bias", "layer_scale"),
        traffic={"fwd": (2, 3, 0), "bwd": (2, 5, 0)},
        outputs=("batch",),
        images=False,
    ),
    # From one branch's output to the next one's input.
    "scatter_add_then_norm": Op(
        providers={
            "fused": _fused_scatter_norm,
            "torch": _torch_scatter_norm,
            "flash_attn": _flash_attn_scatter_norm,
        },
        inputs=("x", "out", "weight", "bias"),
        traffic={"fwd": (2, 2, 1), "bwd": (2, 3, 1)},
        outputs=("batch", "kept"),
        images=False,
    ),
}


@dataclass(frozen=True)
class OpCase:
    """One op, one direction, one dtype; beside it the plain copy (``clone``) of the same tensor.

    Inputs go round in as many copies as do not fit the last cache. A backward pass is reached
    through the autograd engine, whose call costs as much as moving a megabyte or two. ``empty``
    times that call alone (the backward of a view); bandwidths are taken net of it.

    Args:
        rows: the model whose rows these are.
        shape: [B, N, D] or, channels last, [B, C, H, W].
    """

    op: str
    direction: str  # "fwd" or "bwd"
    dtype: str  # "mixed": the stream in fp32, the branch's output in bf16
    rows: str = "ViT-S"
    shape: tuple[int, ...] = (64, 197, 384)
    k: int = 32

    kind: ClassVar[str] = "op"
    baseline: ClassVar[str] = "torch"
    floor: ClassVar[str | None] = "copy"

    @property
    def name(self) -> str:
        shape = "x".join(str(n) for n in self.shape)
        return f"op-{self.op}-{self.direction}-{self.dtype}-{shape}-k{self.k}"

    @property
    def channels_last(self) -> bool:
        return len(self.shape) == 4

    def providers(self, device: torch.device) -> dict[str, str | None]:
        """Every provider, with the reason why it cannot run here; None where it can."""
        reasons: dict[str, str | None] = {}
        for name in OPS[self.op].providers:
            reasons[name] = (
                why_missing(name, device) if name in ("xformers", "flash_attn") else None
            )
        if reasons.get("xformers", "") is None and self.channels_last:
            reasons["xformers"] = "takes rows of two dimensions only"
        if self.dtype == "mixed":
            for name in ("xformers", "flash_attn"):
                if name in reasons:
                    reasons[name] = "takes one dtype"
        return reasons | {"copy": None} | ({"empty": None} if self.direction == "bwd" else {})

    def _functions(self, device: torch.device) -> dict[str, Callable[[OpInputs], Outputs]]:
        reasons = self.providers(device)
        return {n: f for n, f in OPS[self.op].providers.items() if reasons[n] is None}

    def describe(self) -> dict[str, Any]:
        """What the report has to know about the case, ready for JSON."""
        stream, branch = self._dtypes()
        elements = math.prod(self.shape[1:])
        of_batch, of_kept, of_out = OPS[self.op].traffic[self.direction]
        return asdict(self) | {
            "channels_last": self.channels_last,
            "traffic_bytes": elements
            * (
                (of_batch * self.shape[0] + of_kept * self.k) * stream.itemsize
                + of_out * self.k * branch.itemsize
            ),
            "copy_bytes": 2 * self.shape[0] * elements * stream.itemsize,
        }

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the stream and of the branch's output."""
        if self.dtype == "mixed":
            return torch.float32, torch.bfloat16
        return DTYPES[self.dtype], DTYPES[self.dtype]

    def _inputs(
        self, device: torch.device, dtype: torch.dtype | None = None
    ) -> tuple[OpInputs, Outputs]:
        """Inputs, and a gradient for every output.

        In another ``dtype`` than the case's own they are the same numbers.
        """
        generator = seeded()
        stream, branch = self._dtypes()

        def randn(own: torch.dtype, *size: int) -> Tensor:
            values = torch.randn(size, generator=generator).to(own).to(device, dtype or own)
            is_image = self.channels_last and len(size) == 4
            return values.to(memory_format=torch.channels_last) if is_image else values

        batch, *row = self.shape
        width = row[0] if self.channels_last else row[-1]
        norm = nn.LayerNorm(width, device=device, dtype=dtype or stream)
        with torch.no_grad():
            norm.weight.copy_(randn(stream, width))
            norm.bias.copy_(randn(stream, width))
        scale_shape = (width, 1, 1) if self.channels_last else (width,)
        inputs = OpInputs(
            x=randn(stream, *self.shape).requires_grad_(),
            out=randn(branch, self.k, *row).requires_grad_(),
            norm=norm,
            layer_scale=randn(stream, *scale_shape).requires_grad_(),
            rows=kept_rows(batch, self.k / batch, device, seed=1),
            next_rows=kept_rows(batch, self.k / batch, device, seed=2),
        )
        grads = tuple(
            randn(stream, self.k if of == "kept" else batch, *row) for of in OPS[self.op].outputs
        )
        return inputs, grads

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider, on shared inputs that go round past the last cache."""
        first = self._inputs(device)
        held = [first[0].x, first[0].out, *first[1]]
        copies = copies_past_the_cache(sum(t.numel() * t.element_size() for t in held), device)
        sets = [first]
        for _ in range(copies - 1):
            sets.append((first[0].copy(), tuple(grad.clone() for grad in first[1])))
        wanted = OPS[self.op].inputs

        def forward(function: Callable[[OpInputs], Outputs]) -> Workload:
            turn = itertools.cycle(inputs for inputs, _ in sets)
            return Workload(lambda: function(next(turn)))

        def backward(function: Callable[[OpInputs], Outputs]) -> Workload:
            ready = [
                (function(inputs), [getattr(inputs, name) for name in wanted], grads)
                for inputs, grads in sets
            ]
            turn = itertools.cycle(ready)
            return Workload(lambda: torch.autograd.grad(*next(turn), retain_graph=True))

        build = forward if self.direction == "fwd" else backward
        loads = {name: build(function) for name, function in self._functions(device).items()}
        to_copy = itertools.cycle(inputs.x for inputs, _ in sets)
        loads["copy"] = Workload(lambda: next(to_copy).clone())
        if self.direction == "bwd":
            inputs, (grad, *_) = first
            source = inputs.out if grad.shape == inputs.out.shape else inputs.x
            view, grad = source.view_as(source), grad.to(source.dtype)
            loads["empty"] = Workload(
                lambda: torch.autograd.grad(view, source, grad, retain_graph=True)
            )
        return loads

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against the PyTorch equivalent in float64.

        PyTorch's own bfloat16 is no reference: on CPU, its LayerNorm sums the gradients of weight
        and bias in bfloat16 and misses them by a tenth. It is timed as it is.
        """
        op = OPS[self.op]

        def evaluate(
            function: Callable[[OpInputs], Outputs], dtype: torch.dtype | None = None
        ) -> dict[str, Tensor]:
            inputs, grads = self._inputs(device, dtype)
            outputs = function(inputs)
            wanted = [getattr(inputs, name) for name in op.inputs]
            got = torch.autograd.grad(outputs, wanted, grads)
            values = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
            return values | {f"gradient of {n}": g for n, g in zip(op.inputs, got, strict=True)}

        exact = evaluate(op.providers["torch"], torch.float64)
        for provider, function in self._functions(device).items():
            if provider == "torch":
                continue
            got = evaluate(function)
            expected = {name: tensor.to(got[name].dtype) for name, tensor in exact.items()}
            arithmetic = torch.bfloat16 if self.dtype == "mixed" else None
            yield Comparison(provider, got, expected, arithmetic)
