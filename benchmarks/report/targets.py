"""What the package wants to reach. Only bounds stand here; every figure comes from a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
        if self.noise and best is not None:
            return best <= self.bound if self.at_most else best >= self.bound
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

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
        spans = self.low is not None and self.high is not None and self.low < self.bound < self.high
        if spans and not (self.noise and self.gap <= 0):
            return f"inconclusive (spread {50 * (self.high - self.low) / self.measured:.0f} %)"  # type: ignore[operator]
        return "met" if self.met else f"missed by {100 * self.gap:.0f} %"

    @property
    def missed(self) -> bool:
        """Beyond what the repeats leave open."""
        return self.verdict.startswith("missed")


def outcomes(cases: list[dict[str, Any]]) -> list[Outcome]:
    """Every target of the cases that were run (as ``figures.collect`` returns them)."""
    found: list[Outcome] = []
    for case in cases:
        if case["providers"]:
            found += _TARGETS.get(case["kind"], lambda _: [])(case)
    found += _halves(cases)
    return sorted(found, key=lambda outcome: _ORDER.index(outcome.target))


def _ratio(case: dict[str, Any], numerator: str, denominator: str) -> tuple[Any, Any, Any]:
    """Of the medians, and the smallest and the largest within a repeat."""
    a, b = case["providers"].get(numerator), case["providers"].get(denominator)
    if a is None or b is None:
        return None, None, None
    turns = [x / y for x, y in zip(a["turn_medians"], b["turn_medians"], strict=True)]
    return a["median"] / b["median"], min(turns), max(turns)


def _of_copy(case: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Share of the copy's bandwidth, and the smallest and the largest within a repeat."""
    turns = {name: figures["turn_medians"] for name, figures in case["providers"].items()}
    share, found = _figure(case, "fused", "of_copy_bandwidth"), []
    if share is None or "copy" not in turns:
        return share, None, None
    empty = turns.get("empty", [0.0] * len(turns["copy"]))
    for own, nothing, copy in zip(turns["fused"], empty, turns["copy"], strict=True):
        if own > nothing:
            found.append(case["traffic_bytes"] / (own - nothing) / (case["copy_bytes"] / copy))
    return share, min(found, default=None), max(found, default=None)


def _extra(case: dict[str, Any], provider: str) -> tuple[Any, Any, Any]:
    """Of a call over naive masking's, likewise."""
    turns = {name: figures["turn_medians"] for name, figures in case["providers"].items()}
    share, found = _figure(case, provider, "extra_of_baseline"), []
    if share is None:
        return None, None, None
    for own, naive, plain in zip(turns[provider], turns["naive"], turns["plain"], strict=True):
        if naive > plain:
            found.append((own - plain) / (naive - plain))
    return share, min(found, default=None), max(found, default=None)


def _figure(case: dict[str, Any], provider: str, key: str) -> Any:
    return case["providers"].get(provider, {}).get(key)


STACK, INPLACE = "fused / dense on k, 48 small branches", "fused / fused in place"
FLOOR, SPEEDUP, MEMORY = "fused / dense on k", "naive / fused", "memory, fused / naive"
MODEL_FLOOR = "fused / branches on k beside the stream"
NEVER_SLOWER, DINO = "naive / fused, min_saving auto", "DINOv2 style / fused"
IDEAL, ADD, BANDWIDTH = "ideal / fused", "index_add / scatter-add", "bandwidth / copy's"
KERNEL, NORM_KERNEL = "PyTorch's calls / kernel", "PyTorch's calls / norm kernel"
HALVES = "slower / faster of bf16 and fp16"
HOST, HOST_DRAWN = "extra per call / naive's, rows given", "extra per call / naive's, with sampling"
STATIC, DYNAMIC = (
    "compiled DINOv3 style / fused, static k",
    "compiled DINOv3 style / fused, dynamic k",
)
_ORDER = (
    *(FLOOR, STACK, SPEEDUP, NEVER_SLOWER, DINO, MEMORY, IDEAL, MODEL_FLOOR, INPLACE),
    *(KERNEL, NORM_KERNEL, HALVES),
    *(ADD, BANDWIDTH, HOST, HOST_DRAWN, STATIC, DYNAMIC),
)


def _block(case: dict[str, Any]) -> list[Outcome]:
    # Of few rows, those that are kept are another share than keep.
    name, keep, share_kept = case["name"], case["keep"], case["k"] / case["batch"]
    never = Outcome(
        NEVER_SLOWER, name, 1.0, False, "x", *_ratio(case, "naive", "fused-auto"), noise=True
    )
    if keep not in (0.5, 0.75):
        return [never]
    share = _figure(case, "fused", "memory_of_baseline")
    # Where a branch computes little for what it moves, the passes around it weigh more. Its stream
    # holds all rows: what is `beside` it is the floor there.
    light = case["block"].startswith("resnet") or case["block"] == "vit-D192-N50"
    beside = Outcome(MODEL_FLOOR, name, 1.03, True, "x", *_ratio(case, "fused", "beside"))
    return [
        *([beside] if light else []),
        *_inplace(case),
        Outcome(MEMORY, name, share_kept + 0.05, True, "%", share),
        Outcome(
            FLOOR,
            name,
            1.03 if light else 1.02,
            True,
            "x",
            *_ratio(case, "fused", "dense"),
            floor=_ratio(case, "beside", "dense")[0],
        ),
        Outcome(
            SPEEDUP,
            name,
            0.97 / share_kept,
            False,
            "x",
            *_ratio(case, "naive", "fused"),
            floor=_ratio(case, "naive", "dense")[0],
        ),
        never,
        Outcome(DINO, name, 1.0, False, "x", *_ratio(case, "dinov2", "fused-fixed"), noise=True),
    ]


def _inplace(case: dict[str, Any]) -> list[Outcome]:
    """A second branch in place moves less, and computes the same."""
    if "fused-inplace" not in case["providers"]:
        return []
    ratio = _ratio(case, "fused", "fused-inplace")
    return [Outcome(INPLACE, case["name"], 1.0, False, "x", *ratio, noise=True)]


def _depth(case: dict[str, Any]) -> list[Outcome]:
    if case["branches"] != 48:
        return []
    ratio = _ratio(case, "fused", "dense")
    return [Outcome(STACK, case["name"], 1.1, True, "x", *ratio), *_inplace(case)]


def _model(case: dict[str, Any]) -> list[Outcome]:
    name = case["name"]
    of_ideal, floor = _figure(case, "fused", "of_ideal"), _figure(case, "beside", "of_ideal")
    turns = case["providers"].get("fused", {}).get("turn_medians", ())
    shares = [case["ideal_seconds"] / own for own in turns] if case.get("ideal_seconds") else []
    low, high = min(shares, default=None), max(shares, default=None)
    return [
        Outcome(IDEAL, name, 0.97, False, "%", of_ideal, low, high, floor=floor),
        Outcome(MODEL_FLOOR, name, 1.03, True, "x", *_ratio(case, "fused", "beside")),
    ]


def _op(case: dict[str, Any]) -> list[Outcome]:
    if case["op"] not in ("compact", "scatter_add"):
        return []
    found = [Outcome(BANDWIDTH, case["name"], 0.9, False, "%", *_of_copy(case))]
    if case["op"] == "scatter_add" and case["direction"] == "fwd" and case["dtype"] != "mixed":
        speedup = _ratio(case, "torch", "fused")
        found.append(Outcome(ADD, case["name"], 1.5, False, "x", *speedup))
    return found


def _kernel(case: dict[str, Any]) -> list[Outcome]:
    name, speedup = case["name"], _ratio(case, "torch", "fused")
    if case["norm"] and not case["in_cache"]:
        return [Outcome(NORM_KERNEL, name, 1.2, False, "x", *speedup)]
    found = [Outcome(KERNEL, name, 1.0, False, "x", *speedup, noise=True)]
    if case["copies"] and not case["in_cache"]:
        found.append(Outcome(BANDWIDTH, name, 0.9, False, "%", *_of_copy(case)))
    return found


def _halves(cases: list[dict[str, Any]]) -> list[Outcome]:
    """The two 16-bit types beside each other: they move the same bytes."""
    found = []
    kernels = {case["name"]: case for case in cases if case["kind"] == "kernel"}
    for name, case in kernels.items():
        other = kernels.get(name.replace("-bf16-", "-fp16-"))
        if other is None or other is case:
            continue
        pair = [each["providers"].get("fused", {}).get("median") for each in (case, other)]
        ratio = max(pair) / min(pair) if None not in pair else None
        found.append(Outcome(HALVES, name, 1.15, True, "x", ratio))
    return found


def _host(case: dict[str, Any]) -> list[Outcome]:
    return [
        Outcome(title, case["name"], bound, True, "x", *_extra(case, provider))
        for provider, bound, title in (("fused-rows", 1.5, HOST), ("fused", 2.0, HOST_DRAWN))
    ]


def _compile(case: dict[str, Any]) -> list[Outcome]:
    ratio = _ratio(case, "dinov3", "fused")
    if case["counts"] == "static":
        return [Outcome(STATIC, case["name"], 1.0, False, "x", *ratio, noise=True)]
    if case["counts"] == "dynamic":
        return [Outcome(DYNAMIC, case["name"], 1.1, False, "x", *ratio)]
    return []


_TARGETS: dict[str, Callable[[dict[str, Any]], list[Outcome]]] = {
    "block": _block,
    "depth": _depth,
    "model": _model,
    "op": _op,
    "kernel": _kernel,
    "host": _host,
    "compile": _compile,
}
