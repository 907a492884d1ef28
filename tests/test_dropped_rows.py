"""Dropped rows: untouched to the last bit, and what stands in them reaches nothing."""

from dataclasses import replace

import pytest
import torch
from cases import DTYPE_NAMES, NAMED_CASES, Case, Inputs
from comparison import as_integers, assert_same_bits, run_fused
from layouts import layouts_for
from torch import Tensor

from sdkernels import fused_stochastic_depth, scatter_add_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def dropped(x: Tensor, inputs: Inputs) -> Tensor:
    return x.detach()[inputs.rows.slot < 0]


def fill_dropped_rows(x: Tensor, inputs: Inputs) -> None:
    """With every kind of bits: NaN of any payload, quiet or not, infinities, both zeros."""
    shape = dropped(x, inputs).shape
    integer = as_integers(torch.empty(0, dtype=x.dtype)).dtype
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, shape, dtype=torch.int64).to(integer).flatten()
    infinity = as_integers(torch.tensor([torch.inf], dtype=x.dtype))
    special = [0, info.min, infinity, infinity + 1, infinity - 1, -1, 1]
    for position, value in enumerate(special):
        bits[position :: 2 * len(special)] = value
    with torch.no_grad():
        x[inputs.rows.slot < 0] = bits.view(x.dtype).view(shape)


def fill_with(x: Tensor, inputs: Inputs, value: float) -> None:
    with torch.no_grad():
        x[inputs.rows.slot < 0] = value


@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "inplace"])
@pytest.mark.parametrize("row", ["vit", "conv", "wide"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.values())
def test_bits_are_kept(dtype, row, inplace):
    layouts = layouts_for(4 if row == "conv" else 3)
    for layout in (name for name in layouts if not name.startswith("expanded")):
        for norm in (None, "layer"):
            case = Case(row, dtype=dtype, branch_dtype=dtype, layout=layout, norm=norm)
            inputs = case.inputs()
            fill_dropped_rows(inputs.x, inputs)
            before = as_integers(dropped(inputs.x, inputs))
            assert inputs.x.isnan().any()
            with torch.no_grad():
                x = inputs.x.detach()
                y = fused_stochastic_depth(x, inputs.branch, 0.5, **inputs.call(), inplace=inplace)
            assert torch.equal(as_integers(dropped(y, inputs)), before)


@pytest.mark.parametrize(
    ("dtype", "branch_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_bits_are_kept_in_place_beside_another_dtype(dtype, branch_dtype):
    inputs = Case(dtype=dtype, branch_dtype=branch_dtype).inputs()
    fill_dropped_rows(inputs.x, inputs)
    y = inputs.x.detach().clone()
    out = torch.randn(5, 7, 20, dtype=branch_dtype)
    scatter_add_rows(y, out, inputs.rows, inplace=True)
    assert_same_bits(dropped(y, inputs), dropped(inputs.x, inputs))


def test_widening_is_exact():
    """bfloat16 rows in a float32 result: the same numbers."""
    for dtype in (torch.bfloat16, torch.float16):
        inputs = Case(dtype=dtype, branch_dtype=torch.float32).inputs()
        y = fused_stochastic_depth(inputs.x, inputs.branch, 0.5, **inputs.call())
        assert torch.equal(dropped(y, inputs), dropped(inputs.x, inputs).float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", NAMED_CASES, ids=str)
def test_values_reach_nothing(case, value):
    """Neither from x nor from args: every other value and gradient is what it was."""
    clean, spoiled = case.inputs(), case.inputs()
    fill_with(spoiled.x, spoiled, value)
    for arg in spoiled.args:
        fill_with(arg, spoiled, value)
    expected, actual = run_fused(clean), run_fused(spoiled)
    y, expected_y = actual.pop("y"), expected.pop("y")
    kept = clean.rows.index
    assert_same_bits(y[kept], expected_y[kept])
    if case.width is None:
        assert_same_bits(dropped(y, spoiled), dropped(spoiled.x.to(y.dtype), spoiled))
    for name, gradient in expected.items():
        assert gradient.isfinite().all()
        assert_same_bits(actual[name], gradient)


@pytest.mark.parametrize("case", NAMED_CASES, ids=str)
def test_gradients_reach_only_the_stream(case):
    """A NaN in the gradient of a dropped row goes to that row of the stream, and no further."""
    clean, spoiled = case.inputs(), case.inputs()
    spoiled.grad[spoiled.rows.slot < 0] = torch.nan
    expected, actual = run_fused(clean), run_fused(spoiled)
    stream = "x" if case.width is None else "residual"
    for name, gradient in expected.items():
        if name == stream:
            kept = clean.rows.index
            assert_same_bits(actual[name][kept], gradient[kept])
            assert actual[name][clean.rows.slot < 0].isnan().all()
        else:
            assert_same_bits(actual[name], gradient)


def test_gradient_of_a_dropped_row_is_the_incoming_one():
    for norm in (None, "layer", "rms"):
        inputs = Case(norm=norm, layer_scale="C").inputs()
        results = run_fused(inputs)
        assert_same_bits(dropped(results["x"], inputs), dropped(inputs.grad, inputs))
        # With a residual of its own, x gets nothing there.
        inputs = replace(Case(norm=norm), width=11).inputs()
        assert not dropped(run_fused(inputs)["x"], inputs).any()
