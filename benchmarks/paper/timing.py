"""Step times of several networks in one run: in turns, against constant depth and what is ideal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report.figures import merge
from sdkernels import DepthPlan
from sdkernels.measure.turns import time_in_turns

CONSTANT, SKELETON, FLOOR = "constant", "skeleton", "floor"


@dataclass
class Timed:
    """A network's training step, and the law of its blocks."""

    model: nn.Module
    drop_probs: list[float]  # of every block; empty where none is dropped
    mode: str = "row"  # or "batch"
    masked: bool = False  # every sample runs every block; what is dropped is multiplied by zero
    floor: str | None = None  # name of the network that does this one's necessary work alone

    @property
    def keep(self) -> float:
        """The mean survival probability."""
        return 1 - mean(self.drop_probs) if self.drop_probs else 1.0

    def plan(self, step: int, batch: int, device: torch.device) -> DepthPlan | None:
        """The rows of a step, alike for all networks of a law; None where nothing is dropped."""
        if not self.drop_probs:
            return None
        law = {"mode": self.mode, "rescale": "eval", "device": device}
        return DepthPlan.for_step(0, step, batch, self.drop_probs, **law)


@dataclass
class Sample:
    """One step: its seconds, and the share of samples and blocks that it computed."""

    seconds: float
    kept: float
    loss: float


def in_turns(
    networks: dict[str, Timed], images: Tensor, labels: Tensor, repeats: int
) -> dict[str, list[Sample]]:
    """Training steps with SGD, the networks one after the other in each repeat; a first round
    warms up. The rows of a repeat are the same for all networks of a law."""
    device, batch = images.device, len(labels)
    done: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}

    def stepper(name: str, timed: Timed) -> Callable[[], None]:
        timed.model.to(device).train()
        optimizer = torch.optim.SGD(timed.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

        def step() -> None:
            plan = timed.plan(len(done[name]), batch, device)
            loss = F.cross_entropy(timed.model(images, plan), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            computes_all = plan is None or timed.masked
            kept = 1.0 if computes_all else sum(rows.k for rows in plan) / (batch * len(plan))
            done[name].append((kept, loss.item()))

        return step

    steps = {name: stepper(name, timed) for name, timed in networks.items()}
    seconds = time_in_turns(steps, device, repeats).seconds
    return {
        name: [Sample(own, *each) for own, each in zip(seconds[name], done[name][1:], strict=True)]
        for name in networks
    }


def table(networks: dict[str, Timed], samples: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    """Each network against "constant" and against its ideal.

    A step's ideal pays in full for what is around the blocks ("skeleton", nothing where there is no
    such network) and for the share of the blocks that its own rows kept. How far a network is from
    it is the median over the repeats, within which all networks have run next to each other; its
    time as a share of constant depth's is that factor times the ideal at the mean kept share. (A
    gate for the whole mini-batch makes steps of all lengths: a few of them have no typical mean.)

    The ideal takes every block for equally dear and its time for proportional to its rows. A floor
    is measured instead: what stands around the blocks, and their branches for as many rows.
    """
    rows = []
    seconds = {name: np.array([s.seconds for s in each]) for name, each in samples.items()}
    whole = seconds[CONSTANT]
    around = seconds.get(SKELETON, np.zeros_like(whole))
    constant, rest = float(np.median(whole)), float(np.median(around))
    for name, timed in networks.items():
        if name == SKELETON:
            continue
        kept = np.array([s.kept for s in samples[name]])
        spread = merge([(seconds[name] / (around + (whole - around) * kept)).tolist()])
        ideal = (rest + (constant - rest) * timed.keep) / constant
        computed = 1.0 if timed.masked else ideal
        over_floor = seconds[name] / seconds[timed.floor] if timed.floor is not None else None
        rows.append(
            {
                "variant": name,
                "seconds": float(np.median(seconds[name])),
                "kept": timed.keep,
                "over_ideal": spread.median * computed / ideal,
                "over_floor": None if over_floor is None else float(np.median(over_floor)),
                "ideal": ideal,
                "of_constant": spread.median * computed,
                "low": spread.p20 * computed,
                "high": spread.p80 * computed,
                "losses": [s.loss for s in samples[name]],
            }
        )
    return rows
