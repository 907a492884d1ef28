"""fused_stochastic_depth: sample, compact, branch, scatter-add."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .arguments import (
    EVERYTHING,
    Apart,
    Everything,
    Kept,
    KeptAndOnes,
    take_args,
    take_args_of_list,
    unmarked,
)
from .backends import autograd
from .backends.checks import acc_type, check_layer_scale
from .backends.ops import compiled, is_compiling, kernels, packed_kernels
from .backends.traceable import scatter_add_dtype
from .break_even import break_even, check_min_saving
from .building_blocks import (
    DTENSORS,
    STRIDED,
    Activation,
    check_inplace,
    check_input,
    check_local,
    check_rows,
    check_tensor,
    compact_norm,
    norm_dtype,
)
from .empty import (
    Empty,
    has_no_rows,
    run_list_on_ones,
    run_on_kept,
    run_on_nothing,
    run_on_ones,
)
from .options import OpOptions, checked_options, options_of
from .packed import Packed, PackedBranch, check_crops, padding_of
from .rows import KeptRows, draw
from .sampling import Mode, Rescale, Sampler, check_generator
from .schedules import check_probability
from .tracing import fx, is_recorded, jit_tracing_state, refuse_training

__all__ = ["fused_stochastic_depth"]

# One tensor, or a list of them (multi-crop).
X = TypeVar("X", Tensor, list[Tensor])
# Forwards of subclasses of the two norms that compute what PyTorch's own do, each with what must
# hold of the module for that. sdkernels.models adds those of other libraries.
PLAIN_NORM_FORWARDS: dict[Callable[..., Any], Callable[[Any], bool]] = {}


def check_norm(norm: object) -> None:
    if norm is not None and not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        raise TypeError(
            f"norm: expected nn.LayerNorm or nn.RMSNorm, got {type(norm).__name__}; "
            "call any other norm inside the branch"
        )


def check_branch(branch: object) -> None:
    if callable(branch):
        return
    hint = "pass the branch, not its output"
    if isinstance(branch, (int, float)):
        hint = (
            "the order is x, branch, p: stochastic_depth(branch(x), p) of torchvision becomes "
            "fused_stochastic_depth(x, branch, p)"
        )
    raise TypeError(f"branch: expected a callable, got {type(branch).__name__} ({hint})")


def _is_plain(norm: nn.LayerNorm | nn.RMSNorm) -> bool:
    """Whether calling the norm does what PyTorch's own forward does, and nothing else."""
    kind = nn.RMSNorm if isinstance(norm, nn.RMSNorm) else nn.LayerNorm
    forward = type(norm).forward
    if forward is not kind.forward:
        computes_the_same = PLAIN_NORM_FORWARDS.get(forward)
        if computes_the_same is None or not computes_the_same(norm):
            return False
    return "forward" not in norm.__dict__ and not (
        norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or _has_any_global_hook()
    )


def _fused(norm: nn.LayerNorm | nn.RMSNorm | None) -> nn.Module | None:
    """The norm if the kernels read its parameters; one that is called may gather them (FSDP)."""
    return norm if norm is not None and _is_plain(norm) else None


def fused_stochastic_depth(
    x: X,
    branch: Callable[..., X],
    p: float,
    mode: Mode = "row",
    training: bool = True,
    *,
    args: Sequence[Any] = (),
    norm: nn.LayerNorm | nn.RMSNorm | None = None,
    layer_scale: Tensor | None = None,
    residual: X | None = None,
    rows: KeptRows | Sequence[KeptRows] | None = None,
    sampler: Sampler = "bernoulli",
    rescale: Rescale = "train",
    generator: torch.Generator | None = None,
    empty: Empty = "run",
    inplace: bool | None = False,
    min_saving: float | Literal["auto"] = 0.0,
    activation: Activation | None = None,
    packed: bool = False,
    multiple_of: int = 1,
) -> X:
    """Stochastic depth that runs the residual branch on the kept rows only.

    Equivalent PyTorch code::

        residual + layer_scale * stochastic_depth(branch(norm(x), *args), p, mode, training)

    with torchvision's ``stochastic_depth``; values and all gradients are those of that expression,
    to rounding, for every branch that treats rows (samples) independently. The branch sees a batch
    of the k kept rows, so it costs what k rows cost. A branch that mixes rows (batch statistics)
    sees the kept rows only; that cannot be detected here.

    Args:
        x: [B, ...], floating point, any strides; or a list of such tensors (multi-crop), each with
            rows of its own: the branch then maps a list of tensors to a list of tensors.
        branch: maps [k, ...] (and `args`) to [k, ...], row by row. With k = 0 it runs on an empty
            batch. It must not write into `x`.
        p: drop probability, as in torchvision. With p = 0 the plain expression is
            computed (unless `inplace`).
        mode: "row" decides for each row (timm, torchvision), "batch" once for all (the paper).
        training: False computes ``residual + layer_scale * branch(norm(x), *args)`` with plain
            PyTorch operations.
        args: further positional inputs of the branch. A tensor [B, ...], alone or inside tuples,
            lists, dicts and named tuples, belongs to the samples and is compacted like `x`; one of
            one row broadcasts and goes whole; any other is refused until it is wrapped in
            :class:`Shared` (it belongs to the whole batch) or :class:`PerSample` (which says how to
            take the kept samples'). So is an object that holds tensors, but for a
            ``PackedSequence``, nested tensors and flex_attention's ``BlockMask``, of which the op
            takes the kept samples. What holds no tensors goes as it is. Evaluation asks the same.
            For a list `x`, an entry is a list as long as `x` (taken item by item), ``Shared``, or
            without tensors.
        norm: nn.LayerNorm or nn.RMSNorm applied to the branch's input, fused with the compaction.
            (One with hooks or a forward of its own is called on the kept rows instead.) Under
            autocast the fused norm writes the autocast dtype, which the branch's first matrix
            product would cast to.
        layer_scale: learned factor on the branch's output: [C], [C, 1, 1], or anything that
            broadcasts against one row of it.
        residual: tensor to add to, of the branch's output shape. Default: `x`.
        rows: rows drawn elsewhere (a :class:`DepthPlan`, a mask); then `p`, `mode`, `sampler` and
            `generator` are not used in training, and scale and weights are those of the rows. In
            evaluation rows are not used: a gate that holds there too needs ``training=True``.
        sampler: "bernoulli" keeps each row with probability 1 - p; "fixed" keeps exactly
            ``clamp(round(B * (1 - p)), 1, B)`` rows, so that shapes are static; "rounded" keeps
            ``B * (1 - p)`` rows rounded up or down at random, so that each is kept with probability
            1 - p.
        rescale: "train" divides by the survival probability in training (inverted scaling); "eval"
            is the paper's rule, unscaled in training and multiplied by 1 - p in evaluation; "none"
            never scales (training and evaluation then differ in expectation).
        generator: CPU generator to draw from. Default: PyTorch's, which activation checkpointing
            restores.
        empty: what to do when no row is kept. "run" runs the branch on [0, ...], so that its
            parameters get zero gradients (as DDP and FSDP need). "ones", for branches that cannot
            do that, runs it on one row of ones and leaves the result out: gradients are zero as
            well, BatchNorm and buffers take no statistics from it, dropout draws numbers for it.
            "skip" returns `residual` and leaves parameters without gradients. An exception of a
            branch that ran on no row says so in a note.
        inplace: add into `residual` (default `x`) in place and return it. If the branch raises,
            the values of `x` are untouched, but autograd counts it as written. None permits it:
            `residual` is added into where that saves a pass over it and changes nothing else (so
            not where every row runs the branch, with an activation, for a list `x`, in compiled
            code, where the result has another dtype, or where PyTorch forbids it). Under
            torch.compile True may end in an error of the backward: None or False do not.
        min_saving: where the share of dropped rows, ``1 - k / B``, is below it, the branch runs on
            all B rows, and the kept rows of its output are added: the same rows, values and
            gradients, to rounding. Memory follows B then, a branch with batch statistics sees the
            whole batch, and a NaN or infinity in a dropped row can reach the gradients of the
            branch's parameters. "auto": the share below which compaction was measured not to pay
            (``python -m sdkernels.info`` shows it; ``SDKERNELS_MIN_SAVING`` sets it; 0 on devices
            where it was not measured). For a list `x`, each tensor is decided on by itself. Has no
            effect together with `inplace`, and in compiled code. Default: 0, always compact.
        activation: "relu" applies a ReLU to the sum, as the blocks of a ResNet do: in the pass that
            adds, which keeps one bit an element for the backward instead of the result. (In place,
            in evaluation, with p = 0 and in compiled code it is an operation of its own.) Default:
            none.
        packed: for a list `x` of tensors [B, ..., C] of one width: the branch gets the kept tokens
            of all of them in one tensor, as a :class:`Packed`, and returns a tensor [T, C'] or a
            Packed, so that its linear layers run once and not once a tensor. `args` come as lists,
            as without it.
        multiple_of: what the number T of packed tokens is rounded up to, with zeros (16 to 128 for
            FP8 and whole tiles). No gradient comes from them; branch and derivative have to be
            finite there.

    Returns:
        The shape and strides of `residual`, the dtype of ``residual + layer_scale * out``.
        Dropped rows are those of `residual` to the last bit (with an activation, their ReLU).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument outside its range, or shapes, rows or devices that do not fit.
        RuntimeError: in place where PyTorch forbids it; in training under torch.jit.trace or
            torch.fx, which would repeat the rows of one call for ever.

    Note:
        Rows are drawn on the host: no synchronisation, and the same seed gives the same rows on
        every device. Kernels use no atomics: same inputs, same bits.

    Reference:
        Huang, Sun, Liu, Sedra, Weinberger: "Deep Networks with Stochastic Depth", ECCV 2016.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> rows = KeptRows.from_index(torch.tensor([0, 2]), batch=3, scale=2.0)
        >>> fused_stochastic_depth(x, lambda kept: 10 * kept, 0.5, rows=rows).flatten()
        tensor([21.,  2., 63.])
        >>> fused_stochastic_depth(x, lambda kept: 10 * kept, 0.5, training=False).flatten()
        tensor([11., 22., 33.])
    """
    if not callable(branch):
        check_branch(branch)
    if norm is not None:
        check_norm(norm)
    if not isinstance(args, (list, tuple)):
        _refuse_args(args)
    if generator is not None:
        check_generator(generator)
    compiling = is_compiling()
    # Equal numbers are one to what looks options up: these have to be of their own types.
    if type(p) is not float:
        p = check_probability(p)
    if min_saving != 0.0:
        min_saving = check_min_saving(min_saving)
    said = (
        p,
        mode,
        training,
        sampler,
        rescale,
        empty,
        inplace,
        min_saving,
        activation,
        packed,
        multiple_of,
    )
    try:
        options = checked_options(*said) if compiling else options_of(*said)
    except TypeError:  # of what cannot be looked up, which the checks refuse in words of their own
        options = checked_options(*said)
    if options.multiple_of is not None:
        branch = _packed_branch(x, branch, options.multiple_of)
    dense = not training or (rows is None and not options.drops)
    if (
        not compiling
        and (type(x) is not Tensor or jit_tracing_state() is not None or fx._is_fx_tracing_flag)
        and is_recorded(x, residual, layer_scale, args)
    ):
        if not dense:
            refuse_training()
        call = Call(branch, args, norm, layer_scale, generator, options)
        recorded: X = _recorded(x, residual, call)
        return recorded
    if layer_scale is not None:
        check_tensor(layer_scale, "layer_scale")

    if type(x) is not Tensor and isinstance(x, (list, tuple)):  # slow, of a tensor
        call = Call(branch, args, norm, layer_scale, generator, options)
        sums: X = _of_list(list(x), residual, rows, dense, call)
        return sums
    if TYPE_CHECKING:  # a list of tensors has gone its own way
        assert isinstance(x, Tensor)
        assert residual is None or isinstance(residual, Tensor)
        assert rows is None or isinstance(rows, KeptRows)
    # One tensor. _of_list takes the same steps with each of several: one goes twice as fast here.
    inplace, relu = options.inplace, options.relu
    base = _base(x, residual, inplace)
    if dense:
        how = _apart([base]) if inplace else EVERYTHING
        source = how.tensor(x, ())
        given = take_args(args, x.shape[0], how) if args else ()
        out = branch(source if norm is None else norm(source), *given)
        _check_everywhere(base, out, layer_scale)
        return _sum(base, out, layer_scale, options)
    if DTENSORS in sys.modules:
        check_local(_fused(norm), x=x, residual=residual, layer_scale=layer_scale)
    ops = kernels()
    rows = _rows(x, rows, options, generator)
    if empty == "skip" and rows.k == 0:
        return _unchanged(base, inplace, relu)
    whole = min_saving != 0.0 and _runs_whole(rows, options.min_saving, inplace)
    if options.permitted and not (whole or relu or compiling):
        inplace = _may_be_written(ops, base)
    kept, stream = _open(ops, x, residual, rows, norm, whole, inplace, relu)
    nothing = has_no_rows(rows) if compiling else rows.index.numel() == 0
    on_ones = nothing and empty == "ones"
    given = take_args(args, x.shape[0], _how(rows, whole, on_ones)) if args else ()
    if on_ones:
        out = run_on_ones(branch, kept, given)
    elif nothing:
        out = run_on_nothing(branch, kept, given)
    elif compiling:
        out = branch(kept, *given)
    else:
        out = run_on_kept(branch, kept, given, rows.batch)
    out = _kept_output(out, rows, base, layer_scale, whole)
    if options.permitted and scatter_add_dtype(base, out, layer_scale) != base.dtype:
        inplace = False
    y: Tensor = ops.scatter_add(
        stream, out, rows.index, rows.slot, layer_scale, rows.weight, rows.scale, inplace, relu
    )
    return y


def _may_be_written(ops: Any, x: Tensor) -> bool:
    """Whether PyTorch lets one add into x, and no two of its elements can be one in memory."""
    if x.is_neg() or not (x.is_contiguous() or torch._debug_has_internal_overlap(x) == 0):
        return False
    try:
        ops.check_inplace(x)
    except RuntimeError:
        return False
    return True


class Call(NamedTuple):
    """What holds for every tensor of a list."""

    branch: Callable[..., Any]
    args: Sequence[Any]
    norm: nn.LayerNorm | nn.RMSNorm | None
    layer_scale: Tensor | None
    generator: torch.Generator | None
    options: OpOptions


def _refuse_args(args: object) -> NoReturn:
    if is_recorded(args):
        raise RuntimeError(
            "args: torch.fx cannot trace a StochasticDepth by itself, because it takes any number "
            "of them; trace a module that calls it, such as nn.Sequential"
        )
    raise TypeError(f"args: expected a list or tuple, got {type(args).__name__}")


def _of_list(xs: list[Tensor], residual: Any, rows: Any, dense: bool, call: Call) -> Any:
    if not xs:
        raise ValueError("x: expected at least one tensor, got an empty list")
    branch, norm, layer_scale, options = call.branch, call.norm, call.layer_scale, call.options
    inplace, relu = options.inplace, options.relu
    residuals = per_tensor(residual, len(xs), "residual")
    bases = [_base(x, base, inplace) for x, base in zip(xs, residuals, strict=True)]
    batches = [x.shape[0] for x in xs]
    if dense:
        everything = _apart(bases) if inplace else EVERYTHING
        sources = [everything.tensor(x, ()) for x in xs]
        inputs = sources if norm is None else [norm(source) for source in sources]
        given = take_args_of_list(call.args, batches, [everything] * len(xs))
        outs = per_tensor(branch(inputs, *given), len(xs), "branch output")
        for base, out in zip(bases, outs, strict=True):
            _check_everywhere(base, out, layer_scale)
            if inplace and not is_compiling():
                autograd.check_inplace(base, out, layer_scale)
        return [
            _sum(base, out, layer_scale, options) for base, out in zip(bases, outs, strict=True)
        ]
    if DTENSORS in sys.modules:
        for x, base in zip(xs, residuals, strict=True):
            check_local(_fused(norm), x=x, residual=base, layer_scale=layer_scale)
    plan = [
        _rows(x, given_rows, options, call.generator)
        for x, given_rows in zip(xs, per_tensor(rows, len(xs), "rows"), strict=True)
    ]
    if options.empty == "skip" and not any(rows.k for rows in plan):
        return [_unchanged(base, inplace, relu) for base in bases]
    ops = kernels()
    whole = [_runs_whole(rows, options.min_saving, inplace) for rows in plan]
    nothing = [has_no_rows(rows) for rows in plan]
    on_ones = [none and options.empty == "ones" for none in nothing]
    hows = [_how(*each) for each in zip(plan, whole, on_ones, strict=True)]
    if (
        isinstance(branch, PackedBranch)
        and not (relu or any(whole) or any(on_ones))
        and _packs_at_once(ops, norm)
        and not (inplace and _is_written_in_parts(bases))
    ):
        given = take_args_of_list(call.args, batches, hows)
        return _packed(xs, residuals, plan, branch, given, call)
    kept, streams = [], []
    for x, base, rows, all_rows in zip(xs, residuals, plan, whole, strict=True):
        opened = _open(ops, x, base, rows, norm, all_rows, inplace, relu)
        kept.append(opened[0])
        streams.append(opened[1])
    given = take_args_of_list(call.args, batches, hows)
    if any(on_ones):
        results = run_list_on_ones(branch, kept, given, on_ones)
    elif any(nothing):
        results = run_on_nothing(branch, kept, given)
    else:
        results = branch(kept, *given)
    outs = [
        _kept_output(out, rows, base, layer_scale, all_rows)
        for out, rows, base, all_rows in zip(
            per_tensor(results, len(xs), "branch output"), plan, bases, whole, strict=True
        )
    ]
    # All of them before the first is added, which may be in place.
    for stream, out, rows in zip(streams, outs, plan, strict=True):
        ops.check_scatter_add(stream, out, rows.index, rows.slot, layer_scale, rows.weight)
        if inplace and not is_compiling():
            autograd.check_sum_inplace(stream, out, layer_scale, rows.weight)
    return [
        ops.scatter_add(
            stream, out, rows.index, rows.slot, layer_scale, rows.weight, rows.scale, inplace, relu
        )
        for stream, out, rows in zip(streams, outs, plan, strict=True)
    ]


def _base(x: Tensor, residual: Tensor | None, inplace: bool) -> Tensor:
    """What the branch's output is added to, once both are looked at."""
    check_input(x)
    if residual is None:
        if inplace:
            check_inplace(x, "x")
        return x
    check_input(residual, "residual")
    if residual.shape[0] != x.shape[0]:
        raise ValueError(
            f"residual: expected {x.shape[0]} rows as x has, got {residual.shape[0]} "
            f"(shape {tuple(residual.shape)})"
        )
    if residual.device != x.device:
        raise ValueError(f"residual: expected the device of x, {x.device}, got {residual.device}")
    if inplace:
        check_inplace(residual, "residual")
    return residual


def _rows(
    x: Tensor, rows: KeptRows | None, options: OpOptions, generator: torch.Generator | None
) -> KeptRows:
    """Those given for x, or drawn."""
    if rows is not None:
        check_rows(rows, x)
        return rows
    p, mode, sampler, rescale = options.p, options.mode, options.sampler, options.rescale
    return draw(x.shape[0], p, mode, sampler, rescale, generator, x.device)


def _open(
    ops: Any,
    x: Tensor,
    residual: Tensor | None,
    rows: KeptRows,
    norm: nn.LayerNorm | nn.RMSNorm | None,
    whole: bool,
    inplace: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """The branch's input, and what its output is added to: by default x, through the same node."""
    if whole:
        return x if norm is None else norm(x), x if residual is None else residual
    with_stream = residual is None
    inplace = inplace and with_stream
    if norm is not None and _is_plain(norm):
        rms = isinstance(norm, nn.RMSNorm)
        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        shape, weight, eps = norm.normalized_shape, norm.weight, norm.eps
        kept, stream = compact_norm(x, rows, shape, weight, bias, eps, rms, with_stream, inplace)
    else:
        kept, stream = ops.compact(x, rows.index, rows.slot, with_stream, inplace, relu)
        kept = kept if norm is None else norm(kept)
    return kept, stream if residual is None else residual


def _runs_whole(rows: KeptRows, min_saving: float | str, inplace: bool) -> bool:
    """Whether the branch runs on every row, because so few are dropped.

    In place it never does: the branch may save its input, which has to be a copy of the rows then.
    A graph does not depend on how many rows there are.
    """
    if min_saving == 0.0 or inplace or is_compiling():
        return False
    dropped = rows.batch - rows.k
    return dropped < break_even(min_saving, rows.slot.device.type) * rows.batch


def _how(rows: KeptRows, whole: bool, on_ones: bool) -> Everything:
    """How the branch gets the entries of args that belong to the samples."""
    if whole:
        return EVERYTHING
    return KeptAndOnes(rows) if on_ones else Kept(rows)


def _apart(bases: list[Tensor]) -> Everything:
    """As `_how`, where every row runs the branch and these are written to.

    The branch may save for its backward what it gets.
    """
    return Apart(bases) if torch.is_grad_enabled() else EVERYTHING


def _kept_output(
    out: Any, rows: KeptRows, base: Tensor, layer_scale: Tensor | None, whole: bool
) -> Tensor:
    """The kept rows of the branch's output."""
    if type(out) is not Tensor:
        check_local(out=out)
    elif not whole and out.layout is STRIDED and not out.is_nested:
        return out  # as nearly always, in one step
    if not whole:
        _check_branch_output(out)
        return out  # type: ignore[no-any-return]
    _check_everywhere(base, out, layer_scale)
    if rows.k == rows.batch:
        return out  # type: ignore[no-any-return]
    kept: Tensor = kernels().compact(out, rows.index, rows.slot, False, False, False)[0]
    return kept


def _check_branch_output(out: object) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"branch: expected to return a tensor, got {type(out).__name__}")
    if out.layout is not STRIDED or out.is_nested:
        check_tensor(out, "out")


def per_tensor(value: Any, count: int, name: str) -> list[Any]:
    """`value` as a list with one entry for each tensor of a list x."""
    if value is None:
        return [None] * count
    if not isinstance(value, (list, tuple)) or len(value) != count:
        got = f"{len(value)} entries" if isinstance(value, (list, tuple)) else type(value).__name__
        raise ValueError(f"{name}: expected a list of {count}, one entry a tensor, got {got}")
    return list(value)


# Where every row runs the branch


def _recorded(x: Any, residual: Any, call: Call) -> Any:
    """What a tracer records of that: nothing is asked of a tensor."""
    several = isinstance(x, (list, tuple))
    xs = list(x) if several else [x]
    bases = xs if residual is None else list(residual) if several else [residual]
    options = call.options
    sources = [each.clone() for each in xs] if options.inplace else xs
    inputs = sources if call.norm is None else [call.norm(source) for source in sources]
    outs = call.branch(inputs if several else inputs[0], *map(unmarked, call.args))
    pairs = zip(bases, outs if several else [outs], strict=True)
    sums = [_sum(base, out, call.layer_scale, options) for base, out in pairs]
    return sums if several else sums[0]


def _check_everywhere(residual: Tensor, out: Any, layer_scale: Tensor | None) -> None:
    """What the kernels check of a branch's output."""
    _check_branch_output(out)
    if out.shape != residual.shape:
        raise ValueError(
            f"out: expected residual's shape {tuple(residual.shape)}, got {tuple(out.shape)} (the "
            "branch must return one row for each row, in order, of the residual's shape)"
        )
    if layer_scale is not None:
        check_layer_scale(layer_scale, residual.shape[1:])


def _sum(residual: Tensor, out: Tensor, layer_scale: Tensor | None, options: OpOptions) -> Tensor:
    if layer_scale is not None:
        out = out * layer_scale
    if options.factor != 1.0:
        out = out * options.factor
    total = residual.add_(out) if options.inplace else residual + out
    return total.relu_() if options.relu else total


def _unchanged(residual: Tensor, inplace: bool, relu: bool) -> Tensor:
    """The result where nothing is added."""
    if not relu:
        return residual
    return residual.relu_() if inplace else residual.relu()


# All crops in one tensor


def _packed_branch(x: Any, branch: Callable[..., Any], multiple_of: int) -> Callable[..., Any]:
    if not isinstance(x, (list, tuple)):
        raise TypeError(f"x: expected a list of tensors with packed=True, got {type(x).__name__}")
    return PackedBranch(branch, multiple_of)


def _is_written_in_parts(bases: list[Tensor]) -> bool:
    """Whether two of them are one tensor, or one is a view: a function with several results may not
    write into a view, and PyTorch counts what it writes twice once."""
    return len(set(map(id, bases))) < len(bases) or any(base._is_view() for base in bases)


def _packs_at_once(ops: Any, norm: nn.Module | None) -> bool:
    """Whether the crops are compacted straight into one tensor; a graph makes that of itself."""
    if ops is compiled:
        return False
    return norm is None or (_is_plain(norm) and len(norm.normalized_shape) == 1)  # type: ignore[arg-type]


def _packed(
    xs: list[Tensor],
    residuals: list[Tensor | None],
    plan: list[KeptRows],
    branch: PackedBranch,
    given: list[Any],
    call: Call,
) -> list[Tensor]:
    """The branch on the kept tokens of all crops, which are never there one by one."""
    check_crops(xs)
    for x, base in zip(xs, residuals, strict=True):
        if base is not None and base.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"residual: expected the tokens of x with packed=True, {tuple(x.shape[:-1])}, got "
                f"shape {tuple(base.shape)}"
            )
    norm, inplace = call.norm, call.options.inplace
    shapes = [(each.k, *x.shape[1:-1]) for x, each in zip(xs, plan, strict=True)]
    padding = padding_of(shapes, branch.multiple_of)
    weight = bias = None
    eps, dtype = 0.0, xs[0].dtype
    if norm is not None:
        weight, bias = norm.weight, getattr(norm, "bias", None)
        eps = torch.finfo(acc_type(dtype)).eps if norm.eps is None else norm.eps
        dtype = norm_dtype(xs[0])
    index, slot = [each.index for each in plan], [each.slot for each in plan]
    values, streams = packed_kernels.open_packed(
        xs,
        index,
        slot,
        norm is not None,
        weight,
        bias,
        eps,
        isinstance(norm, nn.RMSNorm),
        dtype,
        padding or 0,
        [residual is None for residual in residuals],
        inplace,
    )
    pairs = zip(streams, residuals, strict=True)
    streams = [stream if base is None else base for stream, base in pairs]
    out = branch.run(Packed(values, shapes, padding), given)
    if out.dim() != 2:
        raise ValueError(f"branch output: expected [T, C], got shape {tuple(out.shape)}")
    scales, weights = [each.scale for each in plan], [each.weight for each in plan]
    return packed_kernels.close_packed(
        streams, out, index, slot, scales, call.layer_scale, weights, inplace
    )
