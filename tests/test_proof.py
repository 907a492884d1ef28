"""Blocks that look right in one comparison and are not: each keeps its own forward."""

import copy
import dataclasses
import time
import warnings
from typing import Any

import libraries
import pytest
import torch
from libraries import is_installed
from test_rewriting import WIDTH, Block, assert_compacts, keeps_its_own, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import sdkernels
from sdkernels.models.rewriting import rewriter


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(rewriter, "_BY_BLOCK", {})
    monkeypatch.setattr(rewriter, "_BY_SOURCE", {})


class Mixer(nn.Module):
    """Mixes samples where it is told to."""

    def __init__(self, mixes: bool, alpha: float = 1.0) -> None:
        super().__init__()
        self.mixes, self.alpha = mixes, alpha

    def forward(self, x):
        return x + self.alpha * x.mean(0, keepdim=True) if self.mixes else x


class Holds(Block):
    def __init__(self, *mixer: Any) -> None:
        super().__init__()
        self.mixer = Mixer(*mixer)

    def forward(self, x):
        return x + self.drop_path(self.mixer(self.f(x)))


@pytest.mark.parametrize("settings", [(True,), (True, 0.5)])
def test_a_comparison_speaks_for_blocks_of_the_same_settings_only(settings):
    first = sdkernels.patch(Holds(False))
    assert first.check(tokens())[0].holds
    if len(settings) > 1:
        assert not sdkernels.patch(Holds(True, 0.0)).check(tokens())[0].reason
    assert "depend on each other" in keeps_its_own(Holds(*settings), tokens())


def test_blocks_of_the_same_settings_are_compared_once(monkeypatch):
    from sdkernels.models.comparing import proving

    compared: list[Any] = []
    prove = proving.prove

    def counting(block: Any, *args: Any) -> Any:
        compared.append(block)
        return prove(block, *args)

    monkeypatch.setattr(proving, "prove", counting)
    model = nn.Sequential(*(Holds(False, 0.25 * (n > 2)) for n in range(5))).train()
    for number, block in enumerate(model):
        block.drop_path.rate = 0.1 * number + 0.1  # type: ignore[union-attr]
    sdkernels.patch(model)
    model(tokens())
    model(tokens())
    assert compared == [model[0], model[3]]


class MixesInTraining(Block):
    def forward(self, x):
        y = F.dropout(self.f(x), 0.5, self.training)
        if self.training:
            y = y + x.mean(0, keepdim=True)
        return x + self.drop_path(y)


class DropsOut(Block):
    def forward(self, x):
        y = F.dropout(self.f(x), 0.5, self.training)
        q = y.unsqueeze(1)
        y = F.scaled_dot_product_attention(q, q, q, None, 0.5 if self.training else 0.0).squeeze(1)
        return x + self.drop_path(y)


class Noisy(Block):
    def forward(self, x):
        y = self.f(x)
        if self.training:
            y = y + torch.rand_like(y)
        return x + self.drop_path(y)


class Paired(Block):
    """Mixes samples of larger batches whose number is even."""

    def forward(self, x):
        y = self.f(x)
        if len(y) % 2 == 0 and len(y) > 4:
            y = y + y.flip(0)
        return x + self.drop_path(y)


class Flag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class CountsItsCalls(Block):
    def __init__(self) -> None:
        super().__init__()
        self.flag = Flag()

    def forward(self, x):
        y = self.flag(self.f(x))
        if self.flag.calls > 1000:
            y = y + x.mean(0, keepdim=True)
        return x + self.drop_path(y)


class KeepsLosses(Block):
    def __init__(self) -> None:
        super().__init__()
        self.losses = nn.Module()
        self.losses.values = []

    def remember(self, y):
        self.losses.values.append(y.mean())
        return y

    def forward(self, x):
        return x + self.drop_path(self.remember(self.f(x)))


@dataclasses.dataclass
class Result:
    value: Tensor
    weights: Tensor


class ReturnsAnObject(Block):
    def forward(self, x):
        y = self.f(x)
        return Result(x + self.drop_path(y), x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (MixesInTraining, "depend on each other"),
        (Noisy, "something else in every run"),
        (Paired, "depend on each other"),
        (CountsItsCalls, "changes what it or a module of it holds"),
        (KeepsLosses, "changes what it or a module of it holds"),
    ],
)
def test_what_one_look_would_miss(kind, reason):
    assert reason in keeps_its_own(kind(), tokens())


def test_outputs_that_cannot_be_looked_into():
    block = ReturnsAnObject().train()
    sdkernels.patch(block)
    with pytest.warns(UserWarning, match="its output has a Result"):
        assert isinstance(block(tokens()), Result)


def test_dropout_of_functions_does_not_stand_in_the_way():
    block = DropsOut().double().train()
    (checked,) = sdkernels.patch(block).check(tokens().double())
    assert checked.holds, checked.reason
    assert checked.difference is not None
    assert checked.difference < 1e-10


class WritesUnderAnIf(Block):
    def forward(self, x, late=False):
        shortcut = x
        if late:
            x.mul_(2.0)
        y = self.f(x)
        return shortcut + self.drop_path(y)


class WritesIntoAView(Block):
    def forward(self, x):
        y = x.reshape(x.shape)
        y[:, 0] = 0.0
        return x + self.drop_path(self.f(y))


@pytest.mark.parametrize("kind", [WritesUnderAnIf, WritesIntoAView])
def test_a_branch_that_writes_into_its_input(kind):
    report = sdkernels.patch(kind())
    assert not report.patched
    assert "writes into what comes in" in report.left[0].reason


class Lengths(Block):
    """Tokens of each sample count up to its length."""

    def forward(self, x, lengths, positions=None):
        y = self.f(x)
        if positions is not None:
            y = y + positions
        where = torch.arange(x.shape[1])
        for row in range(x.shape[0]):
            y[row] = y[row] * (where < lengths[row])[:, None]
        return x + self.drop_path(y)


def test_numbers_that_were_the_same_for_all_samples():
    """As a tensor they are taken by sample; in a list it cannot be told."""
    x = tokens()
    lengths, uniform = torch.tensor([1, 5, 2, 4]), torch.full((4,), 5)
    report = assert_compacts(Lengths(), x, uniform)
    block = report.patched[0].block
    original = copy.deepcopy(block)
    sdkernels.unpatch(original)
    plan = report.plan(4, generator=torch.Generator().manual_seed(1))
    (rows,) = plan
    assert 0 < rows.k < 4
    with report.use(plan):
        got = block(x.double(), lengths)
    original.drop_path = nn.Identity()
    mask = ((rows.slot >= 0) * rows.scale).double().view(-1, 1, 1)
    whole = original(x.double(), lengths) - x
    torch.testing.assert_close(got, x + mask * whole)
    assert "may belong to them" in keeps_its_own(Lengths(), x, [5, 5, 5, 5])


def test_arguments_that_come_later():
    """None, one for all, one for each: every kind of call is compared for itself."""
    block = Lengths().double().train()
    report = sdkernels.patch(block)
    lengths, x = torch.tensor([1, 5, 2, 4]), tokens().double()
    for positions in (None, torch.rand(5, WIDTH), torch.rand(1, 5, WIDTH), torch.rand(4, 5, WIDTH)):
        given = None if positions is None else positions.double()
        original = copy.deepcopy(block)
        sdkernels.unpatch(original)
        plan = report.plan(4, generator=torch.Generator().manual_seed(3))
        (rows,) = plan
        with report.use(plan):
            got = block(x, lengths, given)
        original.drop_path = nn.Identity()
        mask = ((rows.slot >= 0) * rows.scale).double().view(-1, 1, 1)
        torch.testing.assert_close(got, x + mask * (original(x, lengths, given) - x))


class ManyArguments(Block):
    def forward(self, x, *, a, b, c, d, e, f, g, h):
        y = self.f(x) + (a + b + c + d + e + f + g + h)
        return x + self.drop_path(y)


def test_many_arguments_are_told_apart_in_time():
    names = "abcdefgh"
    block = ManyArguments().double().train()
    report = sdkernels.patch(block)
    given = {name: torch.rand(5, WIDTH).double() for name in names}
    start = time.perf_counter()
    (checked,) = report.check(tokens(5).double(), **given)
    assert checked.holds, checked.reason
    assert time.perf_counter() - start < 10


def test_a_copy_knows_what_its_original_knows():
    block = Holds(False).train()
    report = sdkernels.patch(block)
    assert report.check(tokens())[0].holds
    made: Any = copy.deepcopy(block)
    assert made._sdkernels.proofs is block._sdkernels.proofs  # type: ignore[union-attr]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(made, backend="eager", fullgraph=True)(tokens())
    assert not [each for each in caught if "not compared" in str(each.message)]


def small_swin(attention: str, **options: Any) -> Any:
    libraries.load("transformers")
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4,
        drop_path_rate=0.5, **options,
    )  # fmt: skip
    config._attn_implementation = attention
    return SwinModel(config).train()


@pytest.mark.skipif(not is_installed("transformers"), reason="needs transformers")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_weights_that_nobody_asks_for(attention, reentrant):
    """The eager attention of transformers returns them all the same, also under checkpoint."""
    model = small_swin(attention)
    report = sdkernels.patch(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plan = report.plan(4, generator=torch.Generator().manual_seed(0))
    with report.use(plan):
        model(torch.randn(4, 3, 16, 16)).last_hidden_state.sum().backward()
    assert not report.whole


@pytest.mark.skipif(not is_installed("transformers"), reason="needs transformers")
def test_attention_weights_that_somebody_asks_for():
    model = small_swin("eager", output_attentions=True)
    report = sdkernels.patch(model)
    with pytest.warns(UserWarning, match="it hands on attn_weights"):
        found = model(torch.randn(4, 3, 16, 16)).attentions
    assert found[0].shape[0] == 4 * 4  # of every window of every sample
    assert [each.name for each in report.whole] == ["encoder.layers.0.blocks.1"]  # p is 0 before
