"""CIFAR from a folder, or handwritten digits where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import digits
from benchmarks.providers.libraries import import_module, is_installed

# Classes of torchvision.datasets, by name on the command line.
SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}


@dataclass(frozen=True)
class Data:
    """Images [N, C, 32, 32] in float32, normalized by the training images; labels [N]."""

    name: str
    classes: int
    flips: bool  # whether a mirrored image is still one of its class
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def sizes(self) -> dict[str, int]:
        """Of a network for it."""
        return {"classes": self.classes, "channels": self.train[0].shape[1]}


def _normalized(parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """By the mean and the deviation of each channel of the first part's images."""
    images = parts[0][0].float()
    mean = images.mean((0, 2, 3), keepdim=True)
    deviation = images.std((0, 2, 3), keepdim=True)
    return [((x.float() - mean) / deviation, y) for x, y in parts]


def _cifar(name: str, directory: Path | None, seed: int) -> Data:
    """45,000 images to train, 5,000 to validate, 10,000 to test."""
    if not is_installed("torchvision"):
        raise ValueError(f"--dataset: {name} is read by torchvision, which is not installed")
    kind: Any = getattr(import_module("torchvision.datasets"), SETS[name])
    try:
        parts = [kind(directory or "", train=train) for train in (True, False)]
    except RuntimeError:
        raise ValueError(
            f"--data: expected the folder that holds a whole {kind.base_folder}, which {kind.url} "
            f"unpacks to, got {directory}"
        ) from None
    (images, labels), test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, used = order[: len(order) // 10], order[len(order) // 10 :]
    split = [(images[chosen], labels[chosen]) for chosen in (used, held_out)]
    return Data(name, len(parts[0].classes), True, *_normalized([*split, test]))


def _digits(seed: int) -> Data:
    """scikit-learn's 1797 handwritten digits, enlarged to 32x32; a tenth of the 1437 training
    images is held out to validate, 360 to test."""
    small, labels, rest, test = digits.load(seed)
    train, validation = digits.split(labels, rest, len(rest) // 10, seed)
    images = F.interpolate(small, size=32, mode="bilinear", align_corners=False)
    parts = [(images[part], labels[part]) for part in (train, validation, test)]
    return Data("digits", 10, False, *_normalized(parts))


def load(name: str, directory: Path | None, seed: int = 0) -> Data:
    """A data set.

    Args:
        name: "digits", "cifar10" or "cifar100".
        directory: the folder that torchvision keeps data sets in; digits need none.
        seed: of the split.

    Raises:
        ValueError: torchvision or a file is missing, or a file is not what its checksum says.
    """
    return _digits(seed) if name == "digits" else _cifar(name, directory, seed)


def augment(images: Tensor, flips: bool, generator: torch.Generator, shift: int = 4) -> Tensor:
    """The paper's augmentation: every image shifted by up to 4 pixels each way, zeros around it,
    and mirrored half of the time.

    Args:
        images: [B, C, H, W].
        flips: whether to mirror at all.
        generator: on the CPU: the same numbers for every device.
    """
    batch, _, height, width = images.shape
    moved = torch.randint(2 * shift + 1, (2, batch), generator=generator)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    rows = moved[0].unsqueeze(1) + torch.arange(height)
    columns = torch.arange(width).expand(batch, width)
    if flips:
        columns = torch.where(mirrored.unsqueeze(1), columns.flip(1), columns)
    columns = columns + moved[1].unsqueeze(1)
    padded = F.pad(images, (shift,) * 4)
    rows, columns = rows.to(images.device), columns.to(images.device)
    chosen = torch.arange(batch, device=images.device)[:, None, None]
    # Indexing puts the channels last; they come back to their place.
    return padded[chosen, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
