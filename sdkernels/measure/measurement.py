"""The measurement: a model as it is beside a patched copy, on one batch."""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models import LeftAlone, PatchReport, patch
from ..models.undisturbed import random_state_kept
from ..rows import KeptRows
from ..sampling import Sampler
from .advice import Findings, advice
from .comparing import Differs, compare, full_precision, without_batch_effects
from .masking import Masked, Masking, NoDropPath, masked
from .memory import is_out_of_memory, peak_allocated_bytes, saved_activation_bytes
from .progress import Progress
from .text import lines_of
from .turns import quartiles, time_in_turns

__all__ = ["MeasureError", "Measurement", "measure"]

UNPATCHED, PATCHED, SKELETON = "unpatched", "patched", "without branches"
Step = Callable[[], object]


class MeasureError(RuntimeError):
    """The model cannot be measured; one sentence says why and what would help."""


@dataclass(frozen=True)
class Measurement:
    """What :func:`sdkernels.measure` found. ``print(measurement)`` shows ten lines.

    Attributes:
        model: the class of the model.
        batch: samples.
        device: of the model's parameters.
        amp: the dtype of autocast, or None.
        compiled: whether both went through torch.compile.
        patched: blocks that were patched; `idle` of them drop nothing.
        left: blocks with a drop path that run as before, each with the reason.
        drop_probs: of every branch of the patched blocks.
        compared: how many tensors were compared, outputs and gradients.
        largest_error: of any of them, relative to its largest entry.
        not_compared: why nothing was compared, or None.
        expected_speedup: by counted operations, were the dropped ones all that there is.
        seconds: of each timed step, "unpatched" and "patched", turn by turn.
        speedup, speedup_low, speedup_high: median and quartiles over the turns.
        saved_bytes: what the forward pass keeps for the backward pass, unpatched and patched.
        peak_bytes: highest allocation of a step, unpatched and patched; None but on CUDA.
        outside: share of the unpatched step that is not in branches of patched blocks.
        outside_is_timed: whether that is a share of the time, or else of the operations.
        host_share: share of the patched step after which the host had issued everything; None but
            on CUDA.
        advice: what to change to gain more.
    """

    model: str
    batch: int
    device: str
    amp: torch.dtype | None
    compiled: bool
    patched: int
    idle: int
    left: tuple[LeftAlone, ...]
    drop_probs: tuple[float, ...]
    compared: int
    largest_error: float
    not_compared: str | None
    expected_speedup: float
    seconds: dict[str, list[float]]
    speedup: float
    speedup_low: float
    speedup_high: float
    saved_bytes: tuple[int, int]
    peak_bytes: tuple[int, int] | None
    outside: float
    outside_is_timed: bool
    host_share: float | None
    advice: tuple[str, ...]

    @property
    def host_bound(self) -> bool | None:
        """Whether the GPU waits for the host; None without a GPU."""
        return None if self.host_share is None else self.host_share > 0.9

    def __str__(self) -> str:
        return "\n".join(lines_of(self))


@dataclass(frozen=True)
class _Setting:
    """What is the same for every model that is measured."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int
    loss: Callable[[Any], Tensor]
    device: torch.device
    amp: torch.dtype | None
    compile: bool

    def output(self, model: Callable[..., Any]) -> Any:
        if self.amp is None:
            return model(*self.args, **self.kwargs)
        with torch.autocast(self.device.type, dtype=self.amp):
            return model(*self.args, **self.kwargs)

    def step(self, model: nn.Module) -> tuple[Callable[[], Tensor], Step]:
        """Forward with loss, and the same with the backward pass; neither leaves a gradient."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        call = torch.compile(model) if self.compile else model

        def forward() -> Tensor:
            return self.loss(self.output(call))

        return forward, lambda: torch.autograd.grad(forward(), parameters, allow_unused=True)

    def results(
        self, model: nn.Module, names: Sequence[str], seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Output and gradients; `names` are those of the parameters, in their order."""
        # torch.manual_seed would reach devices whose state is not kept.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        output = self.output(model)
        grads = torch.autograd.grad(self.loss(output), parameters, allow_unused=True)
        tensors = {f"output {i}": t.detach() for i, t in enumerate(tensors_of(output))}
        gradients = zip(names, grads, strict=True)
        return {**tensors, **{f"gradient of {name}": grad for name, grad in gradients}}


def measure(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    drop_probs: float | Sequence[float] | None = None,
    amp: torch.dtype | None = None,
    sampler: Sampler = "bernoulli",
    compile: bool = False,
    turns: int = 25,
    budget: float = 30.0,
    progress: bool | None = None,
) -> Measurement:
    """Measure what :func:`sdkernels.patch` gains for a training step of a model, on this machine.

    Patches a copy; compares its outputs and gradients with those of an unpatched copy that masks
    the same rows; then times steps of both in turns, each with rows of its own as in training. A
    step is forward, loss and backward, without an optimizer. The model, its gradients and buffers,
    and all random states are as before afterwards.

    Args:
        model: a model whose blocks have drop paths, or any with `drop_probs`. One in evaluation
            mode is measured in training mode.
        batch: what the model is called with: a tensor, a tuple of positional arguments or a dict of
            keyword arguments, on the device of the model. Dimension 0 of its first tensor is the
            number of samples.
        loss: of the model's output, a scalar. Default: the output's own ``.loss`` where it has one,
            else the mean of the squares of its tensors.
        drop_probs: as in :func:`sdkernels.patch`; the unpatched copy gets the same. Default: the
            model's own.
        amp: the dtype of ``torch.autocast``; None, the default, does without. Values are compared
            without.
        sampler: as in :func:`sdkernels.patch`.
        compile: torch.compile both before they are timed.
        turns: steps of each, at most.
        budget: seconds after which no further turn begins, but not before five of them.
        progress: a line on stderr that says what is done. Default: if stderr is a terminal.

    Returns:
        Times, memory, what was expected, and what to change to gain more; it prints as ten lines.

    Raises:
        MeasureError: the model has no drop path that can be patched, or drops nothing; memory ran
            out; or the patched copy computes something else.
        TypeError, ValueError: bad arguments, as :func:`sdkernels.patch`.

    Note:
        Comparing takes rows from a seed of its own, running statistics in the place of batch
        norm's, and no dropout: what depends on the other samples of a batch differs by design.

    Example:
        >>> block = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> measure(block, torch.zeros(4, 3, 8))
        Traceback (most recent call last):
            ...
        sdkernels.measure.measurement.MeasureError: model: it has no drop path; make it with one \
(timm: drop_path_rate=0.4), or give drop_probs=
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if turns < 1 or not budget >= 0:
        raise ValueError(f"turns, budget: expected 1 or more and 0 or more, got {turns}, {budget}")
    setting = _setting(model, batch, loss, amp, compile)
    doing = Progress(sys.stderr.isatty() if progress is None else progress)
    try:
        with doing, _as_before(setting.device):
            return _measure(model, setting, drop_probs, sampler, turns, budget, doing)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MeasureError(
            f"memory ran out while {doing.text}, with {setting.batch} samples on {setting.device}; "
            "a smaller batch may fit"
        ) from None
    finally:
        gc.collect()  # modules and closures refer to each other


def _setting(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None,
    amp: torch.dtype | None,
    compile: bool,
) -> _Setting:
    args = batch if isinstance(batch, tuple) else () if isinstance(batch, Mapping) else (batch,)
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    first = next(tensors_of((args, kwargs)), None)
    if first is None or first.dim() == 0:
        raise TypeError(
            "batch: expected a tensor, a tuple or a dict with one, got " + type(batch).__name__
        )
    device = next((p.device for p in model.parameters()), first.device)
    return _Setting(args, kwargs, len(first), loss or default_loss, device, amp, compile)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts (outputs of transformers are dicts)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_of(each)


def default_loss(output: Any) -> Tensor:
    """The output's own loss, or the mean of squares of its floating-point tensors."""
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    parts = [t.float().square().mean() for t in tensors_of(output) if t.requires_grad]
    if not parts:
        raise MeasureError("loss: the model's output has no tensor that depends on parameters")
    return torch.stack(parts).sum()


@contextlib.contextmanager
def _as_before(device: torch.device) -> Iterator[None]:
    """Leaves every generator as it was."""
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with random_state_kept(devices):
        yield


def _copy(model: nn.Module) -> nn.Module:
    try:
        made = copy.deepcopy(model)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise MeasureError(f"model: it cannot be copied ({error})") from None
    made.zero_grad(set_to_none=True)
    return made if model.training else made.train()


def _patched(
    model: nn.Module, drop_probs: float | Sequence[float] | None, sampler: Sampler, empty: Any
) -> PatchReport:
    """A patched copy in training mode, of which something drops."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model: no block", UserWarning)  # said below
        report = patch(_copy(model), drop_probs=drop_probs, sampler=sampler, empty=empty)
    if not report.patched and not report.left:
        raise MeasureError(
            "model: it has no drop path; make it with one (timm: drop_path_rate=0.4), or give "
            "drop_probs="
        )
    if not report.patched:
        raise MeasureError(
            f"model: none of its {len(report.left)} blocks with a drop path can be patched; "
            f"{report.left[0].name or 'the model'}: {report.left[0].reason}"
        )
    if not any(report.drop_probs):
        raise MeasureError(
            "model: every drop probability is 0; make it with another (timm: drop_path_rate=0.4), "
            "or give drop_probs="
        )
    return report


def _measure(
    model: nn.Module,
    setting: _Setting,
    drop_probs: float | Sequence[float] | None,
    sampler: Sampler,
    turns: int,
    budget: float,
    doing: Progress,
) -> Measurement:
    if not any(p.requires_grad for p in model.parameters()):
        raise MeasureError(
            "model: none of its parameters requires grad, so that nothing is trained"
        )
    doing.say("patching a copy")
    report = _patched(model, drop_probs, sampler, "run")
    probabilities = tuple(report.drop_probs)
    doing.say("comparing outputs and gradients")
    compared, error, not_compared = _compare(model, report, setting)
    report = _patched(model, drop_probs, sampler, "run")  # comparing has changed the other
    if setting.compile and setting.batch > 1:
        report.check(*setting.args, **setting.kwargs)  # no block can be compared once compiled
    plain = _copy(model)
    if drop_probs is not None:
        plain = _masked(plain, report, probabilities, Masking)

    doing.say("counting operations")
    # Of all branches, and of what is dropped of them.
    inside = _saving(model, setting, [1.0] * len(probabilities), sampler)
    saving = _saving(model, setting, list(probabilities), sampler)

    steps = {UNPATCHED: setting.step(plain), PATCHED: setting.step(report.model)}
    timed_outside = False
    if not setting.compile and not_compared is None:
        skeleton = _skeleton(model, setting, probabilities, sampler)
        if skeleton is not None:
            steps[SKELETON], timed_outside = skeleton, True
    doing.say("measuring memory")
    saved = {
        name: saved_activation_bytes(steps[name][0], own.parameters())
        for name, own in ((UNPATCHED, plain), (PATCHED, report.model))
    }
    calls = {name: step for name, (_, step) in steps.items()}
    timed = time_in_turns(
        calls,
        setting.device,
        turns,
        budget=budget,
        warm_up=3 if setting.compile else 1,
        say=doing.turn,
    )
    peaks = None
    if setting.device.type == "cuda":
        peaks = (
            peak_allocated_bytes(calls[UNPATCHED], setting.device),
            peak_allocated_bytes(calls[PATCHED], setting.device),
        )
    pairs = zip(timed.seconds[UNPATCHED], timed.seconds[PATCHED], strict=True)
    low, speedup, high = quartiles([a / b for a, b in pairs])
    medians = {name: statistics.median(each) for name, each in timed.seconds.items()}
    outside = 1 - inside
    if timed_outside:
        outside = min(medians[SKELETON] / medians[UNPATCHED], 1.0)
    host = None
    if setting.device.type == "cuda":
        host = statistics.median(timed.host[PATCHED]) / medians[PATCHED]
    left = (*report.left, *report.whole)  # a block that was found to differ runs as before
    findings = Findings(
        setting.batch, sampler, setting.compile, probabilities, inside, outside, host, left
    )
    return Measurement(
        model=type(model).__name__,
        batch=setting.batch,
        device=str(setting.device),
        amp=setting.amp,
        compiled=setting.compile,
        patched=len(report.patched),
        idle=len(report.idle),
        left=left,
        drop_probs=probabilities,
        compared=compared,
        largest_error=error,
        not_compared=not_compared,
        expected_speedup=1 / (1 - saving),
        seconds={name: timed.seconds[name] for name in (UNPATCHED, PATCHED)},
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        saved_bytes=(saved[UNPATCHED], saved[PATCHED]),
        peak_bytes=peaks,
        outside=outside,
        outside_is_timed=timed_outside,
        host_share=host,
        advice=advice(findings),
    )


def _masked(
    model: nn.Module, report: PatchReport, values: Sequence[Any], kind: Callable[..., nn.Module]
) -> nn.Module:
    try:
        return masked(model, report.patched, values, kind)
    except NoDropPath as error:
        raise MeasureError(f"drop_probs: {error}, to be given the same probabilities") from None


def _compare(
    model: nn.Module, report: PatchReport, setting: _Setting
) -> tuple[int, float, str | None]:
    """How many tensors were compared and their largest error, or why none was."""
    setting = replace(setting, amp=None, compile=False)
    try:
        plan = report.plan(setting.batch, generator=torch.Generator().manual_seed(0))
        reference = masked(_copy(model), report.patched, list(plan), Masked)
    except (NoDropPath, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return 0, 0.0, str(error)
    without_batch_effects(reference)
    without_batch_effects(report.model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    with full_precision():
        expected = setting.results(reference, names)
        with report.use(plan):
            got = setting.results(report.model, names)
        try:
            return len(expected), compare(got, expected), None
        except Differs as difference:
            # Not every random number of a model can be switched off from outside.
            try:
                compare(setting.results(reference, names, seed=1), expected)
            except Differs:
                return 0, 0.0, "the model draws random numbers besides, so that no two steps agree"
            raise MeasureError(
                f"the patched model computes something else than the unpatched one: {difference}"
            ) from None


def _saving(
    model: nn.Module, setting: _Setting, probabilities: list[float], sampler: Sampler
) -> float:
    """Share of the operations that is saved at these probabilities."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # the fused one is not counted on CPUs

    report = patch(_copy(model), drop_probs=probabilities, sampler=sampler)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return report.expected_saving(*setting.args, **setting.kwargs)


def _skeleton(
    model: nn.Module, setting: _Setting, probabilities: Sequence[float], sampler: Sampler
) -> tuple[Callable[[], Tensor], Step] | None:
    """A step that runs no branch of a patched block; None where it cannot do without."""
    report = patch(_copy(model), drop_probs=list(probabilities), sampler=sampler, empty="skip")
    nothing = KeptRows.from_mask(torch.zeros(setting.batch, dtype=torch.bool)).to(setting.device)
    rows = [nothing] * len(probabilities)
    forward, step = setting.step(report.model)

    def within(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with report.use(rows):
                return call()

        return run

    try:
        within(step)()
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return None
    return within(forward), within(step)
