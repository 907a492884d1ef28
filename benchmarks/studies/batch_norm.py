"""What compaction changes in a net with BatchNorm: ``python -m benchmarks batch-norm``.

A small ResNet of timm on scikit-learn's digits, as timm makes it (masking: batch statistics of all
samples) and patched (statistics of the kept samples). Two questions: how far the running statistics
come apart while the weights stand still, and what accuracy both reach when trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdkernels
from benchmarks.cases.training import load_digits_split
from benchmarks.measure import command
from benchmarks.providers.libraries import import_module

DROP = 0.5  # of the last block, rising linearly from 0


def make_model(seed: int) -> nn.Module:
    """Eight basic blocks."""
    timm: Any = import_module("timm.models.resnet")
    torch.manual_seed(seed)
    model: nn.Module = timm.ResNet(
        timm.BasicBlock,
        layers=(2, 2, 2, 2),
        channels=(16, 32, 64, 64),
        num_classes=10,
        in_chans=1,
        drop_path_rate=DROP,
        zero_init_last=False,
    )
    return model.train()


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Full batches of one epoch, upsampled to 32x32."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield F.interpolate(images[chosen], scale_factor=4), labels[chosen]


def statistics_gap(masked: nn.Module, patched: nn.Module) -> tuple[float, float]:
    """Running statistics of the blocks: difference of the means in standard deviations, and
    relative difference of the variances; averages over all channels."""
    others = dict(patched.named_modules())
    means, variances = [], []
    for name, norm in masked.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and name.startswith("layer"):
            other = others[name]
            means.append((other.running_mean - norm.running_mean) / norm.running_var.sqrt())
            variances.append(other.running_var / norm.running_var - 1)
    return torch.cat(means).abs().mean().item(), torch.cat(variances).abs().mean().item()


def compare_statistics(data: tuple[Tensor, ...], batch: int, epochs: int) -> tuple[float, ...]:
    """Both models on the same images, in training mode, weights as initialised."""
    masked = make_model(seed=0)
    patched = copy.deepcopy(masked)
    again = copy.deepcopy(masked)  # masking with other rows: what chance alone does
    sdkernels.patch(patched, sampler="fixed")
    for epoch in range(epochs):
        for number, (images, _) in enumerate(batches(data[0], data[1], batch, epoch)):
            for offset, model in enumerate((masked, patched, again)):
                torch.manual_seed(1000 * number + 10 * epoch + offset)
                with torch.no_grad():
                    model(images)
    return *statistics_gap(masked, patched), *statistics_gap(masked, again)


def train(data: tuple[Tensor, ...], batch: int, epochs: int, seed: int, patch: bool) -> float:
    """Accuracy on the held out digits."""
    model = make_model(seed)
    if patch:
        sdkernels.patch(model, sampler="fixed")  # Bernoulli may keep one sample of one pixel
    steps = epochs * (len(data[0]) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for images, labels in batches(data[0], data[1], batch, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(F.interpolate(data[2], scale_factor=4)).argmax(1) == data[3]
    return right.double().mean().item()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("batch-norm", __doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    data = load_digits_split(torch.device("cpu"))
    print(f"ResNet with 8 basic blocks, digits, drop probability 0 to {DROP}")
    for batch in (16, 128):
        gaps = compare_statistics(data, batch, epochs=2)
        print(
            f"batch {batch}: running mean differs by {gaps[0]:.3f} standard deviations, running "
            f"variance by {gaps[1]:.1%} (masking with other rows: {gaps[2]:.3f} and {gaps[3]:.1%})"
        )
        for name in ("masking", "patched"):
            patch, seeds = name == "patched", range(options.seeds)
            found = [train(data, batch, options.epochs, seed, patch) for seed in seeds]
            values = ", ".join(f"{accuracy:.1%}" for accuracy in found)
            print(f"  {name}: accuracy {mean(found):.1%} ({values})", flush=True)
    return 0
