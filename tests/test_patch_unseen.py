"""patch() by default: a sum of a block's own is written into where nobody can see it, and only
there."""

import ast
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparison import assert_same_bits
from patched_models import freeze_norms, make_rows
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from zoo import NETS

import sdkernels
from sdkernels import KeptRows
from sdkernels.models import adding
from sdkernels.models.adding import Add, BlockState, Options
from sdkernels.models.by_hand import BY_HAND
from sdkernels.models.parts import Law
from sdkernels.models.proof import TRUSTED
from sdkernels.models.rewriting import Branch, Rewriting
from sdkernels.models.rewriting.sums import hides_sums

ROWS = [
    KeptRows.from_index(torch.tensor(index), batch=4, scale=2.0) for index in ([0, 2], [1, 2], [3])
]

SCALE = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


@pytest.fixture
def run(monkeypatch):
    """Runs a forward as a patched block would; what it returns, and which sums were written to."""
    op = adding.fused_stochastic_depth
    written: list[bool] = []

    def watch(x: Any, *args: Any, **options: Any) -> Any:
        stream = x if options["residual"] is None else options["residual"]
        total = op(x, *args, **options)
        written.append(total is stream)
        return total

    monkeypatch.setattr(adding, "fused_stochastic_depth", watch)

    def run(forward, x, laws=None, rows=ROWS, **options):
        written.clear()
        branches = (Branch(None, ()),) * 3
        state = BlockState(Options(**options), branches, [None] * 3)
        state.rows = list(rows)
        block = SimpleNamespace(_sdkernels=state)
        laws = laws or [Law(0.5, "row", True, True)] * 3
        rewriting = Rewriting(nn.Module, forward, branches, hides_sums=True)
        return forward(Add(block, laws, rewriting, (TRUSTED,)), x), list(written)

    return run


def stream(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, generator=generator, dtype=dtype).requires_grad_()


# Forwards whose sums nobody can see. Each returns a list of tensors.


def chain(add, x):
    x = add(0, x, torch.sin)
    x = add(1, x, torch.exp)
    return [add(2, x, torch.sin)]


def with_keywords(add, x):
    x = add(0, x, torch.sin, layer_scale=SCALE)
    return [add(1, x, torch.exp, layer_scale=SCALE)]


def nested(add, x):
    return [add(1, add(0, x, torch.sin), torch.exp)]


def side_by_side(add, x):
    inputs = x
    x = add(0, inputs, torch.sin, residual=x)
    return [add(1, inputs, torch.exp, residual=x)]


def read(add, x):
    """What has been computed from a sum, and does not need it any more, does not mind."""
    x = add(0, x, torch.sin)
    total = x.detach().sum()
    return [add(1, x, torch.exp), total]


UNSEEN = {
    chain: [False, True, True],
    **{forward: [False, True] for forward in (with_keywords, nested, side_by_side, read)},
}


def gradients(found, x):
    total = sum(each.square().sum() for each in found if each.requires_grad)
    return torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize("forward", UNSEEN)
def test_written_where_nobody_sees_it(forward, run):
    x = stream()
    found, written = run(forward, x)
    assert written == UNSEEN[forward]
    expected, before = run(forward, x, inplace=False)
    assert not any(before)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a.detach(), b.detach())
    assert_same_bits(gradients(found, x), gradients(expected, x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode, run):
    with mode():
        (y,), written = run(chain, stream())
        (expected,), _ = run(chain, stream(), inplace=False)
    assert written == [False, True, True]
    assert_same_bits(y, expected)


def test_double_backward(run):
    second = []
    for options in ({}, {"inplace": False}):
        x = stream()
        (y,), _ = run(chain, x, **options)
        (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(d_x.square().sum(), x)[0])
    torch.testing.assert_close(*second)


def test_result_of_a_wider_dtype(run):
    """In place it would be rounded to the sum's."""
    scale = torch.ones(3, dtype=torch.float32)

    def widened(add, x):
        return [add(1, add(0, x, torch.sin), torch.exp, layer_scale=scale)]

    x = stream(torch.bfloat16)
    (y,), written = run(widened, x)
    assert written == [False, False]
    assert y.dtype == torch.float32
    (expected,), _ = run(widened, x, inplace=False)
    assert_same_bits(y.detach(), expected.detach())
    assert_same_bits(gradients([y], x), gradients([expected], x))
    (y,), written = run(widened, stream())
    assert written == [False, True]


def test_branch_on_every_row(run):
    """It may save the sum itself for its backward."""
    x = stream()
    every = KeptRows.from_index(torch.arange(4), batch=4, scale=1.0)  # no compaction at all
    (y,), written = run(chain, x, rows=[ROWS[0], every, ROWS[2]])
    assert written == [False, False, True]
    gradients([y], x)
    (y,), written = run(chain, x, min_saving=0.6)
    assert written == [False, False, True]  # 2, 2 and 1 of 4 rows are kept
    gradients([y], x)


def test_evaluation(run):
    """The paper's rule runs the op there too, densely."""
    x = stream()
    laws = [Law(0.5, "row", True, False)] * 3
    (y,), written = run(chain, x, laws, rescale="eval")
    assert not any(written)
    gradients([y], x)


def test_activation_stays_in_the_pass_that_adds(run):
    def forward(add, x):
        return [add(1, add(0, x, torch.sin), torch.exp, activation=nn.ReLU())]

    assert run(forward, stream())[1] == [False, False]


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Sigmoid])
@pytest.mark.parametrize("first", ["some rows", "every row"])
def test_what_an_activation_returns_is_not_written_into(first, kind, run):
    """It may have saved that for its backward, and its hooks have got it."""
    every = KeptRows.from_index(torch.arange(4), batch=4, scale=1.0)
    rows = [every if first == "every row" else ROWS[0], *ROWS[1:]]
    activation, seen = kind(), []
    activation.register_forward_hook(lambda module, args, y: seen.append((y, y.detach().clone())))

    def forward(add, x):
        return [add(1, add(0, x, torch.sin, activation=activation), torch.cos)]

    x = stream()
    (y,), written = run(forward, x, rows=rows)
    assert written == [False, False]
    for tensor, before in seen:
        assert_same_bits(tensor.detach(), before)
    (other,), _ = run(forward, x, rows=rows, inplace=False)
    expected = gradients([other], x)
    assert_same_bits(gradients([y], x), expected)
    activation._forward_hooks.clear()  # then a ReLU is part of the op
    (y,), written = run(forward, x, rows=rows)
    assert written == [False, False]
    assert_same_bits(gradients([y], x), expected)


def test_subclass():
    class Own(Tensor):
        pass

    assert adding._permitted(stream()) is None
    assert adding._permitted(stream().detach().as_subclass(Own)) is False
    assert adding._permitted(nn.Parameter(stream().detach())) is False


def test_list(run):
    def forward(add, x):
        return add(1, add(0, [x, x + 1], torch.exp), torch.exp)

    x = stream()
    pairs = [[each, each] for each in ROWS]
    found, written = run(forward, x, rows=pairs)
    assert written == [False, False, True, True]
    expected, _ = run(forward, x, rows=pairs, inplace=False)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a.detach(), b.detach())
    assert_same_bits(gradients(found, x), gradients(expected, x))


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class LookingAtFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Looking, LookingAtFunctions])
def test_mode(mode, run):
    """It may keep what it sees."""
    with mode():
        assert run(chain, stream())[1] == [False, False, False]


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing(policy, run):
    """It gives results of the forward out of a cache, in which they must be as they were."""

    def choose(ctx, op, *args, **kwargs):
        return policy if "sdkernels" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    found = []
    for options in ({}, {"inplace": False}):
        x = stream()
        y = checkpoint(
            lambda x, options=options: run(chain, x, **options)[0][0],
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(choose),
        )
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert_same_bits(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, run):
    found = []
    for options in ({}, {"inplace": False}):
        x = stream()
        y = checkpoint(
            lambda x, options=options: run(chain, x, **options)[0][0], x, use_reentrant=reentrant
        )
        y.square().sum().backward()
        found.append(x.grad)
    assert_same_bits(*found)


@pytest.mark.parametrize("kind", ["pre", "forward", "global"])
def test_hooks_on_what_a_branch_is_made_of(kind):
    """They see kept rows, which stay as they were, and may keep them."""
    net = NETS["timm-vit"]
    model: Any = net.model().train()
    freeze_norms(model)
    found = []
    for options in ({}, {"inplace": False}):
        report = sdkernels.patch(model, drop_probs=net.drop_probs, **options)
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(module, inputs, *output, kept=kept):
            if isinstance(inputs[0], Tensor):
                kept.append((inputs[0], inputs[0].detach().clone()))

        block = report.patched[-1].block
        if kind == "global":
            handles = [nn.modules.module.register_module_forward_pre_hook(keep)]
        else:
            register = "register_forward_pre_hook" if kind == "pre" else "register_forward_hook"
            # Not the block itself; with one on a drop path it runs as before it was patched.
            watched = [m for n, m in block.named_modules() if n and "drop_path" not in n]
            handles = [getattr(module, register)(keep) for module in watched]
        try:
            torch.manual_seed(5)  # dropout draws from it
            with report.use(make_rows(len(report.drop_probs))):
                model(net.inputs(4)).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        assert kept
        for tensor, copy in kept:
            assert_same_bits(tensor.detach(), copy)
        found.append([copy for _, copy in kept])
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


# Which forwards hand their sums to the next addition and to nothing else

HIDING = {
    "chain": """
        x = add(0, x, self.f)
        x = add(1, x, self.f)
        return add(2, x, self.f)""",
    "nested": "return add(1, add(0, x, self.f), self.f)",
    "in several statements": """
        y = add(0, x, self.f)
        total = y
        B, N = total.shape[:2]
        def branch(y): return y.view(B, N)
        z = add(1, total, branch, norm=self.norm)
        return z, z + 1""",
    "in another shape": """
        x = add(0, x, self.f)
        x = x.reshape(B, -1).contiguous()
        x = add(1, x, self.f)
        return x.reshape(B, H, W)""",
    "side by side": """
        y = add(0, x, self.f, residual=x)
        return add(1, x, self.f, residual=y)""",
    "read after the last": """
        x = add(0, x, self.f)
        return x, x.mean()""",
}
SHOWING = {
    "in a list": """
        x = add(0, x, self.f)
        kept.append(x)
        return add(1, x, self.f)""",
    "handed on": """
        x = add(0, x, self.f)
        y = add(1, x, self.f)
        return x, y""",
    "by another name": """
        x = add(0, x, self.f)
        shortcut = x
        y = add(1, x, self.f)
        return shortcut + y""",
    "a view": """
        x = add(0, x, self.f)
        first = x[:, 0]
        x = add(1, x, self.f)
        return x, first""",
    "input of two": """
        x = add(0, x, self.f)
        y = add(1, x, self.f)
        return add(2, x, self.f, residual=y)""",
    "in a closure": """
        x = add(0, x, self.f)
        def branch(y): return y + x
        return add(1, x, branch)""",
    "an argument": """
        x = add(0, x, self.f)
        return add(1, x, self.f, args={"y": x})""",
    "through a module": """
        x = self.norm(add(0, x, self.f))
        return add(1, x, self.f)""",
    "in a tuple": """
        x, y = add(0, x, self.f), 1
        return add(1, x, self.f)""",
    "in a loop": """
        for f in self.f:
            x = add(0, x, f)
            kept.append(x)
        return add(1, x, f)""",
    "under an if": """
        if x.requires_grad:
            x = add(0, x, self.f)
        return add(1, x, self.f)""",
}


@pytest.mark.parametrize("name", [*HIDING, *SHOWING])
def test_whether_sums_are_seen(name):
    text = textwrap.dedent({**HIDING, **SHOWING}[name]).strip()
    (function,) = ast.parse("def f(self, add, x):\n" + textwrap.indent(text, "    ")).body
    assert isinstance(function, ast.FunctionDef)
    assert hides_sums(function.body, "add") is (name in HIDING)


def test_a_block_that_shows_its_sum():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g, self.drop_path = nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()

        def forward(self, x, features):
            x = x + self.drop_path(self.f(x))
            features.append(x)
            x = x + self.drop_path(self.g(x))
            return x

    report = sdkernels.patch(Block().train(), drop_probs=0.5, check="never")
    block: Any = report.patched[0].block
    assert not block._sdkernels.rewriting.hides_sums
    features: list[Tensor] = []
    rows = KeptRows.from_index(torch.tensor([0]), batch=2, scale=2.0)
    with report.use([rows, rows]):
        y = block(torch.zeros(2, 4), features)
    assert y is not features[0]
    assert not torch.equal(y[0], features[0][0])


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_blocks_of_libraries_show_none(net):
    """All of them with several branches gain the pass."""
    for entry in sdkernels.patch(net.model(), drop_probs=net.drop_probs).patched:
        rewriting = entry.block._sdkernels.rewriting
        assert rewriting.hides_sums or len(rewriting.branches) == 1, rewriting.source


def test_forwards_by_hand_are_read():
    things = BY_HAND["timm.models.vision_transformer:ParallelThingsBlock"]
    assert things.hides_sums
