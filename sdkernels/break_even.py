"""``min_saving``: the share of dropped rows below which a branch runs on every row of the batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Real
from typing import Literal

__all__ = [
    "MEASURED",
    "BreakEven",
    "MinSaving",
    "break_even",
    "check_min_saving",
    "min_saving_table",
]


@dataclass(frozen=True)
class BreakEven:
    """What was measured on one kind of device by ``python -m benchmarks --preset break-even``.

    ``min_saving`` is the smallest break-even of the blocks: below it, running the branch on every
    row was faster in each of them. (It always takes more memory.)
    """

    min_saving: float
    machine: str
    # block and batch: (share of rows dropped, time with compaction / of the branch on every row)
    ratios: dict[str, tuple[tuple[float, float], ...]]


# 0: compaction pays from the first row that is dropped. With none dropped it costs what its passes
# over the rows save elsewhere: it reads the kept rows in the pass of the norm, and adds the two
# gradients of x in one.
MEASURED: dict[str, BreakEven] = {
    "cpu": BreakEven(
        min_saving=0.0,
        machine="2 threads of AMD EPYC, torch 2.13.0+cpu, commit 4fd04c970572",
        ratios={
            "vit-D32-N16-B8": ((0.0, 0.9629), (0.125, 0.9139), (0.25, 0.8958)),  # break-even 0.000
            "vit-D32-N16-B32": (
                (0.0, 1.0327),
                (0.0312, 0.9387),
                (0.0625, 0.9454),
                (0.125, 0.8901),
                (0.25, 0.8577),
            ),  # break-even 0.000
            "vit-D192-N50-B8": ((0.0, 1.0236), (0.125, 0.903), (0.25, 0.7812)),  # break-even 0.025
            "vit-D192-N50-B32": (
                (0.0, 0.9406),
                (0.0312, 0.9561),
                (0.0625, 0.9035),
                (0.125, 0.8461),
                (0.25, 0.7043),
            ),  # break-even 0.000
            "vit-D192-N197-B8": (
                (0.0, 0.9805),
                (0.125, 0.8534),
                (0.25, 0.7358),
            ),  # break-even 0.000
            "vit-D192-N197-B32": (
                (0.0, 0.9915),
                (0.0312, 0.9122),
                (0.0625, 0.8886),
                (0.125, 0.8137),
                (0.25, 0.7128),
            ),  # break-even 0.000
            "convnext-D384-14x14-B8": (
                (0.0, 1.0031),
                (0.125, 0.8783),
                (0.25, 0.7415),
            ),  # break-even 0.005
            "convnext-D384-14x14-B32": (
                (0.0, 0.9866),
                (0.0312, 0.9204),
                (0.0625, 0.8669),
                (0.125, 0.8428),
                (0.25, 0.6995),
            ),  # break-even 0.000
            "vit-D32-N16-B128": (
                (0.0, 1.0024),
                (0.0312, 0.9116),
                (0.0625, 0.9239),
                (0.125, 0.8984),
                (0.25, 0.7817),
            ),  # break-even 0.000
            "vit-D192-N50-B128": (
                (0.0, 0.9955),
                (0.0312, 0.9768),
                (0.0625, 0.9469),
                (0.125, 0.8605),
                (0.25, 0.725),
            ),  # break-even 0.005
        },
    ),
}

VARIABLE = "SDKERNELS_MIN_SAVING"


@dataclass(frozen=True)
class MinSaving:
    """What "auto" stands for on a device type, and why."""

    device: str
    min_saving: float
    reason: str


def _share(name: str, value: object) -> float:
    if isinstance(value, Real) and not isinstance(value, bool) and 0.0 <= float(value) <= 1.0:
        return float(value)
    raise ValueError(f'{name}: expected "auto" or a share of the rows in [0, 1], got {value!r}')


def _from_environment() -> float | None:
    text = os.environ.get(VARIABLE)
    if not text or text == "auto":
        return None
    try:
        return _share(VARIABLE, float(text))
    except ValueError:
        raise ValueError(
            f'{VARIABLE}: expected "auto" or a share of the rows in [0, 1], got {text!r}'
        ) from None


def _automatic(device: str) -> MinSaving:
    override = _from_environment()
    if override is not None:
        return MinSaving(device, override, f"{VARIABLE}={os.environ[VARIABLE]}")
    measured = MEASURED.get(device)
    if measured is None:
        return MinSaving(device, 0.0, "not measured: always compacts")
    return MinSaving(device, measured.min_saving, f"measured on {measured.machine}")


def min_saving_table() -> list[MinSaving]:
    """What "auto" stands for on every device type, with the reason."""
    return [_automatic(device) for device in [*sorted({*MEASURED, "cpu", "cuda"}), "other"]]


def check_min_saving(value: object) -> float | Literal["auto"]:
    return "auto" if isinstance(value, str) and value == "auto" else _share("min_saving", value)


def break_even(min_saving: float | str, device: str) -> float:
    """The share that `min_saving` stands for on a device type."""
    return _automatic(device).min_saving if isinstance(min_saving, str) else min_saving
