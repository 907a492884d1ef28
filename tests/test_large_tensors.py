"""Offsets beyond 2^31 elements, in memory that is reserved but hardly touched."""

import torch
from comparison import assert_same_bits
from torch import Tensor

from sdkernels import KeptRows, compact_layer_norm, compact_rows, scatter_add_rows

FAR = 2**31 + 16
ROWS = KeptRows.from_index(torch.tensor([1]), batch=2, scale=2.0)


def far_apart(rows: int, distance: int, elements: int, dtype: torch.dtype) -> Tensor:
    """[rows, elements], with `distance` elements from one row to the next."""
    memory = torch.empty((rows - 1) * distance + elements, dtype=dtype)
    return memory.as_strided((rows, elements), (distance, 1))


def test_distance_between_rows():
    x = far_apart(2, FAR, 40, torch.bfloat16)
    x.copy_(torch.randn(2, 40))
    dense = x.clone()
    out, layer_scale = torch.randn(1, 40), torch.randn(40)
    assert torch.equal(compact_rows(x, ROWS), dense[1:])
    for function in (
        lambda x: compact_layer_norm(x, ROWS, 40),
        lambda x: scatter_add_rows(x, out, ROWS, layer_scale),
        lambda x: scatter_add_rows(x, out.bfloat16(), ROWS, inplace=True),
    ):
        assert_same_bits(function(x), function(dense))


def test_distance_between_rows_of_the_gradient():
    grad = far_apart(2, FAR, 40, torch.float16)
    grad.copy_(torch.randn(2, 40))
    results = []
    for incoming in (grad, grad.clone()):
        torch.manual_seed(0)
        leaves = [torch.randn(s, requires_grad=True) for s in ((2, 40), (40,), (40,), (40,))]
        x, layer_scale, weight, bias = leaves
        kept = compact_layer_norm(x, ROWS, 40, weight, bias)
        y = scatter_add_rows(x.half(), torch.sin(kept).half(), ROWS, layer_scale)
        results.append(torch.autograd.grad(y, leaves, incoming))
    for far, near in zip(*results, strict=True):
        assert_same_bits(far, near)


def test_distance_between_elements_of_a_row():
    x = far_apart(3, FAR // 2, 4, torch.uint8).t()
    x.copy_(torch.arange(12).view(4, 3))
    rows = KeptRows.from_index(torch.tensor([1, 3]), batch=4)
    assert compact_rows(x, rows).tolist() == [[3, 4, 5], [9, 10, 11]]


def test_row_number():
    x = torch.empty(FAR, 1, dtype=torch.uint8)
    x[[7, FAR - 3]] = torch.tensor([[1], [2]], dtype=torch.uint8)
    kept = torch.ops.sdkernels.compact_rows(x, torch.tensor([7, FAR - 3]))
    assert kept.tolist() == [[1], [2]]
