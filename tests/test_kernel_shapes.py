"""The sizes at which the kernels change their way of working: vectors, tiles, blocks, slices."""

from __future__ import annotations

import pytest
import torch
from cases import TOLERANCE
from comparison import assert_close
from op_samples import Arguments
from test_ops import check_arguments
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALF_PRECISION = [torch.bfloat16, torch.float16]


def tensor(*shape: int, dtype: torch.dtype, device: torch.device, offset: int = 0) -> Tensor:
    """Random values that start `offset` elements into their memory."""
    values = torch.empty(offset + torch.Size(shape).numel(), dtype=dtype, device=device)
    values = values[offset:].view(shape)
    return values.copy_(torch.randn(shape))


def kept_rows(batch: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    index = torch.randperm(batch)[:k].sort().values
    slot = torch.full((batch,), -1)
    slot[index] = torch.arange(k)
    return index.to(device), slot.to(device)


def norm_arguments(
    batch: int, k: int, lines: int, width: int, dtype: torch.dtype, device: torch.device, offset=0
) -> tuple[Arguments, Arguments]:
    """Of compact_norm, and of its backward with everything wanted."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    index, slot = kept_rows(batch, k, device)
    x = tensor(batch, lines, width, dtype=dtype, device=device, offset=offset)
    weight, bias = (tensor(width, dtype=acc, device=device) for _ in range(2))
    forward = (x, index, [width], weight, bias, 0.1, False, dtype, True)
    kept = x[index]
    wide = kept.to(acc)
    mean = wide.mean(-1)
    rstd = ((wide - mean[..., None]).square().mean(-1) + 0.1).rsqrt()
    d_stream = tensor(batch, lines, width, dtype=dtype, device=device, offset=offset)
    d_normed = tensor(k, lines, width, dtype=dtype, device=device)
    statistics = mean.flatten(), rstd.flatten()
    rows = index, slot
    backward = (d_stream, d_normed, kept, *statistics, *rows, [width], weight, False, [True] * 3)
    return forward, backward


def check_backward(args: Arguments, wanted: list[bool]) -> None:
    """compact_norm_backward for some of its results."""
    function = torch.ops.sdkernels.compact_norm_backward
    expected, actual = function(*args), function(*args[:-1], wanted)
    for is_wanted, a, b in zip(wanted, actual, expected, strict=True):
        if is_wanted:
            assert_close(a, b.double(), TOLERANCE[torch.float32])
        else:
            assert a.shape == (0,)


# A warp holds a line of up to 1024 elements in vectors of 16 bytes, of up to 512 in narrower ones,
# and a block one of up to 8192. Beyond, lines are read again.
WIDTHS = [1, 2, 5, 8, 31, 33, 64, 96, 256, 511, 512, 513, 514, 768, 1000, 1024, 1032, 3000, 4097]
WIDTHS += [8190, 8191, 8192, 8193, 8194, 8200]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_widths(dtype, width, device):
    forward, backward = norm_arguments(4, 2, 2, width, dtype, device)
    check_arguments("compact_norm", forward, TOLERANCE[dtype])
    check_arguments("compact_norm_backward", backward, TOLERANCE[dtype])


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("width", [4, 255, 258, 513, 4096, 4097, 4098, 8191, 8192, 8193, 8194])
def test_norm_widths_in_double(width, k, device):
    """A block holds 8192 doubles too, but beside the sums of the parameters' gradients 4096."""
    for offset in (0, 1) if width == 8192 else (0,):
        forward, backward = norm_arguments(3, k, 2, width, torch.float64, device, offset)
        check_arguments("compact_norm", forward, TOLERANCE[torch.float64])
        check_arguments("compact_norm_backward", backward, TOLERANCE[torch.float64])
        for wanted in ([True, False, False], [False, True, False], [False, False, True]):
            check_backward(backward, wanted)


@pytest.mark.parametrize("width", [64, 4097, 8192, 8193, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_no_row(dtype, width, device):
    """The stream's gradient passes, and the parameters' gradients are zero."""
    forward, backward = norm_arguments(3, 0, 2, width, dtype, device)
    check_arguments("compact_norm", forward, TOLERANCE[dtype])
    check_arguments("compact_norm_backward", backward, TOLERANCE[dtype])
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        check_backward(backward, wanted)


@pytest.mark.parametrize(("width", "lines"), [(24, 2000), (24, 5600), (9000, 12)])
def test_norm_of_many_lines(width, lines, device):
    """Parameter gradients from several blocks, smaller and larger ones, and from one."""
    forward, backward = norm_arguments(3, 2, lines, width, torch.float32, device)
    check_arguments("compact_norm", forward, TOLERANCE[torch.float32])
    check_arguments("compact_norm_backward", backward, TOLERANCE[torch.float32])
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        check_backward(backward, wanted)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_PRECISION])
def test_norm_of_misaligned_rows(dtype, offset, device):
    """Narrower vectors, down to single elements."""
    for width in (96, 8192, 9000):
        forward, backward = norm_arguments(4, 3, 2, width, dtype, device, offset)
        check_arguments("compact_norm", forward, TOLERANCE[dtype])
        check_arguments("compact_norm_backward", backward, TOLERANCE[dtype])


# Rows of every width of vector, few long and many short ones; layer scales that vary along a line,
# from line to line, both, or not at all.
ROWS = {
    "one-long-row": (2, 1, (150_000,), (150_000,)),
    "one-long-row-one-scale": (2, 1, (50_000,), (1,)),
    "many-short-rows": (3000, 2000, (64,), (64,)),
    "many-single-elements": (3000, 2000, (1,), (1,)),
    "three-elements": (600, 400, (3,), (3,)),
    "twelve-elements": (600, 400, (12,), (12,)),
    "tokens": (24, 16, (197, 48), (48,)),
    "tokens-own-scale": (5, 4, (197, 48), (197, 48)),
    "tokens-of-4": (6, 4, (50, 12), (12,)),
    "tokens-of-odd-width": (6, 4, (50, 33), (33,)),
    "image": (6, 4, (24, 14, 14), (24, 1, 1)),
    "image-odd": (6, 4, (24, 7, 7), (24, 1, 1)),
    "small-image": (6, 4, (64, 2, 2), (64, 1, 1)),
    "three-levels": (6, 4, (5, 6, 8), (5, 1, 8)),
}


def scatter_arguments(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, offset: int = 0
) -> tuple[Arguments, Arguments]:
    """Of scatter_add_rows, and of its backward with everything wanted."""
    batch, k, row, scale_shape = ROWS[name]
    dtype, branch_dtype = dtypes
    index, slot = kept_rows(batch, k, device)
    residual = tensor(batch, *row, dtype=dtype, device=device, offset=offset)
    out = tensor(k, *row, dtype=branch_dtype, device=device, offset=offset)
    parameters = dtype if dtype == branch_dtype else torch.float32
    layer_scale = tensor(*scale_shape, dtype=parameters, device=device)
    weight = tensor(k, dtype=parameters, device=device)
    forward = (residual, out, index, slot, layer_scale, weight, 1.5)
    backward = (residual, out, index, layer_scale, weight, 1.5, branch_dtype, [True, True])
    return forward, backward


PAIRS = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f32+bf16": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", ROWS)
def test_rows(name, pair, device):
    forward, backward = scatter_arguments(name, PAIRS[pair], device)
    tolerance = max(TOLERANCE[dtype] for dtype in PAIRS[pair])
    check_arguments("scatter_add_rows", forward, tolerance)
    check_arguments("scatter_add_rows_", forward, tolerance)
    check_arguments("scatter_add_rows_backward", backward, tolerance)
    x, out, index, slot = forward[:4]
    check_arguments("compact_rows", (x, index), 0.0)
    check_arguments("expand_rows", (out, index, slot), 0.0)
    given = out.to(x.dtype)
    check_arguments("scatter_rows", (x, given, index, slot), 0.0)
    check_arguments("scatter_rows_", (x, given, index, slot), 0.0)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned_rows(offset, device):
    """Narrower vectors, down to single elements."""
    for dtype in (torch.float32, torch.bfloat16):
        forward, backward = scatter_arguments("tokens-of-4", (dtype, dtype), device, offset)
        assert forward[0].data_ptr() % 16 == offset * dtype.itemsize % 16
        check_arguments("scatter_add_rows", forward, TOLERANCE[dtype])
        check_arguments("scatter_add_rows_backward", backward, TOLERANCE[dtype])
        check_arguments("compact_rows", (forward[0], forward[2]), 0.0)
        check_arguments("scatter_rows", forward[:4], 0.0)
        check_arguments("scatter_rows_", forward[:4], 0.0)


@pytest.mark.parametrize("offset", [1, 3, 4])
def test_results_in_a_part_of_a_larger_tensor(offset, device):
    """Its start is aligned to an element and no more; what is around it stays as it is."""
    for dtype in (torch.float32, torch.bfloat16):
        forward, backward = scatter_arguments("tokens-of-4", (dtype, dtype), device)
        x, out, index = forward[0], forward[1], forward[2]
        around = torch.full((out.numel() + 2 * offset,), 7.0, dtype=dtype, device=device)
        part = around[offset:-offset].view(out.shape)
        ops = torch.ops.sdkernels
        grad, given, *options = backward
        *options, _, wanted = options
        width = [x.shape[-1]]
        calls = (
            (ops.compact_rows_into, (x, index), ops.compact_rows(x, index)),
            (
                ops.compact_norm_into,
                (x, index, width, None, None, 0.1, False, False),
                ops.compact_norm(x, index, width, None, None, 0.1, False, dtype, False)[0],
            ),
            (
                ops.scatter_add_rows_backward_into,
                (grad, given, *options, wanted),
                ops.scatter_add_rows_backward(*backward)[0],
            ),
        )
        for op, args, expected in calls:
            op(part, *args)
            # Other vectors, and sums in another order.
            assert_close(part, expected.double(), TOLERANCE[dtype])
            assert (around[:offset] == 7).all()
            assert (around[-offset:] == 7).all()


def relu_arguments(forward: Arguments, wants_out: bool = True) -> tuple[Arguments, Arguments]:
    """Of scatter_add_relu_rows, and of its backward, for rows like those of scatter_add_rows."""
    residual, out, index, slot, *factors = forward
    bits = -(-residual[0].numel() // 8)
    positive = torch.randint(256, (residual.shape[0], bits)).to(residual.device, torch.uint8)
    options = out.dtype, torch.contiguous_format, wants_out
    return forward, (residual, positive, index, slot, *factors, *options)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", ROWS)
def test_rows_with_relu(name, pair, device):
    tolerance = max(TOLERANCE[dtype] for dtype in PAIRS[pair])
    arguments = scatter_arguments(name, PAIRS[pair], device)[0]
    for plain in (False, True):
        if plain:
            arguments = (*arguments[:4], None, None, 1.5)
        forward, backward = relu_arguments(arguments, wants_out=not plain)
        check_arguments("scatter_add_relu_rows", forward, tolerance)
        check_arguments("scatter_add_relu_rows_backward", backward, tolerance)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("name", ["tokens-of-4", "twelve-elements"])
def test_misaligned_rows_with_relu(name, offset, device):
    """More threads that share a byte, up to eight; the last byte of a row may have less of them."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        arguments = scatter_arguments(name, (dtype, dtype), device, offset)[0]
        forward, backward = relu_arguments(arguments)
        check_arguments("scatter_add_relu_rows", forward, TOLERANCE[dtype])
        check_arguments("scatter_add_relu_rows_backward", backward, TOLERANCE[dtype])


@pytest.mark.parametrize("elements", [*range(1, 18), 63, 65])
def test_bits_of_every_length(elements, device):
    """Every bit has its place, and those behind the last element are zero."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(70, elements).to(device, dtype)
        nothing = x[:0], torch.empty(0, dtype=torch.int64, device=device)
        slot = torch.full((70,), -1, device=device)
        forward, backward = relu_arguments((x, *nothing, slot, None, None, 1.0))
        check_arguments("scatter_add_relu_rows", forward, 0.0)
        check_arguments("scatter_add_relu_rows_backward", backward, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_PRECISION])
def test_bits_that_a_relu_passes(dtype, device):
    """Not one changes in a gradient, with NaN of any payload; what does not pass is +0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    least, infinity = torch.iinfo(integer).min, torch.tensor(torch.inf, dtype=dtype).view(integer)
    special = [0, least, infinity, infinity + 1, infinity - 1, infinity + least, 1, -1]
    bits = torch.tensor(special * 3, dtype=integer).to(device).repeat(4, 1)
    x = bits.view(dtype)
    none = torch.empty(0, dtype=torch.int64, device=device)
    rows = none, torch.full((4,), -1, device=device), None, None, 1.0
    y, positive = torch.ops.sdkernels.scatter_add_relu_rows(x, x[:0], *rows)
    expected = bits.masked_fill(x <= 0, 0)
    assert torch.equal(y.view(integer), expected)
    options = dtype, torch.contiguous_format, False
    d_x, _ = torch.ops.sdkernels.scatter_add_relu_rows_backward(x, positive, *rows, *options)
    assert torch.equal(d_x.view(integer), expected)


@pytest.mark.parametrize("wanted", [[True, False], [False, True]])
@pytest.mark.parametrize("name", ["tokens", "image", "one-long-row-one-scale"])
def test_one_of_the_sums(name, wanted, device):
    backward = scatter_arguments(name, PAIRS["f32"], device)[1]
    args = (*backward[:-1], wanted)
    check_arguments("scatter_add_rows_backward", args, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["one-long-row-one-scale", "image", "image-odd"])
def test_infinite_weight(name, device):
    """Its sums are infinite: threads that have no element of a line add nothing, not 0 * inf."""
    backward = scatter_arguments(name, PAIRS["f32"], device)[1]
    grad, out, index, layer_scale, weight, *others = backward
    weight = torch.full_like(weight, torch.inf)
    args = (grad.abs(), out.abs(), index, layer_scale.abs(), weight, *others)
    d_out, d_layer_scale, d_weight = torch.ops.sdkernels.scatter_add_rows_backward(*args)
    assert d_out.isposinf().all()
    assert d_layer_scale.isposinf().all()
    assert d_weight.isfinite().all()


@pytest.mark.parametrize("elements", [1, 5, 13, 17, 21])
def test_infinite_weight_and_bits(elements, device):
    """Those behind the last element stay zero: no element of a line, no 0 * inf."""
    x = torch.ones(2, elements, device=device)
    rows = torch.arange(2, device=device)
    weight = torch.full((2,), torch.inf, device=device)
    y, positive = torch.ops.sdkernels.scatter_add_relu_rows(x, x, rows, rows, None, weight, 1.0)
    assert y.isposinf().all()
    last = 2 ** ((elements - 1) % 8 + 1) - 1
    assert positive.tolist() == [[255] * ((elements - 1) // 8) + [last]] * 2


@pytest.mark.parametrize("batch", [0, 1, 31, 32, 33, 1023, 1024, 1025, 5000])
def test_masks(batch, device):
    for share in (0.0, 0.3, 1.0):
        mask = (torch.rand(batch) < share).to(device)
        expected = mask.nonzero().flatten()
        for k in (None, len(expected)):
            index, slot = torch.ops.sdkernels.compact_mask(mask, k)
            assert torch.equal(index, expected)
            assert torch.equal(slot[index], torch.arange(len(index), device=device))
            assert (slot >= 0).sum() == len(index)
            assert slot.min().item() >= -1 if batch else True


def test_strided_mask(device):
    mask = torch.tensor([True, False, True, True, False, False], device=device)[::2]
    index, slot = torch.ops.sdkernels.compact_mask(mask, None)
    assert index.tolist() == [0, 1]
    assert slot.tolist() == [0, 1, -1]
