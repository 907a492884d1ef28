"""StochasticDepth: the op as a module, with the state and the modes of one."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from sdkernels import DepthPlan, KeptRows, StochasticDepth, fused_stochastic_depth

ROWS = KeptRows.from_index(torch.tensor([0, 2, 3]), 8, scale=2.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make(p=0.5, norm=True, layer_scale=True, **options):
    torch.manual_seed(0)
    return StochasticDepth(
        nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)),
        p,
        norm=nn.LayerNorm(4) if norm else None,
        layer_scale=nn.Parameter(torch.tensor([0.5, 1.0, 2.0, -1.0])) if layer_scale else None,
        **options,
    )


def inputs(batch=8):
    return torch.randn(batch, 4, generator=seeded(1))


def plain(module, x, residual=None):
    out = module.branch(x if module.norm is None else module.norm(x))
    if module.layer_scale is not None:
        out = out * module.layer_scale
    return (x if residual is None else residual) + out


# State

BRANCH = ["branch.0.weight", "branch.0.bias", "branch.2.weight", "branch.2.bias"]
NORM = ["norm.weight", "norm.bias"]


@pytest.mark.parametrize("layer_scale", [True, False], ids=["layer_scale", ""])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", ""])
def test_parameters_and_state_are_those_of_its_parts(norm, layer_scale):
    module = make(norm=norm, layer_scale=layer_scale)
    expected = {*BRANCH, *(NORM if norm else []), *(["layer_scale"] if layer_scale else [])}
    assert set(dict(module.named_parameters())) == expected
    assert set(module.state_dict()) == expected
    assert len(list(module.parameters())) == len(expected)
    assert list(module.buffers()) == []


@pytest.mark.parametrize("norm", [True, False], ids=["norm", ""])
def test_every_parameter_gets_its_gradient(norm):
    module, x = make(norm=norm), inputs()
    fused, reference = module, copy.deepcopy(module)
    fused(x, rows=ROWS).square().sum().backward()
    kept = (ROWS.slot >= 0)[:, None]
    y = x + kept * ROWS.scale * (plain(reference, x) - x)
    y.square().sum().backward()
    for (name, a), b in zip(fused.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_layer_scale_tensor_becomes_a_buffer():
    gamma = torch.tensor([1.0, 2.0, 3.0, 4.0])
    module = StochasticDepth(nn.Identity(), 0.5, layer_scale=gamma)
    assert set(module.state_dict()) == {"layer_scale"}
    assert list(module.parameters()) == []
    assert [name for name, _ in module.named_buffers()] == ["layer_scale"]
    x = inputs()
    assert torch.equal(module(x, rows=ROWS)[2], x[2] + 2 * gamma * x[2])
    assert torch.equal(module(x, rows=ROWS)[1], x[1])


def test_state_dict_round_trip():
    module, other, file = make(), make(), io.BytesIO()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(inputs()), module.eval()(inputs()))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies(duplicate):
    module = make(0.25, sampler="fixed", rescale="eval", empty="skip")
    module(inputs())
    other = duplicate(module)
    assert repr(other) == repr(module)
    assert other.layer_scale is not module.layer_scale
    x = inputs()
    for training in (True, False):
        a, b = (each.train(training)(x, generator=seeded(2)) for each in (module, other))
        assert torch.equal(a, b)


def test_repr():
    module = make(0.25, mode="row", sampler="fixed", rescale="eval", empty="skip", inplace=True)
    assert module.extra_repr() == (
        "p=0.25, mode='row', sampler='fixed', rescale='eval', empty='skip', inplace=True"
    )
    assert repr(module).startswith("StochasticDepth(\n  p=0.25, ")
    assert "(norm): LayerNorm((4,)" in repr(module)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_converts_every_part(dtype):
    buffer = StochasticDepth(nn.Identity(), 0.5, layer_scale=torch.ones(4)).to(dtype)
    assert buffer.layer_scale.dtype == dtype
    module = make().to(dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    y = module(inputs().to(dtype), rows=ROWS)
    y.sum().backward()
    assert y.dtype == dtype
    assert module.layer_scale.grad.dtype == dtype


# Modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layer_scale", [True, False], ids=["layer_scale", ""])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", ""])
def test_evaluation_is_the_plain_expression_bit_for_bit(norm, layer_scale, dtype):
    module = make(norm=norm, layer_scale=layer_scale).to(dtype).eval()
    x, residual = inputs().to(dtype), (inputs() + 1).to(dtype)
    assert torch.equal(module(x), plain(module, x))
    assert torch.equal(module(x, residual=residual), plain(module, x, residual))
    assert torch.equal(module(x, rows=ROWS), plain(module, x))


def test_evaluation_under_the_papers_rule():
    module, x = make(0.25, rescale="eval").eval(), inputs()
    assert torch.equal(module(x), x + module.branch(module.norm(x)) * module.layer_scale * 0.75)


def test_training_follows_train_and_eval():
    module, x = make(0.9), inputs()
    seen = []
    module.branch.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    for training in (True, False, True):
        module.train(training)
        module(x, rows=ROWS)
    assert seen == [3, 8, 3]


@pytest.mark.parametrize("sampler", ["bernoulli", "fixed"])
@pytest.mark.parametrize("rescale", ["train", "eval", "none"])
def test_training_is_the_op(rescale, sampler):
    module, x = make(0.4, rescale=rescale, sampler=sampler), inputs()
    y = fused_stochastic_depth(
        x,
        module.branch,
        0.4,
        norm=module.norm,
        layer_scale=module.layer_scale,
        rescale=rescale,
        sampler=sampler,
        generator=seeded(3),
    )
    assert torch.equal(module(x, generator=seeded(3)), y)
    torch.manual_seed(3)
    assert torch.equal(module(x), y)


def test_p_may_change_between_calls():
    module, x = make(0.5), inputs()
    module.p = 0.0
    assert torch.equal(module(x), plain(module, x))
    module.p = 1
    assert torch.equal(module(x), x)
    module.p = 0.75
    assert "p=0.75" in repr(module)
    module.p = 2.0
    with pytest.raises(ValueError, match=r"^p: .*got 2\.0"):
        module(x)


@pytest.mark.parametrize("name", ["mode", "sampler", "rescale", "empty"])
def test_settings_are_checked_after_a_change_too(name):
    module = make()
    setattr(module, name, "other")
    with pytest.raises(ValueError, match=f"^{name}: expected one of .*got 'other'"):
        module(inputs())


def test_empty_skip():
    module, x = make(1.0, empty="skip"), inputs()
    module.branch.register_forward_hook(lambda *_: pytest.fail("the branch was called"))
    assert torch.equal(module(x), x)


def test_inplace():
    module, x = make(inplace=True), inputs()
    expected = make()(x, rows=ROWS)
    for training in (True, False):
        module.train(training)
        target = x.clone()
        y = module(target, rows=ROWS)
        assert y.data_ptr() == target.data_ptr()
        assert torch.equal(y, expected if training else plain(module, x))


# Arguments


class Conditioned(nn.Module):
    def forward(self, x, condition):
        return x * condition


def test_further_arguments_go_to_the_branch():
    module, x, condition = StochasticDepth(Conditioned(), 0.5), inputs(), inputs() + 1
    expected = x + (ROWS.slot >= 0)[:, None] * ROWS.scale * x * condition
    torch.testing.assert_close(module(x, condition, rows=ROWS), expected)
    assert torch.equal(module.eval()(x, condition), x + x * condition)


def test_residual():
    module, x, residual = make(), inputs(), inputs() + 1
    y = module(x, rows=ROWS, residual=residual)
    assert torch.equal(y[1], residual[1])
    torch.testing.assert_close(y - residual, module(x, rows=ROWS) - x)


def test_branch_may_be_a_function():
    module, x = StochasticDepth(torch.neg, 0.5), inputs()
    assert torch.equal(module(x, rows=ROWS)[[0, 1]], torch.stack([-x[0], x[1]]))
    assert list(module.state_dict()) == []


def test_blocks_share_a_plan():
    blocks = nn.ModuleList([make(), make()])
    plan = DepthPlan.sample(8, [0.5, 0.5], sampler="fixed", generator=seeded(4))
    x = inputs()
    for block, rows in zip(blocks, plan, strict=True):
        y = block(x, rows=rows)
        assert torch.equal((y != x).any(1), rows.slot >= 0)
        x = y


class Crops(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, xs):
        return [self.linear(x) for x in xs]


def test_list_of_tensors():
    module = StochasticDepth(Crops(), 0.5, norm=nn.LayerNorm(4), layer_scale=torch.full((4,), 0.5))
    alone = StochasticDepth(
        module.branch.linear, 0.5, norm=module.norm, layer_scale=torch.ones(4) / 2
    )
    xs = [inputs(8), inputs(3)]
    rows = [ROWS, KeptRows.from_index(torch.tensor([1]), 3)]
    for training in (True, False):
        ys = module.train(training)(xs, rows=rows)
        alone.train(training)
        expected = [alone(x, rows=each) for x, each in zip(xs, rows, strict=True)]
        assert isinstance(ys, list)
        for y, other in zip(ys, expected, strict=True):
            torch.testing.assert_close(y, other)
