"""Step times of several networks in one run: in turns, with spread and with what is ideal."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.figures import merge

Step = Callable[[], float]


def make_step(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """A training step with SGD; returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    model.train()

    def step() -> float:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def in_turns(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step, the variants one after the other in each repeat; a first round warms
    up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(
    seconds: dict[str, list[float]], keep: dict[str, float], skeleton: str | None = "skeleton"
) -> list[dict[str, Any]]:
    """Each variant against "constant" and against its ideal.

    The mean is compared, not the median: a gate for the whole mini-batch makes steps of all
    lengths, and what training takes is their sum. The ideal pays in full for what is around the
    blocks (``skeleton``) and for the mean kept share of the blocks.

    Args:
        seconds: of :func:`in_turns`.
        keep: the mean survival probability of the variants that drop.
    """
    constant = mean(seconds["constant"])
    around = mean(seconds[skeleton]) if skeleton else 0.0
    rows = []
    for name, samples in seconds.items():
        if name == skeleton:
            continue
        own, merged = mean(samples), merge([[s] for s in samples])
        ideal = around + (constant - around) * keep.get(name, 1.0)
        rows.append(
            {
                "variant": name,
                "seconds": own,
                "p20": merged.p20,
                "p80": merged.p80,
                # Of the mean: one standard deviation of it.
                "error": (sum((s - own) ** 2 for s in samples) / len(samples) ** 2) ** 0.5,
                "of_constant": own / constant,
                "ideal": ideal / constant,
            }
        )
    return rows
