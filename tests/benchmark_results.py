"""Results of a run that never was: every kind of case, with times that follow a simple law."""

import itertools

import torch

from benchmarks.cases import presets
from benchmarks.measure.environment import environment
from benchmarks.measure.memory import SAVED
from benchmarks.report import figures, targets

CPU = torch.device("cpu")
# Seconds of a provider, from the share of the rows that it computes and what it adds to that.
LAWS = {
    "naive": lambda keep: 1.02,
    "dinov2": lambda keep: keep + 0.06,
    "dinov3": lambda keep: keep + 0.05,
    "dense": lambda keep: keep + 0.001,
    "beside": lambda keep: keep + 0.005,
    "undropped": lambda keep: 1.0,
    "skeleton": lambda keep: 0.1,
    "whole": lambda keep: 1.01,
    "compact": lambda keep: keep + 0.05,
    "copy": lambda keep: 0.4,
    "empty": lambda keep: 0.01,
    "torch": lambda keep: 0.8,
    "plain": lambda keep: 0.2,
}


def timed(case, scale=1.0, slower=()):
    """The record of a case, as the harness would keep it; providers in ``slower`` take a tenth
    more."""
    described = case.describe()
    keep = described.get("keep", 1 - described.get("dropped", described.get("drop", 0.5)))
    reasons = case.providers(CPU)
    record = {
        "case": {
            "name": case.name,
            "kind": case.kind,
            "baseline": case.baseline,
            "floor": case.floor if case.floor in reasons else None,
            **described,
        },
        "skipped": {name: reason for name, reason in reasons.items() if reason},
        "turns": {},
        "extras": {},
    }
    for name, reason in reasons.items():
        if reason:
            continue
        seconds = scale * LAWS.get(name, lambda keep: keep + 0.01)(keep)
        if name in slower:
            seconds *= 1.1
        record["turns"][name] = [
            {"wall": [seconds, 1.01 * seconds, 0.99 * seconds], "host": [], "device": []}
        ] * 2
        used = {"kind": SAVED, "bytes": int(1e8 * (1.0 if "naive" in name else keep))}
        timed_alone = case.kind in ("block", "model", "depth")
        record["extras"][name] = {
            "memory": used if timed_alone else None,
            "flops": int(1e9 * keep) if timed_alone else None,
        }
    return record


def training():
    variants = {}
    for number, (name, sampler) in enumerate(
        itertools.product(("naive", "fused"), ("bernoulli", "fixed"))
    ):
        full = name if sampler == "bernoulli" else f"{name}-fixed"
        variants[full] = {
            "sampler": sampler,
            "losses": [2.3 * 0.97**step + 1e-7 * number for step in range(60)],
            "step_seconds": [[0.02 + 0.001 * number] * 10] * 2,
            "validation_accuracy": [0.5, 0.9],
        }
    variants["naive-perturbed"] = {**variants["naive"]}
    variants["naive-perturbed"]["losses"] = [x + 2e-7 for x in variants["naive"]["losses"]]
    return figures.merge_training(
        {
            "case": "train-digits",
            "settings": {},
            "train_samples": 1437,
            "validation_samples": 360,
            "steps": 60,
            "plan_seconds": {"bernoulli": [1e-4], "fixed": [5e-5]},
            "kept_share": {"bernoulli": 0.7, "fixed": 0.7},
            "largest_loss_difference": {"fused": 1e-7},
            "variants": variants,
        }
    )


def result(preset="standard", names=None, extra=(), **changes):
    """Results of the cases of a preset (and of others), as ``python -m benchmarks`` writes them."""
    cases = [
        case
        for case in (*presets.PRESETS[preset].cases, *extra)
        if names is None or case.name in names
    ]
    collected = figures.collect(timed(case, **changes) for case in cases)
    outcomes = targets.outcomes(collected)
    return {
        "schema": figures.SCHEMA,
        "preset": preset,
        "filter": None,
        "device": "cpu",
        "command": f"python -m benchmarks --preset {preset}",
        "complete": True,
        "environment": environment(CPU),
        "seconds": 60.0,
        "cases": collected,
        "training": training(),
        "reach": [
            {**vars(outcome), "met": outcome.met, "gap": outcome.gap} for outcome in outcomes
        ],
    }
