"""What the slowest of many data-parallel ranks costs: numbers only, nothing is timed here.

A branch that keeps k rows costs ``table[kind, k]``, in seconds or bytes; the ranks wait for each
other once a step or once a block. Under Bernoulli's law all branches of all ranks are independent,
and the expected cost is computed; the other samplers' counts are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from sdkernels import DepthPlan

Counts = NDArray[np.int64]  # [steps, ranks, branches]
Floats = NDArray[np.float64]

# Branches of a block, which differ in cost: attention and MLP. Branch i is of kind i % KINDS.
KINDS = 2
SYNCS = ("step", "block")
SAMPLERS = ("bernoulli", "fixed", "rounded", "balanced")
BINS = 2**13  # of costs, between nothing and the largest


@dataclass(frozen=True)
class Layers:
    """The rows of one rank's batch, and the drop probability of each residual branch."""

    batch: int
    drop_probs: tuple[float, ...]

    @property
    def keep(self) -> Floats:
        """[branches]: survival probabilities."""
        return 1.0 - np.array(self.drop_probs)

    def costs(self, table: Floats) -> Floats:
        """[branches, B + 1]: what each branch costs by number of kept rows."""
        return table[np.arange(len(self.drop_probs)) % KINDS]

    def ideal(self, table: Floats) -> float:
        """Every branch on its mean number of rows: what a perfect balance costs."""
        rows = np.arange(self.batch + 1)
        branches = zip(self.batch * self.keep, self.costs(table), strict=True)
        return float(sum(np.interp(mean, rows, costs) for mean, costs in branches))


def law_of_sum(costs: Floats, batch: int, keep: Floats) -> tuple[float, Floats]:
    """The law of what branches cost together where every row is kept by itself.

    Args:
        costs: [branches, batch + 1].
        keep: [branches].

    Returns:
        A unit of costs, and the probabilities of 0, 1, 2, ... of them.

    >>> unit, law = law_of_sum(np.array([[0.0, 1.0], [0.0, 1.0]]), 1, np.array([0.5, 0.5]))
    >>> law[law > 0].round(9).tolist(), round(unit * float(law @ np.arange(len(law))), 9)
    ([0.25, 0.5, 0.25], 1.0)
    """
    unit = float(costs.max(1).sum()) / BINS
    law = np.ones(1)
    for own, p in zip(costs / unit, keep, strict=True):
        chances = binom.pmf(range(batch + 1), batch, p)
        # Shared by the two places beside each cost, so that the mean stays what it is.
        below, share = np.floor(own).astype(int), own % 1
        size = below.max() + 2
        lower = np.bincount(below, chances * (1 - share), size)
        law = np.convolve(law, lower + np.bincount(below + 1, chances * share, size))
    return unit, law


def expected_largest(unit: float, law: Floats, draws: float) -> float:
    """The mean of the largest of that many independent draws.

    The upper tail is summed from above, so that 1e9 draws cost no digits.

    >>> expected_largest(2.0, np.array([0.5, 0.5]), draws=2)
    1.5
    """
    above = np.cumsum(law[::-1])[::-1][1:].clip(0.0, 1 - 1e-16)  # P(more than 0, 1, 2, ... units)
    return unit * float(-np.expm1(draws * np.log1p(-above)).sum())


def bernoulli(layers: Layers, table: Floats, ranks: Iterable[float], sync: str) -> list[float]:
    """Expected cost of a step, for every number of ranks."""
    costs, keep = layers.costs(table), layers.keep
    size = len(costs) if sync == "step" else KINDS
    laws = [
        law_of_sum(costs[first : first + size], layers.batch, keep[first : first + size])
        for first in range(0, len(costs), size)
    ]
    return [sum(expected_largest(*law, draws=number) for law in laws) for number in ranks]


def draw_balanced(layers: Layers, ranks: int, generator: np.random.Generator) -> Counts:
    """[ranks, branches]: ``sampler="balanced"``, many ranks at once.

    Systematic sampling over the (branch, row) pairs of a kind in a random order, from an offset
    that all ranks share: each pair is kept with its probability, the total is their rounded sum.
    """
    counts = np.empty((ranks, len(layers.drop_probs)), dtype=np.int64)
    for kind in range(KINDS):
        keep = layers.keep[kind::KINDS]
        pairs = np.tile(np.repeat(np.arange(len(keep)), layers.batch), (ranks, 1))
        order = generator.permuted(pairs, axis=1)
        sums = np.floor(generator.random() + 1e-9 + np.cumsum(keep[order], axis=1))
        kept = np.diff(sums, axis=1, prepend=0.0) > 0
        for branch in range(len(keep)):
            counts[:, kind + KINDS * branch] = (kept & (order == branch)).sum(1)
    return counts


@cache
def draw(sampler: str, layers: Layers, steps: int, ranks: int) -> Counts:
    """[steps, ranks, branches]: how many rows are kept."""
    if sampler == "balanced":
        generator = np.random.default_rng(0)
        return np.stack([draw_balanced(layers, ranks, generator) for _ in range(steps)])
    drop_probs = list(layers.drop_probs)
    plans = [
        DepthPlan.for_step(0, 0, layers.batch, drop_probs, rank=rank, sampler=sampler)
        for rank in range(ranks)
    ]
    return np.array([[[own.k for own in p.resample_()] for p in plans] for _ in range(steps)])


def slowest(costs: Floats, ranks: int, sync: str) -> float:
    """Mean cost of a step where ``ranks`` of those that were drawn wait for each other.

    Args:
        costs: [steps, all ranks, branches].

    >>> costs = np.array([[[3.0, 0.0, 1.0, 0.0], [1.0, 0.0, 2.0, 0.0]]])  # two ranks, two blocks
    >>> slowest(costs, 2, "step"), slowest(costs, 2, "block"), slowest(costs, 1, "block")
    (4.0, 5.0, 3.5)
    """
    parts = 1 if sync == "step" else costs.shape[2] // KINDS
    sums = costs.reshape(-1, ranks, parts, costs.shape[2] // parts).sum(3)
    return float(sums.max(1).sum(1).mean())


def expected(
    sampler: str, layers: Layers, table: Floats, ranks: tuple[int, ...], sync: str
) -> list[float]:
    """Cost of a step, for every number of ranks, each a divisor of the largest."""
    if sampler == "bernoulli":
        return bernoulli(layers, table, ranks, sync)
    alike = sampler != "balanced"  # all ranks have the same counts
    counts = draw(sampler, layers, *((500, 1) if alike else (8, max(ranks))))
    costs = table[np.arange(counts.shape[2]) % KINDS, counts]
    return [slowest(costs, 1 if alike else number, sync) for number in ranks]


def summarise(counts: Counts, layers: Layers) -> dict[str, float]:
    """What of Bernoulli's law is left, from drawn counts. Rows of a branch are exchangeable under
    every sampler, so the counts say it all.

    ``keep_error`` is the largest difference of a branch's share of kept rows from ``1 - p``;
    ``count_variance`` and ``total_variance`` those of a branch's count and of a rank's rows in all
    branches, as shares of Bernoulli's; ``row_correlation`` that between the decisions for two rows
    of a rank in one branch (Bernoulli: 0).
    """
    keep = layers.keep
    variance = layers.batch * keep * (1.0 - keep)
    share = float((counts.var((0, 1)) / variance).mean())
    return {
        "keep_error": float(np.abs(counts.mean((0, 1)) / layers.batch - keep).max()),
        "count_variance": share,
        "total_variance": float(counts.sum(2).var() / variance.sum()),
        "row_correlation": (share - 1.0) / (layers.batch - 1),
    }
