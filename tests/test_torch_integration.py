"""The op inside PyTorch: checkpointing, saved tensor hooks, autocast, transforms, fake tensors."""

from collections.abc import Callable

import pytest
import torch
from comparison import assert_same_bits
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint

from sdkernels import (
    DepthPlan,
    KeptRows,
    StochasticDepth,
    compact_layer_norm,
    compact_rms_norm,
    compact_rows,
    fused_stochastic_depth,
    scatter_add_rows,
)
from sdkernels.reference import naive_masking

ROWS = KeptRows.from_index(torch.tensor([0, 2, 3]), batch=8, scale=2.0)


def make_block(**options: object) -> StochasticDepth:
    torch.manual_seed(1)
    return StochasticDepth(
        nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)),
        0.5,
        norm=nn.LayerNorm(6),
        layer_scale=nn.Parameter(torch.rand(6)),
        **options,
    )


def gradients(y: Tensor, x: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))


# Checkpointing


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("sampler", ["bernoulli", "fixed"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, sampler, inplace):
    """The recomputation draws the rows of the forward again, from the restored generator."""
    blocks = nn.ModuleList([make_block(sampler=sampler, inplace=inplace) for _ in range(3)])
    x = torch.randn(16, 5, 6, requires_grad=True)
    seen: list[list[int]] = []
    for block in blocks:
        block.branch.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))

    def run(through: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(3)
        stream = x.clone()
        for block in blocks:
            stream = through(lambda t, block=block: block(t * 1.0), stream)
        loss = stream.square().sum()
        loss.backward()
        found = [p.grad for p in (x, *blocks.parameters())]
        for p in (x, *blocks.parameters()):
            p.grad = None
        return stream.detach(), found

    expected = run(lambda function, stream: function(stream))
    rows, seen[:] = list(seen), []
    assert len(rows) == 3
    actual = run(lambda function, stream: checkpoint(function, stream, use_reentrant=use_reentrant))
    assert seen[:3] == rows  # the forward
    assert seen[3:] == rows[::-1]  # and again, last block first
    assert_same_bits(actual[0], expected[0])
    for a, e in zip(actual[1], expected[1], strict=True):
        assert_same_bits(a, e)


# Hooks on saved tensors


def test_saved_tensor_hooks():
    """What is packed away and brought back, even on another device, is all that is needed."""
    block, x = make_block(), torch.randn(8, 6, requires_grad=True)
    packed: list[object] = []

    def pack(tensor: Tensor) -> object:
        packed.append(tensor.clone())
        return len(packed) - 1

    expected = gradients(block(x, rows=ROWS), x, block)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        y = block(x, rows=ROWS)
    actual = gradients(y, x, block)
    assert packed
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    with torch.autograd.graph.save_on_cpu():
        y = block(x, rows=ROWS)
    for a, e in zip(gradients(y, x, block), expected, strict=True):
        assert_same_bits(a, e)


# Autocast


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_norm_writes_the_autocast_dtype(dtype):
    x, weight = torch.randn(8, 6), torch.rand(6)
    wide = x.double()
    with torch.autocast("cpu", dtype=dtype):
        layer = compact_layer_norm(x, ROWS, 6, weight)
        assert layer.dtype == compact_rms_norm(x, ROWS, 6, weight).dtype == dtype
        assert compact_rows(x, ROWS).dtype == torch.float32
        assert compact_layer_norm(wide, ROWS, 6, weight.double()).dtype == torch.float64
    expected = compact_layer_norm(x, ROWS, 6, weight)
    assert expected.dtype == torch.float32
    assert torch.equal(layer, expected.to(dtype))


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype, stream):
    """As naive masking under autocast, and both as close to float64."""
    block = make_block()
    x = torch.randn(8, 6, dtype=stream, requires_grad=True)
    seen: list[torch.dtype] = []
    block.branch.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    options = {"norm": block.norm, "layer_scale": block.layer_scale, "rows": ROWS}
    with torch.autocast("cpu", dtype=dtype):
        actual = block(x, rows=ROWS)
        assert seen == [dtype]
        expected = naive_masking(x, block.branch, 0.5, **options)
    if stream == torch.float32:
        assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0.05, atol=0.05)
    for a, e in zip(gradients(actual, x, block), gradients(expected, x, block), strict=True):
        assert a.dtype == e.dtype
        largest = e.abs().max().item()
        torch.testing.assert_close(a, e, rtol=0.1, atol=0.05 * largest)


# torch.func, batched gradients


@pytest.mark.parametrize("function", [
    lambda x: compact_rows(x, ROWS),
    lambda x: compact_layer_norm(x, ROWS, 6),
    lambda x: scatter_add_rows(x, torch.ones(3, 6), ROWS),
    lambda x: fused_stochastic_depth(x, torch.sin, 0.5, rows=ROWS),
    lambda x: fused_stochastic_depth(x, torch.sin, 0.5),
    lambda x: fused_stochastic_depth(x, torch.sin, 0.5, norm=nn.LayerNorm(6)),
])  # fmt: skip
def test_func_transforms_are_refused(function):
    x = torch.randn(8, 6)
    transforms = (
        lambda: torch.func.grad(lambda t: function(t).sum())(x),
        lambda: torch.func.vjp(function, x),
        lambda: torch.func.vmap(function)(x[None]),
        lambda: torch.func.jacrev(function)(x),
    )
    for transform in transforms:
        with pytest.raises(NotImplementedError, match=r"torch\.func transforms .* evaluation mode"):
            transform()
    # A transform that was refused, or that has ended well, leaves no trace.
    torch.func.grad(lambda t: t.sin().sum())(x)
    function(x)


def test_func_transforms_in_evaluation():
    block = make_block().eval()
    x = torch.randn(8, 6)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(block(leaf).sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda t: block(t).sum())(x), expected)
    parameters = dict(block.named_parameters())
    y = torch.func.functional_call(block, parameters, (x,))
    assert_same_bits(y, block(x))


def test_functional_call_in_training():
    block, x = make_block(), torch.randn(8, 6)
    other = {name: torch.randn_like(p) for name, p in block.named_parameters()}
    y = torch.func.functional_call(block, other, (x,), {"rows": ROWS})
    assert not torch.equal(y, block(x, rows=ROWS))
    block.load_state_dict(other)
    assert_same_bits(y, block(x, rows=ROWS))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap without a batching rule
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_batched_gradients(norm, activation):
    """The backward under vmap, as torch.autograd.functional.jacobian(vectorize=True) runs it."""
    block, x = make_block(), torch.randn(8, 6, requires_grad=True)
    block.activation = activation
    if not norm:
        block.norm = None
    y = block(x, rows=ROWS)
    batch = torch.randn(3, 8, 6)
    leaves = [x, *block.parameters()]
    expected = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in batch]
    actual = torch.autograd.grad(y, leaves, batch, is_grads_batched=True)
    for i, gradient in enumerate(actual):
        torch.testing.assert_close(gradient, torch.stack([each[i] for each in expected]))


# Tensors without data


def test_fake_tensors():
    block, x = make_block(), torch.randn(8, 6, requires_grad=True)
    y = block(x, rows=ROWS)
    expected = gradients(y, x, block)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        index, slot = mode.from_tensor(ROWS.index), mode.from_tensor(ROWS.slot)
        fake_x = mode.from_tensor(x)
        fake_y = block(fake_x, rows=KeptRows(index, slot, 2.0))
        fakes = gradients(fake_y, fake_x, block)
    for fake, real in zip([fake_y, *fakes], [y, *expected], strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("sampler", ["bernoulli", "fixed", "rounded"])
@pytest.mark.parametrize("shapes", [None, ShapeEnv], ids=["", "symbolic"])
def test_fake_tensors_with_rows_that_are_drawn(sampler, shapes):
    """As many rows as real tensors would have, from the same seed."""
    kept = []

    def run(x):
        block = make_block(sampler=sampler)
        block.branch.register_forward_pre_hook(lambda _, args: kept.append(args[0].shape[0]))
        torch.manual_seed(2)
        y = block(x)
        return [y, *gradients(y, x, block)]

    x = torch.randn(8, 6, requires_grad=True)
    expected, after = run(x), torch.get_rng_state()
    with FakeTensorMode(shape_env=shapes and shapes()) as mode:
        fakes = run(mode.from_tensor(x))
    assert kept[0] == kept[1]
    assert torch.equal(torch.get_rng_state(), after)
    for fake, real in zip(fakes, expected, strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert not isinstance(run(x)[0], FakeTensor)  # the mode leaves nothing behind


@pytest.mark.parametrize("sampler", ["bernoulli", "fixed", "rounded", "balanced"])
def test_plans_of_fake_tensors(sampler):
    given = {"batch": [8, 5], "drop_probs": [0.5, 0.3], "sampler": sampler}

    def counts():
        torch.manual_seed(1)
        plans = [DepthPlan.sample(**given), DepthPlan.for_step(1, 2, **given)]
        return plans, [
            each.k for plan in plans for _ in range(2) for rows in plan.resample_() for each in rows
        ]

    with FakeTensorMode():
        plans, found = counts()
        xs = [torch.randn(batch, 6) for batch in (8, 5)]
        ys = fused_stochastic_depth(xs, lambda kept: kept, 0.5, rows=plans[0][1])
        assert [y.shape for y in ys] == [x.shape for x in xs]
    assert found == counts()[1]


@pytest.mark.parametrize("sampler", ["bernoulli", "fixed", "rounded", "balanced"])
def test_a_plan_stays_what_it_was_made_as(sampler):
    """Whatever mode it is redrawn under; a draw that fails takes no step."""
    given = {"batch": 32, "drop_probs": [0.5, 0.3], "sampler": sampler}
    plan = DepthPlan.for_step(1, 2, **given)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = DepthPlan.for_step(1, 2, **given)
        plan.resample_()
    expected = DepthPlan.for_step(1, 3, **given)
    for kept, wanted in zip(plan, expected, strict=True):
        assert torch.equal(kept.index, wanted.index)
        assert torch.equal(kept.slot, wanted.slot)
    with pytest.raises(RuntimeError, match="make_fx"):
        make_fx(lambda x: x + plan.resample_()[0].k)(torch.ones(1))
    plan.resample_()
    assert torch.equal(plan[0].slot, DepthPlan.for_step(1, 4, **given)[0].slot)
    assert [each.k for each in fake.resample_()] == [each.k for each in expected]


def test_meta_tensors():
    block = make_block().to("meta")
    y = block(torch.empty(8, 6, device="meta"))
    assert (y.shape, y.device.type) == ((8, 6), "meta")
    y.sum().backward()
    assert block.norm.weight.grad.shape == (6,)


# Export


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx_export_in_evaluation():
    """Standard operators only."""
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(
        make_block().eval(), (torch.randn(8, 6),), dynamo=True, verbose=False
    )
    operators = {node.op_type for node in program.model.graph}
    assert {node.domain for node in program.model.graph} == {""}
    assert operators == {"LayerNormalization", "Gemm", "Gelu", "Mul", "Add"}
    assert not program.model.functions


@pytest.mark.parametrize("strict", [False, True])
def test_export_in_evaluation(strict):
    block, x = make_block().eval(), torch.randn(8, 6)
    program = torch.export.export(block, (x,), strict=strict)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "sdkernels" in name]
    torch.testing.assert_close(program.module()(x), block(x))
