"""What to change to gain more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models import LeftAlone

__all__ = ["Findings", "advice"]


@dataclass(frozen=True)
class Findings:
    """What the advice follows from."""

    batch: int
    sampler: str
    compiled: bool
    drop_probs: Sequence[float]
    inside: float  # share of the operations that is in branches of patched blocks
    outside: float  # share of the step that is not
    host_share: float | None
    left: Sequence[LeftAlone]


def advice(found: Findings) -> tuple[str, ...]:
    """What is worth most first.

    >>> at = Findings(32, "bernoulli", False, [0.0, 0.2, 0.4], 0.97, 0.03, None, ())
    >>> advice(at)
    ('the same highest rate in every block: drop_probs=[0.4] * 3 saves up to 39 %',)
    """
    said = []
    mean = sum(found.drop_probs) / len(found.drop_probs)
    highest = max(found.drop_probs)
    if found.left:
        said.append(f"blocks that run as before: {found.left[0].name or 'the model'} and others")
    if found.host_share is not None and found.host_share > 0.9:
        more = "a larger batch" if found.compiled else "a larger batch, or compile=True"
        said.append(f"the GPU waits for the host: {more}")
    if highest < 0.15:
        said.append(f"rates up to {highest:g} save little: higher ones")
    elif mean < 0.75 * highest:
        said.append(
            f"the same highest rate in every block: drop_probs=[{highest:g}] * "
            f"{len(found.drop_probs)} saves up to {highest * found.inside:.0%}".replace("%", " %")
        )
    if found.outside > 0.3:
        said.append("much of the step is not in branches, where nothing can be saved")
    if found.batch * mean < 2:
        said.append(f"a larger batch: of {found.batch} samples few are dropped in a branch")
    if found.sampler != "fixed" and (found.compiled or found.batch < 16):
        said.append('sampler="fixed": the same number of rows in every step')
    return tuple(said)
