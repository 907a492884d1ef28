"""What the package wants to reach. Only bounds stand here; every figure comes from a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

Case = Any  # a dict of figures.collect
Times = dict[str, float]  # of all providers: their medians, or those of one repeat
Figure = Callable[[Case, Times], float]


@dataclass(frozen=True)
class Outcome:
    """One target of a run."""

    target: str
    case: str
    bound: float
    at_most: bool  # else at least
    unit: str  # "x" or "%"
    measured: float | None  # None: its case was not run
    low: float | None = None  # smallest and largest over the repeats, where known
    high: float | None = None
    noise: bool = False  # met as well where the ratio of one repeat reaches the bound
    floor: float | None = None  # the figure that the floor itself would have, where it was run

    @property
    def met(self) -> bool | None:
        """None when it was not measured."""
        if self.measured is None:
            return None
        best = self.low if self.at_most else self.high
        figure = best if self.noise and best is not None else self.measured
        return figure <= self.bound if self.at_most else figure >= self.bound

    @property
    def gap(self) -> float | None:
        """How far past the bound the figure lies, relative to the bound; negative when met."""
        if self.measured is None:
            return None
        return (self.measured / self.bound - 1) * (1 if self.at_most else -1)

    @property
    def verdict(self) -> str:
        """In words; where the repeats lie on both sides of the bound there is none."""
        if self.measured is None or self.gap is None:
            return "not measured"
        low, high = self.low or self.measured, self.high or self.measured
        if low < self.bound < high and not (self.noise and self.gap <= 0):
            return f"inconclusive (spread {50 * (high - low) / self.measured:.0f} %)"
        return "met" if self.met else f"missed by {100 * self.gap:.0f} %"

    @property
    def missed(self) -> bool:
        """Beyond what the repeats leave open."""
        return self.verdict.startswith("missed")


@dataclass(frozen=True)
class Target:
    """A bound on a figure of every case that ``when`` is true of."""

    name: str
    when: Callable[[Case], bool]
    # From a case and the times of its providers. A KeyError: one was skipped; a ZeroDivisionError:
    # nothing is left to divide by.
    figure: Figure
    bound: float | Callable[[Case], float]
    at_most: bool = False
    unit: str = "x"
    noise: bool = False
    floor: Figure | None = None  # the same figure of a floor
    repeats: bool = True  # whether it is another one in every repeat

    def outcome(self, case: Case) -> Outcome:
        providers = case["providers"]

        def evaluate(figure: Figure | None, times: Times) -> float | None:
            try:
                return figure(case, times) if figure else None
            except (KeyError, ZeroDivisionError):
                return None

        medians = {name: figures["median"] for name, figures in providers.items()}
        measured = evaluate(self.figure, medians)
        each: list[float | None] = []
        if self.repeats and measured is not None:
            turns = zip(*(f["turn_medians"] for f in providers.values()), strict=True)
            each = [evaluate(self.figure, dict(zip(providers, t, strict=True))) for t in turns]
        of_repeats = [value for value in each if value is not None]
        return Outcome(
            target=self.name,
            case=case["name"],
            bound=self.bound(case) if callable(self.bound) else self.bound,
            at_most=self.at_most,
            unit=self.unit,
            measured=measured,
            low=min(of_repeats, default=None),
            high=max(of_repeats, default=None),
            noise=self.noise,
            floor=evaluate(self.floor, medians),
        )


def outcomes(cases: list[Case]) -> list[Outcome]:
    """Every target of the cases that were run (as ``figures.collect`` returns them)."""
    timed = [case for case in cases if case["providers"]]
    timed += _pairs(timed)
    return [target.outcome(case) for target in TARGETS for case in timed if target.when(case)]


def ratio(numerator: str, denominator: str) -> Figure:
    return lambda case, times: times[numerator] / times[denominator]


def _of_copy(case: Case, times: Times) -> float:
    """Share of the copy's bandwidth, net of the engine's empty call."""
    net = max(times["fused"] - times.get("empty", 0.0), 0.0)
    return case["traffic_bytes"] / net / (case["copy_bytes"] / times["copy"])


def _extra(provider: str) -> Figure:
    """Of a call over ``x + branch(x)``, as a share of naive masking's."""
    return lambda case, times: (
        (times[provider] - times["plain"]) / max(times["naive"] - times["plain"], 0.0)
    )


def _of_ideal(provider: str) -> Figure:
    return lambda case, times: case["ideal_seconds"] / times[provider]


def _memory(case: Case, times: Times) -> float:
    return case["providers"]["fused"]["memory_of_baseline"]


def _pairs(cases: list[Case]) -> Iterator[Case]:
    """Of kernels, the two 16-bit types as providers of one case: they move the same bytes."""
    kernels = {case["name"]: case for case in cases if case["kind"] == "kernel"}
    for name, case in kernels.items():
        other = kernels.get(name.replace("-bf16-", "-fp16-"), case)
        if other is not case:
            pair = {"bf16": case["providers"].get("fused"), "fp16": other["providers"].get("fused")}
            providers = {dtype: own for dtype, own in pair.items() if own}
            yield {"kind": "halves", "name": name, "providers": providers}


# Which cases


def _all(kind: str, **described: Any) -> Callable[[Case], bool]:
    wanted = {"kind": kind, **described}
    return lambda case: all(case[key] == value for key, value in wanted.items())


def _middle(case: Case) -> bool:
    return case["kind"] == "block" and case["keep"] in (0.5, 0.75)


def _light(case: Case) -> bool:
    """Where a branch computes little for what it moves, the passes around it weigh more. Its
    stream holds all rows: what is `beside` it is the floor there."""
    return case["block"].startswith("resnet") or case["block"] == "vit-D192-N50"


def _beside(case: Case) -> bool:
    return case["kind"] == "model" or (_middle(case) and _light(case))


def _inplace(case: Case) -> bool:
    """A second branch in place moves less, and computes the same."""
    return (_middle(case) or DEEP(case)) and "fused-inplace" in case["providers"]


def _other_kernel(case: Case) -> bool:
    return case["kind"] == "kernel" and not LARGE_NORM(case)


def _index_add(case: Case) -> bool:
    return FORWARD_ADD(case) and case["dtype"] in ("fp32", "bf16")


def _moves(case: Case) -> bool:
    """Whether memory bounds it."""
    is_op = case["kind"] == "op" and case["op"] in ("compact", "scatter_add")
    return is_op or LARGE_WITHOUT_NORM(case)


def _apart(case: Case, times: Times) -> float:
    return max(times["bf16"] / times["fp16"], times["fp16"] / times["bf16"])


# Bounds that depend on the case


def _dense_bound(case: Case) -> float:
    return 1.03 if _light(case) else 1.02


def _kept_bound(case: Case) -> float:
    return 0.97 * case["batch"] / case["k"]  # of few rows, not 1 / keep


def _memory_bound(case: Case) -> float:
    return case["k"] / case["batch"] + 0.05


DEEP, MODEL = _all("depth", branches=48), _all("model")
STATIC, DYNAMIC = _all("compile", counts="static"), _all("compile", counts="dynamic")
FORWARD_ADD = _all("op", op="scatter_add", direction="fwd")
LARGE_NORM = _all("kernel", norm=True, in_cache=False)
LARGE_WITHOUT_NORM = _all("kernel", norm=False, in_cache=False)
OVER_DENSE = ratio("fused", "dense")
OVER_NAIVE, OVER_TORCH, OVER_DINOV3 = (ratio(of, "fused") for of in ("naive", "torch", "dinov3"))
at_least, at_most = Target, partial(Target, at_most=True)
never_slower = partial(Target, bound=1.0, noise=True)
TARGETS = (
    at_most(
        "fused / dense on k", _middle, OVER_DENSE, _dense_bound, floor=ratio("beside", "dense")
    ),
    at_most("fused / dense on k, 48 small branches", DEEP, OVER_DENSE, 1.1),
    at_least("naive / fused", _middle, OVER_NAIVE, _kept_bound, floor=ratio("naive", "dense")),
    never_slower("naive / fused, min_saving auto", _all("block"), ratio("naive", "fused-auto")),
    never_slower("DINOv2 style / fused", _middle, ratio("dinov2", "fused-fixed")),
    at_most("memory, fused / naive", _middle, _memory, _memory_bound, unit="%", repeats=False),
    at_least("ideal / fused", MODEL, _of_ideal("fused"), 0.97, unit="%", floor=_of_ideal("beside")),
    at_most("fused / branches on k beside the stream", _beside, ratio("fused", "beside"), 1.03),
    never_slower("fused / fused in place", _inplace, ratio("fused", "fused-inplace")),
    never_slower("PyTorch's calls / kernel", _other_kernel, OVER_TORCH),
    at_least("PyTorch's calls / norm kernel", LARGE_NORM, OVER_TORCH, 1.2),
    at_most("slower / faster of bf16 and fp16", _all("halves"), _apart, 1.15, repeats=False),
    at_least("index_add / scatter-add", _index_add, OVER_TORCH, 1.5),
    at_least("bandwidth / copy's", _moves, _of_copy, 0.9, unit="%"),
    at_most("extra per call / naive's, rows given", _all("host"), _extra("fused-rows"), 1.5),
    at_most("extra per call / naive's, with sampling", _all("host"), _extra("fused"), 2.0),
    never_slower("compiled DINOv3 style / fused, static k", STATIC, OVER_DINOV3),
    at_least("compiled DINOv3 style / fused, dynamic k", DYNAMIC, OVER_DINOV3, 1.1),
)
