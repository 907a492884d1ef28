"""A branch that runs on no row leaves the running statistics of its modules as they were."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from libraries import load
from torch import Tensor, nn

import sdkernels
from sdkernels import KeptRows, StochasticDepth, fused_stochastic_depth

NOTHING = KeptRows.from_index(torch.empty(0, dtype=torch.int64), 4)
ROWS = KeptRows.from_index(torch.tensor([0, 1, 3]), 4)

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch_1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "batch_2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "batch_3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
    "sync": (lambda: nn.SyncBatchNorm(3, momentum=None), (4, 3, 2, 2)),
    "instance": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 5)),
    "timm": (lambda: load("timm.layers").BatchNormAct2d(3, momentum=None), (4, 3, 2, 2)),
    "timm_evo": (lambda: load("timm.layers").EvoNorm2dB0(3), (4, 3, 2, 2)),
}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


CALLS: dict[str, Callable[[nn.Module, Tensor, KeptRows], Any]] = {
    "module": lambda norm, x, rows: fused_stochastic_depth(x, norm, 0.5, rows=rows),
    "function": lambda norm, x, rows: fused_stochastic_depth(
        x, lambda kept: norm(kept * 1.0), 0.5, rows=rows
    ),
    "list": lambda norm, x, rows: fused_stochastic_depth(
        [x, x], lambda xs: [norm(each) for each in xs], 0.5, rows=[rows, rows]
    )[0],
    "StochasticDepth": lambda norm, x, rows: StochasticDepth(nn.Sequential(norm), 0.5)(
        x, rows=rows
    ),
}


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")  # EvoNorm, of no row
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", NORMS)
def test_no_kept_row_leaves_no_trace(name, call):
    make, shape = NORMS[name]
    norm, x = make(), torch.randn(shape) * 2 + 1
    call(norm, x, ROWS)
    before = buffers(norm)
    y = call(norm, x.requires_grad_(), NOTHING)
    assert_equal(buffers(norm), before)
    assert torch.equal(y, x)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in norm.parameters())
    twin = copy.deepcopy(norm)
    call(norm, x, ROWS)
    for _ in range(2 if call is CALLS["list"] else 1):
        twin(x[ROWS.index])
    assert_equal(buffers(norm), buffers(twin))


class Average(nn.Module):
    """Statistics of one's own, under names of one's own; some are written to, some replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.ema.lerp_(x.detach().mean(0), 0.1)
        self.count = self.count + 1
        return x

    def again(self, x: Tensor) -> Tensor:
        return self.forward(x)


@pytest.mark.parametrize("empty", ["run", "ones"])
@pytest.mark.parametrize("way", ["module", "closure", "forward", "method"])
def test_buffers_of_any_name(empty, way):
    net = Average()
    ways = {"module": net, "closure": lambda x: net(x), "forward": net.forward, "method": net.again}
    x, (ema, count) = torch.randn(4, 3), net.buffers()
    fused_stochastic_depth(x, ways[way], 0.5, rows=ROWS)
    before, count = buffers(net), net.count
    fused_stochastic_depth(x, ways[way], 0.5, rows=NOTHING, empty=empty)
    assert_equal(buffers(net), before)
    assert net.ema is ema  # the tensors that others may hold
    assert net.count is count
    assert before["ema"].any()


@pytest.mark.parametrize("empty", ["run", "ones"])
def test_a_norm_that_is_called_by_its_forward(empty):
    norm = nn.BatchNorm1d(3)
    fused_stochastic_depth(torch.randn(4, 3), norm.forward, 0.5, rows=NOTHING, empty=empty)
    assert_equal(buffers(norm), buffers(nn.BatchNorm1d(3)))
    assert norm.training


@pytest.mark.parametrize("make", [
    lambda: nn.BatchNorm1d(3, track_running_stats=False), lambda: nn.InstanceNorm1d(3, affine=True),
])  # fmt: skip
def test_a_norm_without_statistics_runs_on_the_row_of_ones(make):
    """Of which there may be one value a channel."""
    norm, seen = make(), []
    norm.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(4, 3, 1)
    fused_stochastic_depth(x, lambda kept: norm(kept), 0.5, rows=NOTHING, empty="ones")
    torch.testing.assert_close(seen[0], torch.full((1, 3, 1), (1 + norm.eps) ** -0.5))
    assert (norm.running_mean, norm.running_var, norm.training) == (None, None, True)
    assert not norm.track_running_stats


def test_an_input_that_is_given_by_name():
    norm = nn.BatchNorm1d(3)
    fused_stochastic_depth(torch.randn(4, 3), lambda kept: norm(input=kept), 0.5, rows=NOTHING)
    assert norm.num_batches_tracked == 0


def test_a_cumulative_mean_is_that_of_the_batches_with_rows():
    norm = nn.BatchNorm1d(1, momentum=None)
    x = torch.tensor([[6.0], [7.0], [9.0], [9.0]])  # of mean 8 in the rows below
    fused_stochastic_depth(x, norm, 0.5, rows=NOTHING)
    fused_stochastic_depth(x, norm, 0.5, rows=KeptRows.from_index(torch.tensor([1, 2]), 4))
    assert norm.running_mean.tolist() == [8.0]


def test_only_the_empty_tensor_of_a_list():
    norm, x = nn.BatchNorm1d(3, momentum=None), torch.randn(4, 3)
    rows = [ROWS, NOTHING, ROWS]
    fused_stochastic_depth([x] * 3, lambda xs: [norm(each) for each in xs], 0.5, rows=rows)
    assert norm.num_batches_tracked == 2
    torch.testing.assert_close(norm.running_mean, x[ROWS.index].mean(0))


def test_a_lazy_norm_starts_from_nothing():
    norm = nn.LazyBatchNorm1d(momentum=None)
    fused_stochastic_depth(torch.randn(4, 3), norm, 0.5, rows=NOTHING)
    assert_equal(buffers(norm), buffers(nn.BatchNorm1d(3)))


def test_a_branch_that_raises():
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    before = buffers(norm)
    with pytest.raises(IndexError):
        fused_stochastic_depth(torch.randn(4, 3, 5), norm, 0.5, rows=NOTHING)
    assert_equal(buffers(norm), before)
    assert not torch.nn.modules.module._has_any_global_hook()


def test_a_backward_through_an_earlier_call():
    """The statistics are put back behind autograd's back."""
    norm, x = nn.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    first = fused_stochastic_depth(x, norm, 0.5, rows=ROWS)
    second = fused_stochastic_depth(first, norm, 0.5, rows=NOTHING)
    second.sum().backward()
    assert x.grad.isfinite().all()


def test_modules_that_other_threads_call():
    """Theirs count, whatever runs on no row here."""
    norm, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def branch(kept: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: other(torch.randn(4, 3)))
        thread.start()
        thread.join()
        return norm(kept)

    fused_stochastic_depth(torch.randn(4, 3), branch, 0.5, rows=NOTHING)
    assert (norm.num_batches_tracked, other.num_batches_tracked) == (0, 1)


@pytest.mark.filterwarnings("ignore")  # Dynamo's
@pytest.mark.parametrize("empty", ["run", "ones"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), NORMS["instance"][0]()], ids=["batch", "inst"])
def test_compiled(norm, empty):
    """The block, and a branch that was compiled on its own."""
    x = torch.randn(4, 3, 5)
    for part in ("block", "branch"):
        torch._dynamo.reset()
        own = copy.deepcopy(norm)
        branch = nn.Sequential(own)
        if part == "branch":
            branch = torch.compile(branch, backend="aot_eager")
        block = StochasticDepth(branch, 0.5, empty=empty)
        if part == "block":
            block = torch.compile(block, backend="aot_eager", fullgraph=True)
        twin = copy.deepcopy(norm)
        for rows in (ROWS, NOTHING, ROWS, NOTHING):
            block(x, rows=rows)
            if rows is ROWS:
                twin(x[ROWS.index])
        assert_equal(buffers(own), buffers(twin))


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_patched(name):
    """What runs for every sample counts: a stem, a shortcut; what is in a branch does not."""
    net = load("timm").create_model(name, num_classes=3)
    report = sdkernels.patch(net, drop_probs=0.5)
    with report.use([NOTHING] * len(report.drop_probs)):
        net(torch.randn(4, 3, 64, 64))
    blocks = tuple(f"{entry.name}." for entry in report.patched)
    counted = {True: 0, False: 0}
    for path, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            in_branch = path.startswith(blocks) and "downsample" not in path
            assert module.num_batches_tracked == (0 if in_branch else 1), path
            counted[in_branch] += 1
    assert min(counted.values()) > 0


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("empty", ["run", "ones"])
def test_a_part_that_is_compiled(empty):
    """Its graph calls what keeps the statistics, and has nothing to say about it."""
    norm = nn.BatchNorm1d(4).train()
    compiled = torch.compile(norm, backend="eager")
    x = torch.randn(6, 4)
    fused_stochastic_depth(x, compiled, 0.5, rows=KeptRows.from_index(torch.arange(3), 6))
    before = [buffer.clone() for buffer in norm.buffers()]
    nothing = KeptRows.from_index(torch.arange(0), 6)
    y = fused_stochastic_depth(x, compiled, 0.5, rows=nothing, empty=empty)
    assert torch.equal(y, x)
    assert all(map(torch.equal, before, norm.buffers()))
