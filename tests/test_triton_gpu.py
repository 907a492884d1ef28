"""The Triton kernels on a GPU: whatever the interpreter and the compiler alone cannot show.

All other tests run with them under SDKERNELS_BACKEND=triton, a step of its own of `make gpu-check`.
"""

import time

import pytest
import torch
from cases import Case
from op_samples import arguments, call
from test_backends import run

from sdkernels.backends import choice, traceable

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or choice.missing("triton", "cuda") is not None,
    reason="no GPU for Triton",
)


@pytest.fixture(scope="module")
def kernels():
    from sdkernels.backends import triton

    assert triton.why_unusable() is None
    return triton.OPS


def test_more_elements_than_int32_counts(kernels):
    batch, lines, length = 3, 2**19 + 8, 2048
    assert batch * lines * length > 2**31
    needed = 12 * lines * length * 2  # x and y, two tensors of kept rows, and float32 copies
    if torch.cuda.mem_get_info()[0] < 2 * needed:
        pytest.skip("not enough memory")
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(batch, lines, length, **options)
    out = torch.randn(2, lines, length, **options)
    gamma = torch.rand(length, **options)
    index = torch.tensor([0, 2], device="cuda")
    slot = torch.tensor([0, -1, 1], device="cuda")
    kept = kernels["compact_rows"](x, index)
    assert torch.equal(kept[1], x[2])
    y = kernels["scatter_add_rows"](x, out, index, slot, gamma, None, 2.0)
    assert torch.equal(y[1], x[1])
    for j, row in ((0, 0), (1, 2)):
        torch.testing.assert_close(y[row], (x[row].float() + 2 * gamma * out[j].float()).bfloat16())
    result, positive = kernels["scatter_add_relu_rows"](x, out, index, slot, gamma, None, 2.0)
    assert torch.equal(result, y.relu_())
    del result
    options = torch.bfloat16, torch.contiguous_format, True
    d_x, d_out = kernels["scatter_add_relu_rows_backward"](
        x, positive, index, slot, gamma, None, 2.0, *options
    )
    assert torch.equal(d_x, torch.where(y > 0, x, 0.0))
    torch.testing.assert_close(d_out[1], (2 * gamma * d_x[2].float()).bfloat16())
    del d_x, d_out
    normed, _, mean, rstd = kernels["compact_norm"](
        x, index, [length], gamma, None, 1e-5, False, torch.bfloat16, False
    )
    last = torch.nn.functional.layer_norm(x[2].float(), (length,), gamma.float())
    torch.testing.assert_close(normed[1].float(), last, rtol=1e-2, atol=1e-2)
    del y, last
    d_x, d_weight, _ = kernels["compact_norm_backward"](
        x, out, kept, mean, rstd, index, slot, [length], gamma, False, [True, True, False]
    )
    assert torch.equal(d_x[1], x[1])
    x_hat = normed.float() / gamma.float()
    expected = (out.double().flatten(0, 1) * x_hat.flatten(0, 1)).sum(0)
    torch.testing.assert_close(d_weight.double(), expected, rtol=2e-2, atol=20.0)


CASES = [
    Case(norm="layer", layer_scale="C", weighted=True),
    Case("conv", layout="channels_last", norm="rms", layer_scale="C1", weighted=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_synchronization(case, kernels):
    for op in kernels:
        args = arguments(op, case, "cuda")
        call(kernels[op], op, args)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            kernels[op](*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_one_compilation_for_every_number_of_kept_rows(kernels):
    import triton

    compiled = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    x = torch.randn(48, 7, 32, device="cuda")
    bits = torch.zeros(48, 28, dtype=torch.uint8, device="cuda")
    options = x.dtype, torch.contiguous_format, True
    try:
        triton.knobs.runtime.jit_post_compile_hook = lambda **details: compiled.append(details)
        for k in (2, 1, 3, 16, 17, 32, 47, 48):
            index = torch.arange(k, device="cuda")
            slot = torch.arange(48, device="cuda")
            slot[k:] = -1
            factors = index, slot, None, None, 2.0
            kept = kernels["compact_rows"](x, index)
            kernels["scatter_add_relu_rows"](x, kept, *factors)
            kernels["scatter_add_relu_rows_backward"](x, bits, *factors, *options)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert len(compiled) <= 3  # one of each kernel


def test_host_time_of_a_call(kernels, record_property):
    """Geometry, checks and Triton's own launcher; nothing is compiled or waited for."""
    args = arguments("scatter_add_rows", Case(layer_scale="C"), "cuda")
    seconds = {}
    for name, function in (
        ("triton", kernels["scatter_add_rows"]),
        ("traceable", traceable.scatter_add_rows),
    ):
        function(*args)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            function(*args)
        seconds[name] = (time.perf_counter() - start) / 200
        record_property(f"{name}_us", round(seconds[name] * 1e6, 1))
    assert seconds["triton"] < 250e-6


def test_rows_outside_of_the_batch_stop_the_kernel():
    """In a process of its own: no other work is possible on the device afterwards."""
    program = """
import torch, sdkernels
x = torch.ones(3, 4, device="cuda")
torch.ops.sdkernels.compact_rows(x, torch.tensor([2**40], device="cuda"))
torch.cuda.synchronize()
"""
    result = run(program, SDKERNELS_BACKEND="triton")
    assert result.returncode != 0
    assert "device-side assert" in result.stderr or "not a row of the batch" in result.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_another_device_than_the_current_one(kernels):
    for op in kernels:
        args = arguments(op, CASES[0], "cuda:1")
        for a, b in zip(
            call(kernels[op], op, args), call(traceable.OPS[op], op, args), strict=True
        ):
            torch.testing.assert_close(a, b)
