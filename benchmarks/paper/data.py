"""CIFAR from a folder, or handwritten digits where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import digits

HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
PIXELS = 3 * 32 * 32


class DataError(RuntimeError):
    """The folder does not hold the data set; the message says what is missing and where it is."""


@dataclass(frozen=True)
class Files:
    """The binary version of a data set: records of labels, then 3072 bytes of pixels.

    Args:
        folder: what its archive unpacks to.
        train, test: file names with the number of images in each.
        labels: bytes before the pixels; the last one is the class.
        classes: how many there are.
        archive: the name under which it is offered.
    """

    folder: str
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    labels: int
    classes: int
    archive: str


SETS = {
    "cifar10": Files(
        "cifar-10-batches-bin",
        tuple((f"data_batch_{i}.bin", 10_000) for i in range(1, 6)),
        (("test_batch.bin", 10_000),),
        1,
        10,
        "CIFAR-10 binary version",
    ),
    "cifar100": Files(
        "cifar-100-binary",
        (("train.bin", 50_000),),
        (("test.bin", 10_000),),
        2,
        100,
        "CIFAR-100 binary version",
    ),
}


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
    def channels(self) -> int:
        return self.train[0].shape[1]


def _read(path: Path, images: int, files: Files) -> tuple[Tensor, Tensor]:
    """One file: images as uint8 and labels."""
    where = f'it is part of the "{files.archive}" of {HOME}'
    if not path.is_file():
        raise DataError(f"{path} is missing; {where}")
    record = files.labels + PIXELS
    size = path.stat().st_size
    if size != images * record:
        raise DataError(
            f"{path}: expected {images} records of {record} bytes, {images * record} in all, got "
            f"{size}; {where}"
        )
    records = torch.from_numpy(np.fromfile(path, dtype=np.uint8).reshape(images, record))
    labels = records[:, files.labels - 1].long()
    if int(labels.max()) >= files.classes:
        raise DataError(
            f"{path}: expected labels from 0 to {files.classes - 1}, got {int(labels.max())}; "
            f"{where}"
        )
    return records[:, files.labels :].reshape(images, 3, 32, 32), labels


def _normalized(parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """By the mean and the deviation of each channel of the first part's images."""
    images = parts[0][0].float()
    mean = images.mean((0, 2, 3), keepdim=True)
    deviation = images.std((0, 2, 3), keepdim=True)
    return [((x.float() - mean) / deviation, y) for x, y in parts]


def load_cifar(name: str, directory: Path, seed: int = 0) -> Data:
    """CIFAR-10 or CIFAR-100: 45,000 images to train, 5,000 to validate, 10,000 to test.

    Args:
        name: "cifar10" or "cifar100".
        directory: the folder that the binary version unpacks to, or the one that holds it.
        seed: of the split.

    Raises:
        DataError: a file is missing, has another size, or labels that cannot be.
    """
    files = SETS[name]
    if not directory.is_dir():
        raise DataError(
            f"--data {directory}: no such folder; expected one with {files.folder}, which the "
            f'"{files.archive}" of {HOME} unpacks to'
        )
    if (directory / files.folder).is_dir():
        directory = directory / files.folder
    train = [_read(directory / file, images, files) for file, images in files.train]
    images, labels = (torch.cat(part) for part in zip(*train, strict=True))
    test = [_read(directory / file, count, files) for file, count in files.test]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, used = order[: len(order) // 10], order[len(order) // 10 :]
    parts = [
        (images[used], labels[used]),
        (images[held_out], labels[held_out]),
        (torch.cat([x for x, _ in test]), torch.cat([y for _, y in test])),
    ]
    return Data(name, files.classes, True, *_normalized(parts))


def load_digits(seed: int = 0) -> Data:
    """scikit-learn's 1797 handwritten digits, enlarged to 32x32; a tenth of the 1437 training
    images is held out to validate, 360 to test."""
    small, labels, rest, test = digits.load(seed)
    train, validation = digits.split(labels, rest, len(rest) // 10, seed)
    images = F.interpolate(small, size=32, mode="bilinear", align_corners=False)
    parts = [(images[part], labels[part]) for part in (train, validation, test)]
    return Data("digits", 10, False, *_normalized(parts))


def load(name: str, directory: Path | None, seed: int = 0) -> Data:
    """The data set called ``name``; digits need no folder."""
    if name == "digits":
        return load_digits(seed)
    if directory is None:
        raise DataError(
            f"--data: expected the folder with {SETS[name].folder}, which the "
            f'"{SETS[name].archive}" of {HOME} unpacks to'
        )
    return load_cifar(name, directory, seed)


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
