"""The law of the kept rows: probabilities, independence, exact counts, expectation.

Statistics are over fixed seeds, so a test that passes once passes always; were its seed drawn anew,
a correct sampler would fail it with a probability of about FALSE_ALARM at most.
"""

import decimal
from collections import Counter
from fractions import Fraction
from itertools import combinations, product
from math import comb, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdkernels import DepthPlan, KeptRows, fused_stochastic_depth
from sdkernels.sampling import fixed_count

FALSE_ALARM = 1e-9


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def kept(rows):
    return rows.slot >= 0


def masks(count, batch, p, seed, **options):
    """[count, batch], true where a row is kept: successive draws from one generator."""
    generator = seeded(seed)
    draws = (KeptRows.sample(batch, p, generator=generator, **options) for _ in range(count))
    return torch.stack([kept(rows) for rows in draws])


def binomial_bounds(n, p, false_alarm=FALSE_ALARM):
    """A binomial falls below the first, or above the second, with less than half of false_alarm."""
    k = torch.arange(n + 1, dtype=torch.float64)
    ways = torch.lgamma(k[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    pmf = (ways + torch.special.xlogy(k, p) + torch.special.xlog1py(n - k, -p)).exp()
    below = int((pmf.cumsum(0) < false_alarm / 2).sum())
    above = int((pmf.flip(0).cumsum(0) < false_alarm / 2).sum())
    return below, n - above


def assert_binomial(counts, n, p):
    """Every one of `counts` is a number of successes in n trials; the alarm is shared by all."""
    counts = torch.as_tensor(counts)
    low, high = binomial_bounds(n, p, FALSE_ALARM / counts.numel())
    assert low <= counts.min()
    assert counts.max() <= high


def assert_law(values, law):
    """Chi-square test of independent values against their law, a probability for each value."""
    values = list(values)
    observed = Counter(values)
    assert observed.keys() <= law.keys()
    assert sum(law.values()) == pytest.approx(1)
    expected = {value: len(values) * probability for value, probability in law.items()}
    assert min(expected.values()) > 100  # where the chi-square distribution is a good approximation
    excess = sum((observed[value] - e) ** 2 / e for value, e in expected.items())
    degrees = torch.tensor(len(law) - 1.0, dtype=torch.float64)
    tail = torch.special.gammaincc(degrees / 2, torch.tensor(excess / 2, dtype=torch.float64))
    assert tail > FALSE_ALARM


def patterns(kept_rows):
    return map(tuple, kept_rows.tolist())


def independent(*keeps):
    """The law of independent decisions: one for each of `keeps`."""
    choices = product(*[((True, keep), (False, 1 - keep)) for keep in keeps])
    return {tuple(kept for kept, _ in each): prod(p for _, p in each) for each in choices}


def test_binomial_bounds_are_those_of_the_exact_tails():
    n, p, false_alarm = 40, Fraction(3, 10), 1e-3
    pmf = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    low, high = binomial_bounds(n, float(p), false_alarm)
    assert sum(pmf[:low]) < false_alarm / 2 <= sum(pmf[: low + 1])
    assert sum(pmf[high + 1 :]) < false_alarm / 2 <= sum(pmf[high:])


# Bernoulli


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_bernoulli_probability(p):
    batch = 1 << 21
    rows = KeptRows.sample(batch, p, generator=seeded(1))
    assert_binomial(rows.k, batch, 1 - p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_bernoulli_probability_of_every_row(p):
    counts = masks(10_000, 16, p, seed=2).sum(0)
    assert_binomial(counts, 10_000, 1 - p)


def test_bernoulli_rows_are_independent():
    assert_law(patterns(masks(20_000, 5, 0.4, seed=3)), independent(*[0.6] * 5))


def test_bernoulli_pairs_of_rows_are_independent():
    count, batch, keep = 10_000, 64, 0.7
    together = masks(count, batch, 1 - keep, seed=4).double()
    pairs = together.T @ together
    assert_binomial(pairs[torch.triu(torch.ones(batch, batch), 1) > 0], count, keep**2)


def test_bernoulli_number_kept_is_binomial():
    sizes = masks(20_000, 6, 0.55, seed=5).sum(1).tolist()
    assert_law(sizes, {k: comb(6, k) * 0.45**k * 0.55 ** (6 - k) for k in range(7)})


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_bernoulli_draws_are_independent(mode):
    batch = 3 if mode == "row" else 1
    pairs = masks(20_000, batch, 0.5, seed=6, mode=mode).reshape(-1, 2 * batch)
    assert_law(patterns(pairs), independent(*[0.5] * (2 * batch)))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_branches_of_a_plan_are_independent(mode):
    batch = 2 if mode == "row" else 1
    plan = DepthPlan.sample(batch, [0.5, 0.5, 0.4], mode=mode, generator=seeded(7))
    steps = [torch.cat([kept(rows) for rows in plan.resample_()]) for _ in range(16_000)]
    keeps = [keep for keep in (0.5, 0.5, 0.6) for _ in range(batch)]
    assert_law(patterns(torch.stack(steps)), independent(*keeps))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_batch_mode_keeps_all_rows_or_none(p):
    decisions = masks(10_000, 5, p, seed=8, mode="batch")
    assert torch.equal(decisions, decisions[:, :1].expand(-1, 5))
    assert_binomial(decisions[:, 0].sum(), 10_000, 1 - p)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize(("p", "k"), [(0.0, 4096), (1e-300, 4096), (2.0**-60, 4096), (1.0, 0)])
def test_bernoulli_ends_are_certain(p, k, mode):
    assert KeptRows.sample(4096, p, mode=mode, generator=seeded(9)).k == k


def uniforms(count, seed):
    """The multiples of 2^-53 that `count` draws of 64 bits from a generator stand for."""
    bits = torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=seeded(seed))
    return [(draw % 2**64 >> 11) * 2.0**-53 for draw in bits.tolist()]


@pytest.mark.parametrize("p", [0.0, 2.0**-53, 0.1, 0.3, 0.5, 0.9, 1 - 2.0**-53, 1.0])
def test_bernoulli_keeps_where_53_random_bits_fall_below_keep(p):
    expected = [row for row, u in enumerate(uniforms(1000, seed=10)) if u < 1 - p]
    assert KeptRows.sample(1000, p, generator=seeded(10)).index.tolist() == expected


@pytest.mark.parametrize("row", range(8))
def test_bernoulli_probability_is_exact_to_the_last_bit(row):
    # With keep equal to the row's own u the row is dropped, one step of 2^-53 above it is kept: of
    # the 2^53 values that u can take, exactly keep * 2^53 lie below keep.
    u = uniforms(8, seed=11)[row]
    for keep, survives in ((u, False), (u + 2.0**-53, True)):
        assert 1 - (1 - keep) == keep
        rows = KeptRows.sample(8, 1 - keep, generator=seeded(11))
        assert bool(kept(rows)[row]) is survives


# Fixed

COUNTS = {
    # int(b * (1 - p)) is one less.
    (10, 0.8): 2,
    (10, 0.9): 1,
    (100, 0.8): 20,
    (1000, 0.9): 100,
    # A half goes to the even neighbour, also where b * (1 - p) has lost it: here to 1 and 5.
    (3, 0.5): 2,
    (5, 0.5): 2,
    (15, 0.9): 2,
    (15, 0.7): 4,
    # Never none, never more than there are.
    (2, 0.9): 1,
    (8, 1.0): 1,
    (1, 0.999): 1,
    (8, 0.0): 8,
    (0, 0.5): 0,
}


@pytest.mark.parametrize(
    ("batch", "p", "k"),
    [(*case, k) for case, k in COUNTS.items()],
    ids=[f"B{batch}-p{p}" for batch, p in COUNTS],
)
def test_fixed_count(batch, p, k):
    assert fixed_count(batch, p) == k
    rows = KeptRows.sample(batch, p, sampler="fixed")
    assert rows.k == kept(rows).sum() == k


# Any double, and the decimal fractions that people write.
probabilities = st.floats(0, 1) | st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)


@settings(max_examples=300)
@given(batch=st.integers(0, 10_000), p=probabilities)
def test_fixed_count_is_exact_in_the_decimal_digits_of_p(batch, p):
    exact = round(batch * (1 - Fraction(str(p))))  # a half to even
    assert fixed_count(batch, p) == min(max(exact, 1), batch)


def test_fixed_count_does_not_depend_on_the_decimal_context():
    with decimal.localcontext(decimal.Context(prec=3, rounding=decimal.ROUND_DOWN)):
        assert fixed_count(10_000, 0.1234) == 8766


@pytest.mark.parametrize(("batch", "k"), [(4, 1), (4, 3), (5, 2), (6, 3)])
def test_fixed_every_subset_is_equally_likely(batch, k):
    draws = masks(20_000, batch, 1 - k / batch, seed=12, sampler="fixed")
    subsets = (tuple(mask.nonzero().flatten().tolist()) for mask in draws)
    assert_law(subsets, dict.fromkeys(combinations(range(batch), k), 1 / comb(batch, k)))


def test_fixed_every_row_is_kept_k_times_in_b():
    draws = masks(10_000, 64, 0.7, seed=13, sampler="fixed")
    assert torch.equal(draws.sum(1), torch.full((10_000,), 19))
    assert_binomial(draws.sum(0), 10_000, 19 / 64)


def test_fixed_draws_are_independent():
    pairs = masks(20_000, 4, 0.5, seed=14, sampler="fixed").reshape(-1, 8)
    subsets = [tuple(row in two for row in range(4)) for two in combinations(range(4), 2)]
    law = dict.fromkeys((a + b for a, b in product(subsets, subsets)), 1 / 36)
    assert_law(patterns(pairs), law)


def test_fixed_branches_of_a_plan_are_independent():
    plan = DepthPlan.sample(3, [0.7, 0.3], sampler="fixed", generator=seeded(15))
    steps = [torch.cat([kept(rows) for rows in plan.resample_()]) for _ in range(10_000)]
    one_row = [tuple(row == b for row in range(3)) for b in range(3)]
    two_rows = [tuple(row != b for row in range(3)) for b in range(3)]
    law = dict.fromkeys((a + b for a, b in product(one_row, two_rows)), 1 / 9)
    assert_law(patterns(torch.stack(steps)), law)


# Expectation

LAWS = {"row": {"mode": "row"}, "batch": {"mode": "batch"}, "fixed": {"sampler": "fixed"}}


def evaluation_factor(p, rescale):
    """The factor on the branch's output in evaluation."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return fused_stochastic_depth(zero, torch.ones_like, p, training=False, rescale=rescale).item()


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("rescale", ["train", "eval"])
@pytest.mark.parametrize("p", [1e-3, 0.1, 0.25, 0.5, 0.7, 0.9, 0.99])
def test_mean_of_training_is_evaluation(p, rescale, law):
    for batch in (1, 2, 3, 10, 33):
        rows = KeptRows.sample(batch, p, rescale=rescale, **law)
        probability = rows.k / batch if "sampler" in law else 1 - p
        expected = evaluation_factor(p, rescale)
        assert expected == (1.0 if rescale == "train" else 1 - p)
        assert rows.scale * probability == pytest.approx(expected, rel=1e-15, abs=0)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("rescale", ["train", "eval"])
def test_mean_of_the_op_in_training_is_its_evaluation(rescale, law):
    # Three rows at p = 0.5: the fixed sampler keeps two of them, and its scale undoes the rounding.
    count, x = 4000, torch.zeros(3, 1, dtype=torch.float64)
    options = {"rescale": rescale, "generator": seeded(16), **law}
    steps = [fused_stochastic_depth(x, torch.ones_like, 0.5, **options) for _ in range(count)]
    mean = torch.cat(steps, 1).mean(1)
    probability = 2 / 3 if "sampler" in law else 0.5
    low, high = binomial_bounds(count, probability, FALSE_ALARM / 3)
    expected = evaluation_factor(0.5, rescale) / (count * probability)
    assert (low * expected <= mean).all()
    assert (mean <= high * expected).all()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_rescale_none_never_scales(p, law):
    assert KeptRows.sample(7, p, rescale="none", **law).scale == 1.0
    assert evaluation_factor(p, "none") == 1.0


def test_scale_where_every_row_is_dropped_is_finite():
    assert KeptRows.sample(7, 1.0).scale == 1.0
