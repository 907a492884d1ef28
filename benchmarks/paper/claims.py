"""The paper's claims, each an experiment that returns a record: tables, curves, and what the paper
says beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from benchmarks.measure.memory import measure as measure_memory
from benchmarks.measure.workload import Workload
from benchmarks.paper.data import Data
from benchmarks.paper.networks import (
    PaperResNet,
    PaperResNet152,
    drop_probabilities,
    expected_depth,
)
from benchmarks.paper.timing import CONSTANT, FLOOR, SKELETON, Timed, in_turns, table
from benchmarks.paper.training import Recipe, Trainer
from benchmarks.providers.networks import seeded_module
from sdkernels import DepthPlan

Record = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How much a preset spends on each claim; the paper's own sizes are those of "full"."""

    name: str
    duration: str
    recipe: Recipe  # of what is trained
    seeds: int
    time_depth: int
    time_batch: int
    time_repeats: int
    survivals: tuple[float, ...]  # of the claim on decay
    decay_recipe: Recipe
    deep_depth: int
    deep_batch: int
    deep_steps: int
    image: int  # of ResNet-152
    image_batch: int
    image_repeats: int


_DIGITS = Recipe(depth=20, epochs=12, batch=64, mode="row")
EFFORTS = {
    effort.name: effort
    for effort in (
        Effort(
            name="smoke",
            duration="under a minute; figures mean nothing",
            recipe=replace(_DIGITS, depth=8, epochs=2, batch=512),
            seeds=2,
            time_depth=14,
            time_batch=8,
            time_repeats=2,
            survivals=(0.5, 1.0),
            decay_recipe=replace(_DIGITS, depth=8, epochs=1, batch=512),
            deep_depth=20,
            deep_batch=4,
            deep_steps=2,
            image=64,
            image_batch=2,
            image_repeats=1,
        ),
        Effort(
            name="quick",
            duration="about 5 minutes on 2 cores",
            recipe=replace(_DIGITS, epochs=8),
            seeds=2,
            time_depth=110,
            time_batch=64,
            time_repeats=6,
            survivals=(0.2, 0.5, 0.8, 1.0),
            decay_recipe=replace(_DIGITS, depth=14, epochs=4),
            deep_depth=1202,
            deep_batch=4,
            deep_steps=3,
            image=96,
            image_batch=8,
            image_repeats=3,
        ),
        Effort(
            name="standard",
            duration="about 45 minutes on 2 cores",
            recipe=replace(_DIGITS, epochs=30),
            seeds=4,
            time_depth=110,
            time_batch=64,
            time_repeats=16,
            survivals=(0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0),
            decay_recipe=replace(_DIGITS, depth=14, epochs=8),
            deep_depth=1202,
            deep_batch=8,
            deep_steps=8,
            image=128,
            image_batch=8,
            image_repeats=10,
        ),
        Effort(
            name="full",
            duration="days on one GPU; not yet run",
            recipe=Recipe(),
            seeds=3,
            time_depth=110,
            time_batch=128,
            time_repeats=100,
            survivals=tuple(share / 10 for share in range(1, 11)),
            decay_recipe=Recipe(),
            deep_depth=1202,
            deep_batch=128,
            deep_steps=20,
            image=224,
            image_batch=128,
            image_repeats=30,
        ),
    )
}


@dataclass
class Lab:
    """What an experiment has at hand.

    Args:
        directory: keeps a checkpoint of every training run, so that claims share runs and a
            stopped claim goes on; None keeps nothing.
        advance: told what is being done.
    """

    effort: Effort
    data: Data
    device: torch.device
    directory: Path | None = None
    advance: Callable[[str], None] = field(default=lambda doing: None)

    def train(self, recipe: Recipe) -> Record:
        """The record of a run, which is trained unless it already was."""
        folder = None
        if self.directory is not None:
            key = f"{recipe} {self.data.name}"
            folder = self.directory / hashlib.sha256(key.encode()).hexdigest()[:16]
        trainer = Trainer(recipe, self.data, self.device, folder)
        return trainer.run()


def _mean_keep(drop: list[float]) -> float:
    return 1 - mean(drop)


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _network(n: int, data: Data, drop: list[float], mode: str, implementation: str) -> nn.Module:
    return seeded_module(
        lambda: PaperResNet(
            n, drop, data.classes, data.channels, mode=mode, implementation=implementation
        ),
    )


def _timed(
    n: int, data: Data, drop: list[float], mode: str, how: tuple[str, ...], law: str = ""
) -> dict[str, Timed]:
    """The networks of one law, by name; the fused one is set beside the floor."""
    name = f"{law}per {'sample' if mode == 'row' else 'mini-batch'}"
    return {
        f"{name}, {implementation}": Timed(
            _network(n, data, drop, mode, implementation),
            drop,
            mode,
            masked=implementation == "naive",
            floor=f"{name}, {FLOOR}" if implementation == "fused" else None,
        )
        for implementation in how
    }


def _batch(data: Data, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images, from the beginning again where there are fewer."""
    chosen = torch.arange(size) % len(data.train[1])
    return data.train[0][chosen].to(device), data.train[1][chosen].to(device)


def time_saved(lab: Lab) -> Record:
    """Claim 1: stochastic depth shortens training (section 4: 25 % at p_L = 0.5, 40 % at 0.2)."""
    effort, data, device = lab.effort, lab.data, lab.device
    lab.advance("step times")
    n = (effort.time_depth - 2) // 6
    images, labels = _batch(data, effort.time_batch, device)
    networks = {
        SKELETON: Timed(_network(n, data, [0.0] * 3 * n, "row", "skeleton"), []),
        CONSTANT: Timed(_network(n, data, [0.0] * 3 * n, "row", "constant"), []),
    }
    for p_last in (0.5, 0.2):
        drop = drop_probabilities("linear", 3 * n, p_last)
        for mode in ("row", "batch"):
            how = ("naive", "fused", FLOOR)
            networks |= _timed(n, data, drop, mode, how, f"p_L = {p_last:g}, ")
    samples = in_turns(networks, images, labels, effort.time_repeats)
    draws = 1000
    drop = drop_probabilities("linear", 3 * n, 0.5)
    depth = mean(sum(rows.k > 0 for rows in DepthPlan.sample(1, drop)) for _ in range(draws))
    return {
        "title": f"Training time, ResNet-{effort.time_depth}, batch {effort.time_batch}",
        "paper": {0.5: 0.75, 0.2: 0.6},
        "rows": table(networks, samples),
        "expected_depth": {
            "formula": expected_depth(3 * n),
            "plan": depth,
            "draws": draws,
            "blocks": 3 * n,
        },
    }


def errors(lab: Lab) -> Record:
    """Claim 2: the error against constant depth; and what compaction's BatchNorm does to it."""
    effort, data, base = lab.effort, lab.data, lab.effort.recipe
    variants = {
        "constant depth": replace(base, implementation="constant"),
        "per mini-batch": replace(base, mode="batch"),
        "per sample": replace(base, mode="row"),
        # The same rows; batch statistics of all samples.
        "per sample, masking": replace(base, mode="row", implementation="naive"),
    }
    runs: dict[str, list[Record]] = {name: [] for name in variants}
    for seed in range(effort.seeds):
        for name, recipe in variants.items():
            lab.advance(f"{name}, seed {seed}")
            runs[name].append(lab.train(replace(recipe, seed=seed)))
    rows = []
    for name, each in runs.items():
        found = [run["test_error"] for run in each]
        rows.append(
            {
                "variant": name,
                "test_error": mean(found),
                "deviation": _spread(found),
                "errors": found,
                "curves": [[epoch["test_error"] for epoch in run["epochs"]] for run in each],
            }
        )
    differences = [
        a["test_error"] - b["test_error"]
        for a, b in zip(runs["per sample"], runs["per sample, masking"], strict=True)
    ]
    return {
        "title": f"Error of ResNet-{base.depth} on {data.name}, {base.epochs} epochs, "
        f"p_L = {base.p_last:g}",
        "recipe": asdict(base),
        "rows": rows,
        "batch_norm": {
            "differences": differences,
            "mean": mean(differences),
            "deviation": _spread(differences),
        },
    }


def gradients(lab: Lab) -> Record:
    """Claim 3: the gradient of the first block's first convolution is larger with stochastic depth,
    most after the rate drops (figure 7)."""
    effort, data, base = lab.effort, lab.data, lab.effort.recipe
    variants = {
        "constant depth": replace(base, implementation="constant"),
        "per mini-batch": replace(base, mode="batch"),
        "per sample": replace(base, mode="row"),
    }
    rows = []
    drop = round(base.milestones[0] * base.epochs)
    for name, recipe in variants.items():
        curves = []
        for seed in range(effort.seeds):
            lab.advance(f"{name}, seed {seed}")
            run = lab.train(replace(recipe, seed=seed))
            curves.append([epoch["gradient"] for epoch in run["epochs"]])
        rows.append(
            {
                "variant": name,
                "curves": curves,
                "before": mean(mean(curve[:drop] or curve) for curve in curves),
                "after": mean(mean(curve[drop:]) for curve in curves),
            }
        )
    return {
        "title": f"Mean absolute gradient of the first block's first convolution, "
        f"ResNet-{base.depth} on {data.name}",
        "recipe": asdict(base),
        "drops_after": [share * base.epochs for share in base.milestones],
        "rows": rows,
    }


def decay(lab: Lab) -> Record:
    """Claim 4: uniform survival against linear decay, over p_L (figure 8)."""
    effort, data, base = lab.effort, lab.data, lab.effort.decay_recipe
    rows = []
    for schedule in ("linear", "uniform"):
        for p_last in effort.survivals:
            lab.advance(f"{schedule}, p_L = {p_last:g}")
            found = [
                lab.train(replace(base, schedule=schedule, p_last=p_last, seed=seed))
                for seed in range(max(effort.seeds // 2, 1))
            ]
            values = [run["test_error"] for run in found]
            rows.append(
                {
                    "schedule": schedule,
                    "p_last": p_last,
                    "test_error": mean(values),
                    "deviation": _spread(values),
                    "keep": _mean_keep(drop_probabilities(schedule, 3 * base.n, p_last)),
                }
            )
    return {
        "title": f"Uniform and linear survival, ResNet-{base.depth} on {data.name}, "
        f"{base.epochs} epochs",
        "recipe": asdict(base),
        "rows": rows,
    }


def deep(lab: Lab) -> Record:
    """Claim 5: 1202 layers train; memory and time of a step against constant depth."""
    effort, data, device = lab.effort, lab.data, lab.device
    n = (effort.deep_depth - 2) // 6
    lab.advance(f"{effort.deep_depth} layers")
    drop = drop_probabilities("linear", 3 * n, 0.5)
    images, labels = _batch(data, effort.deep_batch, device)
    networks = {
        SKELETON: Timed(_network(n, data, [0.0] * 3 * n, "row", "skeleton"), []),
        CONSTANT: Timed(_network(n, data, [0.0] * 3 * n, "row", "constant"), []),
    }
    for mode in ("row", "batch"):
        networks |= _timed(n, data, drop, mode, ("fused", FLOOR))
    memory = {}
    for name, timed in networks.items():
        parameters = tuple(timed.model.to(device).train().parameters())
        plan = None
        if timed.drop_probs:
            plan = DepthPlan.for_step(
                0, 0, len(labels), drop, mode=timed.mode, rescale="eval", device=device
            )
        forward = partial(timed.model, images, plan)
        load = Workload(partial(_backward, forward, parameters), forward, parameters)
        memory[name] = measure_memory(load, device)
    rows = table(networks, in_turns(networks, images, labels, effort.deep_steps))
    for row in rows:
        name = row["variant"]
        used, constant = memory[name], memory["constant"]
        row["memory"] = used
        row["memory_of_constant"] = used["bytes"] / constant["bytes"] if used else None
    return {
        "title": f"{effort.deep_depth} layers, batch {effort.deep_batch}, p_L = 0.5",
        "parameters": sum(p.numel() for p in networks[CONSTANT].model.parameters()),
        "rows": rows,
    }


def _backward(forward: Callable[[], torch.Tensor], parameters: tuple[torch.Tensor, ...]) -> None:
    # A floor leaves out a block without kept samples, the skeleton all of them.
    torch.autograd.grad(forward().sum(), parameters, allow_unused=True)


def budget(lab: Lab) -> Record:
    """Claim 6: at equal time, ResNet-152 trains for more epochs (section 4: 120 for 90)."""
    effort, device = lab.effort, lab.device
    lab.advance("ResNet-152")
    drop = drop_probabilities("linear", 50, 0.5)
    generator = torch.Generator().manual_seed(0)
    size = (effort.image_batch, 3, effort.image, effort.image)
    images = torch.randn(size, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(1000, (effort.image_batch,), generator=generator).to(device)

    def network(mode: str, implementation: str) -> nn.Module:
        net = seeded_module(lambda: PaperResNet152(drop, 1000, mode, implementation))
        return net.to(device).to(memory_format=torch.channels_last)

    networks = {
        CONSTANT: Timed(network("row", "constant"), []),
        "per sample, fused": Timed(network("row", "fused"), drop, "row"),
        "per mini-batch, fused": Timed(network("batch", "fused"), drop, "batch"),
    }
    rows = table(networks, in_turns(networks, images, labels, effort.image_repeats))
    for row in rows:
        row["epochs_for_90"] = 90 / row["of_constant"]
    return {
        "title": f"ResNet-152, {effort.image_batch} images of {effort.image}x{effort.image}, "
        "p_L = 0.5",
        "paper": 120,
        "rows": rows,
    }


CLAIMS: dict[str, Callable[[Lab], Record]] = {
    "time": time_saved,
    "error": errors,
    "gradient": gradients,
    "decay": decay,
    "deep": deep,
    "budget": budget,
}
