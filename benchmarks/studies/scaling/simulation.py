"""What the slowest of many data-parallel ranks does to a step: numbers only, nothing is timed.

A step's branches keep ``counts[step, rank, branch]`` rows. A table of seconds by number of kept
rows turns counts into time (or of bytes, into memory); the ranks then wait for each other once a
step or once a block. :data:`SAMPLERS` holds the laws that the counts can follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdkernels import linear_decay, uniform
from sdkernels.sampling import fixed_count

Counts = NDArray[np.int64]  # [steps, ranks, branches]
Floats = NDArray[np.float64]

# Branches of a block, which differ in cost: attention and MLP. Branch i is of kind i % KINDS.
KINDS = 2
SYNCS = ("step", "block")
SCHEDULES: dict[str, Callable[[int, float], list[float]]] = {
    "linear": linear_decay,
    "uniform": uniform,
}


@dataclass(frozen=True)
class Layers:
    """The rows of one rank's batch, and the drop probability of each residual branch."""

    batch: int
    drop_probs: tuple[float, ...]

    @property
    def keep(self) -> Floats:
        """[branches]: survival probabilities."""
        return 1.0 - np.array(self.drop_probs)


def draw_bernoulli(
    layers: Layers, steps: int, ranks: int, generator: np.random.Generator
) -> Counts:
    """Every row by itself: ``sampler="bernoulli"``, with rows of its own on every rank."""
    shape = (steps, ranks, len(layers.drop_probs))
    return generator.binomial(layers.batch, layers.keep, shape)


def draw_fixed(layers: Layers, steps: int, ranks: int, generator: np.random.Generator) -> Counts:
    """``sampler="fixed"``: the rounded count, always."""
    counts = [fixed_count(layers.batch, p) for p in layers.drop_probs]
    return np.broadcast_to(np.array(counts), (steps, ranks, len(counts)))


def draw_rounded(layers: Layers, steps: int, ranks: int, generator: np.random.Generator) -> Counts:
    """``sampler="rounded"``: rounded up or down at random, with a generator that all ranks share.

    A branch's count is the same on all ranks and averages to exactly ``batch * keep``.
    """
    branches = len(layers.drop_probs)
    counts = round_at_random(layers.batch * layers.keep, generator.random((steps, branches)))
    return np.broadcast_to(counts[:, None], (steps, ranks, branches))


def round_at_random(values: Floats, uniform: Floats) -> Counts:
    """``floor(value + uniform)``: an integer beside each value whose mean is the value.

    Values that are whole to rounding stay what they are: ``10 * (1 - 0.8)`` is 1.9999999999999996.

    >>> round_at_random(np.array([7.2, 7.2, 10 * (1 - 0.8)]), np.array([0.7, 0.9, 0.0])).tolist()
    [7, 8, 2]
    """
    nearest = np.round(values)
    values = np.where(np.abs(values - nearest) < 1e-9, nearest, values)
    return np.floor(values + uniform).astype(np.int64)


def draw_dealt(layers: Layers, steps: int, ranks: int, generator: np.random.Generator) -> Counts:
    """Bernoulli counts of the batch of all ranks together, dealt to the ranks in equal shares.

    The deal of a branch goes on where that of the block before stopped, from a first rank that is
    drawn: over all branches of a kind, no rank has more than one row more than another. On one rank
    this is Bernoulli's law itself.
    """
    totals = generator.binomial(ranks * layers.batch, layers.keep, (steps, len(layers.drop_probs)))
    counts = np.empty((steps, ranks, totals.shape[1]), dtype=np.int64)
    places = np.arange(ranks)
    for kind in range(KINDS):
        first = generator.integers(ranks, size=(steps, 1))
        for branch in range(kind, totals.shape[1], KINDS):
            total = totals[:, branch, None]
            counts[:, :, branch] = total // ranks + ((places - first) % ranks < total % ranks)
            first = (first + total) % ranks
    return counts


def draw_total(layers: Layers, steps: int, ranks: int, generator: np.random.Generator) -> Counts:
    """``sampler="balanced"``: the rows of all branches of a kind together are fixed in number.

    Systematic sampling over the (branch, row) pairs in a random order: each pair is kept with
    exactly its probability, and the total is the rounded sum of them. Ranks need not know of each
    other; a single branch's count varies nearly as Bernoulli's.
    """
    counts = np.empty((steps, ranks, len(layers.drop_probs)), dtype=np.int64)
    for kind in range(KINDS):
        keep = layers.keep[kind::KINDS]
        pairs = np.repeat(np.arange(len(keep)), layers.batch)
        # One shared offset: the total is rounded alike on every rank.
        offset = generator.random((steps, 1))
        for rank in range(ranks):
            order = generator.permuted(np.broadcast_to(pairs, (steps, len(pairs))), axis=1)
            sums = offset + np.cumsum(keep[order], axis=1)
            # The last sum is the same on all ranks but for the order of the additions.
            before = np.concatenate((offset, sums[:, :-1]), axis=1)
            kept = np.floor(sums + 1e-9) > np.floor(before + 1e-9)
            for branch in range(len(keep)):
                counts[:, rank, kind + KINDS * branch] = (kept & (order == branch)).sum(1)
    return counts


Sampler = Callable[[Layers, int, int, np.random.Generator], Counts]
SAMPLERS: dict[str, Sampler] = {
    "bernoulli": draw_bernoulli,
    "fixed": draw_fixed,
    "rounded": draw_rounded,
    "dealt": draw_dealt,
    "total": draw_total,
}
ALIKE = ("fixed", "rounded")  # all ranks have the same counts


def costs_of(counts: Counts, table: Floats) -> Floats:
    """[steps, ranks, branches]: ``table[kind, k]`` looked up for the count of every branch."""
    kinds = np.arange(counts.shape[2]) % KINDS
    costs: Floats = table[kinds, counts]
    return costs


def parts_between(costs: Floats, sync: str) -> Floats:
    """[steps, ranks, parts]: the sums of a step's branches from where the ranks wait for each other
    to where they wait next: once a step, or once a block.

    >>> costs = np.array([[[3.0, 0.0, 1.0, 0.0], [1.0, 0.0, 2.0, 0.0]]])  # two ranks, two blocks
    >>> parts_between(costs, "step").tolist(), parts_between(costs, "block").tolist()
    ([[[4.0], [3.0]]], [[[3.0, 1.0], [1.0, 2.0]]])
    """
    if sync not in SYNCS:
        raise ValueError(f"sync: expected one of {', '.join(SYNCS)}, got {sync!r}")
    parts = 1 if sync == "step" else costs.shape[2] // KINDS
    sums: Floats = costs.reshape(*costs.shape[:2], parts, -1).sum(3)
    return sums


def slowest(parts: Floats, ranks: int) -> Floats:
    """[groups]: what the ranks wait for, where the ranks of each step are taken apart into groups.

    >>> slowest(np.array([[[3.0, 1.0], [1.0, 2.0]]]), ranks=2).tolist()
    [5.0]
    """
    waited: Floats = parts.reshape(-1, ranks, parts.shape[2]).max(1).sum(1)
    return waited


@dataclass(frozen=True)
class Expectation:
    """Mean over simulated steps, and its standard error."""

    mean: float
    error: float


def expectation(values: Floats) -> Expectation:
    """
    >>> expectation(np.array([1.0, 3.0]))
    Expectation(mean=2.0, error=1.0)
    """
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Expectation(float(values.mean()), float(error))


def simulate(
    sampler: str,
    layers: Layers,
    tables: Mapping[str, Floats],
    ranks: Sequence[int],
    steps: int,
    generator: np.random.Generator,
) -> dict[str, dict[str, list[Expectation]]]:
    """Expected cost of the slowest rank, by name of the table and by ``sync``, for every number of
    ranks.

    Args:
        sampler: a key of :data:`SAMPLERS`.
        layers: batch of a rank and drop probabilities.
        tables: each [kinds, batch + 1], the cost of a branch that keeps k rows.
        ranks: numbers of ranks, each a divisor of the largest.
        steps: steps of the largest number of ranks to draw. A smaller one takes the same draws
            apart into groups, so that its mean cannot lie above.
        generator: what to draw from.
    """
    most = max(ranks)
    if any(most % number for number in ranks):
        raise ValueError(f"ranks: expected divisors of the largest, {most}, got {list(ranks)}")
    draw = SAMPLERS[sampler]
    results: dict[str, dict[str, list[Expectation]]] = {
        name: {sync: [] for sync in SYNCS} for name in tables
    }

    def add(counts: Counts, group_sizes: Sequence[int]) -> None:
        for name, table in tables.items():
            costs = costs_of(counts, table)
            for sync in SYNCS:
                parts = parts_between(costs, sync)
                results[name][sync] += [expectation(slowest(parts, n)) for n in group_sizes]

    if sampler in ALIKE:
        add(draw(layers, steps, 1, generator), [1] * len(ranks))
    elif sampler == "dealt":  # the law of a rank's counts depends on how many there are
        for number in ranks:
            add(draw(layers, steps * min(most // number, 8), number, generator), [number])
    else:
        add(draw(layers, steps, most, generator), ranks)
    return results


def total_distribution(batch: int, keep: Sequence[float]) -> Floats:
    """Probabilities of the total 0, 1, ... of independent Binomial(batch, keep) counts.

    >>> total_distribution(1, [0.5, 0.5]).tolist()
    [0.25, 0.5, 0.25]
    """
    total = np.ones(1)
    for each in keep:
        counts = range(batch + 1)
        one = [math.comb(batch, k) * each**k * (1.0 - each) ** (batch - k) for k in counts]
        total = np.convolve(total, one)
    return total


def bernoulli_distribution(layers: Layers, per_row: Sequence[float]) -> tuple[Floats, Floats]:
    """A rank's cost under Bernoulli's law where a kept row costs ``per_row[kind]``: ascending
    values and their probabilities. Exact, for costs that are straight lines."""
    values, probabilities = np.zeros(1), np.ones(1)
    for kind, slope in enumerate(per_row):
        total = total_distribution(layers.batch, layers.keep[kind :: len(per_row)].tolist())
        possible = np.flatnonzero(total > 1e-18)  # the rest weighs nothing in 1e10 draws
        values = np.add.outer(values, slope * possible).ravel()
        probabilities = np.multiply.outer(probabilities, total[possible]).ravel()
    order = np.argsort(values)
    return values[order], probabilities[order]


def largest_of(values: Floats, probabilities: Floats, draws: float) -> Floats:
    """Probabilities of the largest of that many independent draws, for the same ascending values.

    The upper tail is summed from above, so that 1e9 draws cost no digits.

    >>> largest_of(np.array([0.0, 1.0]), np.array([0.5, 0.5]), draws=2).tolist()
    [0.25, 0.75]
    """
    above = np.append(np.cumsum(probabilities[:0:-1])[::-1], 0.0)
    with np.errstate(divide="ignore"):  # log(0) of a value that nothing lies below
        below = np.exp(draws * np.log1p(-np.clip(above, 0.0, 1.0)))
    return np.diff(below, prepend=0.0)


def rule_of_thumb(layers: Layers, ranks: int) -> float:
    """Bernoulli's cost over the ideal when the ranks meet once a step: of as many normal variables,
    the largest lies ``sqrt(2 ln ranks)`` deviations above the mean, at most.

    >>> round(rule_of_thumb(Layers(32, (0.5,) * 24), 4096), 3)
    0.147
    """
    keep = layers.keep
    deviation = math.sqrt(layers.batch * float((keep * (1 - keep)).sum()))
    return math.sqrt(2 * math.log(ranks)) * deviation / (layers.batch * float(keep.sum()))


def summarise_law(counts: Counts, layers: Layers) -> dict[str, float]:
    """What of Bernoulli's law is left, from drawn counts. Rows of a branch are exchangeable under
    every sampler, so the counts say it all.

    ``keep_error`` is the largest difference of a branch's share of kept rows from ``1 - p``;
    ``count_variance`` and ``total_variance`` those of a branch's count and of a rank's rows in all
    branches, as shares of Bernoulli's; ``row_correlation`` that between the decisions for two rows
    of a rank in one branch (Bernoulli: 0).
    """
    keep = layers.keep
    variance = layers.batch * keep * (1.0 - keep)
    random = variance > 0
    share = (counts.var((0, 1))[random] / variance[random]).mean()
    return {
        "keep_error": float(np.abs(counts.mean((0, 1)) / layers.batch - keep).max()),
        "count_variance": float(share),
        "total_variance": float(counts.sum(2).var() / variance.sum()),
        "row_correlation": float((share - 1.0) / (layers.batch - 1)),
    }
