"""Same inputs, same bits: run after run, and for any number of threads."""

import threading

import pytest
import torch
from backends import native
from cases import Case, generated_cases
from comparison import assert_same_bits, run_fused
from hypothesis import given, settings
from op_samples import arguments, call
from torch import Tensor, nn

from sdkernels import KeptRows, StochasticDepth, scatter_add_rows
from sdkernels.backends import traceable

# Enough elements for seven threads, with sums over all of them: for layer_scale one number for each
# element of a line, each line, one element of a row or everything.
PARALLEL_CASES = [
    Case("large", norm="layer", layer_scale="C"),
    Case("large", norm="rms", layer_scale="C1"),
    Case("large", norm="layer_2d", layer_scale="NC", layout="sequence_first"),
    Case("large", norm="layer_no_bias", layer_scale="1"),
    Case("large", dtype=torch.bfloat16, branch_dtype=torch.bfloat16, layer_scale="scalar"),
    Case("large", branch_dtype=torch.bfloat16, norm="layer", layer_scale="C"),
    Case("large", dtype=torch.float64, branch_dtype=torch.float64, norm="layer", layer_scale="C"),
    Case("image", layout="channels_last", layer_scale="C1"),
    Case("image", layer_scale="C1W"),
]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert_same_bits(second[name], value)


def run_ours(case: Case) -> dict[str, Tensor]:
    """The case with a branch of elementwise functions: PyTorch's sums may follow the threads."""
    inputs = case.inputs()
    results = run_fused(inputs)
    return {name: value for name, value in results.items() if not name.startswith("branch.")}


@native
@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("case", PARALLEL_CASES, ids=str)
def test_any_number_of_threads(case):
    torch.set_num_threads(1)
    expected = run_ours(case)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_same(expected, run_ours(case))


# What the ops of the dispatcher find beside those: weights of rows, pieces that end within a line.
OP_CASES = [
    Case("large", layout="sequence_first", norm="layer", layer_scale="C"),
    Case("large", norm="rms", layer_scale="NC", layout="sliced", weighted=True),
    Case("image", layout="channels_last", norm="layer_2d", layer_scale="C1", weighted=True),
]


@native
@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("case", OP_CASES, ids=str)
@pytest.mark.parametrize("op", traceable.OPS)
def test_every_op_by_any_number_of_threads(op, case):
    function, found = getattr(torch.ops.sdkernels, op), []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        found.append(call(function, op, arguments(op, case)))
    for other in found[1:]:
        for expected, result in zip(found[0], other, strict=True):
            assert_same_bits(result, expected)


@native
@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("width", [192, 192 + 8, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_rows_that_a_norm_keeps(dtype, width):
    """The CPU kernels write them past the caches, in whole lines of those, where there are some."""
    lines = 2 * 2**20 // (4 * width * dtype.itemsize)
    x, index = torch.randn(6, lines, width).to(dtype), torch.tensor([0, 2, 3, 5])
    weight = torch.randn(width).to(dtype)
    options = [width], weight, None, 1e-5, False, dtype
    norm = torch.ops.sdkernels.compact_norm
    expected = norm(x, index, *options, False)[0]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        normed, kept, _, _ = norm(x, index, *options, True)
        assert kept.nbytes > 2**20
        assert_same_bits(kept, x[index])
        assert_same_bits(normed, expected)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_bits_of_a_relu(threads):
    """Threads share no byte of them, whatever the length of a row."""
    torch.set_num_threads(threads)
    for batch, elements in ((60_000, 5), (30_000, 13), (9, 24 * 40 * 36 + 5)):
        x = torch.randn(batch, elements, requires_grad=True)
        rows = KeptRows.from_index(torch.tensor([1, 2, 7]), batch)
        out = torch.randn(3, elements)
        y = scatter_add_rows(x, out, rows, activation="relu")
        assert torch.equal(y, x.index_add(0, rows.index, out).relu())
        y.backward(torch.ones_like(y))
        assert torch.equal(x.grad, (y > 0).float())


@pytest.mark.parametrize("case", PARALLEL_CASES, ids=str)
def test_run_after_run(case):
    expected = run_ours(case)
    for _ in range(5):
        assert_same(expected, run_ours(case))


@given(case=generated_cases())
@settings(max_examples=30)
def test_generated_cases(case):
    assert_same(run_fused(case.inputs()), run_fused(case.inputs()))


def test_backward_in_several_threads():
    """Python threads that share a module, as nn.DataParallel runs them."""
    module = StochasticDepth(
        nn.Linear(64, 64), 0.5, norm=nn.LayerNorm(64), layer_scale=nn.Parameter(torch.rand(64))
    )
    inputs = [torch.randn(16, 48, 64) for _ in range(4)]
    rows = [KeptRows.sample(16, 0.5) for _ in inputs]
    expected = [
        torch.autograd.grad(module(x, rows=r).square().sum(), list(module.parameters()))
        for x, r in zip(inputs, rows, strict=True)
    ]
    results: list[list[tuple[Tensor, ...]]] = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        start.wait()
        for _ in range(5):
            loss = module(inputs[i], rows=rows[i]).square().sum()
            results[i].append(torch.autograd.grad(loss, list(module.parameters())))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, repeated in enumerate(results):
        assert len(repeated) == 5
        for gradients in repeated:
            torch.testing.assert_close(gradients, expected[i])


def test_sampling_in_several_threads():
    """One generator drawn from by several threads: every draw is whole."""
    generator = torch.Generator().manual_seed(0)
    drawn: list[KeptRows] = []

    def work() -> None:
        for _ in range(200):
            drawn.append(KeptRows.sample(64, 0.5, sampler="fixed", generator=generator))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == 800
    for rows in drawn:
        assert rows.k == 32
        assert torch.equal(rows.slot[rows.index], torch.arange(32))
        assert (rows.slot >= 0).sum() == 32
    assert len({tuple(rows.index.tolist()) for rows in drawn}) == 800
