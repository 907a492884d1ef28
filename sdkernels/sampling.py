"""Drawing rows: the options, the laws, and the sampler in eager and in compiled code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import count
from math import floor
from numbers import Integral
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from .backends import namespace
from .backends.ops import host, is_compiling
from .tracing import dispatch_modes, fake_mode, jit_tracing_state, refuse_fixed_rows, with_data

P = ParamSpec("P")

T = TypeVar("T")

Mode = Literal["row", "batch"]
Sampler = Literal["bernoulli", "fixed", "rounded"]
PlanSampler = Literal["bernoulli", "fixed", "rounded", "balanced"]
Rescale = Literal["train", "eval", "none"]
MODES: tuple[str, ...] = get_args(Mode)
SAMPLERS: tuple[str, ...] = get_args(Sampler)
PLAN_SAMPLERS: tuple[str, ...] = get_args(PlanSampler)
RESCALES: tuple[str, ...] = get_args(Rescale)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def check_law(
    mode: object, sampler: object, rescale: object, samplers: tuple[str, ...] = SAMPLERS
) -> None:
    """The options that say what is drawn, and how it is scaled."""
    known = mode in MODES and sampler in samplers and rescale in RESCALES
    if known and (sampler == "bernoulli" or mode != "batch"):
        return  # as nearly always, in one step: this is on the path of every call
    check_choice("mode", mode, MODES)
    if sampler == "balanced" and sampler not in samplers:
        raise ValueError(
            'sampler: "balanced" spreads the kept rows over the branches of a plan, which one draw '
            'does not know; draw a DepthPlan with sampler="balanced" and pass its rows'
        )
    check_choice("sampler", sampler, samplers)
    check_choice("rescale", rescale, RESCALES)
    if sampler != "bernoulli" and mode == "batch":
        number = "a fixed number of" if sampler == "fixed" else "B * (1 - p)"
        raise ValueError(
            f'sampler: "{sampler}" keeps {number} rows, which mode="batch" has no choice of; use '
            'sampler="bernoulli"'
        )


def check_batch(batch: object) -> int:
    if not isinstance(batch, Integral) or isinstance(batch, bool) or batch < 0:
        raise ValueError(f"batch: expected the number of rows of the batch, got {batch!r}")
    return int(batch)


def check_generator(generator: object) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(
            "generator: expected a CPU generator (rows are drawn on the host, so that a seed gives "
            f"the same rows on every device), got one on {generator.device}"
        )


def fixed_count(batch: int, p: float) -> int:
    """The rows that ``sampler="fixed"`` keeps: ``clamp(round(batch * (1 - p)), 1, batch)``.

    Computed exactly from the decimal text of `p`, so that binary rounding cannot change it
    (``int(10 * (1 - 0.8))`` is 1); a half is rounded to even, as Python's ``round`` does.

    >>> fixed_count(10, 0.8), fixed_count(2, 0.9), fixed_count(0, 0.5)
    (2, 1, 0)
    """
    return min(max(round(batch * (1 - Fraction(repr(p)))), 1), batch)


def rounded_count(batch: int, p: float) -> tuple[int, float]:
    """``batch * (1 - p)`` rounded down, and the probability with which it is rounded up instead.

    From the decimal text of `p`, as :func:`fixed_count`: what is meant to be whole is not rounded.

    >>> rounded_count(8, 0.25), rounded_count(10, 0.8), rounded_count(1, 0.25)
    ((6, 0.0), (2, 0.0), (0, 0.75))
    """
    mean = batch * (1 - Fraction(repr(p)))
    below = floor(mean)
    return below, float(mean - below)


class Rounded(NamedTuple):
    """A number of rows between two whole ones: `up` is drawn where it is rounded up."""

    up: host.Draw  # of one row, kept with the probability of rounding up
    counts: tuple[host.Draw, host.Draw]  # rounded down, rounded up

    def draw(self, rounded_up: bool) -> host.Draw:
        return self.counts[rounded_up]


@lru_cache(maxsize=4096)
def law(
    batch: int, p: float, mode: str, sampler: str, rescale: str
) -> tuple[host.Draw | Rounded, float]:
    """What to draw, and the scale of the kept rows; the arguments were looked at before."""
    count = fixed_count(batch, p) if sampler == "fixed" else -1
    scale = _scale(batch, count, p, sampler, rescale)
    if sampler == "rounded":
        below, remainder = rounded_count(batch, p)
        up = host.Draw(remainder, -1, False)
        counts = [host.Draw(1.0 - p, min(each, batch), False) for each in (below, below + 1)]
        return Rounded(up, (counts[0], counts[1])), scale
    return host.Draw(1.0 - p, count, sampler == "bernoulli" and mode == "batch"), scale


def draw_on_host(
    batch: int,
    drawn: host.Draw | Rounded,
    generator: torch.Generator | None,
    device: torch.device | None,
) -> tuple[Tensor, Tensor]:
    """Index and slot of one draw."""
    if isinstance(drawn, Rounded):
        up, _ = host.sample_rows(1, drawn.up, generator, None)
        drawn = drawn.draw(up.numel() == 1)
    return host.sample_rows(batch, drawn, generator, device)


def _scale(batch: int, count: int, p: float, sampler: str, rescale: str) -> float:
    """The scale of the kept rows, of which "fixed" keeps `count`."""
    keep = 1.0 - p
    if sampler == "fixed":
        # Every row is kept with probability count / batch. "eval" multiplies by keep in evaluation,
        # so training must average to keep as well: 1 but for the rounding of count.
        inverse = batch / count if count else 1.0
        return {"train": inverse, "eval": keep * inverse, "none": 1.0}[rescale]
    return 1.0 / keep if rescale == "train" and keep > 0 else 1.0


# The kinds of devices, of those that PyTorch is built for, whose work can be captured: it is then
# launched again without the host.
_CAPTURING_DEVICES: Any = [
    module
    for module, is_built in (
        (torch.cuda, torch.backends.cuda.is_built()),
        (torch.xpu, torch.xpu._is_compiled()),
    )
    if is_built and hasattr(module, "is_current_stream_capturing")
]


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream; initialises no device."""
    # Initialised: without a driver, and in a forked process, the question itself is an error.
    for module in _CAPTURING_DEVICES:
        if module.is_initialized() and module.is_current_stream_capturing():
            return True
    return False


def refuse_capture() -> None:
    """Before every draw: a graph replays what has reached the device, and the host draws once."""
    if is_capturing():
        raise RuntimeError(
            "rows: cannot be drawn while a CUDA graph is being captured, which would replay the "
            'same rows for ever; draw a DepthPlan with sampler="fixed" before the capture, run '
            "the step with its rows (rows=, report.use) and call plan.resample_() between replays"
        )


def sample_rows(
    batch: int,
    p: float,
    mode: str,
    sampler: str,
    rescale: str,
    generator: torch.Generator | None,
    device: torch.device | None,
) -> tuple[Tensor, Tensor, float]:
    """Index, slot and scale, for arguments that were looked at before."""
    if is_compiling():
        return _sample_in_graph(batch, p, mode, sampler, rescale, generator, device)
    if _CAPTURING_DEVICES:
        refuse_capture()
    fake = None
    if jit_tracing_state() is not None or dispatch_modes():
        refuse_fixed_rows()
        fake, batch = fake_mode(), int(batch)
    drawn, scale = law(batch, p, mode, sampler, rescale)
    if fake is None:
        index, slot = draw_on_host(batch, drawn, generator, device)
        return index, slot, scale
    # It sees of the rows that are drawn how many there are, as meta tensors do.
    with with_data():
        rows = draw_on_host(batch, drawn, generator, None)
    index, slot = (fake.from_tensor(each, static_shapes=True).to(device) for each in rows)
    return index, slot, scale


def _sample_in_graph(
    batch: int,
    p: float,
    mode: str,
    sampler: str,
    rescale: str,
    generator: torch.Generator | None,
    device: torch.device | None,
) -> tuple[Tensor, Tensor, float]:
    cpu = torch.device("cpu")
    device = cpu if device is None else device
    if generator is None and not _backward_may_draw_again():
        index, slot = namespace.ops.sample_rows(
            batch, p, mode, sampler, _next_draw(), device.type == "cuda", device=cpu
        )
    else:
        _warn_of_graph_break(
            "rows under torch._functorch.config's aggressive_recomputation or "
            "activation_memory_budget"
            if generator is None
            else "rows from a generator= of their own"
        )
        index, slot = _sample_outside_graph(batch, p, mode, sampler, generator)
    # Of a fixed count both sizes are constants of the graph. B / k as a value of the graph would be
    # a number, which cannot go from one of DistributedDataParallel's subgraphs to the next.
    scale = _scale(slot.shape[0], index.shape[0], p, sampler, rescale)
    if device != cpu:
        index, slot = (rows.to(device, non_blocking=True) for rows in (index, slot))
    return index, slot, scale


def at_trace_time(function: Callable[P, T]) -> Callable[P, T]:
    """Has torch.compile call the function while it traces, and take the result for a constant.

    It is ``torch.compiler.assume_constant_result``, which loads the compiler when it is called.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@at_trace_time
def _backward_may_draw_again() -> bool:
    """Whether the partitioner was told to recompute more than it does by default.

    It then recomputes every op that is not on a list of ATen's random ones, whatever its tags: the
    backward would run on other rows than the forward.
    """
    from torch._functorch import config

    return bool(config.aggressive_recomputation) or config.activation_memory_budget < 1.0


_draws = count()


@at_trace_time
def _next_draw() -> int:
    """A number of its own for each draw of a graph: PyTorch merges calls with equal arguments."""
    return next(_draws)


_warned: set[str] = set()


@at_trace_time
def _warn_of_graph_break(what: str) -> None:
    """Once for each reason."""
    if what not in _warned:
        _warned.add(what)
        warnings.warn(
            f"sdkernels: drawing {what} inside a compiled region breaks its graph at every draw; "
            'draw a DepthPlan outside and pass rows=, or use sampler="fixed" and the default '
            "generator (docs/guides/compile.md has more)",
            stacklevel=2,
        )


# The sampler as an op: an op of a graph runs at every call, where Python code has run when it was
# traced. Its rows are those that eager code draws from the same seed. PyTorch saves and restores
# the generator of `device` around an op that a checkpoint runs twice: rows are drawn on the host.
# A CUDA graph would replay the rows that it has seen, so Inductor leaves the op out of them.
@torch.library.custom_op(
    namespace.qualified("sample_rows"),
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def _sample_rows(
    batch: int,
    p: float,
    mode: str,
    sampler: str,
    draw: int,
    pin_memory: bool,
    *,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    refuse_capture()
    index, slot = draw_on_host(batch, law(batch, p, mode, sampler, "none")[0], None, device)
    return (index.pin_memory(), slot.pin_memory()) if pin_memory else (index, slot)


@_sample_rows.register_fake
def _(
    batch: int,
    p: float,
    mode: str,
    sampler: str,
    draw: int,
    pin_memory: bool,
    *,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    kept: int | torch.SymInt
    if sampler == "fixed":
        # Exact for a known number of rows only: a symbolic one becomes a constant of the graph.
        batch = int(batch)
        kept = fixed_count(batch, p)
    else:
        try:
            kept = torch.library.get_ctx().new_dynamic_size()
        except RuntimeError:  # without fullgraph=True, PyTorch leaves such an op out of the graph
            kind = "Bernoulli" if sampler == "bernoulli" else sampler
            _warn_of_graph_break(f"{kind} rows, whose number is not known beforehand,")
            raise
        torch._check(kept <= batch)
    index = torch.empty(kept, dtype=torch.int64, device=device)
    return index, torch.empty(batch, dtype=torch.int64, device=device)


@torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable loads the compiler
def _sample_outside_graph(
    batch: int, p: float, mode: str, sampler: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    refuse_capture()
    return draw_on_host(batch, law(batch, p, mode, sampler, "none")[0], generator, None)
