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

WIDTH, LABEL, NAME, BAR = 80, 28, 13, 22
MOST = 4  # comparisons
SHOWN = {"dinov2": "DINO style", "fused": "sdkernels"}
Case = dict[str, Any]


def _label(case: Case) -> str:
    if case["kind"] == "model":
        return f"{case['label']}, drop {case['drop']:g}"
    if case["kind"] == "depth":
        return f"{case['branches']} small branches, keep {case['keep']:g}"
    return f"{case['label']}, keep {case['keep']:g}".replace(", stage", " stage")


def headlines(cases: list[Case]) -> list[Case]:
    """Few that stand for many: a model first, then a block of each kind, then the deepest stack."""

    def of(kind: str) -> list[Case]:
        timed = (case for case in cases if case["kind"] == kind)
        return [case for case in timed if {"naive", "fused"} <= case["providers"].keys()]

    blocks: dict[str, Case] = {}  # the first of each family, at keep 0.5 where there is one
    for case in sorted(of("block"), key=lambda case: abs(case["keep"] - 0.5)):
        blocks.setdefault(case["block"].split("-")[0], case)
    stacks = sorted(of("depth"), key=lambda case: case["branches"])[-1:]
    models = of("model")[: MOST - len(stacks) - min(len(blocks), 2)]
    return [*models, *list(blocks.values())[: MOST - len(models) - len(stacks)], *stacks]


def _bound(case: Case) -> float | None:
    """Times as fast as naive masking, were a branch of fewer samples and nothing else to pay."""
    naive = case["providers"]["naive"]["median"]
    dense = case["providers"].get("dense", {}).get("median")
    best = case.get("ideal_seconds") if case["kind"] == "model" else dense
    return naive / best if best else None


def _bars(cases: list[Case]) -> Iterator[str]:
    """A line a provider, as long as it is faster than naive masking."""
    full = "\u2588" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    figures = [
        (case, provider, case["providers"][provider]["speedup"])
        for case in cases
        for provider in SHOWN
        if provider in case["providers"]
    ]
    longest = max(1.0, *(speedup for _, _, speedup in figures))

    def line(label: str, name: str, speedup: float, bound: str = "") -> str:
        bar = full * max(round(speedup / longest * BAR), 1)
        return f"{label[:LABEL]:{LABEL}} {name:{NAME}} {bar:{BAR}} {speedup:5.2f}{bound}"

    yield line("", "naive masking", 1.0)
    said = None
    for case, provider, speedup in figures:
        label = "" if case is said else _label(case)
        bound = _bound(case) if provider == "fused" else None
        yield line(label, SHOWN[provider], speedup, f" ({bound:.2f})" if bound else "")
        said = case


def _others(cases: list[Case]) -> Iterator[str]:
    """What has no bars, one line a kind."""
    against = {
        "op": "ops against PyTorch's, with autograd",
        "kernel": "kernels against PyTorch's calls",
        "compile": "compiled blocks against DINOv3's code",
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
            line = f"{len(found)} {text}: {median(found):.2f} times as fast"
            yield line + f" ({min(found):.2f} to {max(found):.2f})" * (len(found) > 1)
    for case in cases:
        share = case["providers"].get("fused", {}).get("extra_of_baseline")
        if case["kind"] == "host" and share is not None:
            yield f"Host time of a call: {share:.2f} times what naive masking adds"


def _training(training: dict[str, Any]) -> Iterator[str]:
    variants, apart = training["variants"], training["largest_loss_difference"]
    fused, naive = variants["fused"], variants["naive"]
    accuracies = [percent(variant["validation_accuracy"][-1], 0) for variant in (fused, naive)]
    yield (
        f"Digits, {training['steps']} steps, naive masking and sdkernels with the same samples: "
        f"{seconds(naive['step']['median'])} and {seconds(fused['step']['median'])} a step, "
        f"{accuracies[1]} and {accuracies[0]} of the held out right."
    )
    yardstick = apart.get("naive-perturbed")
    against = f" (after a change of the weights by 1e-7: {yardstick:.0e})" if yardstick else ""
    yield f"Their losses differ by {apart['fused']:.0e} at most{against}."


def summary(result: dict[str, Any], directory: Path, plots: list[str]) -> str:
    """Machine, comparisons, training, and where the rest is."""
    env, cases = result["environment"], result["cases"]
    shown, digits = headlines(cases), result["training"]
    machine = env["gpu"] if result["device"].startswith("cuda") else env["cpu"]
    used = env.get("instruction_set")
    about = (
        f"{machine}, {env['cores']} cores, {env['threads']} threads; backend "
        f"{env.get('backend') or 'unknown'}"
        + (f", CPU kernels for {used}" if used else "")
        + f"; torch {env['torch']}, commit {env['commit'] or 'unknown'}"
    )
    parts = [[about]]
    if shown:
        title = "Times as fast as naive masking, forward + backward (kept samples' work alone)"
        parts.append([title, *_bars(shown)])
    parts += [[*_others(cases)], [*_training(digits)] if digits else [], warnings(result)]
    names = ", ".join(["report.md", "results.json", *plots[:2], *(["..."] if plots[2:] else [])])
    parts.append([f"{result['seconds']:.0f} s. Every figure and the targets: {directory}/", names])
    return "\n\n".join(
        "\n".join(
            line
            if len(line) <= WIDTH
            else textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False)
            for line in part
        )
        for part in parts
        if part
    )
