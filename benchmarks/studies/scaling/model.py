"""The network whose steps are timed at scale: what one of its branches costs by number of kept
rows, what the rest of a step costs, and what both keep for the backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure.correctness import compare
from benchmarks.measure.memory import saved_activation_bytes
from benchmarks.measure.workload import values
from benchmarks.providers.residuals import Rule, dense, dinov3, naive
from benchmarks.providers.vit import Block
from benchmarks.report.figures import quartile_spread
from benchmarks.studies.scaling.simulation import KINDS
from sdkernels import KeptRows, fused_stochastic_depth

PATCH = 3 * 16 * 16  # values of a patch
CLASSES = 1000
KIND_NAMES = ("attention", "MLP")
TIMED_BLOCKS = 1


@dataclass(frozen=True)
class Shape:
    """A ViT."""

    width: int
    tokens: int
    depth: int  # blocks of two branches
    head_width: int = 64

    @property
    def name(self) -> str:
        return f"vit-D{self.width}-N{self.tokens}-L{self.depth}"


class Net(nn.Module):
    """Patches [B, tokens, PATCH] to logits; every branch is given its rows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.stem = nn.Linear(PATCH, shape.width)
        heads = shape.width // shape.head_width
        self.blocks = nn.ModuleList(Block(shape.width, heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, CLASSES)

    def forward(
        self,
        patches: Tensor,
        rows: Sequence[KeptRows],
        residual: Rule = fused_stochastic_depth,
        clock: BranchClock | None = None,
    ) -> Tensor:
        def residual_and_clock(*args: Any, **kwargs: Any) -> Tensor:
            x = residual(*args, **kwargs)
            if clock is not None:
                clock.passed(x)
            return x

        x = self.stem(patches)
        if clock is not None:
            clock.passed(x)
        for i, block in enumerate(self.blocks):
            x = block(x, residual_and_clock, (0.5, 0.5), rows[KINDS * i : KINDS * (i + 1)])
        return self.head(self.norm(x).mean(1))


class BranchClock:
    """Seconds of every branch, forward and backward, taken as the stream passes between them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._forward: list[float] = []
        self._backward: list[float] = []

    def passed(self, x: Tensor) -> None:
        """To be called with the stream before the first and after every branch."""
        self._forward.append(self.clock())
        x.register_hook(lambda grad: self._backward.append(self.clock()))

    @property
    def forward(self) -> list[float]:
        """Of branch 0, 1, ..."""
        return [b - a for a, b in pairwise(self._forward)]

    @property
    def backward(self) -> list[float]:
        """Of branch 0, 1, ..."""
        return [b - a for a, b in pairwise(self._backward)][::-1]


def make_batch(shape: Shape, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Patches and labels."""
    patches = torch.randn(batch, shape.tokens, PATCH)
    return patches.to(device), torch.randint(CLASSES, (batch,)).to(device)


def clock_of(device: torch.device) -> tuple[Callable[[], float], str]:
    """The clock for a device, and its name.

    On a CPU that of the calling thread, which does all the work where ``torch.get_num_threads()``
    is 1: it stands still while another process has the core, or while the thread waits for other
    ranks.
    """
    if device.type == "cpu":
        return time.thread_time, "CPU time of the thread"

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised, "wall time, device synchronised"


def row_counts(batch: int) -> list[int]:
    """The numbers of kept rows that are timed: 0, the powers of two, three quarters, and B.

    >>> row_counts(16)
    [0, 1, 2, 4, 8, 12, 16]
    """
    powers = {2**i for i in range(batch.bit_length()) if 2**i <= batch}
    return sorted({0, 3 * batch // 4, batch} | powers)


def spread_rows(k: int, batch: int, device: torch.device) -> KeptRows:
    """k rows, evenly over the batch."""
    return KeptRows.from_index(torch.arange(k) * batch // max(k, 1), batch, scale=2.0).to(device)


@dataclass(frozen=True)
class Variant:
    """One way to take a training step; ``batch`` is its patches and labels."""

    residual: Rule
    batch: tuple[Tensor, Tensor]
    rows: KeptRows  # of every branch


def check(name: str, net: Net, variants: Mapping[Any, Variant], reference: Any) -> None:
    """Compares the variants' logits and gradients with those of ``variants[reference]``.

    Raises:
        ProviderMismatch: one of them computes something else.
    """

    def results(variant: Variant) -> dict[str, Tensor]:
        patches, labels = variant.batch
        logits = net(patches, [variant.rows] * KINDS * len(net.blocks), variant.residual)
        loss = F.cross_entropy(logits, labels)
        found = values(loss, dict(net.named_parameters()), torch.ones_like(loss))
        return found | {"output": logits.detach()}

    expected = results(variants[reference])
    for key, variant in variants.items():
        compare(f"{name}: {key!r}", results(variant), expected)


def saved_bytes(net: Net, kind: int, x: Tensor, rows: KeptRows) -> int:
    """What the forward of the first block's branch keeps for its backward."""
    block: Any = net.blocks[0]
    branch, norm, scale = (
        (block.attention, block.norm1, block.scale1)
        if KIND_NAMES[kind] == "attention"
        else (block.mlp, block.norm2, block.scale2)
    )
    forward = partial(
        fused_stochastic_depth, x, branch, 0.5, norm=norm, layer_scale=scale, rows=rows
    )
    return saved_activation_bytes(forward, block.parameters())


def measure_branches(
    shape: Shape, batch: int, turns: int, device: torch.device
) -> list[dict[str, Any]]:
    """Seconds and saved bytes of the branches of each kind, forward and backward, by number of kept
    rows; at half of the rows the other providers of the block benchmark beside it.

    The branches are timed inside the steps of a training network of one block, AdamW included, so
    that weights and gradients are as cold in the caches as they are in training. The variants take
    turns.

    Raises:
        ProviderMismatch: the op or gather + index_add computes something else than naive masking.
    """
    torch.manual_seed(0)
    net = Net(replace(shape, depth=TIMED_BLOCKS)).to(device)
    whole = make_batch(shape, batch, device)
    counts, half = row_counts(batch), batch // 2
    rows = {k: spread_rows(k, batch, device) for k in {*counts, half}}
    variants: dict[Any, Variant] = {
        "naive": Variant(naive, whole, rows[half]),
        "index_add": Variant(dinov3, whole, rows[half]),
    }
    fused = {k: Variant(fused_stochastic_depth, whole, each) for k, each in rows.items()}
    check(f"{shape.name}, B={batch}", net, {**variants, "fused": fused[half]}, "naive")
    few = (whole[0][:half], whole[1][:half])
    variants |= {**fused, "dense": Variant(dense, few, rows[half])}

    optimizer = torch.optim.AdamW(net.parameters())

    def train(variant: Variant) -> BranchClock:
        clock = BranchClock(clock_of(device)[0])
        patches, labels = variant.batch
        every = [variant.rows] * KINDS * TIMED_BLOCKS
        F.cross_entropy(net(patches, every, variant.residual, clock), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return clock

    for key in ("naive", half):  # two are enough to warm up with
        train(variants[key])
    seconds: dict[Any, list[list[float]]] = {key: [[] for _ in range(KINDS)] for key in variants}
    for _ in range(turns):
        for key, variant in variants.items():
            short = isinstance(key, int) and key <= batch // 4
            for _ in range(3 if short else 1):  # steps that vary more and cost little
                clock = train(variant)
                for i, (ahead, back) in enumerate(zip(clock.forward, clock.backward, strict=True)):
                    seconds[key][i % KINDS].append(ahead + back)

    x = torch.randn(batch, shape.tokens, shape.width, device=device, requires_grad=True)
    measured = []
    for kind, name in enumerate(KIND_NAMES):
        of_kind = {key: each[kind] for key, each in seconds.items()}
        median = {key: statistics.median(each) for key, each in of_kind.items()}
        measured.append(
            {
                "kind": name,
                "batch": batch,
                "counts": counts,
                "seconds": [median[k] for k in counts],
                "spread": [quartile_spread(of_kind[k]) for k in counts],
                "half": half,
                "at_half": {
                    key: median[half if key == "fused" else key]
                    for key in ("naive", "index_add", "fused", "dense")
                },
                "saved_bytes": [saved_bytes(net, kind, x, rows[k]) for k in counts],
            }
        )
    return measured


def measure_rest(shape: Shape, batch: int, turns: int, device: torch.device) -> dict[str, float]:
    """Seconds of a step outside its branches: stem, norm, head and loss, forward and backward, and
    AdamW over the parameters of the whole network."""
    torch.manual_seed(0)
    ends, net = Net(replace(shape, depth=0)).to(device), Net(shape).to(device)
    patches, labels = make_batch(shape, batch, device)
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    clock, _ = clock_of(device)
    of_ends, of_optimizer = [], []
    for turn in range(turns + 1):  # the first one warms up
        start = clock()
        F.cross_entropy(ends(patches, ()), labels).backward()
        middle = clock()
        optimizer.step()
        end = clock()
        ends.zero_grad()
        if turn:
            of_ends.append(middle - start)
            of_optimizer.append(end - middle)
    return {
        "ends_seconds": statistics.median(of_ends),
        "optimizer_seconds": statistics.median(of_optimizer),
    }


@dataclass(frozen=True)
class Line:
    """``fixed + per_row * k``."""

    fixed: float
    per_row: float


def fit_line(counts: Sequence[int], values: Sequence[float]) -> Line:
    """Least squares of the relative errors, over the points with kept rows (a branch that keeps
    none skips most of its work).

    >>> fit_line([0, 1, 2, 3], [0.0, 3.0, 5.0, 7.0])
    Line(fixed=1.0, per_row=2.0)
    """
    points = [(k, value) for k, value in zip(counts, values, strict=True) if k > 0]
    design = np.array([[1.0 / value, k / value] for k, value in points])
    fixed, per_row = np.linalg.lstsq(design, np.ones(len(points)), rcond=None)[0]
    return Line(round(float(fixed), 12), round(float(per_row), 12))
