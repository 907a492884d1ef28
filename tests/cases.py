"""Sample inputs for every backend and device, and how close a result must come to the reference.

A `Case` names one call of fused_stochastic_depth; `Case.inputs` makes its tensors.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from layouts import LAYOUTS, layouts_for
from torch import Tensor, nn

from sdkernels import KeptRows

# The largest error, in units of the largest value of the tensor. In half precision that is a dozen
# roundings: the branch rounds at every step. That an op rounds once is test_accuracy.py's business.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1.5e-2,
    torch.bfloat16: 0.12,
}

DTYPE_NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}

# Stream and branch. A float32 stream with a branch in half precision is what autocast makes.
DTYPES = [(dtype, dtype) for dtype in DTYPE_NAMES] + [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.bfloat16),
    (torch.float32, torch.float64),
]

# Kernels work on 16 elements at a time and on 64 where they add up a line: the sizes of the last
# dimension leave a remainder of both, and the LARGE ones are work for several threads.
ROWS: dict[str, tuple[int, ...]] = {
    "vit": (7, 20),
    "conv": (6, 5, 3),
    "video": (3, 2, 4, 3),
    "vector": (33,),
    "scalar": (),
    "wide": (2, 103),
    "empty": (3, 0),
    "small": (2, 3),  # for numerical derivatives
    "large": (96, 384),
    "image": (24, 40, 36),
}

LARGE = ("large", "image")


def _randomized(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + 1.0)
    return norm


# A large eps: with the usual one, a line of nearly equal elements (of expanded ones, of three that
# are close by chance) amplifies rounding errors three hundred times.
NORMS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "layer": lambda row: nn.LayerNorm(row[-1:], eps=0.1),
    "layer_no_bias": lambda row: nn.LayerNorm(row[-1:], eps=0.2, bias=False),
    "layer_plain": lambda row: nn.LayerNorm(row[-1:], eps=0.1, elementwise_affine=False),
    "layer_2d": lambda row: nn.LayerNorm(row[-2:], eps=0.2),
    "layer_all": lambda row: nn.LayerNorm(row, eps=0.1),
    "rms": lambda row: nn.RMSNorm(row[-1:], eps=0.1),
    "rms_plain": lambda row: nn.RMSNorm(row[-1:], eps=0.1, elementwise_affine=False),
    "rms_2d": lambda row: nn.RMSNorm(row[-2:], eps=0.2),
}


def norms_for(row: tuple[int, ...]) -> list[str]:
    if not row or 0 in row:
        return []
    return [name for name in NORMS if len(row) >= 2 or not name.endswith("2d")]


LAYER_SCALES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "C": lambda row: row[-1:],
    "C1": lambda row: (row[0],) + (1,) * (len(row) - 1),  # [C, 1, 1] of an image
    "NC": lambda row: row,
    "1": lambda row: (1,),
    "scalar": lambda row: (),
    "C1W": lambda row: (row[0],) + (1,) * (len(row) - 2) + row[-1:],
}


def layer_scales_for(row: tuple[int, ...]) -> list[str]:
    if not row:
        return ["scalar"]
    return [name for name in LAYER_SCALES if len(row) >= 3 or name != "C1W"]


class RowBranch(nn.Module):
    """A branch that treats rows independently; with `width`, to rows of another last dimension."""

    def __init__(self, row: tuple[int, ...], dtype: torch.dtype, width: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(row[-1:]).to(dtype))
        projection = None if width is None else torch.randn(row[-1], width) / row[-1] ** 0.5
        self.projection = None if projection is None else nn.Parameter(projection.to(dtype))

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        out = torch.tanh(x.to(self.weight.dtype) * self.weight)
        for condition in conditions:
            out = out * condition.to(out.dtype)
        return out if self.projection is None else out @ self.projection


@dataclass
class Inputs:
    """The tensors of one call. Those that require grad are leaves."""

    x: Tensor
    rows: KeptRows
    branch: RowBranch
    norm: nn.Module | None
    layer_scale: Tensor | None
    residual: Tensor | None
    args: tuple[Tensor, ...]
    grad: Tensor  # of the result

    def leaves(self) -> dict[str, Tensor]:
        named: dict[str, Tensor | None] = {
            "x": self.x,
            "layer_scale": self.layer_scale,
            "residual": self.residual,
            "row_weight": self.rows.weight,
        }
        named.update({f"args.{i}": arg for i, arg in enumerate(self.args)})
        for prefix, module in (("branch", self.branch), ("norm", self.norm)):
            if module is not None:
                named.update({f"{prefix}.{n}": p for n, p in module.named_parameters()})
        return {n: leaf for n, leaf in named.items() if leaf is not None and leaf.requires_grad}

    def call(self) -> dict[str, Any]:
        """The keyword arguments that the fused op and naive masking share."""
        return {
            "args": self.args,
            "norm": self.norm,
            "layer_scale": self.layer_scale,
            "residual": self.residual,
            "rows": self.rows,
        }

    def double(self) -> Inputs:
        """The same values in float64, dense."""

        def widen(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().double().contiguous().requires_grad_()

        return Inputs(
            widen(self.x),
            dataclasses.replace(self.rows, weight=widen(self.rows.weight)),
            copy.deepcopy(self.branch).double(),
            copy.deepcopy(self.norm).double() if self.norm else None,
            widen(self.layer_scale),
            widen(self.residual),
            tuple(widen(arg) for arg in self.args),
            self.grad.double(),
        )


@dataclass(frozen=True)
class Case:
    """One call, by name: everything that the sample inputs depend on."""

    row: str = "vit"
    batch: int = 8
    kept: int = 5
    dtype: torch.dtype = torch.float32
    branch_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    norm: str | None = None
    layer_scale: str | None = None
    width: int | None = None  # last dimension of a residual of its own
    conditions: int = 0  # further inputs of the branch
    weighted: bool = False  # rows with a weight each
    scale: float = 1.6
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        dtype = DTYPE_NAMES[self.dtype]
        if self.branch_dtype != self.dtype:
            dtype += f"+{DTYPE_NAMES[self.branch_dtype]}"
        parts = [self.row, f"B{self.batch}", f"k{self.kept}", dtype, self.layout]
        if self.grad_layout != "contiguous":
            parts.append(f"grad_{self.grad_layout}")
        parts += [self.norm] if self.norm else []
        parts += [f"scale_{self.layer_scale}"] if self.layer_scale else []
        parts += [f"residual{self.width}"] if self.width else []
        parts += [f"args{self.conditions}"] if self.conditions else []
        parts += ["weighted"] if self.weighted else []
        return "-".join(parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, *ROWS[self.row])

    @property
    def out_row(self) -> tuple[int, ...]:
        row = ROWS[self.row]
        return row if self.width is None else (*row[:-1], self.width)

    @property
    def result_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, self.branch_dtype)

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE[self.dtype], TOLERANCE[self.branch_dtype])

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def kept_rows(self, device: torch.device | str = "cpu") -> KeptRows:
        index = torch.randperm(self.batch, generator=self.generator())[: self.kept].sort().values
        return KeptRows.from_index(index, self.batch, self.scale).to(device)

    def inputs(self, device: torch.device | str = "cpu") -> Inputs:
        generator = self.generator()

        def random(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
            values = torch.randn(shape, generator=generator).to(device, dtype)
            return LAYOUTS[layout](values)

        def leaf(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
            return random(shape, dtype, layout).detach().requires_grad_()

        row = ROWS[self.row]
        out_shape = (self.batch, *self.out_row)
        # Parameters beside a stream of other precision than the branch are kept in float32.
        mixed = self.dtype != self.branch_dtype and torch.float64 not in (
            self.dtype,
            self.branch_dtype,
        )
        parameters = torch.float32 if mixed else self.dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            branch = RowBranch(row, self.branch_dtype, self.width).to(device)
            norm = _randomized(NORMS[self.norm](row)).to(device, parameters) if self.norm else None
        layer_scale = None
        if self.layer_scale:
            layer_scale = leaf(LAYER_SCALES[self.layer_scale](self.out_row), parameters)
        rows = self.kept_rows(device)
        if self.weighted:
            rows = dataclasses.replace(rows, weight=leaf((self.kept,), parameters))
        return Inputs(
            x=leaf(self.shape, self.dtype, self.layout),
            rows=rows,
            branch=branch,
            norm=norm,
            layer_scale=layer_scale,
            residual=None if self.width is None else leaf(out_shape, self.dtype),
            args=tuple(leaf(self.shape, self.branch_dtype) for _ in range(self.conditions)),
            grad=random(out_shape, self.result_dtype, self.grad_layout),
        )


@st.composite
def generated_cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Cases of every kind; `fixed` holds fields that are not varied."""
    row_name = draw(st.sampled_from([name for name in ROWS if name not in LARGE]))
    row = ROWS[row_name]
    elements = 0 if 0 in row else 1
    batch = draw(st.sampled_from([8, 3, 1, 0]))
    dtype, branch_dtype = draw(st.sampled_from(DTYPES))
    layouts = layouts_for(1 + len(row), elements * batch)
    width = draw(st.sampled_from([None, 11])) if row and elements else None
    choices = {
        "row": row_name,
        "batch": batch,
        "kept": draw(st.sampled_from([0, min(1, batch), batch]) | st.integers(0, batch)),
        "dtype": dtype,
        "branch_dtype": branch_dtype,
        "layout": draw(st.sampled_from(layouts)),
        "grad_layout": draw(st.sampled_from(layouts)) if width is None else "contiguous",
        "norm": draw(st.sampled_from([None, *norms_for(row)])),
        "layer_scale": draw(
            st.sampled_from([None, *layer_scales_for(row if width is None else (*row[:-1], width))])
        ),
        "width": width,
        "conditions": draw(st.integers(0, 2)),
        "weighted": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.0, 1 / 0.9])),
        "seed": draw(st.integers(0, 999)),
    }
    return Case(**{**choices, **fixed})


# A small set for tests that are slow, or look at one thing in every setting that could change it.
NAMED_CASES = [
    Case(),
    Case(norm="layer", layer_scale="C"),
    Case(dtype=torch.bfloat16, branch_dtype=torch.bfloat16, norm="rms", layer_scale="C"),
    Case(branch_dtype=torch.bfloat16, norm="layer", layer_scale="1", conditions=1),
    Case("conv", layout="channels_last", layer_scale="C1"),
    Case("conv", layout="channels_last", norm="layer_2d", layer_scale="C1W"),
    Case("vit", layout="sequence_first", norm="rms", layer_scale="NC", width=11),
    Case("wide", dtype=torch.float16, branch_dtype=torch.float16, layout="sliced", norm="layer"),
    Case("vit", kept=0, norm="layer", layer_scale="C"),
    Case("large", norm="layer", layer_scale="C"),
    Case("vit", layer_scale="C", weighted=True),
    Case("conv", branch_dtype=torch.bfloat16, layout="channels_last", weighted=True),
]
