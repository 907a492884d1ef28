"""What each preset runs, and how a filter picks from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.cases import blocks
from benchmarks.cases.blocks import BlockCase, BreakEvenCase, Net
from benchmarks.cases.compiled import COUNTS, STATIC, CompileCase
from benchmarks.cases.depth import stack
from benchmarks.cases.host import HostCase
from benchmarks.cases.kernels import KERNELS, KernelCase
from benchmarks.cases.models import ModelCase
from benchmarks.cases.ops import OPS, OpCase
from benchmarks.cases.training import TrainingCase
from benchmarks.measure.workload import Case, matches
from benchmarks.providers.networks import HAS_LIBRARIES


class SelectionError(ValueError):
    """A preset or a filter that selects nothing; the message lists what would have been valid."""


@dataclass(frozen=True)
class Rounds:
    """How often a case is timed: ``repeats`` turns of each provider, ``rounds`` samples a turn."""

    repeats: int
    rounds: int
    iterations: int = 1  # calls per sample


_QUICK_ROUNDS = {
    "op": Rounds(6, 8),
    "kernel": Rounds(6, 10),
    "block": Rounds(4, 1),
    "model": Rounds(3, 1),
    "host": Rounds(10, 3, 200),
    "depth": Rounds(5, 1),
    "compile": Rounds(6, 5),
    "break_even": Rounds(7, 2),
}


def _rounds(**other: tuple[int, ...]) -> dict[str, Rounds]:
    """Those of the preset `quick`, but for these kinds."""
    return _QUICK_ROUNDS | {kind: Rounds(*counts) for kind, counts in other.items()}


@dataclass(frozen=True)
class Preset:
    """A named selection of cases with the effort spent on each kind."""

    name: str
    summary: str
    duration: str  # of a run
    cases: tuple[Case, ...]
    rounds: dict[str, Rounds] = field(default_factory=lambda: _QUICK_ROUNDS)
    training: TrainingCase | None = None

    def __str__(self) -> str:
        return f"{self.name:10} {self.summary}; {self.duration}"

    def names(self) -> list[str]:
        """Names of all cases, training included: what a filter is matched against."""
        training = [] if self.training is None else [self.training]
        return [case.name for case in (*self.cases, *training)]


VITS = (blocks.VIT_S, blocks.VIT_B, blocks.VIT_L)
VIT_H = Net("vit", 1280, 257, "ViT-H")
CONVNEXT_B = Net("convnext", 128, 56, "ConvNeXt-B, stage 1")

# label: shape of a batch of rows, k = half of it
ROWS = {
    net.label: (64, *net.row)
    for net in (*VITS, VIT_H, blocks.CONVNEXT, CONVNEXT_B, blocks.RESNET, blocks.RESNET_LATE)
}


def _op_cases(
    rows: str = "ViT-S", dtypes: Iterable[str] = ("fp32", "bf16"), names: Iterable[str] = tuple(OPS)
) -> tuple[OpCase, ...]:
    shape = ROWS[rows]
    return tuple(
        OpCase(op, direction, dtype, rows, shape, shape[0] // 2)
        for op in names
        if (OPS[op].tokens if len(shape) == 3 else OPS[op].images)
        for direction in ("fwd", "bwd")
        for dtype in dtypes
    )


KERNEL_SHAPES: tuple[tuple[int, ...], ...] = (
    (64, 16, 64),
    (32, 50, 192),
    (32, 197, 384),
    (16, 197, 768),
    (32, 1024, 14, 14),
)


def _kernel_cases(
    dtypes: Iterable[str] = ("fp32", "bf16", "fp16"),
    shapes: Iterable[tuple[int, ...]] = KERNEL_SHAPES,
    threads: Iterable[int] = (1, 2),
    whole_cache: bool = False,
) -> tuple[KernelCase, ...]:
    return tuple(
        KernelCase(name, dtype, shape, count, whole_cache)
        for name in KERNELS
        for shape in shapes
        for count in threads
        for dtype in dtypes
    )


def _grid(case: Callable[..., Case], *choices: Iterable[Any]) -> tuple[Case, ...]:
    """A case for every combination of its arguments; the last one changes first."""
    return tuple(case(*chosen) for chosen in itertools.product(*choices))


_blocks = partial(_grid, BlockCase)


def _break_even(nets: Iterable[Net], batches: Iterable[int]) -> tuple[BreakEvenCase, ...]:
    shares = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
    return tuple(
        BreakEvenCase(net, batch, 1 - share)
        for net in nets
        for batch in batches
        for share in shares
        if (share * batch).is_integer()  # of few rows no share so small can be dropped
    )


MODELS = {
    "ViT-S": ("timm", "vit_small_patch16_224"),
    "ViT-B": ("timm", "vit_base_patch16_224"),
    "ViT-L": ("timm", "vit_large_patch16_224"),
    "ConvNeXt-T": ("timm", "convnext_tiny"),
    "ConvNeXt-B": ("timm", "convnext_base"),
    "ResNet-50": ("torchvision", "resnet50"),
    "ResNet-152": ("torchvision", "resnet152"),
    "Swin-T": ("torchvision", "swin_t"),
}


def _model(label: str, batch: int = 20, image: int = 224, dtype: str = "fp32") -> ModelCase:
    return ModelCase(*MODELS[label], label, image, batch, dtype=dtype)


KEEPS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
MIDDLE = (0.5, 0.75)
BATCHES = (1, 4, 16, 64, 256, 1024)
MOVES = ("compact", "scatter_add", "scatter_add_layer_scale")
ALL_OPS = (
    *(case for rows in ROWS for case in _op_cases(rows)),
    *_op_cases(dtypes=("mixed",), names=MOVES[1:]),
)
TINY = Net("vit", 32, 16, "tiny")
TINY_NETS = (
    *(Net("convnext", 16, 8, "tiny"), Net("swin", 32, 14, "tiny")),
    Net("resnet", 16, 8, "tiny"),
)
TINY_VIT = ModelCase("timm", "vit_tiny_patch16_224", "tiny", image=32, batch=8, depth=2)
SHORT_VIT = ModelCase("timm", "vit_small_patch16_224", "ViT-S, 3 blocks", batch=10, depth=3)
LATE_STAGES = (blocks.CONVNEXT_LATE, blocks.SWIN_LATE, blocks.RESNET_LATE)
SMALL_ROWS = (TINY, blocks.VIT_TINY_ROWS)
BREAK_EVEN_NETS = (*SMALL_ROWS, blocks.VIT_TI, blocks.CONVNEXT_LATE)

_ALL = (
    Preset(
        name="smoke",
        summary="tiny shapes, few samples: shows that the harness works, figures mean nothing",
        duration="about 24 seconds on 2 cores",
        cases=(
            OpCase("compact", "fwd", "fp32", "tiny", (8, 16, 32), 4),
            OpCase("scatter_add", "bwd", "mixed", "tiny", (8, 16, 32), 4),
            OpCase("scatter_add", "fwd", "bf16", "tiny", (8, 16, 8, 8), 4),
            OpCase("scatter_add_relu", "bwd", "fp32", "tiny", (8, 16, 8, 8), 4),
            KernelCase("compact_layer_norm_backward_stream", "mixed", (8, 16, 32)),
            KernelCase("scatter_add_relu", "fp16", (8, 16, 8, 8), threads=2),
            *_blocks((TINY, *TINY_NETS), (8,), (0.5,)),
            TINY_VIT,
            stack(4, batch=8, tokens=4, width=16),
            HostCase(),
            *_break_even((TINY,), (8,)),
        ),
        rounds={kind: Rounds(2, 2) for kind in _QUICK_ROUNDS},
        training=TrainingCase(width=16, depth=2, heads=2, epochs=1, learning_rate=3e-3),
    ),
    Preset(
        name="quick",
        summary="the headline shapes",
        duration="about 4 minutes on 2 cores",
        cases=(
            *_op_cases(),
            *_kernel_cases(shapes=KERNEL_SHAPES[:1], dtypes=("fp32",), threads=(1,)),
            *_kernel_cases(shapes=KERNEL_SHAPES[2:3], dtypes=("fp32", "bf16"), threads=(1,)),
            *_blocks((blocks.VIT_S, blocks.VIT_TINY_ROWS, blocks.CONVNEXT_LATE), (32,), (0.5,)),
            SHORT_VIT,
            stack(48),
            HostCase(),
        ),
        rounds=_rounds(op=(5, 6), kernel=(5, 6), block=(3, 1)),
        training=TrainingCase(epochs=5),
    ),
    Preset(
        name="standard",
        summary="all kinds of rows, blocks and models that 2 cores can bear; all keeps, depths",
        duration="about 40 minutes on 2 cores",
        cases=(
            *_op_cases(),
            *_op_cases(dtypes=("mixed",), names=MOVES[1:]),
            *_op_cases("ViT-B", names=MOVES),
            *_op_cases("ConvNeXt-T, stage 1", names=MOVES),
            *_op_cases("ResNet-50, stage 3", names=(*MOVES, "scatter_add_relu")),
            *_kernel_cases(threads=(1,)),
            *_blocks((blocks.VIT_S,), (32,), MIDDLE),
            *_blocks((blocks.VIT_B,), (16,), MIDDLE),
            *_blocks((blocks.VIT_L,), (8,), MIDDLE),
            *_blocks(LATE_STAGES, (32,), MIDDLE),
            *_blocks((blocks.VIT_TI,), (20,), KEEPS),
            *_blocks((blocks.VIT_TINY_ROWS,), (*BATCHES, 32), (0.5,)),
            *(_model("ViT-S"), _model("ResNet-50", image=128), _model("ConvNeXt-T", image=128)),
            _model("Swin-T", batch=10),
            *map(stack, (12, 48, 200, 1000)),
            HostCase(),
        ),
        rounds=_rounds(block=(5, 1), model=(4, 1), op=(8, 10)),
        training=TrainingCase(),
    ),
    Preset(
        name="full",
        summary="all shapes and dtypes; for a machine with time and memory",
        duration="about 5 hours on 2 cores",
        cases=(
            *ALL_OPS,
            *_blocks((blocks.VIT_S,), (32,), MIDDLE),
            *_blocks((blocks.VIT_B, blocks.VIT_L), (16,), KEEPS),
            *_blocks((blocks.VIT_7B,), (4,), MIDDLE),
            *_blocks((blocks.VIT_S, blocks.VIT_B), (32,), MIDDLE, ("mixed",)),
            *_grid(
                BlockCase, (blocks.CONVNEXT, blocks.SWIN, blocks.RESNET, *LATE_STAGES), (32,), KEEPS
            ),
            *_blocks((blocks.VIT_TI,), (20,), KEEPS),
            *_blocks((blocks.VIT_TINY_ROWS, blocks.VIT_TI), BATCHES, (0.5, 0.9)),
            *(_model(label) for label in ("ViT-S", "ConvNeXt-T", "ResNet-50")),
            *(_model(label, 10) for label in ("ViT-B", "ConvNeXt-B", "ResNet-152", "Swin-T")),
            _model("ViT-L", batch=5),
            *map(stack, (12, 24, 48, 100, 200, 500, 1000)),
            HostCase(),
        ),
        rounds=_rounds(block=(9, 2), model=(9, 1), op=(12, 12)),
        training=TrainingCase(epochs=40),
    ),
    Preset(
        name="gpu",
        summary="the full set at the sizes of a GPU, in bf16 and mixed; with --device cuda",
        duration="about an hour on one GPU (an estimate, not yet run)",
        cases=(
            *ALL_OPS,
            *(
                case
                for dtype in ("bf16", "mixed")
                for nets, batch, keeps in (
                    (VITS, 64, KEEPS),
                    ((blocks.VIT_7B,), 32, (0.5, 0.75, 0.9)),
                    ((blocks.CONVNEXT, blocks.SWIN, blocks.RESNET), 128, (0.5, 0.75, 0.9)),
                )
                for case in _blocks(nets, (batch,), keeps, (dtype,))
            ),
            *_blocks((blocks.VIT_TI,), BATCHES, (0.5,), ("bf16",)),
            *_grid(CompileCase, VITS, (64,), (0.5,), ("bf16",), COUNTS),
            _model("ViT-S", 32, dtype="amp"),
            *(
                _model(label, 250, dtype="amp")
                for label in ("ViT-S", "ViT-B", "ConvNeXt-T", "ResNet-50", "Swin-T")
            ),
            *(_model(label, 100, dtype="amp") for label in ("ViT-L", "ConvNeXt-B", "ResNet-152")),
            *map(stack, (12, 48, 200, 1000)),
            HostCase(),
            *_break_even(BREAK_EVEN_NETS, (32, 128)),
        ),
        rounds=_rounds(op=(10, 30), block=(8, 10), model=(6, 5), depth=(6, 5), compile=(6, 20))
        | {"break_even": Rounds(9, 10)},
        training=TrainingCase(),
    ),
    Preset(
        name="gpu-short",
        summary="what to look at first on a GPU; with --device cuda",
        duration="about 8 minutes on one GPU (an estimate, not yet run)",
        cases=(
            *(c for rows in ("ViT-S", "ViT-B", "ViT-H") for c in _op_cases(rows, dtypes=("bf16",))),
            *_blocks((blocks.VIT_B,), (64,), (0.5, 0.75, 0.9), ("bf16",)),
            *(_model("ViT-S", 32, dtype="amp"), _model("ViT-B", 128, dtype="amp")),
            CompileCase(blocks.VIT_B, 64, 0.5, "bf16", STATIC),
            HostCase(),
        ),
        rounds=_rounds(op=(6, 20), block=(6, 10), model=(5, 4), host=(6, 3, 200), compile=(5, 20)),
    ),
    Preset(
        name="kernels",
        summary="every op against the PyTorch calls it replaces",
        duration="about 15 minutes on 2 cores, with a last cache of hundreds of MiB an hour",
        cases=_kernel_cases(whole_cache=True),
    ),
    Preset(
        name="compile",
        summary="a block under torch.compile, against the code that DINOv3 compiles",
        duration="about 8 minutes on 2 cores, most of it compilation",
        cases=_grid(CompileCase, (blocks.VIT_S,), (32,), (0.5,), ("fp32",), COUNTS),
    ),
    Preset(
        name="break-even",
        summary='blocks of which few rows are dropped, for min_saving="auto"',
        duration="about 5 minutes on 2 cores",
        cases=(*_break_even(BREAK_EVEN_NETS, (8, 32)), *_break_even(SMALL_ROWS, (128,))),
    ),
)


def _runs_here(case: Case) -> bool:
    """Blocks and models of timm and torchvision are left out where one of them is missing."""
    of_library = ("convnext", "swin", "resnet")
    is_block = isinstance(case, BlockCase) and case.net.family in of_library
    return HAS_LIBRARIES or not (is_block or isinstance(case, ModelCase))


PRESETS = {
    preset.name: replace(preset, cases=tuple(filter(_runs_here, preset.cases))) for preset in _ALL
}


def get_preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        SelectionError: there is none; the message lists all of them.
    """
    if name not in PRESETS:
        valid = "\n".join(f"  {preset}" for preset in PRESETS.values())
        raise SelectionError(f"there is no preset {name!r}; valid presets:\n{valid}")
    return PRESETS[name]


def select(preset: Preset, expression: str | None) -> list[str]:
    """Names of the preset's cases that ``expression`` matches; all of them where it is None.

    Raises:
        SelectionError: nothing matches; the message lists the names.
    """
    names = preset.names()
    selected = [name for name in names if expression is None or matches(name, expression)]
    if not selected:
        valid = "\n".join(f"  {name}" for name in names)
        raise SelectionError(
            f"filter {expression!r} matches no case of preset {preset.name!r}; its cases:\n{valid}"
        )
    return selected
