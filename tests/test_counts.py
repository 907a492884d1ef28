"""Numbers of rows that are exact on average: rounded at random, or balanced over a whole plan.

Statistics as in ``test_samplers.py``: over fixed seeds, with its false alarm.
"""

from fractions import Fraction
from itertools import combinations
from math import comb, floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_samplers import assert_binomial, assert_law, kept, masks, patterns, probabilities, seeded
from zoo import NETS

import sdkernels
from sdkernels import DepthPlan, KeptRows, StochasticDepth, fused_stochastic_depth, plan, sampling
from sdkernels.backends import sampler as python_sampler
from sdkernels.models import drop_probs

ROUNDED = {"sampler": "rounded"}
STEPS = 4000
PROBS = [0.0, 0.1, 0.35, 0.5, 0.83, 1.0]


def steps_of(batch, drop_probs, count=STEPS, rank=None, **options):
    """[count, branches, batch], true where a row is kept, of successive steps."""
    if rank is None:
        drawn = DepthPlan.sample(batch, drop_probs, generator=seeded(30), **options)
    else:
        drawn = DepthPlan.for_step(3, 0, batch, drop_probs, rank=rank, **options)
    return torch.stack(
        [torch.stack([kept(rows) for rows in drawn.resample_()]) for _ in range(count)]
    )


# Rounded


@pytest.mark.parametrize(
    ("batch", "p", "counts"),
    [
        (8, 0.1, {7: 0.8, 8: 0.2}),
        (8, 0.3, {5: 0.4, 6: 0.6}),
        (3, 0.5, {1: 0.5, 2: 0.5}),
        (2, 0.9, {0: 0.8, 1: 0.2}),
        (1, 0.4, {0: 0.4, 1: 0.6}),
    ],
    ids=str,
)
def test_rounded_number_kept(batch, p, counts):
    draws = masks(10_000, batch, p, seed=31, **ROUNDED)
    assert_law(draws.sum(1).tolist(), counts)
    assert_binomial(draws.sum(0), 10_000, 1 - p)


@pytest.mark.parametrize(
    ("batch", "p", "k"), [(10, 0.8, 2), (10, 0.1, 9), (8, 0.5, 4), (0, 0.5, 0)]
)
def test_a_whole_number_is_not_rounded(batch, p, k):
    assert masks(500, batch, p, seed=32, **ROUNDED).sum(1).eq(k).all()


@pytest.mark.parametrize(("p", "k"), [(0.0, 7), (1.0, 0)])
def test_rounded_ends_are_certain(p, k):
    assert masks(100, 7, p, seed=33, **ROUNDED).sum(1).eq(k).all()


@settings(max_examples=200)
@given(batch=st.integers(0, 1000), p=probabilities)
def test_rounded_is_beside_the_mean(batch, p):
    mean = batch * (1 - Fraction(repr(p)))
    below, remainder = sampling.rounded_count(batch, p)
    assert below == floor(mean)
    assert Fraction(remainder) == pytest.approx(mean - below, abs=2**-53)
    rows = KeptRows.sample(batch, p, **ROUNDED)
    assert rows.k in (below, below + 1)
    assert rows.scale == (1 / (1 - p) if p < 1 else 1.0)


def test_rounded_every_subset_is_equally_likely():
    draws = masks(20_000, 4, 0.4, seed=34, **ROUNDED)  # 2 or 3 rows, with 0.6 and 0.4
    law = {
        tuple(row in rows for row in range(4)): share / comb(4, k)
        for k, share in ((2, 0.6), (3, 0.4))
        for rows in combinations(range(4), k)
    }
    assert_law(patterns(draws), law)


def test_rounded_draws_and_branches_are_independent():
    """Of one row, rounding is all there is to the law: it is Bernoulli's."""
    expected = {(a, b): (0.7 if a else 0.3) * (0.4 if b else 0.6) for a in (0, 1) for b in (0, 1)}
    drawn = steps_of(1, [0.3, 0.6], 8000, **ROUNDED).squeeze(2)
    assert_law(patterns(drawn.int()), expected)
    successive = drawn[:, 0].view(-1, 2)
    assert_law(
        patterns(successive.int()),
        {(a, b): (0.7 if a else 0.3) * (0.7 if b else 0.3) for a in (0, 1) for b in (0, 1)},
    )


def test_rounded_steps_of_all_ranks_have_the_same_numbers():
    ranks = [steps_of(8, PROBS, 1000, rank=rank, **ROUNDED) for rank in (0, 1, 7)]
    counts = [steps.sum(2) for steps in ranks]
    assert torch.equal(counts[0], counts[1])
    assert torch.equal(counts[0], counts[2])
    assert counts[0][:, 1].unique().tolist() == [7, 8]
    # The rows are each rank's own: given the numbers, where one rank keeps a row says nothing of
    # the other. Branch 3 keeps 4 of 8.
    assert_binomial((ranks[0][:, 3] & ranks[1][:, 3]).sum(0), 1000, 0.25)


def test_rounded_branches_of_many_rows_are_independent():
    steps = steps_of(6, PROBS[1:5], **ROUNDED)
    for a, b in combinations(range(4), 2):
        keep = (1 - PROBS[1 + a]) * (1 - PROBS[1 + b])
        assert_binomial((steps[:, a] & steps[:, b]).sum(0), STEPS, keep)


def test_rounded_is_right_on_average_in_the_op():
    x = torch.ones(3, 1, dtype=torch.float64)
    torch.manual_seed(35)
    total = sum(
        fused_stochastic_depth(x, lambda rows: rows, 0.3, sampler="rounded") for _ in range(5000)
    )
    # y is 1 or 1 + 1 / 0.7; a mean of 5000 is off by less than six standard deviations.
    deviation = (0.7 * 0.3) ** 0.5 / 0.7 / 5000**0.5
    torch.testing.assert_close(total / 5000, 2 * x, rtol=0, atol=6 * deviation)
    module = StochasticDepth(torch.neg, 0.5, sampler="rounded")
    assert set(module(x).flatten().tolist()) == {1.0, -1.0}  # one or two of three


def test_rounded_takes_a_plan_of_lists():
    drawn = DepthPlan.for_step(5, 0, [8, 3], [0.1, 0.5], **ROUNDED)
    counts = {tuple(rows.k for rows in branch) for _ in range(60) for branch in drawn.resample_()}
    assert counts == {(7, 2), (7, 3), (8, 2), (8, 3), (4, 1), (4, 2)}


# Balanced

BALANCED = {"sampler": "balanced"}


@pytest.mark.parametrize("kinds", [1, 2])
def test_balanced_totals_are_the_same_on_all_ranks(kinds):
    batch = 6
    options = {"count": 600, "kinds": kinds, **BALANCED}
    ranks = [steps_of(batch, PROBS, rank=rank, **options) for rank in range(2)]
    for kind in range(kinds):
        first, second = (steps[:, kind::kinds].sum((1, 2)) for steps in ranks)
        assert torch.equal(first, second)
        mean = sum(batch * (1 - Fraction(repr(p))) for p in PROBS[kind::kinds])
        assert first.unique().tolist() == [floor(mean), floor(mean) + 1]
        assert_binomial((first > floor(mean)).sum(), 600, float(mean - floor(mean)))
    assert (ranks[0] != ranks[1]).any()


@pytest.mark.parametrize("kinds", [1, 2])
def test_balanced_probability_of_every_row(kinds):
    counts = steps_of(6, PROBS, kinds=kinds, **BALANCED).sum(0)
    for p, rows in zip(PROBS, counts, strict=True):
        assert_binomial(rows, STEPS, 1 - p)


def test_balanced_uniform_plans_are_a_subset_of_all_pairs():
    """With one probability, systematic sampling in a random order is a uniform random subset."""
    steps = steps_of(2, [0.5, 0.5], 8000, **BALANCED).flatten(1)
    subsets = [tuple(row in two for row in range(4)) for two in combinations(range(4), 2)]
    assert_law(patterns(steps), dict.fromkeys(subsets, 1 / 6))


def test_balanced_pairs_depend_on_each_other_as_little_as_the_sum_makes_them():
    """Of 48 pairs of which 24 are kept, two are kept together with 24 * 23 / (48 * 47)."""
    steps = steps_of(8, [0.5] * 6, **BALANCED).flatten(1).double()
    together = (steps.T @ steps)[torch.triu(torch.ones(48, 48), 1) > 0]
    assert_binomial(together, STEPS, 24 * 23 / (48 * 47))


def test_balanced_numbers_of_a_branch_vary_nearly_as_bernoullis():
    steps = steps_of(8, [0.5] * 12, 4000, **BALANCED)
    # Hypergeometric: 48 of 96 pairs are kept, 8 of them lie in a branch.
    law = {k: comb(8, k) * comb(88, 48 - k) / comb(96, 48) for k in range(9)}
    assert steps.sum(2).double().var(0).mean() == pytest.approx(8 / 4 * 88 / 95, rel=0.05)
    assert_binomial((steps[:, 0].sum(1) == 4).sum(), 4000, law[4])


def test_balanced_steps_are_independent():
    steps = steps_of(1, [0.5, 0.5], 8000, **BALANCED).flatten(1)[:, 0].view(-1, 2)
    assert_law(
        patterns(steps), dict.fromkeys([(a, b) for a in (False, True) for b in (False, True)], 0.25)
    )


def test_balanced_takes_a_plan_of_lists():
    drawn = DepthPlan.for_step(5, 0, [8, 3], [0.25, 0.5, 0.5], **BALANCED)
    for _ in range(50):
        totals = torch.tensor([[rows.k for rows in branch] for branch in drawn.resample_()]).sum(0)
        assert totals.tolist() in ([14, 5], [14, 6])
    for branch in drawn:
        for rows, batch in zip(branch, (8, 3), strict=True):
            KeptRows(rows.index, rows.slot, rows.scale)
            assert rows.slot[rows.index].tolist() == list(range(rows.k))
            assert rows.batch == batch


def test_balanced_from_a_generator():
    drawn = [
        DepthPlan.sample(6, PROBS, generator=seeded(36), **BALANCED).resample_() for _ in range(2)
    ]
    assert all(torch.equal(a.slot, b.slot) for a, b in zip(*drawn, strict=True))
    assert [rows.scale for rows in drawn[0]] == [1 / (1 - p) if p < 1 else 1.0 for p in PROBS]
    assert len(DepthPlan.sample(4, [], **BALANCED)) == 0
    assert DepthPlan.sample(0, [0.5], **BALANCED)[0].batch == 0


# Both


def test_patched_models():
    """Blocks draw for themselves, by the report's plans, and by a balanced plan that is given."""
    net = NETS["timm-vit"]
    model = net.model().train()
    report = sdkernels.patch(model, drop_probs=[0.1, 0.1, 0.3, 0.5], sampler="rounded")
    model(net.inputs(8)).sum().backward()
    seen = set()
    for step in range(40):
        plans = [report.plan_for_step(1, step, 8, rank=rank) for rank in range(2)]
        first, second = ([rows.k for rows in drawn] for drawn in plans)
        assert first == second
        seen |= set(enumerate(first))
    assert seen == {(0, 7), (0, 8), (1, 7), (1, 8), (2, 5), (2, 6), (3, 4)}
    balanced = DepthPlan.for_step(1, 0, 8, drop_probs(model), kinds=2, **BALANCED)
    for drawn in (plans[0], balanced):
        with report.use(drawn):
            model(net.inputs(8)).sum().backward()


def test_the_same_rows_without_the_extension(monkeypatch):
    def rows():
        torch.manual_seed(37)
        drawn = [KeptRows.sample(9, 0.3, **ROUNDED) for _ in range(20)]
        for options in (ROUNDED, BALANCED):
            drawn += DepthPlan.sample(9, PROBS, **options).resample_()
            drawn += DepthPlan.for_step(2**40, 2**50, 9, PROBS, rank=3, **options).resample_()
        return [each.index.tolist() for each in drawn], torch.get_rng_state().tolist()

    expected = rows()
    monkeypatch.setattr(sampling, "host", python_sampler)
    monkeypatch.setattr(plan, "host", python_sampler)
    sampling.law.cache_clear()
    try:
        assert rows() == expected
    finally:
        sampling.law.cache_clear()


def rank_above(sampler):
    DepthPlan.for_step(1, 1, 8, [0.5], sampler=sampler, rank=2**32 - 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_above("rounded"), r"rank: expected an integer from 0 to 2\*\*32 - 2 with"),
        (lambda: rank_above("balanced"), r"rank: expected an integer from 0 to 2\*\*32 - 2 with"),
        (lambda: DepthPlan.sample(8, [0.5], kinds=2), 'kinds: expected sampler="balanced" beside'),
        (lambda: DepthPlan.sample(8, [0.5], kinds=0, **BALANCED), "kinds: expected .*, got 0"),
        (
            lambda: DepthPlan.sample(8, [0.5], kinds=True, **BALANCED),
            "kinds: expected .*, got True",
        ),
        (lambda: DepthPlan.for_step(1, 1, 8, [0.5], kinds="2"), "kinds: expected .*, got '2'"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_the_last_rank_has_rows_where_nothing_is_shared():
    assert DepthPlan.for_step(1, 1, 8, [0.5], rank=2**32 - 1)[0].batch == 8
