"""Arithmetic in float32 and one rounding at the store, for half precision.

Run as a whole for every instruction set of the processor by test_backends.py.
"""

import pytest
import torch
from comparison import as_integers
from torch import Tensor
from torch.nn import functional as F

from sdkernels import KeptRows, compact_layer_norm, compact_rms_norm, scatter_add_rows

HALVES = [torch.bfloat16, torch.float16]
# Sixteen elements at a time, and a rest.
LENGTHS = [64, 21]


def steps_apart(actual: Tensor, expected: Tensor) -> Tensor:
    """How many representable numbers lie between two tensors of half precision."""

    def ordered(x: Tensor) -> Tensor:
        bits = as_integers(x).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(actual) - ordered(expected)).abs()


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """`actual` is `exact` (float64), rounded; next to a tie a float32 sum may take either."""
    steps = steps_apart(actual, exact.to(actual.dtype))
    assert steps.max() <= 1
    assert (steps == 0).double().mean() > 0.995


def uniform(*shape: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    return (torch.rand(shape) * (high - low) + low).to(dtype)


def all_rows(batch: int, scale: float) -> KeptRows:
    return KeptRows.from_index(torch.arange(batch), batch, scale)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_scatter_add_rounds_once(dtype, length, inplace):
    # No cancellation: a sum much smaller than its terms has float32's rounding in its leading bits.
    x = uniform(64, 30, length, low=1, high=2, dtype=dtype)
    out = uniform(64, 30, length, low=-0.4, high=0.4, dtype=dtype)
    layer_scale = uniform(length, low=0.5, high=1, dtype=dtype)
    rows = all_rows(64, 1 / 0.9)
    exact = x.double() + (1 / 0.9) * layer_scale.double() * out.double()
    rounded_scale = torch.tensor(1 / 0.9).to(dtype).double()
    careless = (x.double() + rounded_scale * (layer_scale * out).double()).to(dtype)
    assert (careless != exact.to(dtype)).double().mean() > 0.02  # what the test is there to notice
    y = scatter_add_rows(x.clone(), out, rows, layer_scale, inplace=inplace)
    assert_rounded_once(y, exact)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_scatter_add_backward_rounds_once(dtype, length):
    x = torch.zeros(64, 30, length, dtype=dtype, requires_grad=True)
    out = uniform(64, 30, length, low=0.5, high=1, dtype=dtype).requires_grad_()
    layer_scale = uniform(length, low=0.5, high=1, dtype=dtype).requires_grad_()
    grad = uniform(64, 30, length, low=0.01, high=0.02, dtype=dtype)
    scatter_add_rows(x, out, all_rows(64, 1 / 0.9), layer_scale).backward(grad)
    scaled = grad.double() / 0.9
    assert_rounded_once(out.grad, scaled * layer_scale.detach().double())
    # 1920 terms: added up in bfloat16 the sum would stand still after 256 of them.
    exact = (scaled * out.detach().double()).sum((0, 1))
    assert steps_apart(layer_scale.grad, exact.to(dtype)).max() <= 1


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_norm_rounds_once(dtype, rms, length):
    x = torch.randn(64, 30, length).to(dtype).requires_grad_()
    weight = uniform(length, low=0.5, high=1.5, dtype=dtype).requires_grad_()
    rows = all_rows(64, 1.0)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    if rms:
        normed = compact_rms_norm(x, rows, length, weight, 1e-5)
        exact = F.rms_norm(wide[0], (length,), wide[1], 1e-5)
    else:
        normed = compact_layer_norm(x, rows, length, weight, None, 1e-5)
        exact = F.layer_norm(wide[0], (length,), wide[1], None, 1e-5)
    # Beside zero, where x meets its mean, float32's own rounding is all there is: left out.
    large = exact.detach().abs() > 2**-6
    assert_rounded_once(normed.detach()[large], exact.detach()[large])
    torch.testing.assert_close(normed.double(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps)
    grad = uniform(64, 30, length, low=0.01, high=0.02, dtype=dtype)
    normed.backward(grad)
    exact.backward(grad.double())
    assert steps_apart(weight.grad, wide[1].grad.to(dtype)).max() <= 1
    large = wide[0].grad.abs() > 2**-10
    assert_rounded_once(x.grad[large], wide[0].grad[large])


def test_sum_of_many_rows_in_float32():
    """More terms than float32 can add one by one without losing digits."""
    n = 2000
    x = torch.zeros(n, 32, 2, requires_grad=True)
    layer_scale = torch.ones(2, requires_grad=True)
    out = torch.rand(n, 32, 2)
    y = scatter_add_rows(x, out, all_rows(n, 1.0), layer_scale)
    y.backward(torch.ones(n, 32, 2))
    exact = out.double().sum((0, 1))
    torch.testing.assert_close(layer_scale.grad.double(), exact, rtol=1e-6, atol=0)


def test_variance_of_a_large_mean():
    """E[x^2] - E[x]^2 would have no digit left."""
    x = (torch.randn(8, 384, dtype=torch.float64) + 3000).float()
    exact = F.layer_norm(x.double(), (384,))
    normed = compact_layer_norm(x, all_rows(8, 1.0), 384)
    torch.testing.assert_close(normed.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [16, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_of_a_large_constant_line(dtype, length):
    """x_hat is zero; behind the line's last element it is (0 - mean) * rstd, which is infinite."""
    large = 2.0**1018 if dtype == torch.float64 else 2.0**122  # a power of two: its sums are exact
    x = torch.full((3, length), large, dtype=dtype, requires_grad=True)
    normed = compact_layer_norm(x, all_rows(3, 1.0), length, eps=1e-4)
    grad = torch.arange(length, dtype=dtype).expand(3, length)
    normed.backward(grad)
    centered = grad.double() - (length - 1) / 2
    torch.testing.assert_close(x.grad, (100 * centered).to(dtype))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_factors_keep_the_sign_of_zero(dtype, length):
    grad = torch.randn(2, length).sign().to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    zero = torch.full((), -0.0, dtype=acc)
    index = torch.arange(2)
    for layer_scale, weight in ((None, zero.repeat(2)), (zero, None), (zero, -zero.repeat(2))):
        (d_out, _, _) = torch.ops.sdkernels.scatter_add_rows_backward(
            grad, None, index, layer_scale, weight, 1.0, dtype, [False, False]
        )
        factor = 1.0 if layer_scale is None else layer_scale.item()
        factor = factor * (1.0 if weight is None else weight[0].item())
        assert torch.equal(as_integers(d_out), as_integers(grad * factor))


def every_half() -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16)


@pytest.mark.parametrize("length", [2**16, 2**11 - 1])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_read_exactly(dtype, length):
    """Subnormals, infinities and both zeros; NaN stays NaN."""
    halves = every_half()[:length].view(dtype).view(1, -1)
    nothing = KeptRows.from_mask(torch.tensor([False]))
    y = scatter_add_rows(halves, torch.empty(0, length), nothing)
    number = ~halves.isnan()
    assert y.dtype == torch.float32
    assert torch.equal(as_integers(y)[number], as_integers(halves.float())[number])
    assert torch.equal(y.isnan(), halves.isnan())
    # The same through arithmetic: -0 + 1 * x is x, with its sign.
    zeros = torch.full((1, length), -0.0)
    y = scatter_add_rows(zeros, halves, all_rows(1, 1.0))
    assert torch.equal(as_integers(y)[number], as_integers(halves.float())[number])


def floats_around_halves(dtype: torch.dtype) -> Tensor:
    """Each half, the ties between neighbours, the floats on both sides of both, and the largest."""
    halves = every_half().view(dtype).float()
    halves = halves[halves.isfinite()].sort().values
    ties = (halves[1:].double() + halves[:-1].double()).div(2).float()
    points = torch.cat([halves, ties])
    up = torch.nextafter(points, torch.tensor(torch.inf))
    down = torch.nextafter(points, torch.tensor(-torch.inf))
    info = torch.finfo(torch.float32)
    rest = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, info.min, info.tiny, 1e-45]
    edge = [65519.9, 65520.0, 65520.1, -65520.0, 65536.0, 1e5, -1e30]
    # Rounded like numbers, the first two of these would become infinity, the others zero.
    nans = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1], dtype=torch.int32)
    rest = torch.cat([torch.tensor(rest + edge), nans.view(torch.float32)])
    return torch.cat([points, up, down, rest, torch.randn(1000) * 1e-6])


@pytest.mark.parametrize("cut", [0, 5])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_rounding_to_half(dtype, cut):
    """To nearest, ties to even, overflow to infinity, subnormals: as PyTorch's own conversion."""
    values = floats_around_halves(dtype)
    values = values[cut:].view(1, -1)
    y = torch.full_like(values, -0.0, dtype=dtype)
    scatter_add_rows(y, values, all_rows(1, 1.0), inplace=True)
    expected = values.to(dtype)
    number = ~values.isnan()
    assert torch.equal(as_integers(y)[number], as_integers(expected)[number])
    assert torch.equal(y.isnan(), values.isnan())


@pytest.mark.parametrize("cut", [0, 5])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_rounding_among_halves(dtype, cut):
    """Sums of two numbers of one 16-bit type, at ties and beside them: bfloat16 goes two by two."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    tie = (numbers.roll(-1).float() - numbers.float()).abs().nan_to_num(1.0, 1.0) / 2
    eps = torch.finfo(dtype).eps
    factors = (0.0, 1.0, -1.0, 1 + eps, 1 - eps, -1 - eps)
    out = torch.cat([(tie * factor).to(dtype) for factor in factors])[cut:].view(1, -1)
    residual = numbers.repeat(len(factors))[cut:].view(1, -1)
    y = scatter_add_rows(residual, out, all_rows(1, 1.0))
    expected = (residual.float() + out.float()).to(dtype)
    number = ~expected.isnan()
    assert torch.equal(as_integers(y)[number], as_integers(expected)[number])
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", HALVES)
def test_no_nan_is_rounded_to_a_number(dtype):
    """Rounded like numbers, these would become infinity or zero."""
    nans = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1], dtype=torch.int32)
    grad, index = torch.ones(4, 37, dtype=dtype), torch.arange(4)
    (d_out, _, _) = torch.ops.sdkernels.scatter_add_rows_backward(
        grad, None, index, None, nans.view(torch.float32), 1.0, dtype, [False, False]
    )
    assert d_out.isnan().all()


def test_double_is_not_rounded_to_float():
    x, out = torch.ones(2, 3, dtype=torch.float64), torch.full((2, 3), 1e-12, dtype=torch.float64)
    y = scatter_add_rows(x, out, all_rows(2, 1 / 3))
    assert torch.equal(y, x + out * (1 / 3))
    for mixed in (
        scatter_add_rows(x, out.float(), all_rows(2, 1 / 3)),
        scatter_add_rows(x.float(), out, all_rows(2, 1 / 3)),
    ):
        assert mixed.dtype == torch.float64
        assert (mixed > 1).all()
