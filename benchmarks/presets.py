"""What each preset runs, and how a filter picks from it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from benchmarks.compiled import BERNOULLI, DYNAMIC, STATIC, CompileCase
from benchmarks.libraries import is_installed
from benchmarks.models import Case, ModelCase
from benchmarks.providers import OPS, BlockCase, HostCase, OpCase
from benchmarks.training import TrainingCase


class SelectionError(ValueError):
    """A preset or a filter that selects nothing; the message lists what would have been valid."""


@dataclass(frozen=True)
class Rounds:
    """How often a case is timed: ``repeats`` turns of each provider, ``rounds`` samples a turn."""

    repeats: int
    rounds: int
    iterations: int = 1  # calls per sample


@dataclass(frozen=True)
class Preset:
    """A named selection of cases with the effort spent on each kind."""

    name: str
    summary: str
    duration: str
    cases: tuple[Case, ...]
    rounds: dict[str, Rounds]
    training: TrainingCase | None = None

    def names(self) -> list[str]:
        """Names of all cases, training included: what a filter is matched against."""
        training = [] if self.training is None else [self.training.name]
        return [case.name for case in self.cases] + training


def _op_cases(shape: tuple[int, int, int] = (64, 197, 384), k: int = 32) -> tuple[OpCase, ...]:
    return tuple(
        OpCase(op, direction, dtype, shape, k)
        for op in OPS
        for direction in ("fwd", "bwd")
        for dtype in ("fp32", "bf16")
    )


# Without timm they are left out.
SMOKE_MODELS, MODELS = (
    ((ModelCase(width=32, depth=2, heads=2, image=32, batch=8),), (ModelCase(),))
    if is_installed("timm") and is_installed("torchvision")
    else ((), ())
)

HEADLINE_BLOCKS = (
    BlockCase(width=384, tokens=197, batch=32, keep=0.5),
    BlockCase(width=384, tokens=197, batch=32, keep=0.75),
)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke",
            summary="tiny shapes, few samples: shows that the harness works, figures mean nothing",
            duration="under 20 seconds",
            cases=(
                OpCase("compact", "fwd", "fp32", (8, 16, 32), 4),
                OpCase("scatter_add", "bwd", "bf16", (8, 16, 32), 4),
                BlockCase(width=32, tokens=16, batch=8, keep=0.5, head_width=16),
                *SMOKE_MODELS,
                HostCase(),
            ),
            rounds={
                "op": Rounds(2, 2),
                "block": Rounds(2, 2),
                "model": Rounds(2, 2),
                "host": Rounds(2, 2, 10),
            },
            training=TrainingCase(width=16, depth=2, heads=2, epochs=1, learning_rate=3e-3),
        ),
        Preset(
            name="quick",
            summary="the headline shapes",
            duration="under 5 minutes on 2 cores",
            cases=(
                *_op_cases(),
                BlockCase(width=192, tokens=197, batch=32, keep=0.5),
                *HEADLINE_BLOCKS,
                *MODELS,
                HostCase(),
            ),
            rounds={
                "op": Rounds(10, 10),
                "block": Rounds(9, 2),
                "model": Rounds(5, 1),
                "host": Rounds(10, 3, 200),
            },
            training=TrainingCase(),
        ),
        Preset(
            name="standard",
            summary="more shapes and samples, longer training",
            duration="about 20 minutes on 2 cores",
            cases=(
                *_op_cases(),
                *_op_cases(shape=(256, 197, 384), k=128),
                BlockCase(width=192, tokens=197, batch=32, keep=0.5),
                *HEADLINE_BLOCKS,
                BlockCase(width=384, tokens=197, batch=32, keep=0.25),
                BlockCase(width=768, tokens=197, batch=16, keep=0.5),
                *MODELS,
                HostCase(),
            ),
            rounds={
                "op": Rounds(15, 15),
                "block": Rounds(12, 3),
                "model": Rounds(9, 2),
                "host": Rounds(20, 5, 300),
            },
            training=TrainingCase(epochs=40),
        ),
        Preset(
            name="compile",
            summary="a block under torch.compile, against the code that DINOv3 compiles",
            duration="about 8 minutes on 2 cores, most of it compilation",
            cases=tuple(
                CompileCase(counts, width=384, tokens=197, batch=32, keep=0.5)
                for counts in (STATIC, DYNAMIC, BERNOULLI)
            ),
            rounds={"compile": Rounds(6, 5)},
        ),
    )
}


def get_preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        SelectionError: there is none; the message lists all of them.
    """
    if name in PRESETS:
        return PRESETS[name]
    valid = "\n".join(
        f"  {preset.name:10} {preset.summary} ({preset.duration})" for preset in PRESETS.values()
    )
    raise SelectionError(f"there is no preset {name!r}; valid presets:\n{valid}")


def matches(name: str, expression: str) -> bool:
    """Whether any of the comma-separated shell patterns occurs in ``name``.

    >>> matches("op-compact-fwd-fp32", "block, compact-*-fp32")
    True
    """
    patterns = [pattern.strip() for pattern in expression.split(",")]
    return any(fnmatchcase(name, f"*{pattern}*") for pattern in patterns if pattern)


def select(preset: Preset, expression: str | None) -> list[str]:
    """Names of the preset's cases that ``expression`` matches; all of them where it is None.

    Raises:
        SelectionError: nothing matches; the message lists the names.
    """
    names = preset.names()
    if expression is None:
        return names
    selected = [name for name in names if matches(name, expression)]
    if not selected:
        valid = "\n".join(f"  {name}" for name in names)
        raise SelectionError(
            f"filter {expression!r} matches no case of preset {preset.name!r}; its cases:\n{valid}"
        )
    return selected
