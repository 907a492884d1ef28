"""What each preset runs, and how a filter picks from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from benchmarks.cases import blocks
from benchmarks.cases.blocks import BlockCase, Net
from benchmarks.cases.break_even import BreakEvenCase
from benchmarks.cases.compiled import BERNOULLI, DYNAMIC, STATIC, CompileCase
from benchmarks.cases.depth import DepthCase
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


# Seconds of a case in a quick run on two cores; of an epoch on the digits.
_SHARES = {
    **{"op": 1, "kernel": 0.5, "block": 15, "model": 25, "depth": 6, "host": 4},
    **{"compile": 160, "break_even": 7, "train": 6.5},
}
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


@dataclass(frozen=True)
class Preset:
    """A named selection of cases with the effort spent on each kind."""

    name: str
    summary: str
    minutes: float
    cases: tuple[Case, ...]
    rounds: dict[str, Rounds] = field(default_factory=lambda: _QUICK_ROUNDS)
    training: TrainingCase | None = None
    timeline: Case | None = None  # of which one step is profiled, where it is among the cases
    where: str = "on 2 cores"  # it takes so long

    @property
    def duration(self) -> str:
        """How long a run takes, in words."""
        units = ((1, 60, "seconds"), (120, 1, "minutes"), (math.inf, 1 / 60, "hours"))
        value, unit = next(
            (self.minutes * factor, unit) for below, factor, unit in units if self.minutes < below
        )
        return f"about {value:.0f} {unit} {self.where}"

    def expected_seconds(self) -> dict[str, float]:
        """Of every case, roughly: for the progress line."""
        shares = {}
        for case in self.cases:
            rounds, quick = self.rounds[case.kind], _QUICK_ROUNDS.get(case.kind, Rounds(1, 1))
            calls = rounds.repeats * rounds.rounds / (quick.repeats * quick.rounds)
            shares[case.name] = _SHARES[case.kind] * calls
        if self.training is not None:
            shares[self.training.name] = _SHARES["train"] * self.training.epochs
        total = sum(shares.values())
        return {name: 60 * self.minutes * share / total for name, share in shares.items()}

    def names(self) -> list[str]:
        """Names of all cases, training included: what a filter is matched against."""
        training = [] if self.training is None else [self.training.name]
        return [case.name for case in self.cases] + training


# label: shape of a batch of rows, k = half of it
ROWS: dict[str, tuple[int, ...]] = {
    "ViT-S": (64, 197, 384),
    "ViT-B": (64, 197, 768),
    "ViT-L": (64, 197, 1024),
    "ViT-H": (64, 257, 1280),
    "ConvNeXt-T, stage 1": (64, 96, 56, 56),
    "ConvNeXt-B, stage 1": (64, 128, 56, 56),
    "ResNet-50, stage 1": (64, 256, 56, 56),
    "ResNet-50, stage 3": (64, 1024, 14, 14),
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
    names: Iterable[str] = tuple(KERNELS),
    dtypes: Iterable[str] = ("fp32", "bf16", "fp16"),
    shapes: Iterable[tuple[int, ...]] = KERNEL_SHAPES,
    threads: Iterable[int] = (1, 2),
) -> tuple[KernelCase, ...]:
    return tuple(
        KernelCase(name, dtype, shape, count)
        for name in names
        for shape in shapes
        for count in threads
        for dtype in dtypes
    )


MOVES = ("compact", "scatter_add", "scatter_add_layer_scale")
MIXED = _op_cases(dtypes=("mixed",), names=("scatter_add", "scatter_add_layer_scale"))


def _library(*nets: Net) -> tuple[Net, ...]:
    """Blocks of timm and torchvision, which are left out where one of them is missing."""
    return tuple(net for net in nets if HAS_LIBRARIES or net.family == "vit")


def _blocks(
    nets: Iterable[Net], batch: int, keeps: Iterable[float], dtype: str = "fp32"
) -> tuple[BlockCase, ...]:
    return tuple(BlockCase(net, batch, keep, dtype) for net in nets for keep in keeps)


def _models(*cases: ModelCase) -> tuple[ModelCase, ...]:
    return cases if HAS_LIBRARIES else ()


TINY = Net("vit", 32, 16, "tiny")
TINY_NETS = _library(
    Net("convnext", 16, 8, "tiny"), Net("swin", 32, 14, "tiny"), Net("resnet", 16, 8, "tiny")
)
HEADLINE_BLOCKS = _blocks((blocks.VIT_S,), 32, (0.5, 0.75))
OTHER_BLOCKS = _blocks(
    _library(blocks.CONVNEXT_LATE, blocks.SWIN_LATE, blocks.RESNET_LATE), 32, (0.5, 0.75)
)
TINY_VIT = ModelCase("timm", "vit_tiny_patch16_224", "tiny", image=32, batch=8, depth=2)
SHORT_VIT = ModelCase("timm", "vit_small_patch16_224", "ViT-S, 3 blocks", batch=10, depth=3)
VIT_S = ModelCase("timm", "vit_small_patch16_224", "ViT-S")
RESNET_50 = ModelCase("torchvision", "resnet50", "ResNet-50", image=128)
CONVNEXT_T = ModelCase("timm", "convnext_tiny", "ConvNeXt-T", image=128)
SWIN_T = ModelCase("torchvision", "swin_t", "Swin-T", batch=10)

KEEPS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
BATCHES = (1, 4, 16, 64, 256, 1024)


def _break_even(nets: Iterable[Net], batches: Iterable[int]) -> tuple[BreakEvenCase, ...]:
    shares = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
    return tuple(
        BreakEvenCase(net, batch, 1 - round(share * batch) / batch)
        for net in nets
        for batch in batches
        for share in shares
        # Of few rows no share so small can be dropped.
        if abs(round(share * batch) / batch - share) < 1e-9
    )


SMALL_ROWS = (TINY, blocks.VIT_TINY_ROWS)
BREAK_EVEN_NETS = _library(*SMALL_ROWS, blocks.VIT_TI, blocks.CONVNEXT_LATE)

_ALL_OPS = tuple(case for rows in ROWS for case in _op_cases(rows))
_DEPTHS = tuple(DepthCase(branches) for branches in (12, 48, 200, 1000))


def _gpu_model(library: str, model: str, label: str, batch: int) -> ModelCase:
    return ModelCase(library, model, label, batch=batch, dtype="amp")


_SMOKE = Preset(
    name="smoke",
    summary="tiny shapes, few samples: shows that the harness works, figures mean nothing",
    minutes=0.4,
    cases=(
        OpCase("compact", "fwd", "fp32", "tiny", (8, 16, 32), 4),
        OpCase("scatter_add", "bwd", "mixed", "tiny", (8, 16, 32), 4),
        OpCase("scatter_add", "fwd", "bf16", "tiny", (8, 16, 8, 8), 4),
        OpCase("scatter_add_relu", "bwd", "fp32", "tiny", (8, 16, 8, 8), 4),
        KernelCase("compact_layer_norm_backward_stream", "mixed", (8, 16, 32)),
        KernelCase("scatter_add_relu", "fp16", (8, 16, 8, 8), threads=2),
        BlockCase(TINY, 8, 0.5),
        *_blocks(TINY_NETS, 8, (0.5,)),
        *_models(TINY_VIT),
        DepthCase(4, batch=8, tokens=4, width=16),
        HostCase(),
        *_break_even((TINY,), (8,)),
    ),
    rounds={kind: Rounds(2, 2) for kind in _QUICK_ROUNDS},
    training=TrainingCase(width=16, depth=2, heads=2, epochs=1, learning_rate=3e-3),
    timeline=TINY_VIT,
)
_QUICK = Preset(
    name="quick",
    summary="the headline shapes",
    minutes=4,
    cases=(
        *_op_cases(),
        *_kernel_cases(shapes=KERNEL_SHAPES[:1], dtypes=("fp32",), threads=(1,)),
        *_kernel_cases(shapes=KERNEL_SHAPES[2:3], dtypes=("fp32", "bf16"), threads=(1,)),
        *_blocks((blocks.VIT_S, blocks.VIT_TINY_ROWS), 32, (0.5,)),
        *_blocks(_library(blocks.CONVNEXT_LATE), 32, (0.5,)),
        *_models(SHORT_VIT),
        DepthCase(48),
        HostCase(),
    ),
    rounds=_QUICK_ROUNDS | {"op": Rounds(5, 6), "kernel": Rounds(5, 6), "block": Rounds(3, 1)},
    training=TrainingCase(epochs=5),
    timeline=SHORT_VIT,
)
_STANDARD = Preset(
    name="standard",
    summary="all kinds of rows, blocks and models that 2 cores can bear; all keeps, depths",
    minutes=40,
    cases=(
        *_op_cases(),
        *MIXED,
        *_op_cases("ViT-B", names=MOVES),
        *_op_cases("ConvNeXt-T, stage 1", names=MOVES),
        *_op_cases("ResNet-50, stage 3", names=(*MOVES, "scatter_add_relu")),
        *_kernel_cases(threads=(1,)),
        *HEADLINE_BLOCKS,
        *_blocks((blocks.VIT_B,), 16, (0.5, 0.75)),
        *_blocks((blocks.VIT_L,), 8, (0.5, 0.75)),
        *OTHER_BLOCKS,
        *_blocks((blocks.VIT_TI,), 20, KEEPS),
        *(BlockCase(blocks.VIT_TINY_ROWS, batch, 0.5) for batch in (*BATCHES, 32)),
        *_models(VIT_S, RESNET_50, CONVNEXT_T, SWIN_T),
        *_DEPTHS,
        HostCase(),
    ),
    rounds=_QUICK_ROUNDS | {"block": Rounds(5, 1), "model": Rounds(4, 1), "op": Rounds(8, 10)},
    training=TrainingCase(),
    timeline=VIT_S,
)
_FULL = Preset(
    name="full",
    summary="all shapes and dtypes; for a machine with time and memory",
    minutes=300,
    cases=(
        *_ALL_OPS,
        *MIXED,
        *HEADLINE_BLOCKS,
        *_blocks((blocks.VIT_B, blocks.VIT_L), 16, KEEPS),
        *_blocks((blocks.VIT_7B,), 4, (0.5, 0.75)),
        *_blocks((blocks.VIT_S, blocks.VIT_B), 32, (0.5, 0.75), "mixed"),
        *_blocks(_library(blocks.CONVNEXT, blocks.CONVNEXT_LATE), 32, KEEPS),
        *_blocks(_library(blocks.SWIN, blocks.SWIN_LATE), 32, KEEPS),
        *_blocks(_library(blocks.RESNET, blocks.RESNET_LATE), 32, KEEPS),
        *_blocks((blocks.VIT_TI,), 20, KEEPS),
        *(
            BlockCase(net, batch, keep)
            for net in (blocks.VIT_TINY_ROWS, blocks.VIT_TI)
            for batch in BATCHES
            for keep in (0.5, 0.9)
        ),
        *_models(
            VIT_S,
            ModelCase("timm", "vit_base_patch16_224", "ViT-B", batch=10),
            ModelCase("timm", "vit_large_patch16_224", "ViT-L", batch=5),
            replace(CONVNEXT_T, image=224),
            ModelCase("timm", "convnext_base", "ConvNeXt-B", batch=10),
            replace(RESNET_50, image=224),
            ModelCase("torchvision", "resnet152", "ResNet-152", batch=10),
            SWIN_T,
        ),
        *(DepthCase(branches) for branches in (12, 24, 48, 100, 200, 500, 1000)),
        HostCase(),
    ),
    rounds=_QUICK_ROUNDS | {"block": Rounds(9, 2), "model": Rounds(9, 1), "op": Rounds(12, 12)},
    training=TrainingCase(epochs=40),
    timeline=VIT_S,
)
_LARGE_VIT = _gpu_model("timm", "vit_large_patch16_224", "ViT-L", 100)
_GPU = Preset(
    name="gpu",
    summary="the full set at the sizes of a GPU, in bf16 and mixed; with --device cuda",
    minutes=60,
    where="on one GPU (an estimate, not yet run)",
    cases=(
        *_ALL_OPS,
        *MIXED,
        *(
            case
            for dtype in ("bf16", "mixed")
            for case in (
                *_blocks((blocks.VIT_S, blocks.VIT_B, blocks.VIT_L), 64, KEEPS, dtype),
                *_blocks((blocks.VIT_7B,), 32, (0.5, 0.75, 0.9), dtype),
                *_blocks(
                    *(_library(blocks.CONVNEXT, blocks.SWIN, blocks.RESNET), 128),
                    *((0.5, 0.75, 0.9), dtype),
                ),
            )
        ),
        *(BlockCase(blocks.VIT_TI, batch, 0.5, "bf16") for batch in BATCHES),
        *(
            CompileCase(net, 64, 0.5, "bf16", counts)
            for net in (blocks.VIT_S, blocks.VIT_B, blocks.VIT_L)
            for counts in (STATIC, DYNAMIC, BERNOULLI)
        ),
        *_models(
            _gpu_model("timm", "vit_small_patch16_224", "ViT-S", 32),
            _gpu_model("timm", "vit_small_patch16_224", "ViT-S", 250),
            _gpu_model("timm", "vit_base_patch16_224", "ViT-B", 250),
            _LARGE_VIT,
            _gpu_model("timm", "convnext_tiny", "ConvNeXt-T", 250),
            _gpu_model("timm", "convnext_base", "ConvNeXt-B", 100),
            _gpu_model("torchvision", "resnet50", "ResNet-50", 250),
            _gpu_model("torchvision", "resnet152", "ResNet-152", 100),
            _gpu_model("torchvision", "swin_t", "Swin-T", 250),
        ),
        *_DEPTHS,
        HostCase(),
        *_break_even(BREAK_EVEN_NETS, (32, 128)),
    ),
    rounds={
        "op": Rounds(10, 30),
        "block": Rounds(8, 10),
        "model": Rounds(6, 5),
        "host": Rounds(10, 3, 200),
        "depth": Rounds(6, 5),
        "compile": Rounds(6, 20),
        "break_even": Rounds(9, 10),
    },
    training=TrainingCase(),
    timeline=_LARGE_VIT,
)
_GPU_SHORT = Preset(
    name="gpu-short",
    summary="what to look at first on a GPU; with --device cuda",
    minutes=8,
    where="on one GPU (an estimate, not yet run)",
    cases=(
        *(c for rows in ("ViT-S", "ViT-B", "ViT-H") for c in _op_cases(rows, dtypes=("bf16",))),
        *_blocks((blocks.VIT_B,), 64, (0.5, 0.75, 0.9), "bf16"),
        *_models(
            _gpu_model("timm", "vit_small_patch16_224", "ViT-S", 32),
            _gpu_model("timm", "vit_base_patch16_224", "ViT-B", 128),
        ),
        CompileCase(blocks.VIT_B, 64, 0.5, "bf16", STATIC),
        HostCase(),
    ),
    rounds={
        "op": Rounds(6, 20),
        "block": Rounds(6, 10),
        "model": Rounds(5, 4),
        "host": Rounds(6, 3, 200),
        "compile": Rounds(5, 20),
    },
)
_KERNELS = Preset(
    name="kernels",
    summary="every op against the PyTorch calls it replaces",
    minutes=15,
    cases=_kernel_cases(),
)
_COMPILE = Preset(
    name="compile",
    summary="a block under torch.compile, against the code that DINOv3 compiles",
    minutes=8,
    where="on 2 cores, most of it compilation",
    cases=tuple(
        CompileCase(blocks.VIT_S, 32, 0.5, counts=counts) for counts in (STATIC, DYNAMIC, BERNOULLI)
    ),
)
_BREAK_EVEN = Preset(
    name="break-even",
    summary='blocks of which few rows are dropped, for min_saving="auto"',
    minutes=5,
    cases=(*_break_even(BREAK_EVEN_NETS, (8, 32)), *_break_even(SMALL_ROWS, (128,))),
)
PRESETS = {
    preset.name: preset
    for preset in (
        *(_SMOKE, _QUICK, _STANDARD, _FULL, _GPU, _GPU_SHORT),
        *(_KERNELS, _COMPILE, _BREAK_EVEN),
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
