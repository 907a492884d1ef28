"""Forwards of anybody's blocks: what is cut out, what is refused, and what the proof catches."""

import copy
import importlib
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import compilation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sdkernels
from sdkernels import KeptRows
from sdkernels.models import PatchReport
from sdkernels.models.comparing import verified
from sdkernels.models.rewriting import rewriter, slicing

WIDTH = 6


class Drop(nn.Module):
    """A drop path under a name that says nothing."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1 - self.rate
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * mask / keep


class Block(nn.Module):
    """Everything that the forwards below need."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.drop_path = Drop()
        self.scale: Tensor | None = None
        self.use_scale = True
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.batch_norm = nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU()


def functional_drop(x: Tensor, p: float, training: bool) -> Tensor:
    if p == 0.0 or not training:
        return x
    keep = 1 - p
    return x * torch.rand(x.shape[0], *[1] * (x.dim() - 1)).add(keep).floor() / keep


def drop_path(x: Tensor, p: float = 0.0, training: bool = False) -> Tensor:
    return functional_drop(x, p, training)


class MaskedDrop(nn.Module):
    """In the place of a drop path: given rows, call after call."""

    def __init__(self, rows: list[KeptRows]) -> None:
        super().__init__()
        self.rows = list(rows)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows.pop(0)
        return x * ((rows.slot >= 0) * rows.scale).to(x).view(-1, *[1] * (x.dim() - 1))


def rows_for(count: int, batch: int) -> list[KeptRows]:
    generator = torch.Generator().manual_seed(4)
    masks = [torch.rand(batch, generator=generator) < 0.5 for _ in range(count)]
    return [KeptRows.from_mask(mask, 1.5) for mask in masks]


def step(run: Callable[[], Any], block: nn.Module, x: Tensor) -> list[Tensor]:
    y = run()
    y = y if isinstance(y, Tensor) else y[0]
    wanted = [x, *block.parameters()]
    gradients = torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
    return [y.detach(), *(g if g is not None else torch.zeros(()) for g in gradients)]


def assert_compacts(
    block: nn.Module, x: Tensor, *args: Any, drop: str = "drop_path"
) -> PatchReport:
    """The block is patched, proven, and computes what masks of the same rows give."""
    block = block.double()
    x = x.double().requires_grad_()
    original = copy.deepcopy(block)
    report = sdkernels.patch(block)
    assert len(report.patched) == 1, report
    plan = rows_for(len(report.drop_probs), len(x))
    setattr(original, drop, MaskedDrop(plan))
    with report.use(plan):
        got = step(lambda: block(x, *args), block, x)
    expected = step(lambda: original(x, *args), original, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b if b.dim() or not a.dim() else torch.zeros_like(a))
    return report


def tokens(batch: int = 4) -> Tensor:
    return torch.randn(batch, 5, WIDTH)


# What research code writes


class TwoHeads(Block):
    """Something for each of two heads, which is no sample's where there are two of them."""

    def forward(self, x, bias):
        return x + self.drop_path(self.f(x) * bias[0] + bias[1])


class Rotated(Block):
    """Positions that both branches get are nobody's, also where there are as many as samples."""

    def rotation(self, n: int) -> Tensor:
        return torch.linspace(0.5, 1.5, n, dtype=torch.float64).view(n, 1) + torch.zeros(n, WIDTH)

    def forward(self, x):
        where = self.rotation(x.shape[1])
        x = x + self.drop_path(self.f(self.norm1(x) * where))
        return x + self.drop_path(self.g(self.norm2(x) * where))


class Windows(Block):
    """ViTDet: windows, padding, sizes read before."""

    def forward(self, x):
        B, H, W, C = x.shape
        shortcut = x
        x = self.norm1(x)
        pad = (2 - H % 2) % 2
        if pad:
            x = F.pad(x, (0, 0, 0, pad, 0, pad))
        Hp, Wp = x.shape[1:3]
        x = x.view(B, Hp // 2, 2, Wp // 2, 2, C).transpose(2, 3).reshape(-1, 4, C)
        x = self.f(x) + x.mean(1, keepdim=True)
        x = x.view(B, Hp // 2, Wp // 2, 2, 2, C).transpose(2, 3).reshape(B, Hp, Wp, C)
        x = x[:, :H, :W].contiguous()
        x = shortcut + self.drop_path(x)
        return x + self.drop_path(self.g(self.norm2(x)))


class ChannelsLast(Block):
    """A ConvNeXt with permutes, a layer scale that may be missing, a batch norm and a ReLU."""

    def forward(self, x):
        input = x
        x = self.conv(x)
        x = x.permute(0, 2, 3, 1)
        x = self.f(self.norm1(x))
        if self.gamma is not None:
            x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        x = self.batch_norm(x)
        x = self.drop_path(x)
        x += input
        return self.relu(x)


class Helper(Block):
    """Official Swin: the second half in a method that ends in the drop path."""

    def second(self, y):
        return self.drop_path(self.g(self.norm2(y)))

    def forward(self, x):
        shortcut = x
        x = self.f(self.norm1(x))
        x = shortcut + self.drop_path(x)
        x = x + self.second(x)
        return x


class Derived(Helper):
    def forward(self, x):
        return super().forward(x) * 2


class Masked(Block):
    """V-JEPA: a mask of the samples, and a table that is not."""

    def forward(self, x, mask, table):
        y = self.f(self.norm1(x)) * mask[..., None] + table
        return x + self.drop_path(y)


class Arms(Block):
    """DINOv2: closures, and arms that training chooses between."""

    def forward(self, x):
        def attention(x):
            return self.gamma * self.f(self.norm1(x))

        if self.training and self.use_scale:
            x = x + self.drop_path(attention(x))
            x = x + self.drop_path(self.g(x))
        else:
            x = x + attention(x)
            x = x + self.g(x)
        return x


class Parallel(Block):
    def forward(self, x):
        return x + self.drop_path(self.f(self.norm1(x))) + self.drop_path(self.g(self.norm1(x)))


class HandsOn(Block):
    """A second result that is nothing where nobody asks."""

    def attention(self, x, ask):
        return self.f(x), (x.softmax(-1) if ask else None)

    def forward(self, x, ask=False):
        residual = x
        x, weights = self.attention(self.norm1(x), ask)
        x = self.drop_path(x) + residual
        return x, weights


@pytest.mark.parametrize(
    ("kind", "x", "args"),
    [
        (Windows, torch.randn(4, 5, 7, WIDTH), ()),
        (Helper, tokens(), ()),
        (Derived, tokens(), ()),
        (Masked, tokens(), (torch.rand(4, 5).double(), torch.rand(5, WIDTH).double())),
        (Masked, tokens(5), (torch.rand(5, 5).double(), torch.rand(5, WIDTH).double())),
        (Arms, tokens(), ()),
        (Rotated, tokens(), ()),
        (Rotated, tokens(5), ()),
        (Parallel, tokens(), ()),
        (HandsOn, tokens(), ()),
        (TwoHeads, tokens(), (torch.randn(2, 5, WIDTH, dtype=torch.float64),)),
    ],
)
def test_blocks_of_research_code(kind, x, args):
    report = assert_compacts(kind(), x, *args)
    assert not report.left
    assert all(each.holds for each in report.check(x.double(), *args))


class TwiceBent(Block):
    """A sum with two activations behind it, of which the op takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.relu2 = nn.ReLU()

    def forward(self, x):
        return self.relu2(self.relu(x + self.drop_path(self.f(x))))


class TwiceBentInTurn(TwiceBent):
    def forward(self, x):
        x = self.relu(x + self.drop_path(self.f(x)))
        x = self.relu2(x)
        return x


class TwiceBentLater(TwiceBent):
    def forward(self, x):
        y = x + self.drop_path(self.f(x))
        y = self.relu(y)
        return self.relu2(y)


class TwiceBentIf(TwiceBent):
    def forward(self, x, flag=True):
        if flag:
            x = self.relu2(self.relu(x + self.drop_path(self.f(x))))
        return x


class TwiceBentWith(TwiceBent):
    def forward(self, x):
        with torch.autograd.profiler.record_function("block"):
            x = self.relu2(self.relu(x + self.drop_path(self.f(x))))
        return x


@pytest.mark.parametrize(
    "kind", [TwiceBent, TwiceBentInTurn, TwiceBentLater, TwiceBentIf, TwiceBentWith]
)
def test_two_activations_behind_a_sum(kind):
    source = assert_compacts(kind(), tokens()).source("")
    assert source.count("activation=self.relu)") == 1
    assert "self.relu2(" in source
    assert "activation=self.relu2" not in source


def test_batch_statistics_are_frozen_in_the_comparison_only():
    block = ChannelsLast()
    block.batch_norm.eval()
    report = assert_compacts(block, torch.randn(4, WIDTH, 3, 3))
    assert "activation=self.relu" in report.source("")
    block = ChannelsLast().train()
    report = sdkernels.patch(block)
    before = copy.deepcopy(block.batch_norm.state_dict())
    assert report.check(torch.randn(4, WIDTH, 3, 3))[0].holds
    for name, value in block.batch_norm.state_dict().items():
        assert torch.equal(value, before[name])
    assert block.training
    assert block.batch_norm.training


def test_a_drop_path_function():
    class Functional(Block):
        drop_prob = 0.5

        def forward(self, x):
            return x + drop_path(self.f(self.norm1(x)), self.drop_prob, self.training)

    block = Functional().double().train()
    report = sdkernels.patch(block)
    assert report.drop_probs == [0.5]
    assert report.check(tokens().double())[0].holds
    x, (rows,) = tokens().double(), rows_for(1, 4)
    with report.use([rows]):
        y = block(x)
    mask = (rows.slot >= 0).double().view(-1, 1, 1) * rows.scale
    torch.testing.assert_close(y, x + mask * block.f(block.norm1(x)))
    block.drop_prob = 0.0
    assert torch.equal(block(x), x + block.f(block.norm1(x)))


# What is refused


def refused(kind: type[nn.Module]) -> str:
    report = sdkernels.patch(kind())
    assert not report.patched
    assert len(report.left) == 1
    return report.left[0].reason


class DropsInput(Block):
    def forward(self, x):
        out = self.f(x)
        x = self.drop_path(x)
        return out + self.g(x)


class Concatenates(Block):
    def forward(self, x):
        return torch.cat([x, self.drop_path(self.f(x))], 1)


class AddsAPart(Block):
    def forward(self, x):
        y = self.drop_path(self.f(x))
        return torch.cat([y[:, :1] + x[:, :1], y[:, 1:]], 1)


class NeededElsewhere(Block):
    def forward(self, x):
        y = self.f(x)
        return x + self.drop_path(y), y.mean()


class WritesToSelf(Block):
    def forward(self, x):
        y = self.f(x)
        self.last = y
        return x + self.drop_path(y)


class InALoop(Block):
    def forward(self, x):
        for f in (self.f, self.g):
            x = x + self.drop_path(f(x))
        return x


class Generator(Block):
    def forward(self, x):
        yield x + self.drop_path(self.f(x))


class Chained(Block):
    def forward(self, x, residual=None):
        x, residual = self.norm1(self.drop_path(x) + 0 * x), x
        return self.f(x), residual


class NotSelf(Block):
    def forward(block, x):
        return x + block.drop_path(block.f(x))


class WrittenOut(Block):
    def forward(self, x):
        mask = torch.rand(x.shape[0], 1, 1).ge(0.5) / 0.5
        return x + self.f(x) * mask


class AfterTheDrop(Block):
    """A factor that does not commute: it depends on what was dropped."""

    def forward(self, x):
        y = self.drop_path(self.f(x))
        y = y.view(x.shape[0], -1).view(x.shape)
        y.clamp_(min=0.25)
        return x + y


REFUSED = {
    NotSelf: "the first parameter of its forward is not called self",
    DropsInput: "its result is used by self.g(x)",
    Concatenates: "its result is used by [x, self.drop_path(self.f(x))]",
    AddsAPart: "its result is used by y[:, :1]",
    NeededElsewhere: "what it drops is computed for others too",
    WritesToSelf: "what it drops is computed for others too",
    AfterTheDrop: "its result is used by y.clamp_",
    InALoop: "it is called inside of a loop",
    Generator: "it is a generator",
    WrittenOut: "it draws a mask of its own",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_cut_out_is_refused(kind):
    reason = refused(kind)
    assert REFUSED[kind] in reason
    if "(line" in reason:
        line = int(reason.rpartition("(line ")[2].rstrip(")"))
        lines, first = inspect.getsourcelines(kind.forward)
        assert first <= line < first + len(lines)


def keeps_its_own(block: nn.Module, x: Tensor, *args: Any) -> str:
    """The block differs on some of its rows, is found out, and trains as before."""
    block = block.double().train()
    sdkernels.patch(block)
    original = copy.deepcopy(block)
    sdkernels.unpatch(original)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        got = block(x.double(), *args)
        block(x.double(), *args)
    torch.manual_seed(0)
    expected = original(x.double(), *args)
    assert torch.equal(got, expected)
    (warning,) = [w for w in caught if "keeps its own forward" in str(w.message)]
    return str(warning.message)


class SequenceFirst(Block):
    """Samples are in dimension 1: what is dropped are tokens."""

    def forward(self, x):
        mixed = self.norm1(x)
        mixed = mixed + mixed.mean(0, keepdim=True)
        return x + self.drop_path(self.f(mixed))


class PerWindow(Block):
    def forward(self, x):
        B, N, C = x.shape
        x = x.reshape(B * N, 1, C)
        x = x + self.drop_path(self.f(self.norm1(x)))
        return x.reshape(B, N, C)


class Numbered(Block):
    """What is added depends on which sample of the batch it is."""

    def forward(self, x):
        B = len(x)
        y = self.f(self.norm1(x)) + torch.arange(B).view(B, 1, 1)
        return x + self.drop_path(y)


@pytest.mark.parametrize("kind", [SequenceFirst, PerWindow, Numbered])
def test_a_block_that_differs_keeps_its_own_forward(kind):
    message = keeps_its_own(kind(), tokens())
    assert kind.__name__ in message


def test_the_report_says_what_differed():
    model = nn.Sequential(PerWindow(), Helper()).train()
    report = sdkernels.patch(model)
    assert not report.whole
    with pytest.warns(UserWarning, match="keeps its own forward"):
        model(tokens())
    (left,) = report.whole
    assert (left.name, left.kind) == ("0", PerWindow)
    assert "rows" in left.reason
    assert left.reason in str(report)
    with pytest.raises(RuntimeError, match="plan: 0 draws its own rows"):
        report.plan(4)
    model(tokens())  # one warning is enough
    report = sdkernels.patch(model)
    with pytest.warns(UserWarning, match="keeps its own forward"):
        model(tokens())


def test_what_the_tests_have_compared_runs_at_once(monkeypatch):
    """In the configuration that they have compared, for which this very source was written."""

    class Scaled(Block):
        def forward(self, x):
            y = self.f(self.norm1(x))
            if self.use_scale:
                y = y * self.gamma
            return x + self.drop_path(y)

    block = Scaled().train()
    written = sdkernels.patch(block).patched[0].block._sdkernels.rewriting
    assert not block._sdkernels.is_known
    path = f"{Scaled.__module__}:{Scaled.__qualname__}"
    monkeypatch.setitem(verified.VERIFIED, path, {written.mark: "1.0"})
    sdkernels.patch(block)
    monkeypatch.setattr("sdkernels.models.comparing.proving.prove", None)
    block(tokens())
    other = Scaled().train()
    other.use_scale = False
    assert not sdkernels.patch(other).patched[0].block._sdkernels.is_known


def test_a_wrong_slice_is_caught(monkeypatch):
    """The statement that a mutated slicer forgets changes the result; nothing of it trains."""

    class Two(Block):
        def forward(self, x):
            y = self.f(self.norm1(x))
            y = y * 3.0
            y = self.g(y)
            return x + self.drop_path(y)

    cut = slicing.cut

    def wrong(*args: Any, **kwargs: Any) -> slicing.Slice:
        found = cut(*args, **kwargs)
        found.body = [s for s in found.body if "3.0" not in ast_text(s)]
        return found

    def ast_text(statement: Any) -> str:
        import ast

        return ast.unparse(statement)

    monkeypatch.setattr(rewriter, "cut", wrong)
    assert "differs by" in keeps_its_own(Two(), tokens())


def test_never_checks_nothing(monkeypatch):
    report = sdkernels.patch(Helper().train(), check="never")
    monkeypatch.setattr("sdkernels.models.comparing.proving.prove", None)
    report.patched[0].block(tokens())
    with pytest.raises(ValueError, match="check: expected one of"):
        sdkernels.patch(Helper(), check="sometimes")


def test_the_comparison_leaves_nothing_behind():
    block = Windows().train()
    report = sdkernels.patch(block)
    seen: list[int] = []
    block.f.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    x, before = torch.randn(4, 4, 4, WIDTH), copy.deepcopy(block.state_dict())
    state = torch.get_rng_state()
    assert report.check(x)[0].holds
    assert torch.equal(torch.get_rng_state(), state)
    assert not seen
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
    assert all(p.grad is None for p in block.parameters())


def test_source_and_tracebacks():
    class Fails(Block):
        def forward(self, x):
            y = self.norm1(x)
            y = y.no_such_method()
            return x + self.drop_path(self.f(y))

    block = Fails().train()
    report = sdkernels.patch(block, check="never")
    try:
        block(tokens())
    except AttributeError as error:
        text = "".join(traceback.format_exception(error))
    assert "y.no_such_method()" in text.rpartition("<sdkernels")[2]
    diff = report.source("")
    assert "-    return x + self.drop_path(self.f(y))" in diff
    forward = block._sdkernels.rewriting.forward  # type: ignore[union-attr]
    assert "def branch_0(" in inspect.getsource(forward)
    with pytest.raises(KeyError, match="no patched block has the name 'there'"):
        report.source("there")


def test_another_configuration_runs_the_original():
    """What the forward was written for is asked at every call."""

    class Optional(Block):
        def forward(self, x):
            y = self.f(self.norm1(x))
            if self.scale is not None:
                y = y + self.scale
            y = self.drop_path(y)
            if self.use_scale:
                y = y * self.gamma
            return x + y

    block = Optional().double().train()
    report = sdkernels.patch(block)
    x = tokens().double()
    block(x)
    block.scale = torch.ones(WIDTH).double()
    with (
        pytest.raises(RuntimeError, match="its configuration is not the one"),
        report.use(rows_for(1, 4)),
    ):
        block(x)
    torch.manual_seed(0)
    y = block(x)
    sdkernels.unpatch(block)
    torch.manual_seed(0)
    assert torch.equal(block(x), y)


# Blocks of one's own


def test_compacted_blocks():
    @sdkernels.compacted
    class Own(Helper):
        pass

    block = Own().double().train()
    assert type(block) is not Own
    assert isinstance(block, Own)
    report = sdkernels.patch(block, sampler="fixed")
    assert report.drop_probs == [0.5, 0.5]
    assert all(each.holds for each in report.check(tokens().double()))
    with pytest.raises(TypeError, match="compacted: expected a class of modules"):
        sdkernels.compacted(3)  # type: ignore[type-var]


def test_registered_forwards():
    class Looped(InALoop):
        pass

    def forward(block, add, x):
        for number, f in enumerate((block.f, block.g)):
            x = add(number, x, f)
        return x

    sdkernels.models.register(Looped, forward, ["drop_path", "drop_path"])
    report = assert_compacts(Looped(), tokens())
    assert report.expected_saving() == 0.5  # of all of it, and not of all of it for each branch
    with pytest.raises(TypeError, match="kind: expected a class of modules"):
        sdkernels.models.register(forward, forward, ["drop_path"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drops: expected a list"):
        sdkernels.models.register(Looped, forward, "drop_path")


# Generated forwards

LINES = st.lists(
    st.sampled_from([
        "y = self.f(y)",
        "y = self.norm2(y)",
        "y = y * 2.0",
        "z = y",
        "y = y + z",
        "y, z = z, y",
        "y, n = self.g(y), y.shape[1]",
        "y = y.reshape(B, N, C)",
        "z = self.g(x)",
        "shape = y.shape",
        "y = y.reshape(shape)",
        "B, N, C = y.shape",
        "x = x + 1.0",
        "s = self.norm1(s)",
        "y = y if self.use_scale else z",
        "if N > 4:\n    y = y + 1.0\nelse:\n    z = y",
        "for _ in range(2):\n    y = self.f(y)",
        "y.mul_(0.5)" ,
    ]),
    max_size=8,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(before=LINES, between=LINES, second=LINES)
def test_generated_forwards(before, between, second, tmp_path_factory):
    """Random statements: whatever is patched is what masks give, and what is not runs as it is."""
    body = [
        "B, N, C = x.shape",
        "shape, n = x.shape, 0",
        "s = x",
        "z = x",
        "y = self.norm1(x)",
        *before,
    ]
    body += ["x = s + self.drop_path(y)", "s = x", "y = x", *between]
    body += ["y = self.g(y)", *second, "return s + self.drop_path(y), z, N"]
    lines = [line for each in body for line in each.split("\n")]
    text = "def forward(self, x):\n" + "".join(f"    {line}\n" for line in lines)
    file = tmp_path_factory.mktemp("forwards") / "forward.py"
    file.write_text(text)
    names: dict[str, Any] = {}
    exec(compile(text, str(file), "exec"), names)
    kind = type("Generated", (Block,), {"forward": names["forward"]})
    torch.manual_seed(0)
    block = kind().double().train()
    original = copy.deepcopy(block)
    x = tokens().double().requires_grad_()
    plan = rows_for(2, len(x))
    report = sdkernels.patch(block)
    numbers = [n for e in report.patched for n, _ in enumerate(e.branches)]
    if len(numbers) < 2:  # the other one draws for itself
        assert len(numbers) + len({e.reason for e in report.left}) >= 1
        return
    original.drop_path = MaskedDrop(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not report.check(x)[0].holds:
            return
    with report.use(plan):
        got = step(lambda: block(x), block, x)
    expected = step(lambda: original(x), original, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b if b.dim() or not a.dim() else torch.zeros_like(a))


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_before_it_was_compared():
    """That it saves nothing is said; compared first, it runs on the kept rows in one graph."""
    block = Plain().train()
    report = sdkernels.patch(block)
    x = torch.randn(4, 3, WIDTH)
    with compilation(), pytest.warns(UserWarning, match="was not compared with it yet"):
        torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    report.check(x)
    sizes: list[int] = []
    block.f.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    with compilation() as seen, report.use([KeptRows.from_index(torch.tensor([1, 3]), 4)]):
        torch.compile(block, backend="aot_eager", fullgraph=True)(x)
        assert sizes == [2]
    assert seen.breaks == 0


EDITED = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, drop_path):
        super().__init__()
        self.f, self.drop_path = nn.Linear(4, 4), drop_path

    {first}(self, x):
        return x + self.drop_path(self.f(x))

    {second}(self, x):
        return x - self.f(x) + self.drop_path(self.f(x))
"""


def test_a_file_that_was_edited_since(tmp_path, monkeypatch):
    """At the lines of the forward that runs stands another method now."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "edited_since.py"
    file.write_text(EDITED.format(first="def forward", second="def other"))
    block = importlib.import_module("edited_since").Block(Drop())
    monkeypatch.delitem(sys.modules, "edited_since")
    file.write_text(EDITED.format(first="def other", second="def forward"))
    report = sdkernels.patch(block)
    assert not report.patched
    assert [each.reason for each in report.left] == ["its source has changed since it was imported"]
