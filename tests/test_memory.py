"""Memory follows the kept rows: what the backward saves, and no temporaries beside the output."""

import warnings
from collections.abc import Callable

import pytest
import torch
from backends import native
from layouts import LAYOUTS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from sdkernels import (
    KeptRows,
    compact_layer_norm,
    compact_rows,
    fused_stochastic_depth,
    scatter_add_rows,
)
from sdkernels.reference import naive_masking

BATCH, TOKENS, WIDTH = 8, 50, 96


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (3, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block, with stochastic depth by the given function."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.branches = nn.ModuleList([Attention(), mlp])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in self.branches])
        self.layer_scales = nn.ParameterList([torch.full((WIDTH,), 0.1) for _ in self.branches])
        self.to(dtype)

    def forward(self, x: Tensor, function: Callable[..., Tensor], rows: KeptRows) -> Tensor:
        for branch, norm, scale in zip(self.branches, self.norms, self.layer_scales, strict=True):
            x = function(x, branch, 0.5, norm=norm, layer_scale=scale, rows=rows)
        return x


def saved_tensors(function: Callable[[], Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """What the backward of function() keeps alive, each memory once, without the parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        pointer = x.untyped_storage().data_ptr()
        if pointer and pointer not in known:
            known.add(pointer)
            saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        assert function().requires_grad
    return saved


def total_bytes(tensors: list[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


@pytest.mark.parametrize("kept", [2, 4, 6], ids=lambda kept: f"keep_{kept / BATCH}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_activations_follow_the_kept_rows(dtype, kept):
    block = Block(dtype)
    rows = KeptRows.from_index(torch.arange(kept), BATCH, BATCH / kept)
    # The input is made by another layer: that it is kept for this one's backward counts.
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    parameters = list(block.parameters())
    naive = saved_tensors(lambda: block(x * 1.0, naive_masking, rows), parameters)
    fused = saved_tensors(lambda: block(x * 1.0, fused_stochastic_depth, rows), parameters)
    assert total_bytes(fused) <= (kept / BATCH + 0.05) * total_bytes(naive)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_tensor_of_the_whole_batch_is_saved(inplace):
    block = Block(torch.float32)
    rows = KeptRows.from_index(torch.arange(3), BATCH)
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)

    def function(*args: object, **options: object) -> Tensor:
        return fused_stochastic_depth(*args, **options, inplace=inplace)

    saved = saved_tensors(lambda: block(x * 1.0, function, rows), list(block.parameters()))
    assert len(saved) > 10
    row_bytes = TOKENS * WIDTH * 4
    for tensor in saved:
        # The rows themselves are the exception, one number for each sample.
        assert tensor.shape[:1] != (BATCH,) or tensor.dtype == torch.int64
        assert tensor.untyped_storage().nbytes() % (BATCH * row_bytes) != 0


def test_a_branch_without_memory_saves_none():
    """Without norm and layer_scale only the rows themselves are needed."""
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    rows = KeptRows.from_index(torch.arange(3), BATCH)

    def function() -> Tensor:
        return fused_stochastic_depth(x * 1.0, lambda kept: kept.neg(), 0.5, rows=rows)

    assert {tensor.dtype for tensor in saved_tensors(function, [])} == {torch.int64}


def test_nothing_is_saved_without_gradients():
    block = Block(torch.float32)
    rows = KeptRows.from_index(torch.arange(3), BATCH)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    seen: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(seen.append, lambda x: x):
        block(x, fused_stochastic_depth, rows)
    assert not seen


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that was allocated at one time during function(), over what there was before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Profiler clears events")  # PyTorch 2.11
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = function()
    del result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def output_bytes(*outputs: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in outputs)


# Each allows the rows to be walked in two levels, runs of elements and lines of them.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": LAYOUTS["channels_last"],
    "sequence_first": LAYOUTS["sequence_first"],
    "sliced_rows": lambda x: x[1::2],
    "sliced_channels": lambda x: x[:, 1:],
    "sliced_height": lambda x: x[:, :, 1:-1],
    "channels_last_sliced_channels": lambda x: LAYOUTS["channels_last"](x)[:, 1:],
    "channels_last_sliced_height": lambda x: LAYOUTS["channels_last"](x)[:, :, 1:],
}
# These as well, but not together with a layer scale of [C, 1, 1]: that is written out for one row.
MORE_VIEWS = VIEWS | {"sliced_width": lambda x: x[..., 1:-1]}
SMALL = 4096  # layer_scale and weights in float32, and the like


def make_x(view: str, dtype: torch.dtype) -> Tensor:
    return MORE_VIEWS[view](torch.randn(16, 24, 20, 30).to(dtype))


def every_second(x: Tensor) -> KeptRows:
    return KeptRows.from_index(torch.arange(0, len(x), 2), len(x), 2.0)


@native
@pytest.mark.parametrize("view", MORE_VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporaries(view, dtype):
    x = make_x(view, dtype)
    rows = every_second(x)
    out = compact_rows(x, rows)
    layer_scale = torch.rand(x.shape[1], 1, 1).to(dtype)
    assert peak_bytes(lambda: torch.empty(1000)) == 4000  # that this measures anything at all
    assert peak_bytes(lambda: compact_rows(x, rows)) == output_bytes(out)
    scattered = peak_bytes(lambda: scatter_add_rows(x, out, rows, layer_scale))
    row_of_layer_scale = 0 if view in VIEWS else 4 * x[0].numel()
    assert scattered <= output_bytes(x) + row_of_layer_scale + SMALL
    assert peak_bytes(lambda: scatter_add_rows(x, out, rows, inplace=True)) <= SMALL


@native
@pytest.mark.parametrize("layout", ["contiguous", "sequence_first", "every_second_row"])
def test_no_temporaries_in_the_norm(layout):
    """Without gradients nothing is kept for a backward."""
    x = LAYOUTS[layout](torch.randn(16, 30, 96))
    rows = every_second(x)
    weight, bias = torch.rand(96), torch.rand(96)
    statistics = 2 * 8 * 30 * 4
    bound = output_bytes(x[:8]) + statistics + SMALL
    assert peak_bytes(lambda: compact_layer_norm(x, rows, 96, weight, bias)) <= bound


@native
def test_backward_merges_the_gradients():
    """d_x of compact + scatter-add is one tensor: no zeros to scatter into, no sum of two."""
    x = torch.randn(16, 30, 96, requires_grad=True)
    rows, grad = every_second(x), torch.randn(16, 30, 96)
    for norm in (None, nn.LayerNorm(96)):
        y = fused_stochastic_depth(x, lambda kept: kept.view(kept.shape), 0.5, rows=rows, norm=norm)
        kept = output_bytes(x[:8])
        sums = 100_000 if norm else 0  # partial sums of the weight's gradient
        bound = output_bytes(x) + kept + sums + SMALL
        assert peak_bytes(lambda y=y: torch.autograd.grad(y, x, grad)) <= bound


@native
def test_backward_of_a_relu_merges_the_gradients():
    """The gradient that the ReLU passes becomes d_x: the kept rows are added to it in place."""
    x = torch.randn(16, 30, 96, requires_grad=True)
    y = fused_stochastic_depth(
        x, lambda kept: kept.view(kept.shape), 0.5, rows=every_second(x), activation="relu"
    )
    grad = torch.randn_like(x)
    bound = output_bytes(x) + output_bytes(x[:8]) + SMALL
    assert peak_bytes(lambda: torch.autograd.grad(y, x, grad)) <= bound


@native
@pytest.mark.parametrize("view", VIEWS)
def test_backward_of_layer_scale_needs_no_temporary(view):
    grad = make_x(view, torch.float32)
    rows = every_second(grad)
    out = compact_rows(grad, rows)
    layer_scale = torch.rand(grad.shape[1], 1, 1)
    peak = peak_bytes(
        lambda: torch.ops.sdkernels.scatter_add_rows_backward(
            grad, out, rows.index, layer_scale, None, 2.0, torch.float32, [True, False]
        )
    )
    # Partial sums stay below an eighth of the data.
    assert peak <= output_bytes(out) * 9 / 8 + SMALL
