"""Where compaction starts to pay: ``python -m benchmarks.break_even``.

Blocks of which few rows are dropped, forward and backward, with compaction (``min_saving=0``), with
the branch run on every row (``min_saving=1``) and with naive masking, in turns, after a check that
all three compute the same. A straight line is fitted to the ratio of the first two over the share
of dropped rows; where it crosses 1 is the break-even of that block. What is printed last belongs
into ``sdkernels/break_even.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.correctness import TOLERANCE, largest_error
from benchmarks.environment import environment, environment_line
from benchmarks.vit import Block, Residual
from sdkernels import KeptRows, fused_stochastic_depth, reference

BATCH = 32
DROPPED = (0, 1, 2, 4, 8)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PROVIDERS: dict[str, Residual] = {
    "compact": fused_stochastic_depth,
    "whole": partial(fused_stochastic_depth, min_saving=1.0),
    "naive": reference.naive_masking,
}


class ConvBlock(nn.Module):
    """Depthwise 7x7, then two pointwise layers, channels last: a ConvNeXt block without norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
        ).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(
        self, x: Tensor, residual: Residual, p: Sequence[float], rows: Sequence[KeptRows]
    ) -> Tensor:
        return residual(x, self.branch, p[0], layer_scale=self.scale, rows=rows[0])


def make_blocks(device: torch.device) -> dict[str, tuple[nn.Module, Tensor]]:
    """Every block that is measured, and its input."""
    torch.manual_seed(0)
    blocks = {
        "vit-D192-N197": (Block(192, 3), torch.randn(BATCH, 197, 192)),
        "vit-D384-N50": (Block(384, 6), torch.randn(BATCH, 50, 384)),
        "conv-C96-14x14": (
            ConvBlock(96),
            torch.randn(BATCH, 96, 14, 14).to(memory_format=torch.channels_last),
        ),
    }
    return {
        name: (block.to(device), x.to(device).requires_grad_())
        for name, (block, x) in blocks.items()
    }


def kept_rows(dropped: int, device: torch.device) -> list[KeptRows]:
    """Rows for two branches; another subset for each."""
    p = dropped / BATCH
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return [
        KeptRows.sample(BATCH, p, sampler="fixed", generator=seed, device=device) for seed in seeds
    ]


def check(name: str, runs: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """Refuses to time a provider that computes something else than naive masking."""
    expected = runs["naive"]()
    for provider, run in runs.items():
        for got, wanted in zip(run(), expected, strict=True):
            error = largest_error(got, wanted)
            if not error <= TOLERANCE[wanted.dtype]:
                sys.exit(f"{name}: {provider!r} differs from naive masking by {error:.3g}")


def time_in_turns(
    runs: dict[str, Callable[[], Any]],
    device: torch.device,
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call. The providers take turns, a single call each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):  # the first one warms up
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def crossing(points: Sequence[tuple[float, float]]) -> float:
    """The share at which the line through (share, ratio) has fallen to 1; within [0, 1].

    >>> round(crossing([(0.0, 1.05), (0.1, 0.95), (0.2, 0.85)]), 3)
    0.05
    >>> crossing([(0.0, 0.99), (0.1, 0.9)])
    0.0
    """
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    if slope >= 0:  # dropping rows does not make it faster: noise, or a block that is all overhead
        return 0.0 if intercept <= 1 else 1.0
    return min(max((1 - intercept) / slope, 0.0), 1.0)


def step(
    block: nn.Module, x: Tensor, grad: Tensor, rows: list[KeptRows], residual: Residual
) -> tuple[Tensor, ...]:
    """Forward and backward: the result, the gradients of x and of all parameters."""
    y = block(x, residual, (0.5, 0.5), rows)
    return (y.detach(), *torch.autograd.grad(y, (x, *block.parameters()), grad))


def measure(
    blocks: dict[str, tuple[nn.Module, Tensor]],
    device: torch.device,
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[tuple[float, float], ...]]:
    """(share dropped, compact / whole) of every block, printed on the way."""
    ratios = {}
    print(
        f"{'block':16} {'dropped':>9} {'naive':>9} {'whole':>9} {'compact':>9} {'spread':>7}  ratio"
    )
    for name, (block, x) in blocks.items():
        grad = torch.randn_like(x)
        points = []
        for dropped in DROPPED:
            rows = kept_rows(dropped, device)
            runs = {p: partial(step, block, x, grad, rows, rule) for p, rule in PROVIDERS.items()}
            check(name, runs)
            seconds = time_in_turns(runs, device, turns, clock)
            median = {provider: statistics.median(each) for provider, each in seconds.items()}
            # Of neighbouring calls: what else the machine does falls on both alike.
            pairs = zip(seconds["compact"], seconds["whole"], strict=True)
            each_turn = [compact / whole for compact, whole in pairs]
            ratio = statistics.median(each_turn)
            low, _, high = statistics.quantiles(each_turn, n=4)
            points.append((dropped / BATCH, round(ratio, 4)))
            print(
                f"{name:16} {dropped:4d} / {BATCH} "
                + " ".join(f"{median[p] * 1e3:6.2f} ms" for p in ("naive", "whole", "compact"))
                + f"  {(high - low) / 2:6.3f}  {ratio:.3f}"
            )
        ratios[name] = tuple(points)
        print(f"{name:16} break-even: {crossing(points):.3f} of the rows dropped\n")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.break_even", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--turns", type=int, default=30, help="calls of every provider (default 30)"
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: this process' CPU time, for one thread (OMP_NUM_THREADS=1) on a busy machine",
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    print(environment_line(environment(device)))
    ratios = measure(make_blocks(device), device, options.turns, CLOCKS[options.clock])
    smallest = min(crossing(points) for points in ratios.values())
    print("entry of MEASURED in sdkernels/break_even.py:\n")
    print(f'"{device.type}": BreakEven(min_saving={smallest:.3f}, machine=..., ratios={ratios!r}),')


if __name__ == "__main__":
    main()
