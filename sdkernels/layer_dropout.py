"""fused_layer_dropout: one set of rows for a whole layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arguments import EVERYTHING, Kept, KeptAndOnes, take_args, unmarked
from .backends.ops import is_compiling, kernels
from .building_blocks import (
    STRIDED,
    check_inplace,
    check_input,
    check_local,
    check_rows,
    check_tensor,
)
from .empty import EMPTY, Empty, has_no_rows, run_on_kept, run_on_nothing, run_on_ones
from .rows import KeptRows, draw
from .sampling import Mode, Rescale, Sampler, check_choice, check_generator, check_law
from .schedules import check_probability
from .tracing import is_recorded, refuse_training

__all__ = ["fused_layer_dropout"]


def fused_layer_dropout(
    x: Tensor,
    layer: Callable[..., Tensor],
    p: float,
    mode: Mode = "row",
    training: bool = True,
    *,
    args: Sequence[Any] = (),
    rows: KeptRows | None = None,
    sampler: Sampler = "bernoulli",
    rescale: Rescale = "none",
    generator: torch.Generator | None = None,
    empty: Empty = "run",
    inplace: bool = False,
) -> Tensor:
    """A whole layer, its residual additions included, on the kept rows only.

    Equivalent PyTorch code, with `kept` a mask over the rows: ``torch.where(kept, layer(x, *args),
    x)``. All branches of the layer share one set of rows: one gather at its start and one scatter
    at its end, and everything between runs dense on k rows.

    Args:
        x: [B, ...], float16, bfloat16, float32 or float64, any strides.
        layer: maps [k, ...] to [k, ...], row by row: the whole layer, ``h + f(h)``, not ``f(h)``.
        p: drop probability.
        mode: "row" draws for every row, "batch" one decision for all rows.
        training: in evaluation the result is ``layer(x, *args)``.
        args: further inputs of the layer, as in :func:`sdkernels.fused_stochastic_depth`.
        rows: rows drawn elsewhere; then `p`, `mode`, `sampler` and `generator` are not used in
            training, and the scale is that of the rows. Rows with weights are refused.
        sampler, generator, empty: as in :func:`sdkernels.fused_stochastic_depth`.
        rescale: what the layer's branches are multiplied by, which only the layer can do. "none",
            as in LayerDrop: nothing, and `layer` is called without a scale. "train": 1 / (1 - p) in
            training, 1 in evaluation; "eval": 1 in training, 1 - p in evaluation (with
            ``sampler="fixed"`` k / B takes the place of 1 - p in training). Then `layer` is called
            with the keyword ``scale``, a float, and multiplies each of its branches by it: ``h = h
            + scale * f(h)``, ``h = h + scale * g(h)``.
        inplace: in training, write the kept rows into `x` and return it. In evaluation, and with p
            = 0, `x` is left alone.

    Returns:
        The shape and strides of `x`, the dtype that ``x + layer(x)`` would have. Dropped rows are
        those of `x` to the last bit. The gradient of `x` is written in one pass: for a dropped row
        it is the result's, for a kept one what the layer sends back.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument outside its range, or shapes, rows or devices that do not fit, such
            as a layer that returns another number of tokens than it was given.
        RuntimeError: in place where PyTorch forbids it; in training under torch.jit.trace or
            torch.fx.

    Note:
        Rows are drawn on the host, without synchronisation; the same seed gives the same rows on
        every device, and as many numbers are drawn as by one branch.

    Reference:
        Fan, Grave, Joulin: "Reducing Transformer Depth on Demand with Structured Dropout", ICLR
        2020 (LayerDrop, which drops a layer for the whole batch: ``mode="batch"``).

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> rows = KeptRows.from_index(torch.tensor([0, 2]), batch=3)
        >>> fused_layer_dropout(x, lambda kept: kept + 10, 0.5, rows=rows).flatten()
        tensor([11.,  2., 13.])
        >>> def layer(kept, scale):
        ...     kept = kept + scale * 10 * kept
        ...     return kept + scale * kept
        >>> fused_layer_dropout(x, layer, 0.5, training=False, rescale="train").flatten()
        tensor([22., 44., 66.])
    """
    if not callable(layer):
        raise TypeError(
            f"layer: expected a callable, got {type(layer).__name__} (pass the layer, not its "
            "output)"
        )
    p = check_probability(p)
    check_law(mode, sampler, rescale)
    check_choice("empty", empty, EMPTY)
    check_generator(generator)
    if not isinstance(args, (list, tuple)):
        raise TypeError(f"args: expected a list or tuple, got {type(args).__name__}")
    dense = not training or (p == 0.0 and rows is None)
    if not is_compiling() and is_recorded(x, args):
        if not dense:
            refuse_training()
        recorded: Tensor = _scaled(layer, rescale, _factor(p, rescale))(x, *map(unmarked, args))
        return recorded
    check_input(x)
    if dense:
        run = _scaled(layer, rescale, 1.0 if training else _factor(p, rescale))
        everywhere: Tensor = run(x, *take_args(args, x.shape[0], EVERYTHING))
        _check_output(everywhere, x.shape)
        return everywhere
    check_local(x=x)
    if inplace not in (True, False):
        raise TypeError(f"inplace: expected True or False, got {inplace!r}")
    if inplace:
        check_inplace(x)
    if rows is None:
        rows = draw(x.shape[0], p, mode, sampler, rescale, generator, x.device)
    else:
        check_rows(rows, x)
        if rows.weight is not None:
            raise ValueError(
                "rows: expected rows without weights, which multiply a branch's output; a layer "
                "has several branches"
            )
    if empty == "skip" and rows.k == 0:
        return x
    run = _scaled(layer, rescale, rows.scale)
    nothing = has_no_rows(rows)
    on_ones = nothing and empty == "ones"
    given = take_args(args, rows.batch, KeptAndOnes(rows) if on_ones else Kept(rows))
    ops = kernels()
    kept, stream, opened = ops.open_rows(x, rows.index, rows.slot, inplace)
    opening = stream.grad_fn if inplace and opened else None  # now: the layer may write to x
    try:
        if on_ones:
            out = run_on_ones(run, kept, given)
        elif nothing:
            out = run_on_nothing(run, kept, given)
        elif is_compiling():
            out = run(kept, *given)
        else:
            out = run_on_kept(run, kept, given, rows.batch)
        _check_output(out, kept.shape)
    except BaseException:
        if opening is not None:
            _pass_everything_through(opening, rows.index)
        raise
    y: Tensor = ops.scatter(stream, out, rows.index, rows.slot, opened, inplace)
    return y


def _pass_everything_through(opening: Any, index: Tensor) -> None:
    """For what opened a stream in place, to which the layer's output is not written then.

    To autograd its kept rows come from the layer, whose gradient takes the place of theirs: the
    stream's is added to it. (To write the layer's input back would do, had no layer written to it.)
    """

    def add_kept_rows(
        d_inputs: tuple[Tensor | None, ...], d_outputs: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        (d_x, *others), d_stream = d_inputs, d_outputs[1]
        if d_x is None or d_stream is None:
            return d_inputs
        return d_x.index_add(0, index, d_stream.index_select(0, index)), *others

    opening.register_hook(add_kept_rows)


def _factor(p: float, rescale: str) -> float:
    """The scale in evaluation."""
    return 1.0 - p if rescale == "eval" else 1.0


def _scaled(layer: Callable[..., Any], rescale: str, scale: float) -> Callable[..., Any]:
    return layer if rescale == "none" else partial(layer, scale=scale)


def _check_output(out: object, shape: torch.Size) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"layer: expected to return a tensor, got {type(out).__name__}")
    if out.layout is not STRIDED or out.is_nested:
        check_tensor(out, "layer output")
    check_local(out=out)
    if out.shape != shape:
        raise ValueError(
            f"layer: expected to return the shape that it was given, {tuple(shape)}, got "
            f"{tuple(out.shape)} (a layer that changes the number of tokens or channels cannot be "
            "dropped)"
        )
