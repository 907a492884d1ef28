"""The paper's claims, each an experiment that returns a record: tables, curves, and what the paper
says beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure.memory import measure as measure_memory
from benchmarks.measure.workload import Workload
from benchmarks.paper.data import Data
from benchmarks.paper.networks import PaperResNet, PaperResNet152, drop_probabilities
from benchmarks.paper.timing import CONSTANT, FLOOR, SKELETON, Timed, in_turns, table
from benchmarks.paper.training import Recipe, Trainer
from benchmarks.providers.networks import seeded_module
from sdkernels import DepthPlan

Record = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How much a preset spends on each claim; the paper's own sizes are those of "full"."""

    duration: str
    recipe: Recipe  # of what is trained
    decay_recipe: Recipe  # of the claim on decay
    seeds: int
    survivals: tuple[float, ...]  # of the claim on decay
    time: tuple[int, int, int]  # layers, batch and repeats
    deep: tuple[int, int, int]  # layers, batch and steps
    image: tuple[int, int, int]  # of ResNet-152: pixels, batch and repeats


_DIGITS = Recipe(depth=20, epochs=30, batch=64, mode="row")
EFFORTS = {
    "quick": Effort(
        duration="about 5 minutes on 2 cores",
        recipe=replace(_DIGITS, epochs=8),
        decay_recipe=replace(_DIGITS, depth=14, epochs=4),
        seeds=2,
        survivals=(0.2, 0.5, 0.8, 1.0),
        time=(110, 64, 6),
        deep=(1202, 4, 3),
        image=(96, 8, 3),
    ),
    "standard": Effort(
        duration="about 45 minutes on 2 cores",
        recipe=_DIGITS,
        decay_recipe=replace(_DIGITS, depth=14, epochs=8),
        seeds=4,
        survivals=(0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0),
        time=(110, 64, 16),
        deep=(1202, 8, 8),
        image=(128, 8, 10),
    ),
    "full": Effort(
        duration="days on one GPU; not yet run",
        recipe=Recipe(),
        decay_recipe=Recipe(),
        seeds=3,
        survivals=tuple(share / 10 for share in range(1, 11)),
        time=(110, 128, 100),
        deep=(1202, 128, 20),
        image=(224, 128, 30),
    ),
}


@dataclass
class Lab:
    """What an experiment has at hand."""

    effort: Effort
    data: Data
    device: torch.device
    directory: Path  # of the checkpoints: claims share runs, and a stopped claim goes on
    advance: Callable[[str], None] = lambda doing: None  # told what is being done

    def train(self, recipe: Recipe) -> Record:
        """The record of a run, which is trained unless it already was."""
        key = hashlib.sha256(f"{recipe} {self.data.name}".encode()).hexdigest()[:16]
        return Trainer(recipe, self.data, self.device, self.directory / key).run()

    def train_all(self, variants: dict[str, Recipe], seeds: int) -> dict[str, list[Record]]:
        """The records of every variant, one a seed."""
        runs: dict[str, list[Record]] = {name: [] for name in variants}
        for seed in range(seeds):
            for name, recipe in variants.items():
                self.advance(f"{name}, seed {seed}")
                runs[name].append(self.train(replace(recipe, seed=seed)))
        return runs

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Training images and labels, from the beginning again where there are fewer."""
        images, labels = self.data.train
        chosen = torch.arange(size) % len(labels)
        return images[chosen].to(self.device), labels[chosen].to(self.device)


def _summary(values: list[float], name: str = "test_error") -> Record:
    """Their mean, by that name, and their standard deviation."""
    return {name: mean(values), "deviation": stdev(values) if len(values) > 1 else 0.0}


def _variants(base: Recipe) -> dict[str, Recipe]:
    return {
        "constant depth": replace(base, implementation="constant"),
        "per mini-batch": replace(base, mode="batch"),
        "per sample": replace(base, mode="row"),
    }


def _networks(
    lab: Lab, n: int, survivals: dict[str, float], implementations: tuple[str, ...]
) -> dict[str, Timed]:
    """What is timed, by name: constant depth, no branches at all, every law in these ways.

    The fused network is set beside the floor.

    Args:
        survivals: p_L, by what the names of its networks begin with.
    """

    def network(drop: list[float], implementation: str, mode: str = "row") -> nn.Module:
        how = {"mode": mode, "implementation": implementation}
        return seeded_module(lambda: PaperResNet(n, drop, **lab.data.sizes, **how))

    made = {name: Timed(network([0.0] * 3 * n, name), []) for name in (SKELETON, CONSTANT)}
    for law, p_last in survivals.items():
        drop = drop_probabilities("linear", 3 * n, p_last)
        for mode, gate in (("row", "sample"), ("batch", "mini-batch")):
            name = f"{law}per {gate}"
            for implementation in implementations:
                made[f"{name}, {implementation}"] = Timed(
                    network(drop, implementation, mode),
                    drop,
                    mode,
                    masked=implementation == "naive",
                    floor=f"{name}, {FLOOR}" if implementation == "fused" else None,
                )
    return made


def time_saved(lab: Lab) -> Record:
    """Claim 1: stochastic depth shortens training (section 4: 25 % at p_L = 0.5, 40 % at 0.2)."""
    lab.advance("step times")
    layers, batch, repeats = lab.effort.time
    n = (layers - 2) // 6
    survivals = {f"p_L = {p:g}, ": p for p in (0.5, 0.2)}
    networks = _networks(lab, n, survivals, ("naive", "fused", FLOOR))
    samples = in_turns(networks, *lab.batch(batch), repeats)
    draws, blocks = 1000, 3 * n
    drop = drop_probabilities("linear", blocks, 0.5)
    depth = mean(sum(rows.k > 0 for rows in DepthPlan.sample(1, drop)) for _ in range(draws))
    return {
        "title": f"Training time, ResNet-{layers}, batch {batch}",
        "paper": {0.5: 0.75, 0.2: 0.6},
        "rows": table(networks, samples),
        "expected_depth": {
            "formula": (3 * blocks - 1) / 4,  # section 3
            "plan": depth,
            "draws": draws,
            "blocks": blocks,
        },
    }


def errors(lab: Lab) -> Record:
    """Claim 2: the error against constant depth; and what compaction's BatchNorm does to it."""
    base = lab.effort.recipe
    # The same rows; batch statistics of all samples.
    masking = {"per sample, masking": replace(base, mode="row", implementation="naive")}
    runs = lab.train_all(_variants(base) | masking, lab.effort.seeds)
    rows = []
    for name, each in runs.items():
        found = [run["test_error"] for run in each]
        curves = [[epoch["test_error"] for epoch in run["epochs"]] for run in each]
        rows.append({"variant": name, **_summary(found), "errors": found, "curves": curves})
    pairs = zip(runs["per sample"], runs["per sample, masking"], strict=True)
    apart = [compacted["test_error"] - masked["test_error"] for compacted, masked in pairs]
    return {
        "title": f"Error of ResNet-{base.depth} on {lab.data.name}, {base.epochs} epochs, "
        f"p_L = {base.p_last:g}",
        "recipe": asdict(base),
        "rows": rows,
        "batch_norm": {"differences": apart, **_summary(apart, "mean")},
    }


def gradients(lab: Lab) -> Record:
    """Claim 3: the gradient of the first block's first convolution is larger with stochastic depth,
    most after the rate drops (figure 7)."""
    base, rows = lab.effort.recipe, []
    drop = round(base.milestones[0] * base.epochs)
    for name, runs in lab.train_all(_variants(base), lab.effort.seeds).items():
        curves = [[epoch["gradient"] for epoch in run["epochs"]] for run in runs]
        before = mean(mean(curve[:drop] or curve) for curve in curves)
        after = mean(mean(curve[drop:]) for curve in curves)
        rows.append({"variant": name, "curves": curves, "before": before, "after": after})
    return {
        "title": f"Mean absolute gradient of the first block's first convolution, "
        f"ResNet-{base.depth} on {lab.data.name}",
        "recipe": asdict(base),
        "drops_after": [share * base.epochs for share in base.milestones],
        "rows": rows,
    }


def decay(lab: Lab) -> Record:
    """Claim 4: uniform survival against linear decay, over p_L (figure 8)."""
    base, rows = lab.effort.decay_recipe, []
    laws = {
        f"{schedule}, p_L = {p_last:g}": replace(base, schedule=schedule, p_last=p_last)
        for schedule in ("linear", "uniform")
        for p_last in lab.effort.survivals
    }
    for name, runs in lab.train_all(laws, max(lab.effort.seeds // 2, 1)).items():
        recipe = laws[name]
        law = {"schedule": recipe.schedule, "p_last": recipe.p_last}
        found = _summary([run["test_error"] for run in runs])
        rows.append({**law, **found, "keep": 1 - mean(recipe.drop_probs)})
    return {
        "title": f"Uniform and linear survival, ResNet-{base.depth} on {lab.data.name}, "
        f"{base.epochs} epochs",
        "recipe": asdict(base),
        "rows": rows,
    }


def deep(lab: Lab) -> Record:
    """Claim 5: 1202 layers train; memory and time of a step against constant depth."""
    layers, batch, steps = lab.effort.deep
    lab.advance(f"{layers} layers")
    images, labels = lab.batch(batch)
    networks = _networks(lab, (layers - 2) // 6, {"": 0.5}, ("fused", FLOOR))
    memory = {}
    for name, timed in networks.items():
        parameters = tuple(timed.model.to(lab.device).train().parameters())
        forward = partial(timed.model, images, timed.plan(0, batch, lab.device))
        load = Workload(partial(_backward, forward, parameters), forward, parameters)
        memory[name] = measure_memory(load, lab.device)
    rows = table(networks, in_turns(networks, images, labels, steps))
    for row in rows:
        used, constant = memory[row["variant"]], memory[CONSTANT]
        row["memory"] = used
        row["memory_of_constant"] = used["bytes"] / constant["bytes"] if used else None
    return {
        "title": f"{layers} layers, batch {batch}, p_L = 0.5",
        "parameters": sum(p.numel() for p in networks[CONSTANT].model.parameters()),
        "rows": rows,
    }


def _backward(forward: Callable[[], Tensor], parameters: tuple[Tensor, ...]) -> None:
    # A floor leaves out a block without kept samples, the skeleton all of them.
    torch.autograd.grad(forward().sum(), parameters, allow_unused=True)


def budget(lab: Lab) -> Record:
    """Claim 6: at equal time, ResNet-152 trains for more epochs (section 4: 120 for 90)."""
    lab.advance("ResNet-152")
    pixels, batch, repeats = lab.effort.image
    drop = drop_probabilities("linear", 50, 0.5)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, pixels, pixels, generator=generator)
    labels = torch.randint(1000, (batch,), generator=generator).to(lab.device)

    def timed(mode: str, dropped: list[float]) -> Timed:
        net = seeded_module(lambda: PaperResNet152(dropped, mode))
        return Timed(net.to(lab.device).to(memory_format=torch.channels_last), dropped, mode)

    networks = {
        CONSTANT: timed("row", []),
        "per sample, fused": timed("row", drop),
        "per mini-batch, fused": timed("batch", drop),
    }
    images = images.to(lab.device, memory_format=torch.channels_last)
    rows = table(networks, in_turns(networks, images, labels, repeats))
    for row in rows:
        row["epochs_for_90"] = 90 / row["of_constant"]
    return {
        "title": f"ResNet-152, {batch} images of {pixels}x{pixels}, p_L = 0.5",
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
