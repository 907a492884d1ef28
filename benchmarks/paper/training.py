"""The paper's training: SGD with Nesterov momentum, a rate that drops twice, and checkpoints from
which a run goes on as if it had never stopped.

Nothing is drawn from a generator with a state: the order of an epoch, the augmentation of a step
and the kept rows of a step follow from the seed and their numbers. So a checkpoint is the weights,
the optimizer and what was recorded of the steps so far.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure.store import differences, write_json
from benchmarks.paper.data import Data, augment
from benchmarks.paper.networks import PaperResNet, drop_probabilities
from benchmarks.providers.networks import seeded_module
from sdkernels import DepthPlan

# What a checkpoint keeps of the steps so far, besides weights and optimizer.
HISTORY = ("losses", "gradients", "epochs")


def _option(default: Any, text: str, *choices: str) -> Any:
    """A field of the recipe, as the command line has it."""
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass(frozen=True)
class Recipe:
    """One run. The defaults are the paper's for ResNet-110 (section 4)."""

    depth: int = _option(110, "layers, 6n + 2")
    schedule: str = _option("linear", "how the survival of blocks falls", "linear", "uniform")
    p_last: float = _option(0.5, "survival probability of the last block")
    mode: str = _option("batch", "a gate for the mini-batch or for each sample", "row", "batch")
    rescale: str = _option(
        "eval", "where survival is made up for (eval: the paper's rule)", "eval", "train"
    )
    implementation: str = _option(
        "fused", "the op, naive masking, or constant depth", "fused", "naive", "constant"
    )
    projection: bool = _option(False, "1x1 convolutions in shortcuts that change shape")
    epochs: int = _option(500, "of training")
    batch: int = _option(128, "images of a step, of all processes together")
    learning_rate: float = _option(0.1, "until the first milestone")
    momentum: float = _option(0.9, "Nesterov's")
    weight_decay: float = _option(1e-4, "of all parameters")
    milestones: tuple[float, ...] = _option(
        (0.5, 0.75), "shares of the epochs after which the rate is divided by 10"
    )
    warmup: int = _option(0, "epochs at a tenth of the rate first (the paper's 1202 layers: 10)")
    seed: int = _option(0, "of weights, order, augmentation and gates")
    amp: str | None = _option(None, "autocast", "bf16")
    channels_last: bool = _option(False, "memory format of images and weights")

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f"--depth: expected 6n + 2 with n >= 1, got {self.depth}")
        if not 0.0 < self.p_last <= 1.0:
            raise ValueError(f"--p-last: expected a probability above 0, got {self.p_last}")
        for each in fields(self):
            name, value, choices = each.name, getattr(self, each.name), each.metadata["choices"]
            if name in ("epochs", "batch") and value < 1:
                raise ValueError(f"--{name}: expected at least 1, got {value}")
            if choices and value not in (each.default, *choices):
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")

    @property
    def n(self) -> int:
        return (self.depth - 2) // 6

    @property
    def drop_probs(self) -> list[float]:
        if self.implementation == "constant":
            return [0.0] * (3 * self.n)
        return drop_probabilities(self.schedule, 3 * self.n, self.p_last)

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        if epoch < self.warmup:
            return self.learning_rate / 10
        passed = sum(epoch >= share * self.epochs for share in self.milestones)
        return float(self.learning_rate * 0.1**passed)


def _join(device: torch.device) -> tuple[int, int]:
    """Rank among the processes that torchrun has started, and how many; alone where there are
    none."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def _generator(*key: int) -> torch.Generator:
    """A generator that follows from numbers, as from a counter."""
    state = 0
    for number in key:
        state = (state * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(state)


class Trainer:
    """A run of a recipe.

    Args:
        recipe, data: what to train.
        device: of the model and of the data.
        directory: where the checkpoint and ``run.json`` go; None keeps nothing. A checkpoint that
            is there is gone on from: it must be of the same recipe and data.
        checkpoint_every: steps between checkpoints; 0: at the end of an epoch only.
        advance: called after every step with its loss, as a float.

    Raises:
        ValueError: the checkpoint is of another recipe, data set or number of processes, or of a
            version that kept less in it.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        device: torch.device,
        directory: Path | None = None,
        checkpoint_every: int = 0,
        advance: Callable[[float], None] = lambda loss: None,
    ) -> None:
        self.recipe, self.data, self.device = recipe, data, device
        self.directory, self.checkpoint_every, self.advance = directory, checkpoint_every, advance
        self.rank, self.world = _join(device)
        if recipe.batch % self.world:
            raise ValueError(
                f"--batch: expected a multiple of the {self.world} processes, got {recipe.batch}"
            )
        self.train, self.validation, self.test = (
            (images.to(device), labels.to(device))
            for images, labels in (data.train, data.validation, data.test)
        )
        self.steps_per_epoch = max(len(data.train[1]) // recipe.batch, 1)
        how = ("mode", "rescale", "implementation", "projection")
        options = data.sizes | {name: getattr(recipe, name) for name in how}
        make = partial(PaperResNet, recipe.n, recipe.drop_probs, **options)
        self.model = seeded_module(make, recipe.seed).to(device)
        if recipe.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.replica: nn.Module = self.model
        if self.world > 1:
            self.replica = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=True,
        )
        self.losses: list[float] = []  # of every step
        self.gradients: list[float] = []  # of the epoch so far
        self.epochs: list[dict[str, Any]] = []
        self._load()

    @property
    def step(self) -> int:
        """How many are done."""
        return len(self.losses)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """This process' images of the present step, augmented, and their labels."""
        recipe, images, labels = self.recipe, *self.train
        epoch, position = divmod(self.step, self.steps_per_epoch)
        order = torch.randperm(len(labels), generator=_generator(recipe.seed, 1, epoch))
        chosen = order[position * recipe.batch : (position + 1) * recipe.batch]
        chosen = chosen[self.rank :: self.world].to(images.device)
        moving = _generator(recipe.seed, 2, self.step, self.rank)
        batch = augment(images[chosen], self.data.flips, moving)
        if recipe.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        return batch, labels[chosen]

    def _plan(self, batch: int) -> DepthPlan | None:
        if self.recipe.implementation == "constant":
            return None
        return DepthPlan.for_step(
            self.recipe.seed,
            self.step,
            batch,
            self.recipe.drop_probs,
            # The paper's gate is that of the whole mini-batch, whichever process has its images.
            rank=0 if self.recipe.mode == "batch" else self.rank,
            mode=self.recipe.mode,
            rescale=self.recipe.rescale,
            device=self.device,
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp is not None)

    def train_step(self) -> float:
        """One step of the optimizer; returns the loss before it."""
        rate = self.recipe.rate(self.step // self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images, labels = self._batch()
        self.replica.train()
        with self._autocast():
            loss = F.cross_entropy(self.replica(images, self._plan(len(labels))), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient = self.model.first_convolution.weight.grad
        self.gradients.append(0.0 if gradient is None else gradient.abs().mean().item())
        self.optimizer.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    @torch.no_grad()
    def error(self, part: tuple[Tensor, Tensor]) -> float:
        """Share of the images that are put into the wrong class."""
        self.model.eval()
        wrong = 0
        for images, labels in zip(*(t.split(500) for t in part), strict=True):
            with self._autocast():
                wrong += int((self.model(images).argmax(1) != labels).sum())
        return wrong / len(part[1])

    def run(self) -> dict[str, Any]:
        """Trains to the last epoch; returns the record that ``run.json`` holds.

        An interruption (ctrl-C) leaves a checkpoint behind.
        """
        start = time.perf_counter()
        last = self.recipe.epochs * self.steps_per_epoch
        try:
            while self.step < last:
                self.advance(self.train_step())
                at_end = self.step % self.steps_per_epoch == 0
                if at_end:
                    self._end_epoch(time.perf_counter() - start)
                    start = time.perf_counter()
                if at_end or (self.checkpoint_every and self.step % self.checkpoint_every == 0):
                    self._save()
        except KeyboardInterrupt:
            self._save()
            raise
        return self.record()

    def _end_epoch(self, seconds: float) -> None:
        """Errors are those of one process' model; they are all the same."""
        self.epochs.append(
            {
                "epoch": len(self.epochs),
                "rate": self.recipe.rate(len(self.epochs)),
                "validation_error": self.error(self.validation),
                "test_error": self.error(self.test),
                # Mean absolute gradient of the first block's first convolution.
                "gradient": sum(self.gradients) / len(self.gradients),
                "seconds": seconds,  # of this run: less than the epoch took where it went on
            }
        )
        self.gradients = []

    def record(self) -> dict[str, Any]:
        """The run so far, ready for JSON."""
        best = min(self.epochs, key=lambda entry: entry["validation_error"], default=None)
        return {
            "recipe": asdict(self.recipe),
            "data": self.data.name,
            "images": [len(self.train[1]), len(self.validation[1]), len(self.test[1])],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "epochs": self.epochs,
            "losses": self.losses,
            # As the paper reports it: at the epoch with the smallest validation error.
            "test_error": best["test_error"] if best else None,
        }

    def _identity(self) -> dict[str, Any]:
        """What a run must share with the one that it continues."""
        return asdict(self.recipe) | {"data": self.data.name, "processes": self.world}

    def _save(self) -> None:
        """Whole or not at all."""
        if self.directory is None or self.rank:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.directory / "run.json", self.record())
        state = {
            "identity": self._identity(),
            **{name: getattr(self, name) for name in HISTORY},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        part = self.directory / "checkpoint.part"
        torch.save(state, part)
        os.replace(part, self.directory / "checkpoint.pt")

    def _load(self) -> None:
        if self.directory is None or not (self.directory / "checkpoint.pt").exists():
            return
        checkpoint = self.directory / "checkpoint.pt"
        state = torch.load(checkpoint, map_location=self.device, weights_only=True)
        kept = ("identity", *HISTORY, "model", "optimizer")
        if missing := ", ".join(name for name in kept if name not in state):
            raise ValueError(
                f"{checkpoint} is of an older version, without {missing}; give another --out"
            )
        if differing := differences(state["identity"], self._identity()):
            raise ValueError(
                f"{checkpoint} is of another run: {differing}; continue it with the same "
                "arguments, or give another --out"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in HISTORY:
            setattr(self, name, state[name])
