"""The survival schedules: the paper's rule, timm's rule, and one probability for all."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdkernels import DepthPlan, linear_decay, uniform

probabilities = st.floats(0, 1)
depths = st.integers(0, 200)


def test_linear_decay_is_equation_4():
    # p_l = 1 - l / L * (1 - p_L), with p_L = 0.5 and L = 54 as in the paper's ResNet-110.
    survival = [1 - Fraction(branch, 54) * Fraction(1, 2) for branch in range(1, 55)]
    drop_probs = linear_decay(54, 0.5)
    assert drop_probs == pytest.approx([float(1 - p) for p in survival], rel=1e-15)
    assert drop_probs[-1] == 0.5


@pytest.mark.parametrize("depth", [1, 2, 12, 54, 1201])
def test_expected_depth_is_that_of_the_paper(depth):
    # Section 4: with p_L = 0.5 the expected number of residual branches is (3L - 1) / 4.
    survival = [1 - p for p in linear_decay(depth, 0.5)]
    assert sum(survival) == pytest.approx((3 * depth - 1) / 4, rel=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3, 12, 24, 40])
@pytest.mark.parametrize("p_last", [0.0, 0.1, 0.3, 1.0])
def test_linear_decay_from_zero_is_timms(depth, p_last):
    # timm: [x.item() for x in torch.linspace(0, drop_path_rate, depth)]
    timm = torch.linspace(0, p_last, depth, dtype=torch.float64).tolist()
    assert linear_decay(depth, p_last, first=0.0) == pytest.approx(timm, rel=1e-14)


def test_linear_decay_between_two_ends():
    assert linear_decay(5, 0.5, first=0.25) == [0.25, 0.3125, 0.375, 0.4375, 0.5]
    assert linear_decay(3, 0.0, first=1.0) == [1.0, 0.5, 0.0]


@given(depth=depths, p_last=probabilities)
def test_linear_decay_rises_to_p_last(depth, p_last):
    drop_probs = linear_decay(depth, p_last)
    assert len(drop_probs) == depth
    assert drop_probs == sorted(drop_probs)
    assert all(0 <= p <= p_last for p in drop_probs)
    assert drop_probs[-1:] == [p_last] * min(depth, 1)


@given(depth=st.integers(2, 200), p_last=probabilities, first=probabilities)
def test_linear_decay_has_its_ends(depth, p_last, first):
    drop_probs = linear_decay(depth, p_last, first=first)
    assert len(drop_probs) == depth
    assert (drop_probs[0], drop_probs[-1]) == (first, p_last)
    assert all(0 <= p <= 1 for p in drop_probs)
    assert all(type(p) is float for p in drop_probs)
    DepthPlan.sample(1, drop_probs)


@pytest.mark.parametrize("first", [None, 0.0, 0.25])
def test_linear_decay_of_no_and_one_branch(first):
    assert linear_decay(0, 0.5, first=first) == []
    assert linear_decay(1, 0.5, first=first) == [0.5 if first is None else first]


@given(depth=depths, p=probabilities)
def test_uniform(depth, p):
    assert uniform(depth, p) == [p] * depth


@pytest.mark.parametrize("number", [int, np.float32, np.float64, Fraction])
def test_probabilities_are_returned_as_floats(number):
    one, zero = number(1), number(0)
    drop_probs = [*linear_decay(3, one), *linear_decay(1, one, first=zero), *uniform(2, one)]
    assert [type(p) for p in drop_probs] == [float] * 6
    assert drop_probs == pytest.approx([1 / 3, 2 / 3, 1, 0, 1, 1])


SCHEDULES = {
    "p_last": lambda p: linear_decay(3, p),
    "p_last-first": lambda p: linear_decay(3, p, first=0.0),
    "first": lambda p: linear_decay(3, 0.5, first=p),
    "p": lambda p: uniform(3, p),
}


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", SCHEDULES)
def test_probability_out_of_range(name, p):
    argument = name.split("-")[0]
    with pytest.raises(ValueError, match=rf"^{argument}: .* in \[0, 1\], got {p}$"):
        SCHEDULES[name](p)


@pytest.mark.parametrize("p", ["0.5", torch.tensor(0.5), [0.5]], ids=["str", "tensor", "list"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_probability_of_the_wrong_type(name, p):
    argument = name.split("-")[0]
    with pytest.raises(TypeError, match=f"^{argument}: .*got {type(p).__name__}"):
        SCHEDULES[name](p)


@pytest.mark.parametrize("depth", [-1, 1.0, "3", None, True], ids=repr)
def test_depth_is_a_count(depth):
    for make in (lambda: linear_decay(depth, 0.5), lambda: uniform(depth, 0.5)):
        with pytest.raises(ValueError, match=f"^depth: expected the number .*got {depth!r}"):
            make()
