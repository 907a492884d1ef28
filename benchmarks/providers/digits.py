"""scikit-learn's handwritten digits: real images that come with a package."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

Numbers = NDArray[np.int64]


def load(seed: int = 0) -> tuple[Tensor, Tensor, Numbers, Numbers]:
    """Images [1797, 1, 8, 8] and labels [1797]; then which 1437 are to train with, and which 360
    are held out, stratified by class."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    train, held_out = split(labels, np.arange(len(labels)), 360, seed)
    return images, labels, train, held_out


def split(labels: Tensor, of: Numbers, count: int, seed: int) -> tuple[Numbers, Numbers]:
    """Holds out ``count`` of the images, stratified by class."""
    rest, held_out = train_test_split(
        of, test_size=count, stratify=labels[torch.from_numpy(of)].numpy(), random_state=seed
    )
    return rest, held_out
