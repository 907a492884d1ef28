"""Patched models of the real libraries against the models as they were, with the same kept rows."""

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from comparison import assert_same_bits
from torch import Tensor, nn
from zoo import NETS, Net, output_of

import sdkernels
from sdkernels import KeptRows, reference
from sdkernels.models import PatchReport, blocks

BATCH = 4
NORMS = (nn.BatchNorm2d,)
each_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)
batch_norm_nets = {name: net for name, net in NETS.items() if net.batch_norm}


class Masked(nn.Module):
    """In the place of a drop path: multiplies by the mask of given rows, one call after another."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[KeptRows] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows[self.calls % len(self.rows)]
        self.calls += 1
        mask = (rows.slot >= 0).to(x.dtype) * rows.scale
        return x * mask.view(-1, *[1] * (x.dim() - 1))


def make_rows(count: int, batch: int = BATCH) -> list[KeptRows]:
    """Rows for every branch: none in the second, all but scaled in the third, half elsewhere."""
    generator = torch.Generator().manual_seed(0)
    plan = []
    for branch in range(count):
        mask = torch.rand(batch, generator=generator) < 0.5
        if branch == 1:
            mask[:] = False
        elif branch == 2:
            mask[:] = True
        plan.append(KeptRows.from_mask(mask, 1.5))
    return plan


def give_masks(model: nn.Module, report: PatchReport, plan: list[KeptRows]) -> nn.Module:
    """The model before it was patched, with the masks of these rows for drop paths."""
    rows = iter(plan)
    for entry in report.patched:
        for branch in entry.branches:
            if branch.drop is None:  # torchvision's ResNet: after the last norm of the branch
                norm = "bn3" if hasattr(entry.block, "bn3") else "bn2"
                name, masked = f"{entry.name}.{norm}", Masked()
                masked.rows.append(next(rows))
                whole = nn.Sequential(model.get_submodule(name), masked)
                model.set_submodule(name, whole)
                continue
            name = f"{entry.name}.{branch.drop}"
            there = attrgetter(name)(model)
            if not isinstance(there, Masked):
                there = Masked()
                model.get_submodule(name.rpartition(".")[0])
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, there)
            there.rows.append(next(rows))
    return model


def freeze_norms(model: nn.Module) -> None:
    """Batch statistics are of the kept rows, by design: out of the comparison with masking."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()


def train_step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)  # patch dropout (of EVA) draws from it
    y = output_of(model(x))
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2)))
    return y.detach(), {"x": x.grad} | {n: p.grad for n, p in model.named_parameters()}


def patched_copy(model: nn.Module, net: Net) -> tuple[nn.Module, PatchReport]:
    model = copy.deepcopy(model)
    return model, sdkernels.patch(model, drop_probs=net.drop_probs)


@each_net
def test_all_blocks_are_patched(net):
    _, report = patched_copy(net.model(), net)
    assert {type(entry.block).__name__ for entry in report.patched} == set(net.classes)
    assert all("no skip connection" in entry.reason for entry in report.left)
    assert max(report.drop_probs) > 0.3


@each_net
def test_evaluation_is_bit_equal(net):
    model = net.model()
    patched, _ = patched_copy(model, net)
    x = net.inputs(2)
    with torch.no_grad():
        assert_same_bits(output_of(patched.eval()(x)), output_of(model.eval()(x)))


@each_net
def test_no_drop_is_bit_equal(net):
    """At p = 0 training runs the original forward, and reads p again at every call."""
    model = net.model().train()
    patched, report = patched_copy(model, net)
    for entry in report.patched:
        entry.block._sdkernels.p = [None] * len(entry.branches)
    for module in (*model.modules(), *patched.modules()):
        if type(module).__name__.endswith(("DropPath", "StochasticDepth")):
            setattr(module, "p" if hasattr(module, "p") else "drop_prob", 0.0)
    assert not any(report.drop_probs)
    x = net.inputs(2)
    torch.manual_seed(3)
    expected = output_of(model(x))
    torch.manual_seed(3)
    assert_same_bits(output_of(patched(x)), expected)


@each_net
def test_training_is_masking(net):
    """Output and all gradients, in float64, with the same kept rows."""
    model = net.model().train()
    freeze_norms(model)
    patched, report = patched_copy(model, net)
    plan = make_rows(len(report.drop_probs))
    reference_model = give_masks(model, report, plan)
    x = net.inputs(BATCH)
    with report.use(plan):
        y, gradients = train_step(patched, x)
    expected, expected_gradients = train_step(reference_model, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    # The reference for torchvision's ResNet has its norms one level deeper.
    renamed = {n.replace("bn2.0.", "bn2.").replace("bn3.0.", "bn3."): g
               for n, g in expected_gradients.items()}  # fmt: skip
    assert gradients.keys() == renamed.keys()
    for name, gradient in gradients.items():
        if renamed[name] is None:
            assert gradient is None, name
            continue
        assert gradient is not None, name
        torch.testing.assert_close(gradient, renamed[name], rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("net", batch_norm_nets.values(), ids=batch_norm_nets)
def test_batch_statistics_are_of_the_kept_rows(net, monkeypatch):
    """Training mode norms: as gather, branch, index_add in PyTorch; not as masking."""
    model = net.model().train()
    patched, report = patched_copy(model, net)
    ours, plan = copy.deepcopy(patched), make_rows(len(report.drop_probs))
    plan[1] = plan[0]  # some norms refuse to train on nothing
    x = net.inputs(BATCH)
    with sdkernels.models.use(ours, plan):
        y, gradients = train_step(ours, x)

    def plain(x: Any, branch: Callable[..., Tensor], p: float, mode: str, training: bool,
              **options: Any) -> Tensor:  # fmt: skip
        wanted = ("norm", "layer_scale", "residual", "rows")
        options = {name: options[name] for name in wanted}
        if options["rows"] is None:
            options["rows"] = KeptRows.from_index(torch.arange(len(x)), len(x))
        return reference.index_add(x, branch, **options)

    with monkeypatch.context() as patcher, report.use(plan):
        patcher.setattr(blocks, "fused_stochastic_depth", plain)
        expected, expected_gradients = train_step(patched, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-7, atol=1e-8)
    buffers = dict(patched.named_buffers())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])
    masked, _ = train_step(give_masks(model, report, plan), x)
    assert not torch.allclose(y, masked)


def saved_bytes(model: nn.Module, names: list[str], x: Tensor) -> int:
    """Memory that the backward keeps alive for the blocks of these names, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice
    depth = 0

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if depth and storage.data_ptr() not in own:
            kept.append(tensor)
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(enter)
        model.get_submodule(name).register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output_of(model(x))
    return sum(storages.values())


@each_net
def test_activation_memory_is_lower(net):
    model = net.model().train()
    patched, report = patched_copy(model, net)
    rows = KeptRows.from_index(torch.arange(2), 8, 4.0)
    x, names = net.inputs(8), [entry.name for entry in report.patched]
    dense = saved_bytes(model, names, x)
    with report.use([rows] * len(report.drop_probs)):
        compacted = saved_bytes(patched, names, x)
    assert compacted < net.memory * dense, compacted / dense


@each_net
def test_drawn_rows(net):
    """Without a plan rows are drawn; a step changes every parameter and leaves numbers."""
    model, _ = patched_copy(net.model().train(), net)
    y, gradients = train_step(model, net.inputs(6))
    assert y.isfinite().all()
    for name, gradient in gradients.items():
        assert gradient is None or gradient.isfinite().all(), name
    other, _ = train_step(model, net.inputs(6))
    assert not torch.equal(y, other)
