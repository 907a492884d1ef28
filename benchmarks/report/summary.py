"""The printed end of a run: one screen of 80 columns."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report.page import warnings
from benchmarks.report.table import percent, seconds

WIDTH, LABEL, BAR = 80, 31, 24
MOST = 5  # comparisons
Case = dict[str, Any]


def _kept_share(case: Case) -> float:
    return 1 / case["ideal_speedup"] if case.get("ideal_speedup") else case["k"] / case["batch"]


def _label(case: Case) -> str:
    if case["kind"] == "model":
        return f"{case['label']}, drop {case['drop']:g}"
    if case["kind"] == "depth":
        return f"{case['branches']} small branches, keep {case['keep']:g}"
    return f"{case['label']} block, keep {case['keep']:g}"


def headlines(cases: list[Case]) -> list[Case]:
    """Few that stand for many: models first, then a block of each kind, then the deepest stack."""

    def of(kind: str) -> list[Case]:
        timed = (case for case in cases if case["kind"] == kind)
        return [case for case in timed if {"naive", "fused"} <= case["providers"].keys()]

    blocks: dict[str, Case] = {}  # at keep 0.5 where there is one
    for case in sorted(of("block"), key=lambda case: abs(case["keep"] - 0.5)):
        blocks.setdefault(case["label"], case)
    stacks = sorted(of("depth"), key=lambda case: case["branches"])[-1:]
    models = of("model")[: MOST - 1 - len(stacks)]
    room = MOST - len(models) - len(stacks)
    return [*models, *list(blocks.values())[:room], *stacks]


def _bar(share: float) -> str:
    full = "\u2588" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    return (full * max(round(share * BAR), 1)).ljust(BAR)


def _bars(cases: list[Case]) -> Iterator[str]:
    """Two lines a case, DINO style and the op, as long as they are faster than naive masking."""
    figures = [
        (name, case["providers"][provider]["speedup"], case)
        for case in cases
        for provider, name in (("dinov2", "DINO style"), ("fused", "sdkernels"))
        if provider in case["providers"]
    ]
    longest = max(speedup for _, speedup, _ in figures)
    said = None
    for name, speedup, case in figures:
        label = "" if case is said else textwrap.shorten(_label(case), LABEL, placeholder="")
        said = case
        ideal = f" of {1 / _kept_share(case):.2f}" if name == "sdkernels" else ""
        line = f"{label:{LABEL}} {name:10} {_bar(speedup / longest)} {speedup:4.2f}{ideal}"
        yield line.rstrip()


def _others(cases: list[Case]) -> Iterator[str]:
    """What has no bars, one line a kind."""
    against = {
        "op": "building blocks against PyTorch's",
        "kernel": "kernels against PyTorch's calls",
        "compile": "compiled blocks against DINOv3 style",
        "break_even": "blocks of which few rows are dropped",
    }
    for kind, text in against.items():
        found = [
            case["providers"][provider]["speedup"]
            for case in cases
            for provider in ("fused", "compact")
            if case["kind"] == kind and "speedup" in case["providers"].get(provider, {})
        ]
        if found:
            line = f"{len(found)} {text}: median {median(found):.2f} times as fast"
            yield line + f" ({min(found):.2f} to {max(found):.2f})" * (len(found) > 1)
    for case in cases:
        share = case["providers"].get("fused", {}).get("extra_of_baseline")
        if case["kind"] == "host" and share is not None:
            yield f"host time of a call: {share:.2f} times what naive masking adds"


def _training(training: dict[str, Any]) -> Iterator[str]:
    variants, apart = training["variants"], training["largest_loss_difference"]
    fused, naive = variants["fused"], variants["naive"]
    accuracies = [variant["validation_accuracy"][-1] for variant in (fused, naive)]
    yield (
        f"Digits, {training['steps']} steps: a step takes {seconds(fused['step']['median'])} for "
        f"{seconds(naive['step']['median'])} ({fused['speedup']:.2f} times as fast); right on "
        f"{percent(accuracies[0])} of the held out for {percent(accuracies[1])}."
    )
    yardstick = apart.get("naive-perturbed")
    against = f"; weights changed by 1e-7 alone: {yardstick:.0e}" if yardstick else ""
    yield f"Losses agree with naive masking to {apart['fused']:.0e} in every step{against}."


def summary(result: dict[str, Any], directory: Path, plots: list[str]) -> str:
    """Machine, comparisons, training, and where the rest is."""
    env, cases = result["environment"], result["cases"]
    shown, digits = headlines(cases), result["training"]
    machine = env["gpu"] if result["device"].startswith("cuda") else env["cpu"]
    used = env.get("instruction_set")
    parts = [
        f"{machine}, {env['cores']} cores, {env['threads']} threads.",
        f"Backend {env.get('backend') or '?'}{f', CPU kernels for {used}' if used else ''}; torch "
        f"{env['torch']}, sdkernels {env['sdkernels']}, commit {env['commit'] or 'unknown'}.",
    ]
    lines = ["", *(line for part in parts for line in textwrap.wrap(part, WIDTH)), ""]
    if shown:
        lines += ["Forward + backward, times as fast as naive masking (of what is ideal)", ""]
        lines += [*_bars(shown), ""]
    notes = [*_others(cases)]
    for group in (notes, [*_training(digits)] if digits else [], warnings(result)):
        wrapped = [line for text in group for line in textwrap.wrap(text, WIDTH)]
        lines += [*wrapped, ""] if wrapped else []
    names = ", ".join(["report.md", "results.json", *plots[:2], *(["..."] if plots[2:] else [])])
    lines.append(f"{result['seconds']:.0f} s. All figures and plots: {directory}/")
    lines += textwrap.wrap(f"  {names}", WIDTH)
    return "\n".join(lines)
