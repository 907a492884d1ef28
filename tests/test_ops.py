"""The dispatcher ops: literal cases, then against float64 and against traceable PyTorch code."""

from dataclasses import replace

import pytest
import torch
from cases import Case, generated_cases
from comparison import assert_close
from hypothesis import given
from layouts import layouts_for
from op_samples import EXPECTED, Arguments, arguments, call
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from sdkernels.backends import traceable

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = torch.ops.sdkernels
NORM_OPS = ("compact_norm", "compact_norm_into", "compact_norm_backward")
COPIES = ("compact_rows", "compact_rows_into", "expand_rows", "scatter_rows", "scatter_rows_")
INDEX, SLOT = torch.tensor([0, 2]), torch.tensor([0, -1, 1])


def test_compact_rows():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert OPS.compact_rows(x, INDEX).tolist() == [[1, 2], [5, 6]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64])
def test_compact_rows_of_other_dtypes(dtype):
    x = torch.tensor([[1, 0], [0, 1], [1, 1]]).to(dtype)
    kept = OPS.compact_rows(x, INDEX)
    assert kept.dtype == dtype
    assert torch.equal(kept, torch.tensor([[1, 0], [1, 1]]).to(dtype))


def test_written_into_a_part_of_a_larger_tensor():
    """What lies before and behind stays as it is."""
    x = torch.tensor([[1.0, 3.0], [0.0, 0.0], [3.0, 4.0]])
    values = torch.full((4, 2), 9.0)
    OPS.compact_rows_into(values[1:3], x, INDEX)
    assert values.tolist() == [[9, 9], [1, 3], [3, 4], [9, 9]]
    weight, bias = torch.tensor([2.0, 3.0]), torch.tensor([10.0, 20.0])
    rest = INDEX, [2], weight, bias, 0.0, False, True
    kept, mean, rstd = OPS.compact_norm_into(values[1:3], x, *rest)
    assert values.tolist() == [[9, 9], [8, 23], [8, 23], [9, 9]]
    assert kept.tolist() == [[1, 3], [3, 4]]
    assert mean.tolist() == [2, 3.5]
    assert rstd.tolist() == [1, 2]
    out = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    rest = INDEX, torch.tensor([1.0, 0.5]), None, 2.0, [True, False]
    d_layer_scale, nothing = OPS.scatter_add_rows_backward_into(values[:2], x, out, *rest)
    assert values.tolist() == [[2, 3], [6, 4], [8, 23], [9, 9]]
    assert d_layer_scale.tolist() == [2 * (1 * 10 + 3 * 30), 2 * (3 * 20 + 4 * 40)]
    assert nothing.shape == (0,)


def test_expand_rows():
    kept = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert OPS.expand_rows(kept, INDEX, SLOT).tolist() == [[1, 2], [0, 0], [3, 4]]


def test_scatter_rows():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    expected = [[10, 20], [3, 4], [30, 40]]
    assert OPS.scatter_rows(x, out, INDEX, SLOT).tolist() == expected
    assert x.tolist() == [[1, 2], [3, 4], [5, 6]]
    OPS.scatter_rows_(x, out, INDEX, SLOT)
    assert x.tolist() == expected


def test_scatter_add_rows():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    layer_scale = torch.tensor([1.0, 0.5])
    expected = [[21, 22], [3, 4], [65, 46]]
    assert OPS.scatter_add_rows(x, out, INDEX, SLOT, layer_scale, None, 2.0).tolist() == expected
    assert x.tolist() == [[1, 2], [3, 4], [5, 6]]
    OPS.scatter_add_rows_(x, out, INDEX, SLOT, layer_scale, None, 2.0)
    assert x.tolist() == expected


def test_scatter_add_rows_with_weights():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    row_weight = torch.tensor([3.0, 0.1], dtype=torch.float64)
    y = OPS.scatter_add_rows(x, out, INDEX, SLOT, torch.tensor([1.0, 0.5]), row_weight, 2.0)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.tensor([[61.0, 62.0], [3.0, 4.0], [11.0, 10.0]]))


def test_scatter_add_rows_backward():
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    layer_scale = torch.tensor([1.0, 0.5])
    d_out, d_layer_scale, nothing = OPS.scatter_add_rows_backward(
        grad, out, INDEX, layer_scale, None, 2.0, torch.float32, [True, False]
    )
    assert d_out.tolist() == [[2, 2], [10, 6]]
    assert d_layer_scale.tolist() == [2 * (1 * 10 + 5 * 30), 2 * (2 * 20 + 6 * 40)]
    assert nothing.shape == (0,)
    d_out, *nothing = OPS.scatter_add_rows_backward(
        grad, None, INDEX, layer_scale, None, 2.0, torch.float32, [False, False]
    )
    assert d_out.tolist() == [[2, 2], [10, 6]]
    assert [tensor.shape for tensor in nothing] == [(0,), (0,)]


def test_scatter_add_rows_backward_with_weights():
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    layer_scale, row_weight = torch.tensor([1.0, 0.5]), torch.tensor([4.0, 0.0])
    d_out, d_layer_scale, d_row_weight = OPS.scatter_add_rows_backward(
        grad, out, INDEX, layer_scale, row_weight, 2.0, torch.float32, [True, True]
    )
    assert d_out.tolist() == [[8, 8], [0, 0]]
    assert d_layer_scale.tolist() == [2 * 4 * 1 * 10, 2 * 4 * 2 * 20]
    # A weight of zero has a gradient all the same.
    assert d_row_weight.tolist() == [2 * (10 + 2 * 20 / 2), 2 * (5 * 30 + 6 * 40 / 2)]


@pytest.mark.parametrize("k", [None, 2])
def test_compact_mask(k):
    index, slot = OPS.compact_mask(torch.tensor([True, False, True]), k)
    assert index.tolist() == INDEX.tolist()
    assert slot.tolist() == SLOT.tolist()


def test_compact_norm():
    x = torch.tensor([[1.0, 3.0], [0.0, 0.0], [3.0, 4.0]])
    weight, bias = torch.tensor([2.0, 3.0]), torch.tensor([10.0, 20.0])
    layer = OPS.compact_norm(x, INDEX, [2], weight, bias, 0.0, False, torch.float32, True)
    normed, kept, mean, rstd = layer
    assert normed.tolist() == [[8, 23], [8, 23]]
    assert kept.tolist() == [[1, 3], [3, 4]]
    assert mean.tolist() == [2, 3.5]
    assert rstd.tolist() == [1, 2]
    x = torch.tensor([[1.0, 7.0], [0.0, 0.0], [1.0, 1.0]])
    rms = OPS.compact_norm(x, INDEX, [2], None, None, 0.0, True, torch.float32, False)
    normed, kept, mean, rstd = rms
    torch.testing.assert_close(normed, torch.tensor([[0.2, 1.4], [1.0, 1.0]]))
    assert kept.shape == mean.shape == (0,)
    torch.testing.assert_close(rstd, torch.tensor([0.2, 1.0]))


def test_compact_norm_backward():
    # One line of four: x_hat = (1, -1, 1, -1), and d_normed is chosen to have a simple projection.
    kept = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    d_stream = torch.tensor([[100.0, 200.0, 300.0, 400.0], [1.0, 2.0, 3.0, 4.0]])
    d_normed = torch.tensor([[4.0, 0.0, 0.0, 0.0]])
    d_x, d_weight, d_bias = OPS.compact_norm_backward(
        d_stream, d_normed, kept, torch.zeros(1), torch.ones(1), torch.tensor([1]),
        torch.tensor([-1, 0]), [4], torch.tensor([1.0, 2.0, 3.0, 4.0]), False, [True, True, True],
    )  # fmt: skip
    # d_x_hat - mean(d_x_hat) - x_hat * mean(d_x_hat * x_hat) = (4,0,0,0) - 1 - x_hat
    assert d_x.tolist() == [[100, 200, 300, 400], [1 + 2, 2 + 0, 3 - 2, 4 + 0]]
    assert d_weight.tolist() == [4, 0, 0, 0]
    assert d_bias.tolist() == [4, 0, 0, 0]


def assert_same_layout(actual: Tensor, expected: Tensor) -> None:
    """The same strides, but for dimensions that are never walked."""
    assert actual.shape == expected.shape
    if actual.numel():
        walked = [d for d in range(actual.dim()) if actual.shape[d] > 1]
        assert [actual.stride(d) for d in walked] == [expected.stride(d) for d in walked]


def check(op: str, case: Case, device: torch.device) -> None:
    if op in NORM_OPS and case.norm is None:
        return
    check_arguments(op, arguments(op, case, device), case.tolerance)


def check_arguments(op: str, args: Arguments, tolerance: float) -> None:
    """The op against float64, and against traceable PyTorch code."""
    actual = call(getattr(OPS, op), op, args)
    same = call(traceable.OPS[op], op, args)
    expected = EXPECTED[op](*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for i, (a, b, c) in enumerate(zip(actual, same, expected, strict=True)):
        assert a.dtype == b.dtype, f"result {i}"
        assert_same_layout(a, b)
        assert_close(a, c, tolerance, f"result {i}")
        assert_close(b, c, tolerance, f"result {i} of traceable")
        if op in COPIES:
            assert torch.equal(a.double(), c)


@pytest.mark.parametrize("op", traceable.OPS)
@given(case=generated_cases(width=None))
def test_generated_cases(op, case, device):
    check(op, case, device)


@pytest.mark.parametrize("op", traceable.OPS)
def test_large(op, device):
    """Work for several threads, in pieces that end within a line."""
    check(op, Case("large", layout="sequence_first", norm="layer", layer_scale="C"), device)
    check(op, Case("large", norm="rms", layer_scale="NC", layout="sliced"), device)
    # Rows whose weight's gradient several pieces share, and many in a piece.
    check(op, Case("large", norm="rms", weighted=True), device)
    check(op, Case("image", layout="channels_last", layer_scale="C1", weighted=True), device)
    check(op, Case("vector", batch=9000, kept=5000, weighted=True), device)


OPCHECK_CASES = [
    Case(norm="layer", layer_scale="C"),
    Case(kept=0, norm="rms_plain"),
    Case("conv", layout="channels_last", grad_layout="channels_last", layer_scale="C1"),
    Case("wide", dtype=torch.bfloat16, layout="sequence_first", norm="layer_2d", scale=1.0),
    Case("vector", batch=1, kept=1, layout="sliced", norm="rms", layer_scale="1"),
    Case("vit", layer_scale="C", weighted=True),
]


@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
@pytest.mark.parametrize("op", traceable.OPS)
def test_opcheck(op, case, device):
    """The schema says what the op writes, and the fake says what it returns."""
    if op in NORM_OPS and case.norm is None:
        case = replace(case, norm="layer")
    torch.library.opcheck(getattr(OPS, op), arguments(op, case, device))


LAYOUT_CASES = [
    (layout, grad_layout, layer_scale)
    for layout in layouts_for(4)
    for grad_layout in ("contiguous", "channels_last", layout)
    for layer_scale in ("C1", "NC", "C1W")
]


@pytest.mark.parametrize("op", [op for op in traceable.OPS if op != "compact_mask"])
def test_fake_layouts(op, device):
    """A fake with other strides than the kernel's makes torch.compile compute nonsense."""
    for layout, grad_layout, layer_scale in LAYOUT_CASES:
        for kept in (0, 5, 8):
            case = Case(
                "conv",
                kept=kept,
                layout=layout,
                grad_layout=grad_layout,
                norm="layer",
                layer_scale=layer_scale,
            )
            if layer_scale != "C1" and not op.startswith("scatter_add"):
                continue
            args = arguments(op, case, device)
            with FakeTensorMode() as mode:
                fakes = tree_map_only(Tensor, mode.from_tensor, args)
                faked = call(getattr(OPS, op), op, fakes)
            for result, fake in zip(call(getattr(OPS, op), op, args), faked, strict=True):
                assert result.dtype == fake.dtype
                assert_same_layout(fake, result)
