"""Strides: what comes in and what goes out."""

import pytest
import torch
from cases import DTYPE_NAMES, ROWS, Case
from comparison import assert_same_results, run_fused, run_reference
from layouts import LAYOUTS, layouts_for
from torch import Tensor

from sdkernels import KeptRows, compact_rows, fused_stochastic_depth, scatter_add_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")

KEPT = KeptRows.from_index(torch.tensor([0, 2, 5]), batch=8, scale=2.0)

EVERY_LAYOUT = [
    (row, layout)
    for row in ("vector", "vit", "conv", "video")
    for layout in layouts_for(1 + len(ROWS[row]))
]


def strides(x: Tensor) -> list[int]:
    """Of the dimensions that are walked: the stride of a dimension of one element means nothing."""
    return [x.stride(d) for d in range(x.dim()) if x.shape[d] > 1]


@pytest.mark.parametrize(("row", "layout"), EVERY_LAYOUT)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_every_layout_of_x_and_of_the_gradient(row, layout, norm, device):
    for layouts in ({"layout": layout}, {"grad_layout": layout}):
        case = Case(row, norm=norm, layer_scale="C", **layouts)
        inputs = case.inputs(device)
        assert_same_results(run_fused(inputs), run_reference(inputs), case.tolerance)


@pytest.mark.parametrize(("row", "layout"), EVERY_LAYOUT)
def test_result_has_the_strides_of_the_sum(row, layout, device):
    inputs = Case(row, layout=layout).inputs(device)
    x, rows = inputs.x.detach(), inputs.rows.to(device)
    expected = x + torch.sin(x)
    assert strides(fused_stochastic_depth(x, torch.sin, 0.5, rows=rows)) == strides(expected)
    half = x.to(torch.bfloat16)
    fused = fused_stochastic_depth(half, lambda kept: torch.sin(kept.float()), 0.5, rows=rows)
    assert fused.dtype == torch.float32
    assert strides(fused) == strides(half + torch.sin(half.float()))


@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "sequence_first", "reversed", "batch_last"]
)
def test_kept_rows_are_in_the_memory_order_of_x(layout, device):
    x = LAYOUTS[layout](torch.randn(8, 6, 5, 3, device=device))
    kept = compact_rows(x, KEPT.to(device))
    assert strides(kept) == strides(torch.empty_like(x[:3]))
    assert torch.equal(kept, x[KEPT.index])


def test_channels_last_survives_a_network():
    """Also where nothing or everything is kept, and through the backward."""
    conv = torch.nn.Conv2d(6, 6, 3, padding=1).to(memory_format=torch.channels_last)
    for index in ([], [1], list(range(8))):
        rows = KeptRows.from_index(torch.tensor(index, dtype=torch.int64), batch=8)
        leaf = torch.randn(8, 6, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
        seen = []

        def branch(kept: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(kept)
            return conv(kept)

        y = fused_stochastic_depth(leaf * 1.0, branch, 0.5, rows=rows)
        y.sum().backward()  # an expanded gradient
        for x in (y, leaf.grad, *(kept for kept in seen if kept.numel())):
            assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("inplace", [False, True])
def test_branch_output_in_another_layout(dtype, inplace, device):
    """x, out and layer_scale disagree about the order of memory; the result follows x."""
    for x_layout in layouts_for(4):
        if inplace and x_layout.startswith("expanded"):
            continue
        for out_layout in ("contiguous", "channels_last", "reversed", "strided", "expanded_all"):
            x = LAYOUTS[x_layout](torch.randn(8, 6, 5, 3, device=device).to(dtype))
            out = LAYOUTS[out_layout](torch.randn(3, 6, 5, 3, device=device).to(dtype))
            layer_scale = torch.randn(6, 1, 3, device=device)
            sum_of = x.double().index_add(0, KEPT.index.to(device), 2 * out.double() * layer_scale)
            expected_strides = strides(x if inplace else x + x)
            y = scatter_add_rows(x, out, KEPT.to(device), layer_scale, inplace=inplace)
            # One rounding of the result, and float32 arithmetic before it.
            eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
            torch.testing.assert_close(y.double(), sum_of, rtol=eps, atol=1e-5)
            assert strides(y) == expected_strides


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_nothing_is_written_beside_a_view(dtype, device):
    """Lines end within a vector of 16 elements, and NaN stands behind them."""
    for shape in ((8, 21), (8, 6, 5, 3), (8, 2, 50)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            if memory_format == torch.channels_last and len(shape) != 4:
                continue
            outer = torch.full([size + 2 for size in shape], torch.nan, dtype=dtype, device=device)
            outer = outer.contiguous(memory_format=memory_format)
            inner = outer[tuple(slice(1, -1) for _ in shape)]
            inner.zero_()
            out = torch.ones(3, *shape[1:], dtype=dtype, device=device)
            scatter_add_rows(inner, out, KEPT.to(device), inplace=True)
            assert (inner[KEPT.index] == 2).all()
            assert outer.isnan().sum() == outer.numel() - inner.numel()


def test_layer_scale_in_any_layout(device):
    for layer_scale in (
        torch.randn(3, 5, 6).permute(2, 1, 0),
        torch.randn(12, 1, 1)[::2],
        torch.randn(1).expand(6, 5, 3),
        torch.randn(5, 6).t()[:, :, None],
    ):
        x = torch.randn(8, 6, 5, 3, dtype=torch.float64)
        for layout in ("contiguous", "channels_last"):
            leaves = [LAYOUTS[layout](x), torch.randn(3, 6, 5, 3, dtype=torch.float64)]
            leaves = [t.to(device).requires_grad_() for t in (*leaves, layer_scale.double())]
            y = scatter_add_rows(*leaves[:2], KEPT.to(device), leaves[2])
            added = 2.0 * leaves[1] * leaves[2]
            expected = leaves[0].index_add(0, KEPT.index.to(device), added)
            grad = torch.randn(8, 6, 5, 3, dtype=torch.float64, device=device)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(
                torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad)
            )


def test_gradient_without_strides(device):
    """sum() sends back one number, expanded."""
    for norm in (None, "layer"):
        case = Case("conv", layout="channels_last", norm=norm, layer_scale="C1")
        inputs = case.inputs(device)
        inputs.grad = torch.ones((), device=device).expand(inputs.grad.shape)
        assert_same_results(run_fused(inputs), run_reference(inputs), case.tolerance)


def test_negative_and_conjugate_views():
    """Tensors whose values are not what stands in memory."""
    z = torch.randn(8, 4, dtype=torch.complex64)
    assert torch.equal(compact_rows(z.conj(), KEPT), z.conj()[KEPT.index])
    negative = z.conj().imag
    assert negative.is_neg()
    out = torch.randn(3, 4)
    assert torch.equal(compact_rows(negative, KEPT), negative[KEPT.index])
    expected = negative.index_add(0, KEPT.index, out, alpha=2)
    torch.testing.assert_close(scatter_add_rows(negative, out, KEPT), expected)
