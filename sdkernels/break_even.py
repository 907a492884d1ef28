"""``min_saving``: the share of dropped rows below which a branch runs on every row of the batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Real

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
    """What was measured on one kind of device by ``python -m benchmarks.break_even``.

    ``min_saving`` is the smallest break-even of the blocks: below it, running the branch on every
    row was faster in each of them. (It always takes more memory.)
    """

    min_saving: float
    machine: str
    # block: (share of rows dropped, time with compaction / time of running the branch on every row)
    ratios: dict[str, tuple[tuple[float, float], ...]]


# 0: compaction pays from the first row that is dropped. With none dropped it costs what its passes
# over the rows save elsewhere: it reads the kept rows in the pass of the norm, and adds the two
# gradients of x in one.
MEASURED: dict[str, BreakEven] = {
    "cpu": BreakEven(
        min_saving=0.0,
        machine="one thread of an AMD EPYC (its CPU time, beside other work), torch 2.13.0",
        ratios={
            "vit-D192-N197": (
                (0.0, 1.0379),
                (0.03125, 0.9884),
                (0.0625, 0.9044),
                (0.125, 0.8308),
                (0.25, 0.7374),
            ),
            "vit-D384-N50": (
                (0.0, 0.9829),
                (0.03125, 0.9873),
                (0.0625, 0.9329),
                (0.125, 0.8682),
                (0.25, 0.7728),
            ),
            "conv-C96-14x14": (
                (0.0, 0.9957),
                (0.03125, 0.9343),
                (0.0625, 0.9424),
                (0.125, 0.8928),
                (0.25, 0.7663),
            ),
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


def check_min_saving(value: object) -> float | str:
    return "auto" if isinstance(value, str) and value == "auto" else _share("min_saving", value)


def break_even(min_saving: float | str, device: str) -> float:
    """The share that `min_saving` stands for on a device type."""
    return _automatic(device).min_saving if isinstance(min_saving, str) else min_saving
