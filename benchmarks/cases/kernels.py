"""One op of the dispatcher against the PyTorch calls that it replaces, without autograd.

`OpCase` times what a user calls. Here the kernels stand alone, forward and backward alike, in the
dtypes, shapes and numbers of threads in which they must not be slower than PyTorch's own.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.rows import RowCase
from benchmarks.measure.workload import Comparison, Workload, copies_past_the_cache, kept_rows

aten, own = torch.ops.aten, torch.ops.sdkernels
EPS, SCALE = 1e-5, 2.0
Outputs = tuple[Tensor, ...]
# Below it a tensor is still in the cache when the next op of a model comes to it.
ELEMENTS_IN_CACHE = 2**17


@dataclass(frozen=True)
class Tensors:
    """What the ops take. The branch's tensors are of another dtype than the stream's if "mixed"."""

    x: Tensor  # [B, ...]: the stream, and the gradient of one
    out: Tensor  # [k, ...]: a branch's output, and the gradient of its input
    kept: Tensor  # [k, ...]: rows of the stream
    weight: Tensor  # [D]
    bias: Tensor  # [D]
    layer_scale: Tensor  # [D], or [C, 1, 1] for images
    index: Tensor  # [k]
    slot: Tensor  # [B]

    @property
    def width(self) -> list[int]:
        return [self.x.shape[-1]]

    def copy(self) -> Tensors:
        """The same numbers in memory of its own."""
        return Tensors(*(getattr(self, each.name).clone() for each in fields(self)))

    @property
    def row_dims(self) -> list[int]:
        """The dimensions that the gradient of layer_scale sums over."""
        return [0, 2, 3] if self.layer_scale.dim() == 3 else list(range(self.x.dim() - 1))


Call = Callable[[], Outputs]


@dataclass(frozen=True)
class Kernel:
    """One op beside PyTorch's own calls.

    Args:
        op, torch: get tensors, do once what is not timed, and return what is.
        traffic: rows of the batch, kept rows of the stream's dtype and of the branch's that have
            to be read and written.
        norm: whether it normalizes over the last dimension.
        copies: whether it does nothing but move rows and add them, so that memory bounds it.
    """

    op: Callable[[Tensors], Call]
    torch: Callable[[Tensors], Call]
    traffic: tuple[int, int, int]
    norm: bool = False
    copies: bool = False


def _scatter_add(layer_scale: bool) -> tuple[Callable[[Tensors], Call], Callable[[Tensors], Call]]:
    def op(t: Tensors) -> Call:
        gamma = t.layer_scale if layer_scale else None
        add = own.scatter_add_rows.default
        return lambda: (add(t.x, t.out, t.index, t.slot, gamma, None, SCALE),)

    def calls(t: Tensors) -> Call:
        def run() -> Outputs:
            out = t.out * t.layer_scale if layer_scale else t.out
            return (aten.index_add(t.x, 0, t.index, out.to(t.x.dtype), alpha=SCALE),)

        return run

    return op, calls


def _scatter_add_inplace() -> tuple[Callable[[Tensors], Call], Callable[[Tensors], Call]]:
    """On a stream of its own, that grows from call to call."""

    def op(t: Tensors) -> Call:
        y, add = t.x.clone(), own.scatter_add_rows_.default

        def run() -> Outputs:
            add(y, t.out, t.index, t.slot, None, None, SCALE)
            return (y,)

        return run

    def calls(t: Tensors) -> Call:
        y = t.x.clone()
        return lambda: (aten.index_add_(y, 0, t.index, t.out.to(y.dtype), alpha=SCALE),)

    return op, calls


def _scatter_add_backward(
    layer_scale: bool,
) -> tuple[Callable[[Tensors], Call], Callable[[Tensors], Call]]:
    def op(t: Tensors) -> Call:
        gamma, out = (t.layer_scale, t.out) if layer_scale else (None, None)
        backward, wanted = own.scatter_add_rows_backward.default, [layer_scale, False]

        def run() -> Outputs:
            d_out, d_gamma, _ = backward(t.x, out, t.index, gamma, None, SCALE, t.out.dtype, wanted)
            return (d_out, d_gamma) if layer_scale else (d_out,)

        return run

    def calls(t: Tensors) -> Call:
        def run() -> Outputs:
            grad = aten.index_select(t.x, 0, t.index).mul_(SCALE)
            if not layer_scale:
                return (grad.to(t.out.dtype),)
            d_gamma = (grad * t.out).sum(t.row_dims).view_as(t.layer_scale)
            return (grad * t.layer_scale).to(t.out.dtype), d_gamma

        return run

    return op, calls


def _scatter(inplace: bool) -> tuple[Callable[[Tensors], Call], Callable[[Tensors], Call]]:
    """Rows that replace those of the stream: also the backward of opening a layer's rows."""

    def op(t: Tensors) -> Call:
        y, rows = t.x.clone(), t.kept.neg()
        if not inplace:
            return lambda: (own.scatter_rows.default(t.x, rows, t.index, t.slot),)

        def run() -> Outputs:
            own.scatter_rows_.default(y, rows, t.index, t.slot)
            return (y,)

        return run

    def calls(t: Tensors) -> Call:
        y, rows = t.x.clone(), t.kept.neg()
        if inplace:
            return lambda: (aten.index_copy_(y, 0, t.index, rows),)
        return lambda: (aten.index_copy(t.x, 0, t.index, rows),)

    return op, calls


def _into(
    written: Callable[[Tensors], Tensor],
    op: Callable[[Tensors, Tensor], Outputs],
    calls: Callable[[Tensors], Call],
) -> tuple[Callable[[Tensors], Call], Callable[[Tensors], Call]]:
    """What is written into a crop's part of the packed tensor.

    By the op at once; PyTorch's calls make a tensor, which is then copied there as `cat` does.
    """

    def ours(t: Tensors) -> Call:
        part = torch.empty_like(written(t))
        return lambda: (part, *op(t, part))

    def theirs(t: Tensors) -> Call:
        part = torch.empty_like(written(t))
        run = calls(t)

        def copied() -> Outputs:
            first, *others = run()
            return (part.copy_(first), *others)

        return copied

    return ours, theirs


def _compact_into(t: Tensors, part: Tensor) -> Outputs:
    own.compact_rows_into.default(part, t.x, t.index)
    return ()


def _norm_into(t: Tensors, part: Tensor) -> Outputs:
    into = own.compact_norm_into.default
    return into(part, t.x, t.index, t.width, t.weight, t.bias, EPS, False, True)[:1]  # type: ignore[no-any-return]


def _scatter_add_backward_into(t: Tensors, part: Tensor) -> Outputs:
    into, wanted = own.scatter_add_rows_backward_into.default, [True, False]
    return into(part, t.x, t.out, t.index, t.layer_scale, None, SCALE, wanted)[:1]  # type: ignore[no-any-return]


def _relu_op(t: Tensors) -> Call:
    add = own.scatter_add_relu_rows.default
    return lambda: add(t.x, t.out, t.index, t.slot, None, None, SCALE)[:1]


def _relu_calls(t: Tensors) -> Call:
    add = aten.index_add
    return lambda: (add(t.x, 0, t.index, t.out.to(t.x.dtype), alpha=SCALE).relu_(),)


def _format(x: Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _relu_backward_op(t: Tensors) -> Call:
    add, backward = own.scatter_add_relu_rows.default, own.scatter_add_relu_rows_backward.default
    positive = add(t.x, t.out, t.index, t.slot, None, None, SCALE)[1]
    dtype, form = t.out.dtype, _format(t.x)
    return lambda: backward(t.x, positive, t.index, t.slot, None, None, SCALE, dtype, form, True)


def _relu_backward_calls(t: Tensors) -> Call:
    (y,) = _relu_calls(t)()

    def run() -> Outputs:
        grad = aten.threshold_backward(t.x, y, 0)
        return grad, aten.index_select(grad, 0, t.index).mul_(SCALE).to(t.out.dtype)

    return run


def _norm(rms: bool) -> tuple[Callable[[Tensors], Call], Callable[[Tensors], Call]]:
    def op(t: Tensors) -> Call:
        norm, bias = own.compact_norm.default, None if rms else t.bias
        return lambda: norm(t.x, t.index, t.width, t.weight, bias, EPS, rms, t.out.dtype, True)[:2]

    def calls(t: Tensors) -> Call:
        def run() -> Outputs:
            kept = aten.index_select(t.x, 0, t.index)
            if rms:
                return F.rms_norm(kept, t.width, t.weight, EPS).to(t.out.dtype), kept
            normed, _, _ = aten.native_layer_norm(kept, t.width, t.weight, t.bias, EPS)
            return normed.to(t.out.dtype), kept

        return run

    return op, calls


def _norm_backward(
    rms: bool, stream: bool
) -> tuple[Callable[[Tensors], Call], Callable[[Tensors], Call]]:
    """With the stream's gradient, or where nothing but the branch used x."""

    def op(t: Tensors) -> Call:
        bias = None if rms else t.bias
        _, kept, mean, rstd = own.compact_norm.default(
            t.x, t.index, t.width, t.weight, bias, EPS, rms, t.out.dtype, True
        )
        backward, d_stream = own.compact_norm_backward.default, t.x if stream else None
        wanted, some = [True, True, not rms], 2 if rms else 3
        return lambda: backward(
            d_stream, t.out, kept, mean, rstd, t.index, t.slot, t.width, t.weight, rms, wanted
        )[:some]

    def expanded(t: Tensors, d_kept: Tensor) -> Tensor:
        base = t.x if stream else torch.zeros_like(t.x)
        add = aten.index_add if stream else aten.index_add_
        return add(base, 0, t.index, d_kept)  # type: ignore[no-any-return]

    def calls(t: Tensors) -> Call:
        kept = aten.index_select(t.x, 0, t.index)
        if rms:  # its backward has no name of its own on a CPU
            with torch.enable_grad():
                inputs = (kept.requires_grad_(), t.weight.detach().requires_grad_())
                normed = F.rms_norm(*inputs[:1], t.width, inputs[1], EPS)

            def run_rms() -> Outputs:
                d_kept, d_weight = torch.autograd.grad(
                    normed, inputs, t.out.to(normed.dtype), retain_graph=True
                )
                return expanded(t, d_kept), d_weight

            return run_rms
        _, mean, rstd = aten.native_layer_norm(kept, t.width, t.weight, t.bias, EPS)
        backward = aten.native_layer_norm_backward

        def run() -> Outputs:
            d_kept, d_weight, d_bias = backward(
                t.out.to(kept.dtype),
                *(kept, t.width, mean, rstd, t.weight, t.bias, [True, True, True]),
            )
            return expanded(t, d_kept), d_weight, d_bias

        return run

    return op, calls


KERNELS: dict[str, Kernel] = {
    "compact": Kernel(
        lambda t: lambda: (own.compact_rows.default(t.x, t.index),),
        lambda t: lambda: (aten.index_select(t.x, 0, t.index),),
        traffic=(0, 2, 0),
        copies=True,
    ),
    # The backward of compact: rows between zeros.
    "expand": Kernel(
        lambda t: lambda: (own.expand_rows.default(t.kept, t.index, t.slot),),
        lambda t: lambda: (torch.zeros_like(t.x).index_add_(0, t.index, t.kept),),
        traffic=(1, 1, 0),
        copies=True,
    ),
    # Also the backward of compact, where the stream has a gradient.
    "scatter_add": Kernel(*_scatter_add(False), traffic=(2, 0, 1), copies=True),
    "scatter_add_layer_scale": Kernel(*_scatter_add(True), traffic=(2, 0, 1), copies=True),
    "scatter_add_inplace": Kernel(*_scatter_add_inplace(), traffic=(0, 2, 1), copies=True),
    "scatter_add_backward": Kernel(*_scatter_add_backward(False), traffic=(0, 1, 1), copies=True),
    "scatter_add_layer_scale_backward": Kernel(
        *_scatter_add_backward(True), traffic=(0, 1, 2), copies=True
    ),
    "scatter": Kernel(*_scatter(False), traffic=(2, 0, 0), copies=True),
    "scatter_inplace": Kernel(*_scatter(True), traffic=(0, 2, 0), copies=True),
    # Of packed crops, each a part of one tensor.
    "compact_into": Kernel(
        *_into(
            lambda t: t.kept, _compact_into, lambda t: lambda: (aten.index_select(t.x, 0, t.index),)
        ),
        traffic=(0, 2, 0),
        copies=True,
    ),
    "compact_layer_norm_into": Kernel(
        *_into(lambda t: t.out, _norm_into, _norm(False)[1]), traffic=(0, 2, 1), norm=True
    ),
    "scatter_add_layer_scale_backward_into": Kernel(
        *_into(lambda t: t.out, _scatter_add_backward_into, _scatter_add_backward(True)[1]),
        traffic=(0, 1, 2),
        copies=True,
    ),
    "scatter_add_relu": Kernel(_relu_op, _relu_calls, traffic=(2, 0, 1), copies=True),
    "scatter_add_relu_backward": Kernel(
        _relu_backward_op, _relu_backward_calls, traffic=(2, 0, 1), copies=True
    ),
    "compact_layer_norm": Kernel(*_norm(False), traffic=(0, 2, 1), norm=True),
    "compact_rms_norm": Kernel(*_norm(True), traffic=(0, 2, 1), norm=True),
    "compact_layer_norm_backward": Kernel(
        *_norm_backward(False, False), traffic=(1, 1, 1), norm=True
    ),
    "compact_rms_norm_backward": Kernel(*_norm_backward(True, False), traffic=(1, 1, 1), norm=True),
    "compact_layer_norm_backward_stream": Kernel(
        *_norm_backward(False, True), traffic=(2, 1, 1), norm=True
    ),
}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def takes_tokens(op: str) -> bool:
    """Whether channels are the last dimension; images are [B, H, W, C] then."""
    return KERNELS[op].norm or op.endswith("_into")


@dataclass(frozen=True)
class KernelCase(RowCase):
    """One op, dtype, shape and number of threads; beside it a clone of the stream.

    Inputs go round in as many copies as do not fit the last cache, and so does what is written: an
    output lives until its input's turn comes again. A tensor so small that a model would find it in
    the cache is found there.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    threads: int = 1

    kind: ClassVar[str] = "kernel"
    baseline: ClassVar[str] = "torch"
    floor: ClassVar[str | None] = "copy"

    @property
    def name(self) -> str:
        return f"kernel-{self.op}-{self.dtype}-{self.shape_name}-t{self.threads}"

    @property
    def k(self) -> int:  # type: ignore[override]
        return self.shape[0] // 2

    @property
    def in_cache(self) -> bool:
        return math.prod(self.shape) < ELEMENTS_IN_CACHE

    def describe(self) -> dict[str, Any]:
        kernel = KERNELS[self.op]
        flags = {"norm": kernel.norm, "copies": kernel.copies, "in_cache": self.in_cache}
        return asdict(self) | {"k": self.k, **flags} | self.bytes_of(kernel.traffic)

    def providers(self, device: torch.device) -> dict[str, str | None]:
        several = device.type == "cuda" and self.threads > 1
        reason = "threads are the CPU's" if several else None
        return dict.fromkeys(("fused", "torch", "copy"), reason)

    def tensors(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensors:
        """See ``RowCase.random``."""
        made = self.random(device, dtype)
        if self.is_image and takes_tokens(self.op):
            made["layer_scale"] = made["layer_scale"].flatten()
            for name in ("x", "out"):
                made[name] = made[name].permute(0, 2, 3, 1)
        rows = kept_rows(self.shape[0], self.k / self.shape[0], device, seed=1)
        kept = torch.empty_like(made["x"][: self.k])  # in x's order, which index_select may leave
        kept.copy_(made["x"].index_select(0, rows.index))
        return Tensors(**made, kept=kept, index=rows.index, slot=rows.slot)

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        first = self.tensors(device)
        held = sum(tensor.nbytes for tensor in (first.x, first.out, first.kept))
        copies = 1 if self.in_cache else copies_past_the_cache(held, device)
        sets = [first, *(first.copy() for _ in range(copies - 1))]

        def workload(calls: list[Callable[[], object]]) -> Workload:
            turn = itertools.cycle(calls)
            # Without it an allocator gives out what was freed last, which a cache still holds: a
            # clone, which writes most, would be flattered most.
            outputs: deque[object] = deque(maxlen=copies - 1)

            def run() -> None:
                with torch.no_grad():
                    outputs.append(next(turn)())

            with threads(self.threads):
                for _ in range(copies):  # no page is new when the clock runs
                    run()
            return Workload(run, context=lambda: threads(self.threads))

        kernel = KERNELS[self.op]
        return {
            "fused": workload([kernel.op(t) for t in sets]),
            "torch": workload([kernel.torch(t) for t in sets]),
            "copy": workload([t.x.clone for t in sets]),
        }

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """The op against PyTorch's calls in float64."""
        kernel = KERNELS[self.op]
        with torch.no_grad(), threads(self.threads):
            got = kernel.op(self.tensors(device))()
            exact = kernel.torch(self.tensors(device, torch.float64))()
        of_op = {f"output {i}": tensor for i, tensor in enumerate(got)}
        pairs = zip(of_op.items(), exact, strict=True)
        expected = {name: tensor.to(found.dtype) for (name, found), tensor in pairs}
        yield Comparison("fused", of_op, expected, self.arithmetic)
