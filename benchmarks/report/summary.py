"""The printed end of a run: one screen of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report.page import warnings
from benchmarks.report.table import Table, percent, ratio, seconds

WIDTH = 80
Case = dict[str, Any]


def _label(case: Case) -> str:
    if case["kind"] == "model":
        return f"{case['label']}, drop {case['drop']:g}"
    if case["kind"] == "depth":
        return f"{case['branches']} small branches, keep {case['keep']:g}"
    return f"{case['label']}, keep {case['keep']:g}"


def headlines(cases: list[Case]) -> list[Case]:
    """Few that stand for many: two models, a block of each kind, and the deepest stack."""

    def of(kind: str) -> list[Case]:
        timed = (case for case in cases if case["kind"] == kind)
        return [case for case in timed if {"naive", "fused"} <= case["providers"].keys()]

    blocks: dict[str, Case] = {}  # the first of each family, at keep 0.5 where there is one
    for case in sorted(of("block"), key=lambda case: abs(case["keep"] - 0.5)):
        blocks.setdefault(case["block"].split("-")[0], case)
    deepest = sorted(of("depth"), key=lambda case: case["branches"])[-1:]
    return [*of("model")[:2], *blocks.values(), *deepest]


def _bound(case: Case) -> float | None:
    """Times as fast as naive masking, were a branch of fewer samples and nothing else to pay."""
    dense = case["providers"].get("dense", {}).get("median")
    best = case.get("ideal_seconds") if case["kind"] == "model" else dense
    return case["providers"]["naive"]["median"] / best if best else None


def _speedup(provider: str) -> Callable[[Case], str]:
    return lambda case: ratio(case["providers"].get(provider, {}).get("speedup"), 2)


_COLUMNS: dict[str, Callable[[Case], object]] = {
    "times as fast as naive masking": _label,
    "DINO style": _speedup("dinov2"),
    "sdkernels": _speedup("fused"),
    "kept samples' work alone": lambda case: ratio(_bound(case), 2),
}


def _others(cases: list[Case]) -> Iterator[str]:
    """One line a kind."""
    against = {
        "op": "ops against PyTorch's, with autograd",
        "kernel": "kernels against PyTorch's calls",
        "compile": "compiled blocks against DINOv3's code",
        "break_even": "blocks of which few rows are dropped",
    }
    for kind, text in against.items():
        provider = "compact" if kind == "break_even" else "fused"
        those = [case["providers"].get(provider, {}) for case in cases if case["kind"] == kind]
        found = [figures["speedup"] for figures in those if "speedup" in figures]
        if found:
            line = f"{len(found)} {text}: {median(found):.2f} times as fast"
            yield line + f" ({min(found):.2f} to {max(found):.2f})" * (len(found) > 1)
    for case in cases:
        share = case["providers"].get("fused", {}).get("extra_of_baseline")
        if case["kind"] == "host" and share is not None:
            yield f"Host time of a call: {share:.2f} times what naive masking adds"


def _training(training: dict[str, Any]) -> Iterator[str]:
    apart = training["largest_loss_difference"]
    naive, fused = (training["variants"][name] for name in ("naive", "fused"))
    right = [percent(variant["validation_accuracy"][-1], 0) for variant in (naive, fused)]
    yield (
        f"Digits, {training['steps']} steps, naive masking and sdkernels with the same samples: "
        f"{seconds(naive['step']['median'])} and {seconds(fused['step']['median'])} a step, "
        f"{right[0]} and {right[1]} of the held out right."
    )
    yardstick = apart.get("naive-perturbed")
    against = f" (after a change of the weights by 1e-7: {yardstick:.0e})" if yardstick else ""
    yield f"Their losses differ by {apart['fused']:.0e} at most{against}."


def summary(result: dict[str, Any], directory: Path, plots: list[str]) -> str:
    """Machine, comparisons, training, and where the rest is."""
    env, shown = result["environment"], headlines(result["cases"])
    machine = env["gpu"] if result["device"].startswith("cuda") else env["cpu"]
    used = env.get("instruction_set")
    about = (
        f"{machine}, {env['cores']} cores, {env['threads']} threads; backend "
        f"{env.get('backend') or 'unknown'}"
        + (f", CPU kernels for {used}" if used else "")
        + f"; torch {env['torch']}, commit {env['commit'] or 'unknown'}"
    )
    names = ", ".join(["report.md", "results.json", *plots[:2], *(["..."] if plots[2:] else [])])
    parts = [
        [about],
        [Table.of("", _COLUMNS, [shown], names=1).text(WIDTH)] if shown else [],
        _others(result["cases"]),
        _training(result["training"]) if result["training"] else [],
        warnings(result),
        [f"{result['seconds']:.0f} s. Every figure and the targets: {directory}/", names],
    ]
    texts = ["\n".join(map(_wrapped, part)) for part in parts]
    return "\n\n".join(text for text in texts if text)


def _wrapped(text: str) -> str:
    if "\n" in text or len(text) <= WIDTH:
        return text
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
