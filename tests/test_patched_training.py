"""Patched models in training loops: precision, averages, checkpointing, DataParallel, failures."""

import copy
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from checkpointing import each_variant
from comparison import assert_same_bits
from libraries import load
from patched_models import freeze_norms, give_masks
from torch import Tensor, nn
from torch.nn.parallel.replicate import replicate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from zoo import NETS, Net, output_of

import sdkernels
from sdkernels.models import PatchReport, drop_probs

VIT, CONVNEXT = NETS["timm-deit3"], NETS["timm-convnext"]
both_nets = pytest.mark.parametrize("net", [VIT, CONVNEXT], ids=["vit", "convnext"])
BATCH, STEPS = 8, 4


def patched(
    net: Net, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Any, PatchReport]:
    model = net.model().to(dtype).train()
    return model, sdkernels.patch(model, drop_probs=0.5, **options)


def images(net: Net, step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + step)
    x = net.inputs(BATCH).to(dtype)
    return x, torch.randint(5, (BATCH,))


def backward(model: nn.Module, net: Net, step: int = 0) -> list[Tensor]:
    x, labels = images(net, step)
    model.zero_grad()
    torch.manual_seed(step)
    loss = nn.functional.cross_entropy(output_of(model(x)), labels)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, e in zip(found, expected, strict=True):
        assert_same_bits(a, e)


# Precision


def train(
    model: nn.Module, net: Net, autocast: torch.dtype | None, use: Callable[[int], Any]
) -> Tensor:
    """Losses, with a GradScaler where gradients are float16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", 2.0**10, enabled=autocast == torch.float16)
    losses = []
    for step in range(STEPS):
        x, labels = images(net, step, torch.float32)
        optimizer.zero_grad()
        with use(step):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                y = model(x)
            loss = nn.functional.cross_entropy(y.float(), labels)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    assert scaler.get_scale() == (2.0**10 if autocast == torch.float16 else 1.0)
    return torch.stack(losses)


@both_nets
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(net, autocast):
    """Losses as close to float32's as those of masking in the same precision."""

    def masked(autocast: torch.dtype | None) -> Tensor:
        _, report = patched(net, torch.float32)
        original = net.model().float().train()
        for step in range(STEPS):  # a drop path is called once a step
            give_masks(original, report, list(report.plan_for_step(1, step, BATCH)))
        return train(original, net, autocast, lambda step: torch.enable_grad())

    model, report = patched(net, torch.float32)
    found = train(model, net, autocast, lambda s: report.use(report.plan_for_step(1, s, BATCH)))
    exact, expected = masked(None), masked(autocast)
    assert (expected - exact).abs().max() > 0
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-5


# Averages of weights


def averages() -> dict[str, Callable[[nn.Module], Any]]:
    return {
        "AveragedModel": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        "ModelEmaV3": lambda m: load("timm.utils").ModelEmaV3(m, decay=0.5),
    }


@both_nets
@pytest.mark.parametrize("kind", averages())
def test_average_of_weights(net, kind):
    """Made inside of `use` even, it is bound to no rows; it averages, and evaluates as its weights
    do in a model that was never patched."""
    model, report = patched(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with report.use(report.plan(BATCH)):
        backward(model, net)
        average = averages()[kind](model)
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(STEPS):
        backward(model, net, step)
        optimizer.step()
        state = torch.get_rng_state()
        if kind == "AveragedModel":
            average.update_parameters(model)
        else:
            average.update(model)
        assert torch.equal(torch.get_rng_state(), state)
        decay = 0.0 if step == 0 and kind == "AveragedModel" else 0.5  # its first update copies
        for e, p in zip(expected, model.parameters(), strict=True):
            e.lerp_(p.detach(), 1 - decay)
    for a, e in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(a.detach(), e)
    plain = net.model().eval()
    plain.load_state_dict(average.module.state_dict())
    x, _ = images(net, 9)
    assert_same_bits(average.module.eval()(x), plain(x))
    average.module.train()
    assert not torch.equal(average.module(x), average.module(x))  # it draws rows of its own
    assert drop_probs(average.module) == report.drop_probs


# Activation checkpointing


def checkpointed(module: nn.Module, variant: dict[str, Any]) -> None:
    forward = module.forward
    module.forward = lambda x, *a, **k: checkpoint(forward, x, *a, **variant, **k)


@each_variant
@both_nets
@pytest.mark.parametrize("rows", ["own", "plan"])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_checkpointing(net, variant, rows, where):
    """Blocks, or the modules of their branches, run again in the backward: the same bits."""
    found, calls = [], []
    for which in (False, True):
        model, report = patched(net)
        freeze_norms(model)
        inner = [entry.block.mlp for entry in report.patched]
        for mlp in inner:
            mlp.fc1.register_forward_hook(lambda *_, which=which: calls.append(which))
        if which and where == "inside":
            for mlp in inner:
                checkpointed(mlp, variant)
        if which and where == "outside":
            wrap = partial(checkpoint, **variant)
            for entry in report.patched:
                model.set_submodule(entry.name, Wrapped(entry.block, wrap))
        if rows == "plan":
            with report.use(report.plan_for_step(3, 0, BATCH)):
                found.append(backward(model, net))
        else:
            found.append(backward(model, net))
    assert calls.count(True) == 2 * calls.count(False)
    assert_equal(*found)


class Wrapped(nn.Module):
    def __init__(self, block: nn.Module, wrap: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.wrap = block, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.block, x)


@both_nets
def test_checkpointing_of_timm(net):
    expected = backward(patched(net)[0], net)
    model, _ = patched(net)
    model.set_grad_checkpointing(True)
    assert_equal(backward(model, net), expected)


# DataParallel


def test_data_parallel_without_gpus_is_the_module_itself():
    model, report = patched(VIT)
    wrapped = nn.DataParallel(model)
    x, _ = images(VIT, 0)
    with report.use(report.plan(BATCH)):
        assert_same_bits(wrapped(x), model(x))


@pytest.fixture
def replicas_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DataParallel does on several GPUs, with copies of the parameters on the CPU."""

    def broadcast(tensors: Any, devices: Any, detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]  # the name is that of the function, too
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)


@both_nets
def test_replicas_draw_for_themselves(net, replicas_on_cpu):
    """Each runs its share of the batch in a thread of its own; gradients are of the one model."""
    model, report = patched(net)
    freeze_norms(model)
    replicas = replicate(model, [0, 1])
    x, _ = images(net, 0)
    results: list[Any] = [None, None]

    def run(i: int) -> None:
        results[i] = replicas[i](x[: BATCH // 2] if i == 0 else x[BATCH // 2 :])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cat(results).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for entry in report.patched:
        assert not entry.block._sdkernels.pending  # the replicas' forwards are not the model's
    # A replica computes what the model computes with the same rows.
    torch.manual_seed(3)
    alone = replicas[0](x)
    torch.manual_seed(3)
    assert_same_bits(alone, model(x))


def test_data_parallel_refuses_a_plan(replicas_on_cpu):
    model, report = patched(VIT)
    with (
        report.use(report.plan(BATCH)),
        pytest.raises(RuntimeError, match=r"^plan: nn\.DataParallel splits the batch"),
    ):
        replicate(model, [0, 1])
    replicate(model, [0, 1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@both_nets
def test_data_parallel_on_gpus(net):
    model, _ = patched(net)
    model.cuda()
    x, _ = images(net, 0)
    nn.DataParallel(model)(x.cuda()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Failures


class Broken(Exception):
    pass


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "inplace": {"inplace": True},
    "min_saving": {"min_saving": 1.0},
    "fixed": {"sampler": "fixed"},
}


@both_nets
@pytest.mark.parametrize("where", ["branch", "backward"])
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_a_step_after_an_exception_is_right(net, where, options):
    model, report = patched(net, **options)
    twin = copy.deepcopy(model)

    def explode(*_: object) -> None:
        raise Broken

    for bound in (False, True):
        module = report.patched[-1].block.mlp
        if where == "branch":
            handle = module.register_forward_pre_hook(explode)
        else:
            handle = module.register_full_backward_hook(explode)
        using = report.use(report.plan(BATCH)) if bound else nullcontext()
        with pytest.raises(Broken), using:
            backward(model, net)
        handle.remove()
    for block in (entry.block for entry in report.patched):
        assert block._sdkernels.user is None
        assert not any(block._sdkernels.rows)
    freeze_norms(model)  # whose running statistics have gone on
    freeze_norms(twin)
    assert_equal(backward(model, net, 1), backward(twin, net, 1))


def test_norms_train_again_after_an_exception():
    """Where no row is kept, they are in evaluation mode while the sample of ones runs."""
    net = NETS["timm-mobilenet-v4"]
    model, report = patched(net)
    block = next(e.block for e in report.patched if hasattr(e.block, "attn"))
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms

    def explode(*_: object) -> None:
        raise Broken

    handle = block.attn.register_forward_hook(explode)
    nothing = sdkernels.KeptRows.from_mask(torch.zeros(BATCH, dtype=torch.bool))
    x, _ = images(net, 0)
    with report.use([nothing] * len(report.drop_probs)), pytest.raises(Broken):
        model(x)
    handle.remove()
    assert all(norm.training for norm in norms)
