"""Survival schedules: the drop probability of every residual branch of a network."""

from __future__ import annotations

from numbers import Real

__all__ = ["linear_decay", "uniform"]


def check_probability(p: object, name: str = "p") -> float:
    """`p` as a float in [0, 1]; errors call it `name`."""
    if not isinstance(p, Real):
        raise TypeError(f"{name}: expected a drop probability as a number, got {type(p).__name__}")
    value = float(p)
    if not 0.0 <= value <= 1.0:  # also refuses NaN
        raise ValueError(f"{name}: expected a drop probability in [0, 1], got {p}")
    return value


def _check_depth(depth: object) -> None:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise ValueError(f"depth: expected the number of branches, got {depth!r}")


def linear_decay(depth: int, p_last: float, *, first: float | None = None) -> list[float]:
    """Drop probabilities that rise linearly with depth.

    Branch ``l = 1..depth`` is dropped with probability ``l / depth * p_last``: equation 4 of Huang
    et al., "Deep Networks with Stochastic Depth" (ECCV 2016), where the survival probability of
    branch l is ``1 - l/L * (1 - p_L)`` and ``p_last = 1 - p_L``.

    Args:
        depth: number of residual branches.
        p_last: drop probability of the last branch.
        first: drop probability of the first branch; the rest is spaced evenly from there.
            ``first=0.0`` is timm's rule, which never drops the first branch. Default: the paper's
            rule.

    Returns:
        A list of `depth` drop probabilities.

    Raises:
        TypeError: a probability is not a number.
        ValueError: `depth` is no count, or a probability lies outside [0, 1].

    Example:
        >>> linear_decay(4, 0.5)
        [0.125, 0.25, 0.375, 0.5]
        >>> linear_decay(3, 0.5, first=0.0)
        [0.0, 0.25, 0.5]
    """
    _check_depth(depth)
    p_last = check_probability(p_last, "p_last")
    if first is None:
        return [branch / depth * p_last for branch in range(1, depth + 1)]
    first = check_probability(first, "first")
    if depth == 1:
        return [first]
    # Both ends weighted, so that no rounding can carry the last value past p_last.
    return [
        first * (1 - step / (depth - 1)) + p_last * (step / (depth - 1)) for step in range(depth)
    ]


def uniform(depth: int, p: float) -> list[float]:
    """The same drop probability for every branch.

    Args:
        depth: number of residual branches.
        p: drop probability of each.

    Returns:
        A list of `depth` drop probabilities.

    Raises:
        TypeError: `p` is not a number.
        ValueError: `depth` is no count, or `p` lies outside [0, 1].

    Example:
        >>> uniform(3, 0.2)
        [0.2, 0.2, 0.2]
    """
    _check_depth(depth)
    return [check_probability(p)] * depth
