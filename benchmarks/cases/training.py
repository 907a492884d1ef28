"""A small ViT trained on real handwritten digits by every provider from the same seed, data order
and kept rows.

The data are scikit-learn's 1797 images of 8x8 pixels. All variants take their steps in turn, so
that what the machine does meanwhile falls on all of them alike, and each step draws one plan per
sampler that naive masking and the fused op share: their loss curves then differ by rounding only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure.workload import seeded
from benchmarks.providers import digits
from benchmarks.providers.networks import seeded_module
from benchmarks.providers.residuals import Rule, dense, fused, naive
from benchmarks.providers.vit import DigitsViT
from sdkernels import DepthPlan, linear_decay

SAMPLERS = ("bernoulli", "fixed")

# name -> (sampler, residual rule, relative change of the initial weights)
#
# The last one is a yardstick: the same naive run from weights changed by one rounding error.
# Training amplifies such differences, and two correct implementations can't stay closer to each
# other than it stays to "naive".
VARIANTS: dict[str, tuple[str, Rule, float]] = {
    "naive": ("bernoulli", naive, 0.0),
    "fused": ("bernoulli", fused(), 0.0),
    "naive-fixed": ("fixed", naive, 0.0),
    "fused-fixed": ("fixed", fused(), 0.0),
    "naive-perturbed": ("bernoulli", naive, 1e-7),
}

RECORDED = ("sampler", "losses", "step_seconds", "validation_accuracy")  # of a variant

# Pairs whose loss curves have to agree.
PAIRS = {"fused": "naive", "fused-fixed": "naive-fixed", "naive-perturbed": "naive"}


@dataclass(frozen=True)
class TrainingCase:
    """Model and schedule; the same for every variant."""

    width: int = 96
    depth: int = 6
    heads: int = 4
    layer_scale: float = 0.3
    p_last: float = 0.5  # drop probability of the last branch, linear decay before it
    epochs: int = 12
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0

    kind, name = "train", "train-digits"


@dataclass
class Variant:
    """One run: its model, its optimizer and what was recorded."""

    model: DigitsViT
    optimizer: torch.optim.Optimizer
    sampler: str
    rule: Rule
    losses: list[float] = field(default_factory=list)
    step_seconds: list[list[float]] = field(default_factory=list)  # per epoch
    validation_accuracy: list[float] = field(default_factory=list)  # per epoch

    def step(self, images: Tensor, labels: Tensor, drop: list[float], plan: DepthPlan) -> float:
        loss = F.cross_entropy(self.model(images, self.rule, drop, list(plan)), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        correct = self.model(images, dense).argmax(1) == labels
        return correct.double().mean().item()


def load_digits_split(device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """Training images, training labels, validation images, validation labels.

    1437 and 360 images [n, 1, 8, 8], stratified by class, standardised by the training split.
    """
    images, labels, train, held_out = digits.load(seed)
    images = (images - images[train].mean()) / images[train].std()
    split = (images[train], labels[train], images[held_out], labels[held_out])
    return tuple(tensor.to(device) for tensor in split)


def _start(case: TrainingCase, name: str, device: torch.device) -> Variant:
    sampler, rule, perturbation = VARIANTS[name]

    def make() -> DigitsViT:
        model = DigitsViT(case.width, case.depth, case.heads, case.layer_scale)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + perturbation * torch.randn_like(parameter))
        return model

    model = seeded_module(make, case.seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=case.weight_decay)
    return Variant(model, optimizer, sampler, rule)


def _learning_rate(case: TrainingCase, step: int, steps: int) -> float:
    """Linear warm-up over the first tenth, then half a cosine to zero."""
    warmup = max(steps // 10, 1)
    if step < warmup:
        return case.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return case.learning_rate * (1 + math.cos(math.pi * progress)) / 2


@contextmanager
def _stopwatch(seconds: list[float], device: torch.device) -> Iterator[None]:
    """Appends the time that the block took."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    seconds.append(time.perf_counter() - start)


def train(
    case: TrainingCase, device: torch.device, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Trains all variants side by side and returns a JSON-ready record.

    ``advance`` is called after each step of all variants.
    """
    train_x, train_y, val_x, val_y = load_digits_split(device, case.seed)
    variants = {name: _start(case, name, device) for name in VARIANTS}
    drop = linear_decay(2 * case.depth, case.p_last)  # two branches a block
    order, rows_generator = seeded(case.seed), seeded(case.seed + 1)
    plan_seconds: dict[str, list[float]] = {sampler: [] for sampler in SAMPLERS}
    kept_rows = dict.fromkeys(SAMPLERS, 0)
    per_epoch = len(train_x) // case.batch  # what is left over waits for the next shuffle
    steps = per_epoch * case.epochs

    for step in range(steps):
        position = step % per_epoch
        if position == 0:
            shuffled = torch.randperm(len(train_x), generator=order).to(device)
            for variant in variants.values():
                variant.step_seconds.append([])
        batch = shuffled[position * case.batch : (position + 1) * case.batch]

        plans = {}
        for sampler in SAMPLERS:
            with _stopwatch(plan_seconds[sampler], device):
                plans[sampler] = DepthPlan.sample(
                    case.batch, drop, sampler=sampler, generator=rows_generator, device=device
                )
            kept_rows[sampler] += sum(rows.k for rows in plans[sampler])

        names = list(variants)
        first = step % len(names)  # nobody always runs after the same neighbour
        for name in names[first:] + names[:first]:
            variant = variants[name]
            for group in variant.optimizer.param_groups:
                group["lr"] = _learning_rate(case, step, steps)
            with _stopwatch(variant.step_seconds[-1], device):
                loss = variant.step(train_x[batch], train_y[batch], drop, plans[variant.sampler])
            variant.losses.append(loss)
        if position == per_epoch - 1:
            for variant in variants.values():
                variant.validation_accuracy.append(variant.accuracy(val_x, val_y))
        advance()

    def difference(name: str, other: str) -> float:
        pairs = zip(variants[name].losses, variants[other].losses, strict=True)
        return max(abs(a - b) for a, b in pairs)

    return {
        "case": case.name,
        "settings": asdict(case),
        "train_samples": len(train_x),
        "validation_samples": len(val_x),
        "steps": steps,
        "plan_seconds": plan_seconds,
        "kept_share": {s: kept_rows[s] / (steps * len(drop) * case.batch) for s in SAMPLERS},
        "variants": {
            name: {key: getattr(variant, key) for key in RECORDED}
            for name, variant in variants.items()
        },
        "largest_loss_difference": {name: difference(name, other) for name, other in PAIRS.items()},
    }
