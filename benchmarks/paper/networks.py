"""The paper's networks: ResNets for 32x32 images, and ResNet-152 for larger ones.

Deep Networks with Stochastic Depth (Huang, Sun, Liu, Sedra, Weinberger; ECCV 2016), section 4, and
the authors' published Torch code for what the text leaves open: a block is
``ReLU(shortcut(x) + b * f(x))``, f two 3x3 convolutions with batch norm after each, and a shortcut
that changes shape averages over 2x2 pixels and pads with channels of zeros ("option A"). Their
convolutions have biases, which batch norm takes out again; ours have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import sdkernels
from benchmarks.providers.networks import torchvision_model
from benchmarks.providers.residuals import beside
from sdkernels import DepthPlan, KeptRows, StochasticDepth, linear_decay, reference, uniform

# Ways to add a branch for given rows that others than the op have.
ADDING = {"naive": reference.naive_masking, "floor": beside}


def drop_probabilities(schedule: str, depth: int, p_last: float) -> list[float]:
    """Of every block, from the paper's survival probability ``p_last`` of the last one.

    Equation 4: with ``schedule="linear"``, block l of L survives with 1 - l/L * (1 - p_last); with
    "uniform" all of them with p_last.

    >>> drop_probabilities("linear", 4, 0.5)
    [0.125, 0.25, 0.375, 0.5]
    """
    return {"linear": linear_decay, "uniform": uniform}[schedule](depth, 1 - p_last)


def _min_saving(mode: str) -> float:
    """Per mini-batch most steps keep every sample, and there is nothing to compact then."""
    return 1e-6 if mode == "batch" else 0.0


class Shortcut(nn.Module):
    """Option A: half the resolution by averaging, twice the channels by zeros; no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, x.shape[1]))


class Block(nn.Module):
    """``ReLU(shortcut(x) + b * f(x))``.

    Args:
        planes: channels of the input.
        stride: 1, or 2 for the first block of a stage, which doubles the channels.
        p: drop probability.
        mode: "batch", the paper's gate for a mini-batch, or "row", one for each sample.
        rescale: "eval", the paper's rule (equation 5: evaluation multiplies by the survival
            probability), or "train".
        implementation: "fused" computes f for the kept rows; "naive" for all rows, and multiplies
            by a mask; "constant" never drops. Two are for timing only, and learn nothing:
            "skeleton" leaves f out, "floor" computes f beside the stream, for as many samples as
            are kept.
        projection: a 1x1 convolution for a shortcut that changes shape ("option B").
    """

    def __init__(
        self,
        planes: int,
        stride: int,
        p: float,
        mode: str = "row",
        rescale: str = "eval",
        implementation: str = "fused",
        projection: bool = False,
    ) -> None:
        super().__init__()
        width = planes * stride
        branch = nn.Sequential(
            nn.Conv2d(planes, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        law = {"mode": mode, "rescale": rescale, "min_saving": _min_saving(mode)}
        self.residual = StochasticDepth(branch, p, activation="relu", **law)
        self.implementation = implementation
        self.shortcut: nn.Module | None = None
        if stride > 1 and projection:
            self.shortcut = nn.Sequential(
                nn.Conv2d(planes, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        elif stride > 1:
            self.shortcut = Shortcut()

    def forward(self, x: Tensor, rows: KeptRows | None) -> Tensor:
        """``rows`` in training, unless the depth is constant; None in evaluation."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        branch = self.residual.branch
        if self.implementation == "constant":
            return F.relu(shortcut + branch(x), inplace=True)
        if self.implementation == "skeleton":
            return F.relu(shortcut)
        if self.implementation in ADDING and rows is not None:
            add = ADDING[self.implementation]
            return F.relu(add(x, branch, 0.0, residual=shortcut, rows=rows), inplace=True)
        # None where it is x itself: the op then adds the two gradients of x in one pass.
        residual = None if self.shortcut is None else shortcut
        return self.residual(x, residual=residual, rows=rows)  # type: ignore[no-any-return]


class PaperResNet(nn.Module):
    """A ResNet of 6n + 2 layers for images of 32x32: n = 18 has 110 layers, n = 200 has 1202.

    Args:
        n: blocks in each of the three stages of 16, 32 and 64 channels.
        drop_probs: one a block, 3n of them.
        classes, channels: of the data.
        how: mode, rescale, implementation and projection of every :class:`Block`.
    """

    def __init__(
        self, n: int, drop_probs: Sequence[float], classes: int = 10, channels: int = 3, **how: Any
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        blocks = []
        for number, p in enumerate(drop_probs):
            stage, first = divmod(number, n)
            stride = 2 if stage and not first else 1
            blocks.append(Block(16 * 2**stage // stride, stride, p, **how))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Over the inputs, as the authors' initialiser does it.
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    @property
    def first_convolution(self) -> nn.Conv2d:
        """Of the first residual block: the paper's figure 7 shows its gradient."""
        return self.blocks[0].residual.branch[0]  # type: ignore[no-any-return,union-attr,index]

    def forward(self, x: Tensor, plan: DepthPlan | None = None) -> Tensor:
        """Images [B, channels, 32, 32] to logits [B, classes].

        ``plan`` holds the rows of every block: in training, unless the depth is constant.
        """
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = block(x, None if plan is None else plan[number])
        return self.head(x.mean((2, 3)))


class PaperResNet152(nn.Module):
    """torchvision's ResNet-152 with the paper's drop probabilities in its 50 blocks; of constant
    depth without any."""

    def __init__(self, drop_probs: Sequence[float], mode: str = "batch") -> None:
        super().__init__()
        self.model = torchvision_model("resnet152", num_classes=1000)
        if drop_probs:
            law = {"mode": mode, "rescale": "eval", "min_saving": _min_saving(mode)}
            self.report = sdkernels.patch(self.model, drop_probs=list(drop_probs), **law)

    def forward(self, x: Tensor, plan: DepthPlan | None = None) -> Tensor:
        """``plan`` holds the rows of every block; without one each block draws its own."""
        if plan is None:
            return self.model(x)  # type: ignore[no-any-return]
        with self.report.use(list(plan)):
            return self.model(x)  # type: ignore[no-any-return]
