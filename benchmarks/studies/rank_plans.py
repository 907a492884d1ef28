"""Rows of a step that give every data-parallel rank the same work, made with the public interface.

Both functions need nothing but the number of the step and the rank. What they return goes where a
plan goes: ``rows=plan[i]``, or ``sdkernels.models.use(model, plan)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from sdkernels import DepthPlan, KeptRows

ALL_RANKS = 2**32 - 1  # in place of a rank: what is drawn with it is the same on all of them


def rounded_plan(
    seed: int, step: int, batch: int, drop_probs: Sequence[float], rank: int | None = None
) -> DepthPlan:
    """Rows of each rank's own, as many in a branch on all ranks: the count is rounded up or down at
    random, alike on all ranks, so that it averages to ``batch * (1 - p)`` exactly.

    Where that is below one row, one is kept all the same, as ``sampler="fixed"`` does.

    Args:
        seed: of the run, the same on all ranks.
        step: number of the step.
        batch: rows of this rank, the same on all ranks.
        drop_probs: one a branch.
        rank: default: this process' rank, as in :meth:`DepthPlan.for_step`.
    """
    whole = [math.floor(batch * (1 - p)) for p in drop_probs]
    remainders = [batch * (1 - p) - k for p, k in zip(drop_probs, whole, strict=True)]
    # A batch of one row, which is kept where a count is rounded up.
    up = DepthPlan.for_step(seed, step, 1, [1 - r for r in remainders], rank=ALL_RANKS)
    counts = [k + one.k for k, one in zip(whole, up, strict=True)]
    # The probabilities of which the fixed count is k.
    exact = [1 - k / batch for k in counts]
    return DepthPlan.for_step(seed, step, batch, exact, sampler="fixed", rank=rank)


def total_rows(
    seed: int, step: int, batch: int, drop_probs: Sequence[float], rank: int, kinds: int = 1
) -> list[KeptRows]:
    """Rows of each rank's own, whose number varies from branch to branch nearly as Bernoulli's and
    is the same on all ranks in sum.

    Systematic sampling over the (branch, row) pairs in a random order: each pair is kept with
    exactly its probability.

    Args:
        seed, step, batch, drop_probs: as in :func:`rounded_plan`.
        rank: which of the ranks this is.
        kinds: branches i, i + kinds, ... cost the same; each such group has its sum. 2 where
            attention and MLP take turns.
    """
    # Not torch.Generator, which takes 32 bits of its seed and so would know no rank.
    shared, own = (np.random.default_rng((seed, step, each)) for each in (ALL_RANKS, rank))
    keep = 1 - np.array(drop_probs)
    mask = np.empty((len(keep), batch), dtype=bool)
    for kind in range(kinds):
        pairs = np.repeat(keep[kind::kinds], batch)
        order = own.permutation(len(pairs))
        sums = shared.random() + np.append(0.0, np.cumsum(pairs[order]))
        kept = np.empty(len(pairs), dtype=bool)
        # The ranks add up in orders of their own, and have to round alike.
        kept[order] = np.diff(np.floor(sums + 1e-9)) > 0
        mask[kind::kinds] = kept.reshape(-1, batch)
    scales = [1 / (1 - p) if p < 1 else 1.0 for p in drop_probs]
    return [
        KeptRows.from_mask(torch.from_numpy(each), scale)
        for each, scale in zip(mask, scales, strict=True)
    ]
