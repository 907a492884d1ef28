"""What the comparison of a block with its original sees, and what it leaves behind."""

import gc
import random
import types
import weakref
from typing import Any

import libraries
import numpy as np
import pytest
import torch
from test_rewriting import WIDTH, Block, Drop, assert_compacts, keeps_its_own, tokens
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import sdkernels
from sdkernels.models.comparing import proving
from sdkernels.models.comparing.results import other_state
from sdkernels.models.rewriting import rewriter


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(rewriter, "_BY_BLOCK", {})
    monkeypatch.setattr(rewriter, "_BY_SOURCE", {})


# What a branch leaves behind


class Appends(Block):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Collector()

    def forward(self, x, found=None):
        return x + self.drop_path(self.inner(self.f(x), found))


class Collector(nn.Module):
    def forward(self, x, found):
        if isinstance(found, list):
            found.append(x.mean())
        elif isinstance(found, dict):
            found["loss"] = x.mean()
        elif found is not None:
            found.loss = x.mean()
        return x


class Bag:
    loss: Any = None


@pytest.mark.parametrize("make", [list, dict, Bag])
def test_what_an_argument_gets(make):
    """The list of the caller, who waits for what all samples give."""
    block, found = Appends().train(), make()
    sdkernels.patch(block)
    with pytest.warns(UserWarning, match="writes into an argument, list or object"):
        block(tokens(), found)
    got = found if make is not Bag else [found.loss] * (found.loss is not None)
    assert len(got) == 1


@pytest.mark.parametrize("number", [0, 1.0, True, None])
@pytest.mark.parametrize("tensor", [torch.zeros(()), torch.ones(3), torch.tensor([1])])
def test_a_number_is_no_tensor(number, tensor):
    for a, b in ((number, tensor), (tensor, number)):
        assert other_state({"held": a}, {"held": b}) == "held"


class Observes(nn.Module):
    """Remembers something of what goes through."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.seen, self.largest = how, None, []
        self.register_buffer("running", torch.zeros(()))

    def forward(self, x):
        if self.how == "attribute":
            self.seen = x.square().mean()
        elif self.how == "rows":
            self.seen = len(x)
        elif self.how == "list":
            self.largest = [x.detach().amax()]
        elif self.how == "buffer":
            self.running.copy_(torch.maximum(self.running, x.detach().amax()))
        elif self.how == "replaced":
            self.running = 0.9 * self.running + 0.1 * x.detach().mean()
        return x


class Observed(Block):
    def __init__(self, how: str, inside: bool = True) -> None:
        super().__init__()
        self.observer, self.inside = Observes(how), inside

    def forward(self, x):
        if not self.inside:
            x = self.observer(x)
        y = self.f(x)
        if self.inside:
            y = self.observer(y)
        return x + self.drop_path(y)


@pytest.mark.parametrize("how", ["attribute", "rows", "list", "buffer", "replaced"])
def test_what_a_module_keeps_of_the_kept_rows(how):
    assert "changes what it or a module of it holds (observer." in keeps_its_own(
        Observed(how), tokens()
    )


@pytest.mark.parametrize("how", ["attribute", "rows", "list"])
def test_what_a_module_keeps_of_all_rows(how):
    assert_compacts(Observed(how, inside=False), tokens())


class SpectralNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.f = parametrizations.spectral_norm(self.f)

    def forward(self, x):
        return x + self.drop_path(self.f(x))


class OldNorms(Block):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.utils.weight_norm(self.f)
        self.g = nn.utils.spectral_norm(self.g)

    def forward(self, x):
        return x + self.drop_path(self.g(self.f(x)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("kind", [SpectralNorm, OldNorms])
def test_weights_that_are_computed_in_every_forward(kind):
    block = kind().train()
    (checked,) = sdkernels.patch(block).check(tokens(20))
    assert checked.holds, checked.reason


# Samples that depend on each other


class Trains(nn.Module):
    """Of one sample nothing is learnt, or of all that are there."""

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        self.linear, self.rows = nn.Linear(WIDTH, WIDTH), rows

    def forward(self, x):
        y = self.linear(x)
        return y.detach() if len(y) == self.rows else y


class LearnsNothingOf(Block):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.trains = Trains(rows)

    def forward(self, x):
        return x + self.drop_path(self.trains(x))


def test_gradients_where_one_sample_is_kept():
    """Which the masked forward never runs the branch on."""
    block = LearnsNothingOf(1).train()
    sdkernels.patch(block)
    with pytest.warns(UserWarning, match="with 1 of 2 rows"):
        block(tokens())


class NormedMean(Block):
    """A shift of all entries of the mean is gone behind the norm."""

    def forward(self, x):
        return x + self.drop_path(self.f(x)) + F.layer_norm(x.mean(0, keepdim=True), (WIDTH,))


class MaximumOfAll(Block):
    """Only what is far out moves the others."""

    def forward(self, x):
        return x + self.drop_path(self.f(x)) + (x.amax() - 20.0).clamp(min=0.0)


class LargeBatches(Block):
    def forward(self, x):
        y = self.f(x)
        if len(y) >= 16:
            y = y - y.mean(0, keepdim=True)
        return x + self.drop_path(y)


def test_mixing_in_large_batches():
    assert "depend on each other" in keeps_its_own(LargeBatches(), tokens(20))


@pytest.mark.parametrize("kind", [NormedMean, MaximumOfAll])
def test_mixing_that_a_shift_of_a_sample_would_not_show(kind):
    assert "depend on each other" in keeps_its_own(kind(), tokens())


# Trust


def known(monkeypatch, block: Any) -> Any:
    """The block, patched, as one of a class that was compared before a release."""
    patched = sdkernels.patch(block).patched[0].block
    written = patched._sdkernels.rewriting
    kind = written.original
    name = f"{kind.__module__}:{kind.__qualname__}"
    monkeypatch.setitem(proving.VERIFIED, name, {written.mark: "1"})
    sdkernels.unpatch(block)
    return sdkernels.patch(block).patched[0].block._sdkernels


class Plain(Block):
    def forward(self, x):
        return x + self.drop_path(self.f(x))


class OwnDrop(Drop):
    def forward(self, x):
        return Drop.forward(self, x)


class Known(Plain):
    """Of one module, in all its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = OwnDrop()

    def forward(self, x):
        return x + self.drop_path(self.f(x))


def test_a_verified_class_with_a_forward_of_somebody_else(monkeypatch):
    assert known(monkeypatch, Known()).is_known
    block = Known()
    block.f.forward = types.MethodType(lambda self, x: x - x.mean(0), block.f)
    assert not known(monkeypatch, block).is_known
    with monkeypatch.context() as patch:
        forward = eval("lambda self, x: x - x.mean(0)", {"__name__": "somebody"})
        patch.setattr(nn.Linear, "forward", forward)
        assert not known(monkeypatch, Known()).is_known


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_part_that_is_compiled_after_patch(monkeypatch):
    """What is compiled is the same module: a verified class stays one, another is compared."""
    block = Known().train()
    block.f = torch.compile(block.f, backend="eager")  # type: ignore[assignment]
    assert known(monkeypatch, block).is_known
    plain = Plain().train()
    report = sdkernels.patch(plain)
    plain.f = torch.compile(plain.f, backend="eager")  # type: ignore[assignment]
    plain(tokens())
    assert not report.whole


class Flagged(Block):
    def forward(self, x, mixes=0):
        y = self.f(x)
        if mixes == 1:
            y = y - y.mean(0, keepdim=True)
        return x + self.drop_path(y)


def test_a_number_in_the_place_of_a_flag():
    block = Flagged().train()
    report = sdkernels.patch(block)
    block(tokens(), 0)
    assert not report.whole
    with pytest.warns(UserWarning, match="depend on each other"):
        block(tokens(), 1)


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixes, self.inner = False, nn.Identity()

    def forward(self, x):
        return self.inner(x - x.mean(0, keepdim=True) if self.mixes else x)


class Holds(Block):
    def __init__(self) -> None:
        super().__init__()
        self.part = Sometimes()

    def forward(self, x):
        return x + self.drop_path(self.part(self.f(x)))


class Mixes(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_attributes_that_change_after_patch(monkeypatch):
    for change in (
        lambda block: setattr(block.part, "mixes", True),
        lambda block: setattr(block.part, "inner", Mixes()),
        lambda block: setattr(block, "part", Mixes()),
    ):
        block = Holds().train()
        report = sdkernels.patch(block)
        block(tokens())
        assert not report.whole
        change(block)
        with pytest.warns(UserWarning, match="depend on each other"):
            block(tokens())
        assert report.whole


def test_nothing_is_looked_up_again_while_nothing_changes(monkeypatch):
    looked: list[Any] = []
    recall = proving.recall
    block = Holds().train()
    sdkernels.patch(block)
    monkeypatch.setattr(proving, "recall", lambda *args: (looked.append(args), recall(*args)))
    for rate in (0.1, 0.2):
        block.drop_path.rate = rate
        block.train(rate == 0.1).train()
        block(tokens())
    assert not looked
    block.part.name = "another"  # type: ignore[assignment]
    block(tokens())
    block(tokens())
    assert len(looked) == 1


# What may not break


class Nested(Block):
    def __init__(self) -> None:
        super().__init__()
        self.part = Sometimes()
        self.part.sizes = ([1, 2], {3})  # type: ignore[assignment]

    def forward(self, x):
        return x + self.drop_path(self.part(self.f(x)))


def test_attributes_that_have_no_hash():
    assert_compacts(Nested(), tokens())


class Slotted:
    __slots__ = ("model",)


class Refused(Block):
    def forward(self, x):
        return torch.cat([x, self.drop_path(self.f(x))])


@pytest.mark.parametrize("kind", [Plain, Refused])
def test_models_are_not_kept_alive(kind):
    model = nn.ModuleList([kind()]).train()
    slotted = Slotted()
    slotted.model = model[0].f
    model[0].slotted = slotted  # type: ignore[assignment]
    gone = weakref.ref(model[0].f)
    report = sdkernels.patch(model)
    if report.patched:
        model[0](tokens())
    del model, report, slotted
    gc.collect()
    assert gone() is None


def test_proofs_are_bounded():
    for number in range(600):
        block = Plain()
        block.number = number  # type: ignore[assignment]
        block.train()
        rewriting = sdkernels.patch(block).patched[0].block._sdkernels.rewriting
    assert len(rewriting.proofs) <= 300


class Biased(Block):
    """A bias for each sample, and one for all."""

    def forward(self, x, bias, shared=None):
        y = self.f(x) + torch.stack([bias[row] for row in range(len(x))])[:, None]
        return x + self.drop_path(y if shared is None else y + shared)


def test_a_batch_of_one():
    """As the last of an epoch may be."""
    block = Biased().train()
    report = sdkernels.patch(block)
    block(tokens(1), torch.rand(1, WIDTH))
    block(tokens(1), torch.rand(1, WIDTH), torch.rand(1, 5, WIDTH))
    block(tokens(4), torch.rand(4, WIDTH))
    assert not report.whole
    assert_compacts(Biased(), tokens(1), torch.rand(1, WIDTH).double())


@pytest.mark.filterwarnings("ignore:.*keeps its own forward")
def test_a_batch_of_one_that_is_refused_says_nothing_of_others(monkeypatch):
    block = Plain().train()
    report = sdkernels.patch(block)
    prove = proving.prove
    monkeypatch.setattr(proving, "prove", lambda *args: proving.Proof(False, "not this one"))
    block(tokens(1))
    assert not report.whole
    monkeypatch.setattr(proving, "prove", prove)
    block(tokens(4))
    assert not report.whole
    (holds,) = {proof.holds for proof in block._sdkernels.proofs.values() if proof.lasts}  # type: ignore[union-attr]
    assert holds


class DrawsElsewhere(Block):
    def forward(self, x):
        random.random()
        np.random.rand()
        return x + self.drop_path(self.f(x))


def test_other_random_numbers_are_kept():
    report = sdkernels.patch(DrawsElsewhere().train())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    model = report.model
    model.register_forward_pre_hook(lambda *_: None)
    block: Any = report.patched[0].block
    proving.prove(block, block._sdkernels.rewriting, {"x": tokens()}, ())
    torch.manual_seed(1)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()


def test_hooks_around_a_check():
    """The user's own are not called; what the model registers in its first call stays."""
    called: list[str] = []

    class RegistersLate(nn.Sequential):
        hooked = False

        def forward(self, x):
            if not self.hooked:
                self.hooked = True
                self[1].register_forward_hook(lambda *_: called.append("late"))
            return super().forward(x)

    model = RegistersLate(Plain(), Plain()).train()
    report = sdkernels.patch(model)
    model[1].register_forward_hook(lambda *_: called.append("first"))
    handle = model[1].register_forward_hook(lambda *_: called.append("second"))
    model[0].register_forward_pre_hook(lambda *_: called.append("before"))
    hooks = dict(model[1]._forward_hooks)
    assert all(checked.holds for checked in report.check(tokens()))
    late = set(model[1]._forward_hooks) - set(hooks)
    assert len(late) == 1
    assert [*model[1]._forward_hooks] == [*hooks, *late]
    assert {*called} == {"late"}
    called.clear()
    model(tokens())
    assert called == ["before", "first", "second", "late"]
    handle.remove()
    assert len(model[1]._forward_hooks) == 2


@pytest.mark.parametrize("ran", [False, True])
def test_what_transformers_collects_by_hooks(ran):
    """A model whose first call is the check, and one that has its hooks already."""
    libraries.load("transformers")
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Dinov2Config(**sizes, image_size=28, patch_size=14, drop_path_rate=0.5)
    model, images = Dinov2Model(config).train(), torch.randn(4, 3, 28, 28)
    if ran:
        model(images, output_hidden_states=True)
    report = sdkernels.patch(model)
    assert all(each.holds for each in report.check(images, output_hidden_states=True))
    assert len(model(images, output_hidden_states=True).hidden_states) == 3


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop = nn.Linear(WIDTH, WIDTH), Drop(0.5)

    def forward(self, x):
        return self.drop(self.f(x))


class Within(Block):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return x + self.drop_path(self.inner(x))


def test_a_drop_path_inside_of_a_branch():
    """As in PoolFormer's MLP: it stays, and is as little to be compared as a dropout."""
    report = sdkernels.patch(Within().train())
    (checked,) = report.check(tokens())
    assert checked.holds, checked.reason


class Counts(Block):
    def forward(self, x, counter=None):
        counter.count += 1
        return x + self.drop_path(self.f(x))


class Counter:
    count = 0


@pytest.mark.filterwarnings("ignore:.*keeps its own forward")
def test_objects_among_the_arguments_are_copied():
    block, counter = Counts().train(), Counter()
    sdkernels.patch(block)
    block(tokens(), counter)
    assert counter.count == 1


def test_a_report_after_unpatch():
    block = Plain().train()
    report = sdkernels.patch(block)
    sdkernels.unpatch(block)
    assert [each.reason for each in report.whole] == ["it was unpatched"]
    assert report.drop_probs == []
    assert report.idle == report.check(tokens()) == ()
    assert "it was unpatched" in str(report)
    with pytest.raises(KeyError, match="no patched block"):
        report.source("")


@pytest.mark.parametrize("sampler", ["fixed", "rounded"])
def test_samplers_that_a_mode_has_no_choice_of(sampler):
    block = Plain().train()
    block.drop_path = libraries.load("torchvision").ops.StochasticDepth(0.5, "batch")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f'^sampler: "{sampler}" keeps .* of mode "batch"'):
        sdkernels.patch(block, sampler=sampler)
    assert not isinstance(block, sdkernels.models.blocks.PatchedBlock)


# What need not be refused


class Sized(Block):
    def forward(self, x, size):
        height, width = size
        y = x[:, 1:].reshape(x.shape[0], height, width, WIDTH)
        y = torch.cat([x[:, :1], self.f(y).reshape(x.shape[0], height * width, WIDTH)], 1)
        return x + self.drop_path(y)


class PerSample(Block):
    def forward(self, x, lengths):
        y = self.f(x)
        for row in range(x.shape[0]):
            y[row] = y[row] * lengths[row]
        return x + self.drop_path(y)


def test_sizes_with_as_many_entries_as_samples():
    assert_compacts(Sized(), torch.randn(2, 7, WIDTH), (2, 3))
    assert "does not run" in keeps_its_own(PerSample(), tokens(2), [5, 5])


class WritesIntoTheStream(Block):
    def forward(self, x):
        x = F.relu(x, inplace=True)
        return x + self.drop_path(self.f(x))


class Checkpoints(Block):
    def forward(self, x):
        return x + self.drop_path(checkpoint(self.f, x, use_reentrant=True))


class OwnDtypes(Block):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.f.register_buffer("marker", torch.zeros((), dtype=torch.bfloat16))

    def forward(self, x):
        return x + self.drop_path(self.f(x.bfloat16()).float())


class Complex(Block):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, WIDTH, dtype=torch.complex64))

    def forward(self, x):
        y = torch.fft.rfft(x, dim=1) * self.filter
        return x + self.drop_path(torch.fft.irfft(y, n=x.shape[1], dim=1))


class Recurrent(Block):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x):
        y, _ = self.rnn(x)
        return x + self.drop_path(y)


class Uncopied(Block):
    def __init__(self) -> None:
        super().__init__()
        self.stream = (each for each in ())  # cannot be copied

    def forward(self, x):
        return x + self.drop_path(self.f(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "kind",
    [WritesIntoTheStream, Checkpoints, OwnDtypes, Complex, Recurrent, Uncopied],
)
def test_what_need_not_be_refused(kind):
    (checked,) = sdkernels.patch(kind().train()).check(tokens())
    assert checked.holds, checked.reason


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_was_replaced_after_patch(reentrant):
    """By a closure over the module itself: the comparison runs a copy of that, too."""
    block = Plain().train()
    report = sdkernels.patch(block)
    forward, seen = block.f.forward, []
    block.f.register_forward_hook(lambda *_: seen.append(1))
    block.f.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)  # type: ignore[method-assign]
    before = block.f.weight.grad = torch.ones_like(block.f.weight)
    block(tokens().requires_grad_())
    assert not report.whole
    assert len(seen) == 1
    assert block.f.weight.grad is before
    assert (before == 1).all()


def test_blocks_with_recurrent_nets_are_compared_once():
    model = nn.Sequential(Recurrent(), Recurrent()).train()
    sdkernels.patch(model)
    model(tokens())
    first, second = (block._sdkernels.proofs for block in model)  # type: ignore[union-attr]
    assert first is second
    assert len(first) == 1


def test_what_a_comparison_costs():
    """Either forward four times, once more; the original twice where there are many samples."""
    calls: list[int] = []

    class Counted(Block):
        def forward(self, x):
            calls.append(len(x))
            return x + self.drop_path(self.f(x))

    every = [8, 8, 2, 2, 8, 8, 2, 2, 8]  # with some, one, all, none; with all, of which two differ
    for batch, rows in ((4, every), (20, [*every, 20, 20])):
        calls.clear()
        block = Counted().train()
        sdkernels.patch(block)
        proving.prove(block, block._sdkernels.rewriting, {"x": tokens(batch)}, ())  # type: ignore[union-attr, arg-type]
        assert calls == rows


def test_keywords_in_any_order():
    block = Biased().train()
    report = sdkernels.patch(block)
    block(bias=torch.ones(4, WIDTH).long(), x=tokens())
    assert not report.whole


@pytest.mark.filterwarnings("ignore:.*keeps its own forward")
def test_more_kinds_of_calls_than_are_remembered(monkeypatch):
    monkeypatch.setattr(proving, "_KINDS", 2)
    block = Flagged().train()
    report = sdkernels.patch(block)
    for flag in (0, False, None, "no"):
        block(tokens(), flag)
    assert not report.whole
    proofs = block._sdkernels.proofs  # type: ignore[union-attr]
    assert len(proofs) == 2
    assert all(proof.holds for proof in proofs.values())
