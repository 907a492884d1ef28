"""patch and unpatch: reports, refusals, round trips, hooks, copies, plans."""

import copy
import inspect
import io
import os
import pickle
import sys
from typing import Any

import processes
import pytest
import torch
from comparison import assert_same_bits
from libraries import load
from patched_models import freeze_norms, make_rows, patched_blocks, patched_copy, train_step
from test_rewriting import Drop
from torch import nn
from torch.nn.utils import parametrize
from zoo import NETS, output_of

import sdkernels
from sdkernels import DepthPlan, KeptRows, linear_decay
from sdkernels.models import drop_probs, parts, registry, use

VIT = NETS["timm-vit"]
# One net of each library, and one whose blocks have no drop path.
SOME = ("timm-deit3", "torchvision-convnext", "transformers-dinov2", "torchvision-resnet")
some_nets = pytest.mark.parametrize("net", [NETS[name] for name in SOME], ids=SOME)


# Round trips


@some_nets
def test_unpatch_restores_everything(net):
    model = net.model().train()
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    text, keys = repr(model), list(model.state_dict())
    report = sdkernels.patch(model, drop_probs=net.drop_probs)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    for entry in report.patched:
        assert isinstance(entry.block, before[entry.name][0])
    assert sdkernels.unpatch(model) is model
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before
    assert not patched_blocks(model)
    sdkernels.unpatch(model)  # of what is not patched does nothing


@some_nets
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_patched_model(net, how):
    model = net.model().train()
    sdkernels.patch(model, sampler="fixed", drop_probs=net.drop_probs)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert drop_probs(other) == drop_probs(model) != []
    x = net.inputs(4)
    y, gradients = train_step(model, x)
    other_y, other_gradients = train_step(other, x)
    assert_same_bits(other_y, y)
    for name, gradient in gradients.items():
        if gradient is not None:
            assert_same_bits(other_gradients[name], gradient)
    with use(other, [KeptRows.from_mask(torch.ones(4).bool(), 0.0)] * len(drop_probs(other))):
        assert not torch.equal(output_of(other(x)), y)  # states are not shared
        torch.manual_seed(5)
        assert_same_bits(output_of(model(x)).detach(), y)
    sdkernels.unpatch(other)
    assert patched_blocks(model)


def test_pickles_load_in_another_process(tmp_path):
    """The class of a patched block is found again by name, without patch() being called."""
    load("timm")
    model = VIT.model()
    sdkernels.patch(model)
    torch.save(model, tmp_path / "model.pt")
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
import libraries; libraries.load("timm")
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
from sdkernels.models import drop_probs
print(drop_probs(model), model.train()(torch.randn(4, 3, 32, 32).double()).shape)
"""
    done = processes.run("-c", script, cwd=os.getcwd(), env=os.environ)
    assert done.stdout == "[0.0, 0.0, 0.5, 0.5] torch.Size([4, 5])\n", done.stderr


def test_importing_sdkernels_imports_no_library():
    script = (
        "import sys, sdkernels; print({'timm', 'torchvision', 'transformers'} & set(sys.modules))"
    )
    done = processes.run("-c", script, cwd=os.getcwd(), env=os.environ)
    assert done.stdout == "set()\n", done.stderr


@some_nets
def test_patching_again_replaces_options(net):
    model = net.model()
    first = sdkernels.patch(model, drop_probs=0.5)
    text = str(first)
    second = sdkernels.patch(model, drop_probs=0.25, sampler="fixed")
    assert [type(e.block) for e in second.patched] == [type(e.block) for e in first.patched]
    assert max(second.drop_probs) == 0.25
    assert {b._sdkernels.options.sampler for b in patched_blocks(model)} == {"fixed"}
    assert "0.5" in text


def test_a_pickle_of_a_forward_that_is_not_known(monkeypatch):
    """It would train with our forward and evaluate with theirs, of another version."""
    vision: Any = load("timm.models.vision_transformer")
    model = VIT.model()
    sdkernels.patch(model)
    pickled = pickle.dumps(model)
    monkeypatch.setattr(registry, "_PATCHED", {})  # as in another process
    monkeypatch.setattr(vision.Block, "forward", lambda self, x: x)
    other = pickle.loads(pickled)
    with pytest.raises(RuntimeError, match="was patched where its forward was another one"):
        other.train()(VIT.inputs(2))
    monkeypatch.undo()
    assert patched_blocks(pickle.loads(pickled))


# Hooks


@some_nets
def test_hooks(net):
    """Hooks on a block see the batch, those inside of it the kept rows; both may change things."""
    model, report = patched_copy(net.model().train(), net)
    entry = report.patched[-1]
    seen: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda module, args, out: seen.update({name: output_of(out).shape[0]})

    entry.block.register_forward_hook(count("block"))
    freeze_norms(model)  # which refuse one row of one pixel
    inner = {name: m for name, m in entry.block.named_modules() if list(m.parameters(False))}
    inner = {name: m for name, m in inner.items() if name and "downsample" not in name}
    for name, module in inner.items():
        module.register_forward_hook(count(name))
    rows = KeptRows.from_index(torch.tensor([1]), 4, 2.0)
    with report.use([rows] * len(report.drop_probs)):
        y = output_of(model(net.inputs(4)))
    assert seen.pop("block") == 4
    assert set(seen.values()) == {1}
    assert seen.keys() == inner.keys()
    entry.block.register_forward_hook(
        lambda module, args, out: out * 2 if isinstance(out, torch.Tensor) else out
    )
    with report.use([rows] * len(report.drop_probs)):
        assert not torch.equal(output_of(model(net.inputs(4))), y)


def test_hooks_on_a_drop_path_make_its_block_run_as_before():
    model = VIT.model().train()
    report = sdkernels.patch(model)
    seen = []
    drop = model.blocks[1].drop_path1
    handle = drop.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    model(VIT.inputs(4))
    assert seen == [4]
    rows = KeptRows.from_mask(torch.ones(4).bool())
    handle.remove()
    with report.use([rows] * 4):
        handle = drop.register_forward_hook(lambda module, args, out: seen.append(len(out)))
        with pytest.raises(RuntimeError, match="a Block draws its own rows: its drop path module"):
            model(VIT.inputs(4))
    handle.remove()
    model(VIT.inputs(4))
    assert seen == [4]


def test_a_hooked_layer_scale_is_called():
    net = NETS["timm-deit3"]
    model, report = patched_copy(net.model().train(), net)
    block = model.blocks[1]
    calls = []
    handle = block.ls1.register_forward_hook(lambda m, args, out: calls.append(args[0].shape[0]))
    x = net.inputs(4)
    with report.use(make_rows(4)):
        y, gradients = train_step(model, x)
        handle.remove()
        expected, expected_gradients = train_step(model, x)
    assert calls == [1]  # no row is kept there, and attention does not run on none
    torch.testing.assert_close(y, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])


# A class whose forward is replaced


class Replaceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.drop_path = nn.Linear(4, 4, dtype=torch.float64), Drop()

    def forward(self, x):
        return x + self.drop_path(self.f(x))


def ten_times(self, y):
    return y + self.drop_path(10 * self.f(y))


def gains(block, x):
    """What the block adds, in multiples of its branch, one for each sample."""
    with torch.no_grad():
        return ((block(x) - x) / block.f(x)).mean(1)


@pytest.mark.parametrize("rows", ["branch", "block"])
def test_a_forward_that_is_replaced_between_two_models(rows, monkeypatch):
    """As a library does that has a faster one."""
    x = torch.randn(4, 4, dtype=torch.float64)
    kept = [KeptRows.from_index(torch.tensor([0, 2]), batch=4, scale=2.0)]
    first, second = Replaceable(), Replaceable()
    sdkernels.patch(first, rows=rows)
    first.train()(x)
    monkeypatch.setattr(Replaceable, "forward", ten_times)
    report = sdkernels.patch(second, rows=rows)
    assert list(inspect.signature(second.forward).parameters) == ["y"]
    with report.use(kept):
        found = gains(second.train(), x)
    torch.testing.assert_close(found, torch.tensor([20.0, 0.0, 20.0, 0.0], dtype=torch.float64))
    for block in (first, second):
        torch.testing.assert_close(gains(block.eval(), x), torch.full_like(x[:, 0], 10.0))
        torch.testing.assert_close(block(y=x), block(x))
        pickle.loads(pickle.dumps(block))


def test_a_forward_that_is_replaced_in_a_patched_model(monkeypatch):
    x = torch.randn(64, 4, dtype=torch.float64)
    block = Replaceable().train()
    report = sdkernels.patch(block)
    assert gains(block, x).unique().numel() > 1
    monkeypatch.setattr(Replaceable, "forward", ten_times)
    with pytest.warns(UserWarning, match="the forward of its class was replaced") as caught:
        seen = {round(each) for each in (*gains(block, x).tolist(), *gains(block, x).tolist())}
    assert len(caught) == len(report.whole) == 1
    assert "was replaced" in report.check(x)[0].reason
    assert seen == {0, 20}
    assert {round(each) for each in gains(block.eval(), x).tolist()} == {10}
    assert not sdkernels.patch(block).whole
    assert {round(each) for each in gains(block.train(), x).tolist()} == {0, 20}
    assert not report.whole


# A parameter of the block's own that is computed


class Soft(nn.Module):
    def forward(self, w):
        return nn.functional.softplus(w)


class Scaled(Replaceable):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(4, dtype=torch.float64) + 0.5)

    def forward(self, x):
        return x + self.drop_path(self.f(x) * self.gamma)


def parametrized(block):
    parametrize.register_parametrization(block, "gamma", Soft(), unsafe=True)
    return block


def assert_drops(block, report, gamma):
    """Two samples are kept, and the parameter beneath gets its gradient."""
    kept = [KeptRows.from_index(torch.tensor([0, 2]), batch=4, scale=2.0)]
    x = torch.randn(4, 4, dtype=torch.float64)
    with report.use(kept):
        y = block.train()(x)
    factors = torch.tensor([2.0, 0.0, 2.0, 0.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(y, x + factors * gamma * block.f(x))
    assert not report.whole
    block.zero_grad()
    y.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())
    torch.testing.assert_close(block.eval()(x), x + gamma * block.f(x))


@pytest.mark.parametrize("rows", ["branch", "block"])
@pytest.mark.parametrize("before", [True, False])
def test_a_parametrized_parameter(before, rows):
    block = Scaled()
    gamma = block.gamma.detach().clone()
    if before:
        parametrized(block)
        keys = list(block.state_dict())
    report = sdkernels.patch(block, rows=rows, strict=True)
    if not before:
        assert_drops(block, report, gamma)
        keys = list(parametrized(block).state_dict())
    assert list(block.state_dict()) == keys
    assert parametrize.is_parametrized(block, "gamma")
    assert_drops(block, report, nn.functional.softplus(gamma))

    other = copy.deepcopy(block)
    assert parametrize.is_parametrized(sdkernels.unpatch(other), "gamma")
    assert type(parametrize.remove_parametrizations(other, "gamma")) is Scaled

    parametrize.remove_parametrizations(block, "gamma")
    assert "gamma" in block.state_dict()
    assert_drops(block, report, nn.functional.softplus(gamma))
    assert type(sdkernels.unpatch(block)) is Scaled


# Lazy modules


@pytest.mark.parametrize("checked", [False, True])
def test_lazy_modules_get_their_parameters_first(checked):
    class Lazy(Replaceable):
        def __init__(self):
            super().__init__()
            self.f = nn.LazyLinear(4, dtype=torch.float64)

        def forward(self, x):
            return x + self.drop_path(self.f(x))

    model = nn.Sequential(Lazy(), Lazy()).train()
    report = sdkernels.patch(model, strict=True)
    assert "2 blocks patched" in str(report)
    x = torch.randn(64, 4, dtype=torch.float64)
    seen: list[int] = []
    model[0].f.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    if checked:
        assert [each.reason for each in report.check(x)] == [
            "its lazy modules have no parameters yet"
        ] * 2
        assert all(each.holds for each in report.check(x))
    else:
        model(x)
        assert seen == [64]
    assert type(model[0].f) is nn.Linear
    assert not report.whole
    model(x).sum().backward()
    assert seen[-1] < 64


# Options and probabilities


def test_probability_is_read_at_call_time():
    model = VIT.model().train()
    report = sdkernels.patch(model)
    assert report.drop_probs == [0.0, 0.0, 0.5, 0.5]
    model.blocks[1].drop_path1.drop_prob = 1.0
    model.blocks[1].drop_path2 = nn.Identity()
    assert report.drop_probs == drop_probs(model) == [0.0, 0.0, 1.0, 0.0]
    seen = []
    model.blocks[1].attn.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    model.blocks[1].mlp.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    model(VIT.inputs(4))
    assert seen == [1, 4]  # one sample where none is kept
    timm_drop: Any = load("timm.layers.drop")
    model.blocks[0].drop_path1 = timm_drop.DropPath(1.0)
    model.blocks[0].attn.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    model(VIT.inputs(4))
    assert seen[2] == 1
    # A drop path that is switched off by itself drops nothing.
    model.blocks[0].drop_path1.eval()
    model(VIT.inputs(4))
    assert seen[5] == 4


def test_a_probability_of_zero_overrides_the_drop_path_module():
    model = VIT.model().train()
    report = sdkernels.patch(model, drop_probs=[0.5, 0.5, 0.0, 0.0])
    assert model.blocks[1].drop_path1.drop_prob == 0.5
    block, x = report.patched[1].block, torch.randn(64, 17, 32, dtype=torch.float64)
    y = block(x)
    torch.testing.assert_close(y, block.eval()(x))


def test_timm_without_scaling():
    """DropPath(scale_by_keep=False) keeps its rule."""
    model = VIT.model().train()
    for name in ("drop_path1", "drop_path2"):
        getattr(model.blocks[1], name).scale_by_keep = False
    sdkernels.patch(model)
    block, x = model.blocks[1], torch.randn(64, 17, 32, dtype=torch.float64)
    y = block(x)
    block.eval()
    full = block(x)
    kept_both = (y - full).flatten(1).abs().amax(1) < 1e-12
    assert 4 < kept_both.sum() < 32


def test_paper_rule():
    """rescale="eval": unscaled in training, times 1 - p in evaluation."""
    model = VIT.model()
    report = sdkernels.patch(model, rescale="eval")
    plan = DepthPlan.sample(4, report.drop_probs, rescale="eval")
    assert {rows.scale for rows in plan} == {1.0}
    x = VIT.inputs(4)
    model.eval()
    y = model(x)
    for name in ("drop_path1", "drop_path2"):
        getattr(model.blocks[1], name).drop_prob = 0.0
    full = model(x)
    assert not torch.allclose(y, full)
    sdkernels.unpatch(model)
    block = model.blocks[1]
    block.attn.proj.weight.data.mul_(0.5)
    block.attn.proj.bias.data.mul_(0.5)
    block.mlp.fc2.weight.data.mul_(0.5)
    block.mlp.fc2.bias.data.mul_(0.5)
    torch.testing.assert_close(model(x), y)


class LastBlock:
    """The last block of a net whose blocks have one branch, patched, and what goes into it."""

    def __init__(self, name: str, p: float = 0.5, **options: Any) -> None:
        net, seen = NETS[name], []
        model = net.model().train()
        self.block = sdkernels.patch(model, drop_probs=p, **options).patched[-1].block
        handle = self.block.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
        model(net.inputs(16))
        handle.remove()
        self.x = seen[0]
        self.alone = sdkernels.unpatch(copy.deepcopy(self.block)).eval()
        self.counts: list[int] = []  # rows of the branch
        for module in self.block.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(lambda m, args, out: self.counts.append(len(out)))

    def factors(self) -> list[float]:
        """What each row of the unpatched branch is multiplied by in a call; 0 if it is dropped."""
        self.counts.clear()
        with torch.no_grad():
            added = output_of(self.block(self.x)) - self.x
            branch = output_of(self.alone(self.x)) - self.x
        factors = (added * branch).flatten(1).sum(1) / branch.square().flatten(1).sum(1)
        torch.testing.assert_close(added, branch * factors.view(-1, *[1] * (added.dim() - 1)))
        return [round(factor, 9) for factor in factors.tolist()]


one_branch = pytest.mark.parametrize(
    "name", ["timm-vit-parallel", "timm-convnext", "torchvision-convnext", "transformers-convnext"]
)


@one_branch
def test_fixed_keeps_the_same_number(name):
    last = LastBlock(name, 0.25, sampler="fixed")
    draws = [last.factors() for _ in range(6)]
    scale = round(4 / 3, 9)
    assert {(row.count(scale), row.count(0.0)) for row in draws} == {(12, 4)}
    assert len(set(map(tuple, draws))) > 1
    last = LastBlock(name, 0.25)
    assert len({last.factors().count(0.0) for _ in range(6)}) > 1


@one_branch
def test_mode(name):
    last = LastBlock(name, mode="batch")
    assert {tuple(last.factors()) for _ in range(12)} == {(0.0,) * 16, (2.0,) * 16}
    last = LastBlock(name)
    assert {factor for _ in range(2) for factor in last.factors()} == {0.0, 2.0}
    assert len(set(last.factors())) == 2


class Settable(nn.Module):
    """A drop path with settings of its own."""

    def __init__(self, p=0.5, scale=True, batch=False):
        super().__init__()
        self.p, self.keep, self.enabled, self.scale = p, 1 - p, True, scale
        self._batch = batch

    def forward(self, x):
        if not self.training or not self.enabled or self.p == 0.0:
            return x
        rows = 1 if self._batch else len(x)
        mask = torch.rand(rows, *[1] * (x.dim() - 1)).to(x) < self.keep
        return x * mask / self.keep if self.scale else x * mask


def settable(**options):
    block = Replaceable().train()
    block.drop_path = Settable(**options)
    return block


def gains_seen(block, calls=8):
    """The factors of all samples, and those that stand in one call."""
    x = torch.randn(64, 4, dtype=torch.float64)
    seen = [{round(each, 3) for each in gains(block, x).tolist()} for _ in range(calls)]
    return set().union(*seen), max(map(len, seen))


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(
    ("name", "factors"), [("enabled", {1.0}), ("scale", {0.0, 1.0}), ("_batch", {0.0, 2.0})]
)
def test_a_setting_of_a_drop_path_that_changes(name, factors, stepped):
    block = settable()
    report = sdkernels.patch(block)
    if stepped:
        assert gains_seen(block) == ({0.0, 2.0}, 2)
    setattr(block.drop_path, name, not getattr(block.drop_path, name))
    assert gains_seen(block)[0] == factors
    assert gains_seen(block)[1] == (2 if name == "scale" else 1)
    assert len(report.whole) == (name == "enabled")
    setattr(block.drop_path, name, not getattr(block.drop_path, name))
    assert gains_seen(block) == ({0.0, 2.0}, 2)
    assert not report.whole


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_setting_of_a_drop_path_that_changes_in_compiled_code():
    block = settable()
    x = torch.randn(64, 4, dtype=torch.float64)
    sdkernels.patch(block).check(x)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for name, value, factors in (
        ("enabled", True, {0.0, 2.0}),
        ("enabled", False, {1.0}),
        ("enabled", True, {0.0, 2.0}),
        ("scale", False, {0.0, 1.0}),
    ):
        setattr(block.drop_path, name, value)
        with torch.no_grad():
            found = ((compiled(x) - x) / block.f(x)).mean(1)
        assert {round(each, 3) for each in found.tolist()} == factors


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_code_compares_the_numbers_and_strings_of_a_drop_path():
    """The rest does not stop it, nor do marks of fully_shard or what equals p at first."""
    block = Replaceable().train()
    drop: Any = block.drop_path
    drop.pair, drop.kind, drop.generator = (1, (2, 3)), nn.Linear, torch.Generator()
    drop.start = drop.rate
    report = sdkernels.patch(block)
    report.check(torch.randn(64, 4, dtype=torch.float64))
    drop._is_fsdp_managed_module = drop._fsdp_use_orig_params = True
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    plan = [KeptRows.from_index(torch.tensor([0, 2]), batch=4, scale=2.0)]
    for p in (0.5, 0.25):
        drop.rate = p
        with report.use(plan):  # which a block that runs its own forward refuses
            compiled(torch.randn(4, 4, dtype=torch.float64))


def test_the_entries_of_a_long_schedule_are_not_compared_in_each_call(monkeypatch):
    read: list[object] = []
    real = parts._setting
    monkeypatch.setattr(parts, "_setting", lambda value: read.append(value) or real(value))
    block = settable()
    block.drop_path.values = [0.5] * 1000
    sdkernels.patch(block)
    read.clear()
    assert gains_seen(block) == ({0.0, 2.0}, 2)
    assert block.drop_path.values not in read


def test_a_factor_that_equals_the_probability_is_no_probability():
    class Multiplying(Settable):
        def __init__(self, p):
            super().__init__(p)
            self.factor = 1.0
            del self.keep

        def forward(self, x):
            self.__dict__["keep"] = 1 - self.p
            y = super().forward(x)
            del self.keep
            return y * self.factor

    model = nn.Sequential(settable(), settable())
    model[0].drop_path, model[1].drop_path = Multiplying(0.0), Multiplying(0.5)
    sdkernels.patch(model.train())
    assert gains_seen(model[1]) == ({0.0, 2.0}, 2)
    model[1].drop_path.factor = 0.5
    assert gains_seen(model[1])[0] == {0.0, 1.0}


def test_a_setting_of_a_drop_path_that_is_one_or_true():
    class Mode(Settable):
        kind: Any = 1

        def forward(self, x):
            return x if self.kind is True else super().forward(x)

    block = settable()
    block.drop_path = drop = Mode()
    drop.kind = 1
    sdkernels.patch(block.train())
    assert gains_seen(block) == ({0.0, 2.0}, 2)
    drop.kind = True
    assert gains_seen(block) == ({1.0}, 1)


def test_a_setting_of_a_drop_path_that_it_gets_later(monkeypatch):
    monkeypatch.setattr(Settable, "off", False, raising=False)
    forward = Settable.forward
    monkeypatch.setattr(Settable, "forward", lambda d, x: x if d.off else forward(d, x))
    block = settable()
    sdkernels.patch(block)
    block.drop_path.off = True
    assert gains_seen(block) == ({1.0}, 1)
    del block.drop_path.off
    assert gains_seen(block) == ({0.0, 2.0}, 2)


def test_drop_paths_of_one_class_that_are_set_to_different_things():
    model = nn.Sequential(settable(), settable(scale=False), settable(batch=True), settable(p=0.0))
    report = sdkernels.patch(model)
    assert [entry.name for entry in report.patched] == ["0", "1", "2"]  # `keep` does nothing in 3
    assert [gains_seen(block) for block in model] == [
        ({0.0, 2.0}, 2),
        ({0.0, 1.0}, 2),
        ({0.0, 2.0}, 1),
        ({1.0}, 1),
    ]


def test_a_schedule_of_the_probability_tries_nothing_out(monkeypatch):
    """Also where a drop path holds it twice; and what changes in every step is given up."""
    block = settable()
    sdkernels.patch(block)
    gains_seen(block)
    tried: list[float] = []
    real = parts._try_drop_path
    monkeypatch.setattr(parts, "_try_drop_path", lambda drop: tried.append(drop.p) or real(drop))
    for p in (0.1, 0.25, 0.75):
        block.drop_path.p, block.drop_path.keep = p, 1 - p
        assert gains_seen(block)[0] == {0.0, round(1 / (1 - p), 3)}
    assert not tried
    monkeypatch.setattr(parts, "_MANY", parts._RETRIED[Settable] + 3)
    for step in range(8):
        block.drop_path.step = step
        gains_seen(block, 1)
    assert len(tried) == 3


def test_mode_of_the_drop_path_module():
    last = LastBlock("torchvision-convnext")
    last.block.stochastic_depth.mode = "batch"
    assert {tuple(last.factors()) for _ in range(12)} == {(0.0,) * 16, (2.0,) * 16}
    sdkernels.patch(last.block, mode="row", drop_probs=0.5)
    assert set(last.factors()) == {0.0, 2.0}


@one_branch
@pytest.mark.parametrize(
    ("rescale", "training", "evaluation"),
    [("train", 1.25, 1.0), ("eval", 1.0, 0.8), ("none", 1.0, 1.0)],
)
def test_rescale(name, rescale, training, evaluation):
    last = LastBlock(name, 0.2, rescale=rescale)
    assert set(last.factors() + last.factors()) == {0.0, training}
    last.block.eval()
    assert set(last.factors()) == {evaluation}


@one_branch
def test_min_saving(name):
    for min_saving, runs_whole in ((0.0, False), (0.9, True)):
        last = LastBlock(name, min_saving=min_saving)
        dropped = last.factors().count(0.0)
        assert 0 < dropped < 14
        assert set(last.counts) == {16 if runs_whole else 16 - dropped}


@pytest.mark.parametrize("name", [*SOME, "timm-resnet", "timm-resnet-bottleneck",
                                  "torchvision-resnet-bottleneck"])  # fmt: skip
def test_empty(name):
    """Parameters of branches that keep nothing get no gradient, or one of zeros."""
    net = NETS[name]
    for empty in ("skip", "run"):
        model = net.model().train()
        report = sdkernels.patch(model, drop_probs=net.drop_probs, empty=empty)
        report = sdkernels.patch(model, drop_probs=[1.0] * len(report.drop_probs), empty=empty)
        y, _ = train_step(model, net.inputs(4))
        assert y.isfinite().all()
        # Shortcuts are no part of a branch.
        gradients = {f"{entry.name}.{key}": parameter.grad for entry in report.patched
                     for key, parameter in entry.block.named_parameters()
                     if "downsample" not in key}  # fmt: skip
        assert gradients
        for key, gradient in gradients.items():
            assert gradient is None if empty == "skip" else not gradient.any(), key


@pytest.mark.parametrize("name", ["timm-resnet", "timm-resnet-bottleneck", "torchvision-resnet",
                                  "torchvision-resnet-bottleneck"])  # fmt: skip
def test_a_skipped_block_does_not_write_into_its_input(name):
    """The activation after the sum is in place, and the sum may be the input."""
    net = NETS[name]
    model = net.model().train()
    sdkernels.patch(model, drop_probs=1.0, empty="skip")
    block = next(b for b in patched_blocks(model) if b.downsample is None)
    block._sdkernels.p = [1.0]
    width = next(block.parameters()).shape[1]
    x = torch.randn(2, width, 4, 4, dtype=torch.float64)
    before = x.clone()
    assert_same_bits(block(x), before.relu())
    assert_same_bits(x, before)


@pytest.mark.parametrize(("name", "activation"), [("timm-resnet", "act2"),
                         ("timm-resnet-bottleneck", "act3"), ("torchvision-resnet", "relu"),
                         ("torchvision-resnet-bottleneck", "relu")])  # fmt: skip
def test_the_last_relu_of_a_block_is_fused(name, activation):
    """Unless it is watched, or another activation."""
    model = NETS[name].model().train()
    freeze_norms(model)
    report = sdkernels.patch(model, drop_probs=0.5)
    plan, seen = make_rows(len(report.drop_probs)), []
    for block in patched_blocks(model):
        width = next(block.parameters()).shape[1]
        x = torch.randn(4, width, 4, 4, dtype=torch.float64, requires_grad=True)
        with report.use(plan):
            fused = block(x)
            handle = getattr(block, activation).register_forward_hook(lambda *_: seen.append(1))
            called = block(x)
            handle.remove()
            setattr(block, activation, nn.LeakyReLU(0.0))
            other = block(x)
        assert "relu" not in fused.grad_fn.name().lower()
        assert called.grad_fn.name() == "ReluBackward0"
        assert other.grad_fn.name() == "LeakyReluBackward0"
        grad = torch.randn_like(fused)
        inputs = (x, *block.parameters())
        expected = torch.autograd.grad(called, inputs, grad)
        for y in (fused, other):
            torch.testing.assert_close(y, called)
            torch.testing.assert_close(torch.autograd.grad(y, inputs, grad), expected)
    assert seen


@pytest.mark.parametrize("how", ["argument", "config"])
def test_attention_weights_are_of_all_samples(how):
    """Who asks for them gets the original forward."""
    model: Any = NETS["transformers-swin"].model().train()
    x = NETS["transformers-swin"].inputs(2)
    model.set_attn_implementation("eager")
    asked = {"output_attentions": True} if how == "argument" else {}
    if how == "config":
        model.config.output_attentions = True
    sdkernels.patch(model, drop_probs=0.5)
    with pytest.warns(UserWarning, match="SwinLayer keeps its own forward, .* it hands on attn_w"):
        attentions = model(x, **asked).attentions
    assert [each.shape[0] for each in attentions] == [2 * 36, 2 * 9]  # windows of all samples
    assert len(model.eval()(x, **asked).attentions) == 2


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_what_transformers_collects_is_of_all_samples(reentrant):
    """By hooks inside of the blocks, which stay and collect nothing in other calls."""
    model: Any = NETS["transformers-dinov2"].model().train()
    x = NETS["transformers-dinov2"].inputs(4)
    model.set_attn_implementation("eager")
    report = sdkernels.patch(model, drop_probs=0.5)
    if reentrant is not None:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    seen: list[int] = []
    model.encoder.layer[1].mlp.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    for kinds in ({"output_attentions"}, {"output_attentions", "output_hidden_states"}):
        found = model(x, **dict.fromkeys(kinds, True))
        found.last_hidden_state.sum().backward()
        assert {len(each) for each in found.attentions} == {4}
    assert set(seen) == {4}
    plan = [KeptRows.from_index(torch.tensor([1, 2]), batch=4)] * len(report.drop_probs)
    with report.use(plan):
        for collects in (True, False):
            seen.clear()
            found = model(x, output_hidden_states=collects)
            found.last_hidden_state.sum().backward()
            assert set(seen) == {2}
        with pytest.raises(RuntimeError, match="what its modules compute is collected"):
            model(x, output_attentions=True)
    assert not report.whole


MASKED = {
    "flash_attention_2": lambda x, attention_mask: (x * attention_mask[..., None], None),
    # SDPA knows no flat masks.
    "sdpa": lambda x, attention_mask: (attention_mask.to(x.dtype) @ x, None),
}


def test_flat_masks_of_transformers():
    """Flash attention's belong to the samples; [tokens, tokens], as scores are masked, to all."""
    model: Any = NETS["transformers-dinov2"].model().train()
    report = sdkernels.patch(model)
    block = report.patched[-1].block
    seen: list[Any] = []
    block.attention.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    x, kept = torch.randn(4, 5, 32, dtype=torch.float64), torch.tensor([0, 1, 0, 0]).bool()
    of_samples, of_all = torch.arange(20).view(4, 5) % 3 > 0, torch.ones(5, 5).bool()
    square = torch.arange(16).view(4, 4) % 3 > 0  # as many tokens as samples
    for attention, mask, rows, expected in (
        ("flash_attention_2", of_samples, kept, of_samples[1:2]),
        ("flash_attention_2", square, kept, square[1:2]),
        ("sdpa", of_all, kept, of_all),
        ("sdpa", square, kept, square),
        ("sdpa", of_all, torch.zeros(4).bool(), of_all),
    ):
        seen.clear()
        block.attention.config._attn_implementation = attention
        block.attention.forward = MASKED[attention]
        with report.use([KeptRows.from_mask(rows)] * len(report.drop_probs)):
            block(x[:, : mask.shape[1]], attention_mask=mask)
        assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-things", "torchvision-convnext"])
def test_expected_saving(name):
    """What the probabilities say, of the blocks; stem and head stay."""
    net = NETS[name]
    model, report = patched_copy(net.model().train(), net)
    model.eval()
    model.get_submodule(report.patched[0].name).train()
    x = net.inputs(1)
    blocks = sum(p.numel() for e in report.patched for p in e.block.parameters())
    share = blocks / sum(p.numel() for p in model.parameters())
    probabilities = report.drop_probs
    average = sum(probabilities) / len(probabilities)
    assert report.expected_saving() <= share * max(probabilities)
    assert report.expected_saving() > 0.8 * share * average
    assert 0.5 * average < report.expected_saving(x) < 1.3 * average
    # The count leaves the model as it was.
    assert report.patched[0].block.training
    assert not report.patched[1].block.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    sdkernels.patch(model, drop_probs=[0.0] * len(probabilities))
    assert report.expected_saving() == report.expected_saving(x) == 0.0


def test_drop_probs():
    model = NETS["torchvision-resnet"].model()
    without = sdkernels.patch(model)
    assert not without.patched
    assert "5 left alone" in str(without)
    assert {e.reason for e in without.left} == {"it has no drop path (drop_probs= gives it one)"}
    assert sdkernels.patch(model, drop_probs=0.5).drop_probs == linear_decay(5, 0.5)
    given = [0.5, 0.0, 0.25, 0.125, 1.0]
    assert sdkernels.patch(model, drop_probs=given).drop_probs == given
    # By blocks, whose branches are alike.
    vit = VIT.model()
    assert sdkernels.patch(vit, drop_probs=0.5).drop_probs == [0.25, 0.25, 0.5, 0.5]
    report = sdkernels.patch(vit)
    assert report.drop_probs == [0.0, 0.0, 0.5, 0.5]
    # A block whose probabilities are 0 is patched, for the time when they rise; the report says so.
    assert [entry.name for entry in report.idle] == ["blocks.0"]
    assert "2 blocks patched (1 of them run as before: p == 0), 0 left alone" in str(report)
    assert "blocks.0  Block  p == 0: runs as before, until a p rises" in str(report)
    timm_drop: Any = load("timm.layers.drop")
    vit.blocks[0].drop_path2 = timm_drop.DropPath(0.1)
    assert not report.idle
    assert "run as before" not in str(report)
