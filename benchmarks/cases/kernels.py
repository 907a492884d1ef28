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
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.rows import RowCase
from benchmarks.cases.rows import Tensors as RowTensors
from benchmarks.measure.workload import Comparison, Workload, copies_past_the_cache

aten, own = torch.ops.aten, torch.ops.sdkernels
EPS, SCALE = 1e-5, 2.0
Outputs = Any  # a tensor or several
Function = Callable[["Tensors"], Outputs]
# Below it a tensor is still in the cache when the next op of a model comes to it.
ELEMENTS_IN_CACHE = 2**17


class Tensors(RowTensors):
    """Also what ops need besides, made in their first call, which is not timed."""

    # Rows of the stream, in its order of elements, which index_select may leave.
    kept = cached_property(lambda t: torch.empty_like(t.x[: len(t.out)]).copy_(_select(t)))
    others = cached_property(lambda t: t.kept.neg())  # rows that replace those of the stream
    stream = cached_property(lambda t: t.x.clone())  # to be written into
    # A crop's part of a packed tensor: of the stream's dtype, and of the branch's.
    kept_part = cached_property(lambda t: torch.empty_like(t.kept))
    out_part = cached_property(lambda t: torch.empty_like(t.out))
    # What the ReLU's backward needs, and PyTorch's.
    positive = cached_property(lambda t: _scatter_add_relu(t)[1])
    activated = cached_property(lambda t: _index_add(t, t.out).relu_())
    # Kept rows, mean and rstd for the backward of LayerNorm and (True) of RMSNorm.
    normed = cached_property(lambda t: {rms: _compact_norm(t, rms)[1:] for rms in (False, True)})

    @cached_property
    def normed_by_torch(self) -> list[Tensor]:
        """Mean and rstd of PyTorch's LayerNorm."""
        _, *saved = aten.native_layer_norm(self.kept, self.width, self.weight, self.bias, EPS)
        return saved

    @cached_property
    def rms_graph(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """An RMSNorm and its inputs: its backward has no name of its own on a CPU."""
        with torch.enable_grad():
            inputs = (self.kept.detach().requires_grad_(), self.weight.detach().requires_grad_())
            return F.rms_norm(inputs[0], self.width, inputs[1], EPS), inputs


# What both sides of the table below are made of


def _scatter_add_relu(t: Tensors) -> Outputs:
    add = own.scatter_add_relu_rows.default
    return add(t.x, t.out, t.index, t.slot, None, None, SCALE)


def _scatter_add_inplace(t: Tensors) -> Tensor:
    own.scatter_add_rows_.default(t.stream, t.out, t.index, t.slot, None, None, SCALE)
    return t.stream


def _scatter_inplace(t: Tensors) -> Tensor:
    own.scatter_rows_.default(t.stream, t.others, t.index, t.slot)
    return t.stream


def _scatter_add_relu_backward(t: Tensors) -> Outputs:
    backward, out = own.scatter_add_relu_rows_backward.default, t.out
    channels_last = t.x.dim() == 4 and t.x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if channels_last else torch.contiguous_format
    return backward(t.x, t.positive, t.index, t.slot, None, None, SCALE, out.dtype, form, True)


def _compact_norm(t: Tensors, rms: bool) -> Outputs:
    norm, bias = own.compact_norm.default, None if rms else t.bias
    return norm(t.x, t.index, t.width, t.weight, bias, EPS, rms, t.out.dtype, True)


def _compact_norm_backward(t: Tensors, rms: bool, stream: Tensor | None) -> Outputs:
    backward, (kept, mean, rstd) = own.compact_norm_backward.default, t.normed[rms]
    rows, wanted = (t.index, t.slot, t.width, t.weight, rms), [True, True, not rms]
    return backward(stream, t.out, kept, mean, rstd, *rows, wanted)[: 2 if rms else 3]


def _compact_into(t: Tensors) -> Tensor:
    own.compact_rows_into.default(t.kept_part, t.x, t.index)
    return t.kept_part


def _compact_norm_into(t: Tensors) -> Outputs:
    into, given = own.compact_norm_into.default, (t.width, t.weight, t.bias)
    return t.out_part, into(t.out_part, t.x, t.index, *given, EPS, False, True)[0]


def _scatter_add_backward_into(t: Tensors) -> Outputs:
    into, given = own.scatter_add_rows_backward_into.default, (t.x, t.out, t.index)
    wanted = [True, False]
    return t.out_part, into(t.out_part, *given, t.layer_scale, None, SCALE, wanted)[0]


def _index_add(t: Tensors, out: Tensor) -> Any:
    return aten.index_add(t.x, 0, t.index, out.to(t.x.dtype), alpha=SCALE)


def _select(t: Tensors) -> Any:
    return aten.index_select(t.x, 0, t.index)


def _layer_scale_backward(t: Tensors) -> Outputs:
    grad = _select(t).mul_(SCALE)
    summed = [0, 2, 3] if t.layer_scale.dim() == 3 else list(range(t.x.dim() - 1))
    d_layer_scale = (grad * t.out).sum(summed).view_as(t.layer_scale)
    return (grad * t.layer_scale).to(t.out.dtype), d_layer_scale


def _relu_backward(t: Tensors) -> Outputs:
    grad = aten.threshold_backward(t.x, t.activated, 0)
    return grad, aten.index_select(grad, 0, t.index).mul_(SCALE).to(t.out.dtype)


def _layer_norm(t: Tensors) -> Outputs:
    kept = _select(t)
    normed, _, _ = aten.native_layer_norm(kept, t.width, t.weight, t.bias, EPS)
    return normed.to(t.out.dtype), kept


def _rms_norm(t: Tensors) -> Outputs:
    kept = _select(t)
    return F.rms_norm(kept, t.width, t.weight, EPS).to(t.out.dtype), kept


def _expanded(t: Tensors, rows: Tensor, stream: Tensor | None = None) -> Any:
    if stream is not None:
        return aten.index_add(stream, 0, t.index, rows)
    return torch.zeros_like(t.x).index_add_(0, t.index, rows)


def _layer_norm_backward(t: Tensors, stream: Tensor | None = None) -> Outputs:
    given = (t.kept, t.width, *t.normed_by_torch, t.weight, t.bias, [True, True, True])
    d_kept, *of_parameters = aten.native_layer_norm_backward(t.out.to(t.kept.dtype), *given)
    return _expanded(t, d_kept, stream), *of_parameters


def _rms_norm_backward(t: Tensors) -> Outputs:
    normed, inputs = t.rms_graph
    grad = t.out.to(normed.dtype)
    d_kept, d_weight = torch.autograd.grad(normed, inputs, grad, retain_graph=True)
    return _expanded(t, d_kept), d_weight


def _copied(part: Tensor, output: Tensor, *others: Tensor) -> Outputs:
    """What PyTorch's calls made, copied into a crop's part of a packed tensor as `cat` does."""
    part.copy_(output)
    return (part, *others) if others else part


@dataclass(frozen=True)
class Kernel:
    """One op beside PyTorch's own calls.

    Args:
        fused, torch: what is timed; both give the same outputs.
        traffic: rows of the batch, kept rows of the stream's dtype and of the branch's that have
            to be read and written.
    """

    fused: Function
    torch: Function
    traffic: tuple[int, int, int]

    def op(self, t: Tensors) -> Callable[[], Outputs]:
        """The op on these tensors, ready to be timed."""
        return prepared(self.fused, t)


def prepared(function: Function, t: Tensors) -> Callable[[], Outputs]:
    """Called once, so that what it needs is there."""
    function(t)
    return partial(function, t)


KERNELS: dict[str, Kernel] = {
    "compact": Kernel(lambda t: own.compact_rows.default(t.x, t.index), _select, (0, 2, 0)),
    # The backward of compact: rows between zeros.
    "expand": Kernel(
        lambda t: own.expand_rows.default(t.kept, t.index, t.slot),
        lambda t: _expanded(t, t.kept),
        (1, 1, 0),
    ),
    # Also the backward of compact, where the stream has a gradient.
    "scatter_add": Kernel(
        lambda t: own.scatter_add_rows.default(t.x, t.out, t.index, t.slot, None, None, SCALE),
        lambda t: _index_add(t, t.out),
        (2, 0, 1),
    ),
    "scatter_add_layer_scale": Kernel(
        lambda t: own.scatter_add_rows.default(
            t.x, t.out, t.index, t.slot, t.layer_scale, None, SCALE
        ),
        lambda t: _index_add(t, t.out * t.layer_scale),
        (2, 0, 1),
    ),
    # On a stream of its own, that grows from call to call.
    "scatter_add_inplace": Kernel(
        _scatter_add_inplace,
        lambda t: aten.index_add_(t.stream, 0, t.index, t.out.to(t.x.dtype), alpha=SCALE),
        (0, 2, 1),
    ),
    "scatter_add_backward": Kernel(
        lambda t: own.scatter_add_rows_backward.default(
            t.x, None, t.index, None, None, SCALE, t.out.dtype, [False, False]
        )[0],
        lambda t: _select(t).mul_(SCALE).to(t.out.dtype),
        (0, 1, 1),
    ),
    "scatter_add_layer_scale_backward": Kernel(
        lambda t: own.scatter_add_rows_backward.default(
            t.x, t.out, t.index, t.layer_scale, None, SCALE, t.out.dtype, [True, False]
        )[:2],
        _layer_scale_backward,
        (0, 1, 2),
    ),
    # Rows that replace those of the stream: also the backward of opening a layer's rows.
    "scatter": Kernel(
        lambda t: own.scatter_rows.default(t.x, t.others, t.index, t.slot),
        lambda t: aten.index_copy(t.x, 0, t.index, t.others),
        (2, 0, 0),
    ),
    "scatter_inplace": Kernel(
        _scatter_inplace, lambda t: aten.index_copy_(t.stream, 0, t.index, t.others), (0, 2, 0)
    ),
    # Of packed crops, each a part of one tensor.
    "compact_into": Kernel(_compact_into, lambda t: _copied(t.kept_part, _select(t)), (0, 2, 0)),
    "compact_layer_norm_into": Kernel(
        _compact_norm_into, lambda t: _copied(t.out_part, *_layer_norm(t)), (0, 2, 1)
    ),
    "scatter_add_layer_scale_backward_into": Kernel(
        _scatter_add_backward_into,
        lambda t: _copied(t.out_part, *_layer_scale_backward(t)),
        (0, 1, 2),
    ),
    "scatter_add_relu": Kernel(
        lambda t: _scatter_add_relu(t)[0], lambda t: _index_add(t, t.out).relu_(), (2, 0, 1)
    ),
    "scatter_add_relu_backward": Kernel(_scatter_add_relu_backward, _relu_backward, (2, 0, 1)),
    "compact_layer_norm": Kernel(lambda t: _compact_norm(t, False)[:2], _layer_norm, (0, 2, 1)),
    "compact_rms_norm": Kernel(lambda t: _compact_norm(t, True)[:2], _rms_norm, (0, 2, 1)),
    "compact_layer_norm_backward": Kernel(
        lambda t: _compact_norm_backward(t, False, None), _layer_norm_backward, (1, 1, 1)
    ),
    "compact_rms_norm_backward": Kernel(
        lambda t: _compact_norm_backward(t, True, None), _rms_norm_backward, (1, 1, 1)
    ),
    "compact_layer_norm_backward_stream": Kernel(
        lambda t: _compact_norm_backward(t, False, t.x),
        lambda t: _layer_norm_backward(t, t.x),
        (2, 1, 1),
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


def normalizes(op: str) -> bool:
    """Over the last dimension; the others do nothing but move rows and add them, so that memory
    bounds them."""
    return "_norm" in op


def takes_tokens(op: str) -> bool:
    """Whether channels are the last dimension; images are [B, H, W, C] then."""
    return normalizes(op) or op.endswith("_into")


@dataclass(frozen=True)
class KernelCase(RowCase):
    """One op, dtype, shape and number of threads; beside it a clone of the stream.

    Inputs go round in as many copies as do not fit the last cache, and so does what is written: an
    output lives until its input's turn comes again. A tensor so small that a model would find it in
    the cache is found there.

    Args:
        whole_cache: go round past the whole cache that the machine names, however large.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    threads: int = 1
    whole_cache: bool = False

    kind, baseline, floor = "kernel", "torch", "copy"

    @property
    def name(self) -> str:
        return f"kernel-{self.op}-{self.dtype}-{self.shape_name}-t{self.threads}"

    @property
    def k(self) -> int:
        return self.shape[0] // 2

    @property
    def in_cache(self) -> bool:
        return math.prod(self.shape) < ELEMENTS_IN_CACHE

    def describe(self) -> dict[str, Any]:
        norm = normalizes(self.op)
        flags = {"norm": norm, "copies": not norm, "in_cache": self.in_cache}
        return asdict(self) | {"k": self.k, **flags} | self.bytes_of(KERNELS[self.op].traffic)

    def providers(self, device: torch.device) -> dict[str, str | None]:
        several = device.type == "cuda" and self.threads > 1
        reason = "threads are the CPU's" if several else None
        return dict.fromkeys(("fused", "torch", "copy"), reason)

    @property
    def tokens_last(self) -> bool:
        return takes_tokens(self.op)

    def tensors(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensors:
        return Tensors(**vars(super().tensors(device, dtype)))

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        first = self.tensors(device)
        held = sum(tensor.nbytes for tensor in (first.x, first.out, first.out))
        copies = 1 if self.in_cache else copies_past_the_cache(held, device, self.whole_cache)
        sets = [first, *(first.copy() for _ in range(copies - 1))]
        kernel = KERNELS[self.op]

        def workload(function: Function) -> Workload:
            with torch.no_grad():
                turn = itertools.cycle([prepared(function, t) for t in sets])
            # Without it an allocator gives out what was freed last, which a cache still holds: a
            # clone, which writes most, would be flattered most.
            outputs: deque[object] = deque(maxlen=copies - 1)

            def run() -> None:
                with torch.no_grad():
                    outputs.append(next(turn)())

            with threads(self.threads):
                for _ in range(copies):  # no page is new when the clock runs
                    run()
            # Once round, so that nothing of the previous provider waits in a cache.
            return Workload(run, context=lambda: threads(self.threads), warm_up=copies)

        functions = {"fused": kernel.fused, "torch": kernel.torch, "copy": lambda t: t.x.clone()}
        return {name: workload(function) for name, function in functions.items()}

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """The op against PyTorch's calls in float64."""
        kernel, got, expected = KERNELS[self.op], {}, {}
        with torch.no_grad(), threads(self.threads):
            outputs = kernel.fused(self.tensors(device))
            exact = kernel.torch(self.tensors(device, torch.float64))
        if isinstance(outputs, Tensor):
            outputs, exact = (outputs,), (exact,)
        for i, (found, wanted) in enumerate(zip(outputs, exact, strict=True)):
            got[f"output {i}"], expected[f"output {i}"] = found, wanted.to(found.dtype)
        yield Comparison("fused", got, expected, self.arithmetic)
