"""What only a GPU can show: graphs, streams, synchronisation, races, and tensors beyond 2^31."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from comparison import assert_same_bits
from compiling import assert_same, compilation, needs_inductor
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from sdkernels import (
    DepthPlan,
    KeptRows,
    StochasticDepth,
    compact_layer_norm,
    fused_stochastic_depth,
    scatter_add_rows,
)
from sdkernels.backends import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

OPS = torch.ops.sdkernels
BATCH, TOKENS, WIDTH = 16, 50, 64
DROP_PROBS = [0.2, 0.4, 0.6]

# Inductor warns of what depends on the GPU: too few multiprocessors, TF32 that is not in use.
any_warning = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Three blocks with everything that is fused: norm, layer scale, stream."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            StochasticDepth(
                nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
                p,
                norm=nn.LayerNorm(WIDTH),
                layer_scale=nn.Parameter(torch.rand(WIDTH)),
                **options,
            )
            for p in DROP_PROBS
        )

    def forward(self, x: Tensor, plan: DepthPlan | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x) if plan is None else block(x, rows=plan[i])
        return x


def gradients(net: nn.Module, x: Tensor, plan: DepthPlan | None = None) -> list[Tensor]:
    loss = net(x, plan).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, [x, *net.parameters()])]


def batch(dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH).to(device, dtype).requires_grad_()


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_kernels_serve_cuda():
    """Ours, or those of the backend that was asked for. compact_mask has no Triton kernel."""
    requested = os.environ.get("SDKERNELS_BACKEND") or "auto"
    chosen = {
        choice.backend
        for choice in ops.backend_table()
        if choice.device == "cuda" and choice.op != "compact_mask"
    }
    assert chosen == {"cpp" if requested == "auto" else requested}


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "fixed"}, {"inplace": True}, {"activation": "relu"}], ids=str
)
def test_step_does_not_synchronise(options, no_synchronisation):
    net, x = Net(**options).to("cuda", non_blocking=True), None
    memory = torch.zeros(BATCH, TOKENS, WIDTH, device="cuda")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        x = memory * 1.0
        with torch.autocast("cuda", torch.bfloat16):
            net(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_plan_does_not_synchronise(no_synchronisation):
    net = Net().to("cuda", non_blocking=True)
    x = torch.zeros(BATCH, TOKENS, WIDTH, device="cuda")
    plan = DepthPlan.sample(BATCH, DROP_PROBS, device="cuda")
    for _ in range(3):
        net(x, plan).square().mean().backward()
        plan.resample_()


def test_mask_of_known_count_does_not_synchronise():
    mask = torch.tensor([True, False, True, True], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index, slot = OPS.compact_mask(mask, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert index.tolist() == [0, 2, 3]
    assert slot.tolist() == [0, -1, 1, 2]


def test_graph_replays_with_new_rows():
    """A captured training step, and a plan that is refreshed between its replays."""
    net, x = Net().cuda(), batch()
    plan = DepthPlan.sample(BATCH, DROP_PROBS, sampler="fixed", device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what warms up must not be captured
            gradients(net, x, plan)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(net, x, plan)
    losses = set()
    for _ in range(5):
        plan.resample_()
        expected = gradients(net, x, plan)
        graph.replay()
        for actual, wanted in zip(captured, expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        losses.add(captured[0].item())
    assert len(losses) == 5  # other rows every time


def test_rows_are_not_drawn_under_capture():
    """They would be replayed for ever; a capture that was given up harms nothing."""
    block, x = Net().cuda().blocks[0], batch()
    plan = DepthPlan.sample(BATCH, DROP_PROBS, sampler="fixed", device="cuda")
    for draw in (lambda: block(x), plan.resample_):
        with (
            pytest.raises(RuntimeError, match="rows: cannot be drawn while a CUDA graph is being"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            draw()
    with pytest.raises(RuntimeError, match="rows: cannot be drawn while a CUDA graph is being"):
        torch.cuda.make_graphed_callables(block, (x,))
    plan.resample_()
    assert block(x).isfinite().all()


@needs_inductor
@any_warning
def test_compiled_step_replays_with_new_rows():
    """The CUDA graphs of mode="reduce-overhead" read the rows that a plan has by then."""
    net, x = Net().cuda(), batch()
    plan = DepthPlan.sample(BATCH, DROP_PROBS, sampler="fixed", device="cuda")
    with compilation() as compiled:
        compiled_net = torch.compile(net, fullgraph=True, mode="reduce-overhead")
        losses = set()
        for _ in range(8):  # runs, is captured, is replayed
            plan.resample_()
            expected = gradients(net, x, plan)
            torch.compiler.cudagraph_mark_step_begin()
            actual = gradients(compiled_net, x, plan)
            assert_same(actual, expected)
            losses.add(actual[0].item())
        assert (compiled.graphs, compiled.breaks) == (1, 0)
        assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(losses) == 8


@needs_inductor
@any_warning
def test_rows_drawn_in_a_compiled_region_are_new():
    """A CUDA graph must not replay them: at every call those that eager code draws."""

    def step(x: Tensor) -> Tensor:
        return fused_stochastic_depth(x, torch.ones_like, 0.5, sampler="fixed")

    x = torch.zeros(BATCH, TOKENS, WIDTH, device="cuda", requires_grad=True)
    weight = torch.rand_like(x)
    with compilation() as compiled:
        compiled_step = torch.compile(step, fullgraph=True, mode="reduce-overhead")
        seen = set()
        for seed in range(8):
            results = []
            for function in (step, compiled_step):
                torch.manual_seed(seed)
                torch.compiler.cudagraph_mark_step_begin()
                y = function(x)
                results.append([y.detach().clone(), *torch.autograd.grad(y, x, weight)])
            assert_same(results[1], results[0])
            seen.add(tuple(results[1][0][:, 0, 0].tolist()))
        assert (compiled.graphs, compiled.breaks) == (1, 0)
    assert len(seen) == 8


def test_side_stream():
    """Kernels run on the current stream: a result is ready for what follows on that stream."""
    net, x = Net().cuda(), batch()
    plan = DepthPlan.sample(BATCH, DROP_PROBS, device="cuda")
    expected = gradients(net, x, plan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream is too early
        scaled = x.detach().mul(1.0).requires_grad_()
        actual = gradients(net, scaled, plan)
    side.synchronize()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device():
    net, x = Net(), batch(device="cpu")
    plan = DepthPlan.sample(BATCH, DROP_PROBS)
    expected = gradients(net, x, plan)
    assert torch.cuda.current_device() == 0
    rows = [r.to("cuda:1") for r in plan]
    net, x = net.to("cuda:1"), x.detach().to("cuda:1").requires_grad_()
    stream = x
    for block, r in zip(net.blocks, rows, strict=True):
        stream = block(stream, rows=r)
    loss = stream.square().mean()
    actual = [loss, *torch.autograd.grad(loss, [x, *net.parameters()])]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-4, atol=1e-4)


def test_rows_of_another_device():
    rows = KeptRows.sample(BATCH, 0.5)
    with pytest.raises(ValueError, match="expected the device of"):
        fused_stochastic_depth(batch(), nn.Identity(), 0.5, rows=rows)


@pytest.mark.parametrize("rms", [False, True])
def test_gradcheck(rms):
    rows = KeptRows.from_index(torch.tensor([0, 2]), batch=3, scale=1.5).to("cuda")
    norm = (nn.RMSNorm if rms else nn.LayerNorm)(6).double().cuda()
    weight = torch.rand(2, dtype=torch.float64, device="cuda", requires_grad=True)
    x = torch.randn(3, 4, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    layer_scale = torch.randn(6, dtype=torch.float64, device="cuda", requires_grad=True)

    def function(x: Tensor, layer_scale: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
        weighted = KeptRows(rows.index, rows.slot, rows.scale, weight)
        return fused_stochastic_depth(
            x, torch.sin, 0.5, norm=norm, layer_scale=layer_scale, rows=weighted
        )

    assert torch.autograd.gradcheck(function, (x, layer_scale, weight, *norm.parameters()))


def repeated(function: Callable[[], tuple[Tensor, ...]], times: int) -> int:
    """How many of the runs differ from the first in some bit."""

    def bits(results: tuple[Tensor, ...]) -> list[Tensor]:
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return [result.view(integers[result.element_size()]) for result in results]

    first = bits(function())
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(times):
        for a, b in zip(bits(function()), first, strict=True):
            different += (a != b).any()
    return int(different.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_thousand_repetitions(dtype):
    """A race would change a bit once in a while."""
    rows = KeptRows.sample(24, 0.5, sampler="fixed", device="cuda")
    index, slot, k = rows.index, rows.slot, rows.k
    x, grad = (torch.randn(24, 197, 192, device="cuda").to(dtype) for _ in range(2))
    out, d_normed = (torch.randn(k, 197, 192, device="cuda").to(dtype) for _ in range(2))
    layer_scale, weight, bias = (torch.rand(192, device="cuda") for _ in range(3))
    gates = torch.rand(k, device="cuda")
    _, kept, mean, rstd = OPS.compact_norm(x, index, [192], weight, bias, 1e-6, False, dtype, True)
    scale = layer_scale.to(dtype), gates, 2.0
    _, positive = OPS.scatter_add_relu_rows(x, out, index, slot, *scale)
    options = dtype, torch.contiguous_format, True

    def step() -> tuple[Tensor, ...]:
        return (
            *OPS.compact_norm(x, index, [192], weight, bias, 1e-6, False, dtype, True),
            *OPS.compact_norm_backward(
                grad, d_normed, kept, mean, rstd, index, slot, [192], weight, False, [True] * 3
            ),
            OPS.scatter_add_rows(x, out, index, slot, *scale),
            *OPS.scatter_add_rows_backward(
                grad, out, index, layer_scale, gates, 2.0, dtype, [True, True]
            ),
            *OPS.scatter_add_relu_rows(x, out, index, slot, *scale),
            *OPS.scatter_add_relu_rows_backward(grad, positive, index, slot, *scale, *options),
        )

    assert repeated(step, 10_000) == 0


# Beyond 2^31 elements

LINES, LINE = 2**20, 1024  # a row of 2^30 elements


@pytest.fixture
def huge() -> Iterator[Tensor]:
    """[3, 2^20, 1024] in bfloat16: 6 GiB, and the tests need six times that."""
    needed = 40 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    x = torch.empty(3, LINES, LINE, device="cuda", dtype=torch.bfloat16)
    for row in x:
        row.normal_()
    yield x
    del x
    torch.cuda.empty_cache()


HUGE_ROWS = KeptRows.from_index(torch.tensor([1, 2]), batch=3, scale=2.0)


def test_huge_rows(huge):
    rows = HUGE_ROWS.to("cuda")
    kept = OPS.compact_rows(huge, rows.index)
    for j, row in enumerate((1, 2)):
        assert torch.equal(kept[j], huge[row])
    y = scatter_add_rows(huge, kept, rows)
    assert torch.equal(y[0], huge[0])
    for row in (1, 2):
        assert_same_bits(y[row, -1], (huge[row, -1].float() * 3).bfloat16())
        assert_same_bits(y[row, 0], (huge[row, 0].float() * 3).bfloat16())
    expanded = OPS.expand_rows(kept, rows.index, rows.slot)
    assert not expanded[0].any()
    assert torch.equal(expanded[2], huge[2])


def test_huge_backward(huge):
    rows = HUGE_ROWS.to("cuda")
    layer_scale = torch.ones(LINE, device="cuda")
    ones = torch.ones(2, LINES, LINE, device="cuda", dtype=torch.bfloat16)
    d_out, d_layer_scale, _ = OPS.scatter_add_rows_backward(
        huge, ones, rows.index, layer_scale, None, 2.0, torch.bfloat16, [True, False]
    )
    assert_same_bits(d_out[1, -1], (huge[2, -1].float() * 2).bfloat16())
    expected = 2 * huge[1:].sum((0, 1), dtype=torch.float32)
    torch.testing.assert_close(d_layer_scale, expected, rtol=1e-3, atol=1.0)


def test_huge_relu(huge):
    rows = HUGE_ROWS.to("cuda")
    kept = OPS.compact_rows(huge, rows.index)
    factors = rows.index, rows.slot, None, None, 2.0
    y, positive = OPS.scatter_add_relu_rows(huge, kept, *factors)
    assert torch.equal(y[0], huge[0].relu())
    for line in (0, -1):
        assert_same_bits(y[2, line], (huge[2, line].float() * 3).bfloat16().relu())
    options = torch.bfloat16, torch.contiguous_format, True
    d_x, d_out = OPS.scatter_add_relu_rows_backward(huge, positive, *factors, *options)
    # The gradient has the values of x, and those that are positive pass.
    for row in range(3):
        assert torch.equal(d_x[row], huge[row].relu())
    assert_same_bits(d_out[1, -1], (huge[2, -1].float() * 2).bfloat16().relu())


def test_huge_norm(huge):
    rows = HUGE_ROWS.to("cuda")
    weight = torch.rand(LINE, device="cuda", requires_grad=True)
    bias = torch.rand(LINE, device="cuda", requires_grad=True)
    normed = compact_layer_norm(huge, rows, LINE, weight, bias)
    last = F.layer_norm(huge[2, -1:].float(), [LINE], weight, bias)
    torch.testing.assert_close(normed[1, -1:].float(), last, rtol=1e-2, atol=1e-2)
    d_bias = torch.autograd.grad(normed, bias, torch.ones_like(normed))[0]
    assert d_bias.tolist() == [2.0 * LINES] * LINE
