"""The network whose steps are timed: what one of its branches costs by number of kept rows, what
the rest of a step costs, and what a branch keeps for the backward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure.correctness import compare
from benchmarks.measure.memory import saved_activation_bytes
from benchmarks.measure.workload import values
from benchmarks.providers.residuals import Rule, naive
from benchmarks.providers.vit import Block
from benchmarks.report.figures import quartile_spread
from benchmarks.studies.scaling.law import KINDS
from sdkernels import KeptRows, fused_stochastic_depth

PATCH = 3 * 16 * 16  # values of a patch
CLASSES = 1000


@dataclass(frozen=True)
class Shape:
    """A ViT."""

    width: int
    tokens: int
    depth: int  # blocks of two branches
    head_width: int = 64


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
        rule: Rule = fused_stochastic_depth,
        clock: BranchClock | None = None,
    ) -> Tensor:
        def timed(*args: Any, **options: Any) -> Tensor:
            x = rule(*args, **options)
            return x if clock is None else clock.passed(x)

        x = self.stem(patches)
        if clock is not None:
            clock.passed(x)
        for i, block in enumerate(self.blocks):
            x = block(x, timed, (0.5, 0.5), rows[KINDS * i : KINDS * (i + 1)])
        return self.head(self.norm(x).mean(1))


class BranchClock:
    """Seconds of every branch, forward and backward, taken as the stream passes between them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._forward: list[float] = []
        self._backward: list[float] = []

    def now(self) -> float:
        """On a CPU the time of the calling thread, which does all the work where there is one: it
        stands still while another process has the core, or while the thread waits for ranks."""
        if self.device.type == "cpu":
            return time.thread_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def passed(self, x: Tensor) -> Tensor:
        """To be called with the stream before the first and after every branch."""
        self._forward.append(self.now())
        x.register_hook(lambda grad: self._backward.append(self.now()))
        return x

    def passes(self) -> dict[str, list[float]]:
        """Of branch 0, 1, ..."""
        forward, backward = (
            [after - before for before, after in pairwise(times)]
            for times in (self._forward, self._backward)
        )
        return {"forward": forward, "backward": backward[::-1]}


def make_batch(shape: Shape, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Patches and labels."""
    patches = torch.randn(batch, shape.tokens, PATCH)
    return patches.to(device), torch.randint(CLASSES, (batch,)).to(device)


def row_counts(batch: int) -> list[int]:
    """The numbers of kept rows that are timed: 0, the powers of two, 1/2, 3/4 and all of B.

    >>> row_counts(16)
    [0, 1, 2, 4, 8, 12, 16]
    """
    powers = {2**i for i in range(batch.bit_length())}
    return sorted({0, batch // 2, 3 * batch // 4, batch} | powers)


def measure_branches(
    shape: Shape, batch: int, turns: int, device: torch.device
) -> list[dict[str, Any]]:
    """Seconds and saved bytes of a branch of each kind, forward and backward, by number of kept
    rows; of half of the rows those of naive masking too.

    The branches are timed inside the steps of a training network of one block, AdamW included, so
    that weights and gradients are as cold in the caches as they are in training. All take turns.

    Raises:
        ProviderMismatch: the op computes something else than naive masking.
    """
    torch.manual_seed(0)
    net = Net(replace(shape, depth=1)).to(device)
    patches, labels = make_batch(shape, batch, device)
    half, optimizer = batch // 2, torch.optim.AdamW(net.parameters())
    rows = {}
    for k in row_counts(batch):  # evenly over the batch
        index = torch.arange(k) * batch // max(k, 1)
        rows[k] = KeptRows.from_index(index, batch, scale=2.0).to(device)
    ways = {"naive": (naive, rows[half])}
    ways |= {k: (fused_stochastic_depth, each) for k, each in rows.items()}

    def loss(key: Any, clock: BranchClock | None = None) -> Tensor:
        rule, kept = ways[key]
        return F.cross_entropy(net(patches, [kept] * KINDS, rule, clock), labels)

    def train(key: Any) -> BranchClock:
        clock = BranchClock(device)
        loss(key, clock).backward()
        optimizer.step()
        optimizer.zero_grad()
        return clock

    checked = [loss(key) for key in (half, "naive")]
    found = [values(y, dict(net.named_parameters()), torch.ones_like(y)) for y in checked]
    compare(f"the op, B={batch}", *found)
    for key in (half, "naive"):  # two are enough to warm up with
        train(key)

    seconds: dict[Any, list[list[float]]] = {key: [[], []] for key in ways}
    for _ in range(turns):
        for key in ways:
            taken = train(key).passes()
            for kind, passes in enumerate(zip(*taken.values(), strict=True)):
                seconds[key][kind].append(sum(passes))

    x = torch.randn(batch, shape.tokens, shape.width, device=device, requires_grad=True)
    block: Any = net.blocks[0]
    parts = (
        ("attention", block.attention, block.norm1, block.scale1),
        ("MLP", block.mlp, block.norm2, block.scale2),
    )
    measured = []
    for kind, (name, branch, norm, scale) in enumerate(parts):
        call = partial(fused_stochastic_depth, x, branch, 0.5, norm=norm, layer_scale=scale)
        forwards = [partial(call, rows=each) for each in rows.values()]
        own = {key: of_kinds[kind] for key, of_kinds in seconds.items()}
        measured.append(
            {
                "kind": name,
                "batch": batch,
                "counts": list(rows),
                "seconds": [median(own[k]) for k in rows],
                "spread": [quartile_spread(own[k]) for k in rows],
                "at_half": {"naive": median(own["naive"])},
                "saved_bytes": [saved_activation_bytes(f, net.parameters()) for f in forwards],
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
    now = BranchClock(device).now
    of_ends, of_optimizer = [], []
    for _ in range(turns + 1):
        start = now()
        F.cross_entropy(ends(patches, ()), labels).backward()
        middle = now()
        optimizer.step()
        of_ends.append(middle - start)
        of_optimizer.append(now() - middle)
        ends.zero_grad()
    # The first one warms up.
    return {"ends_seconds": median(of_ends[1:]), "optimizer_seconds": median(of_optimizer[1:])}
