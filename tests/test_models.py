"""Patched models of the real libraries against the models as they were, with the same kept rows."""

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from comparison import assert_same_bits
from patched_models import BATCH, freeze_norms, give_masks, make_rows, patched_copy, train_step
from torch import Tensor, nn
from zoo import NETS, Net, maxxvit, output_of

import sdkernels
from sdkernels import KeptRows, Shared, reference
from sdkernels.models import adding

each_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)
batch_norm_nets = {name: net for name, net in NETS.items() if net.batch_norm}


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
    plan[1] = plan[2] = plan[0]  # the comparison runs every branch on its rows, as they are
    x = net.inputs(BATCH)
    with sdkernels.models.use(ours, plan):
        y, gradients = train_step(ours, x)

    def plain(x: Any, branch: Callable[..., Tensor], p: float, mode: str, training: bool,
              **options: Any) -> Tensor:  # fmt: skip
        wanted = ("norm", "layer_scale", "residual", "rows")
        given = {name: options[name] for name in wanted}
        if given["rows"] is None:
            given["rows"] = KeptRows.from_index(torch.arange(len(x)), len(x))
        args = [arg.value if isinstance(arg, Shared) else arg for arg in options["args"]]
        total = reference.index_add(x, lambda kept: branch(kept, *args), **given)
        return total.relu() if options["activation"] else total

    with monkeypatch.context() as patcher, report.use(plan):
        patcher.setattr(adding, "fused_stochastic_depth", plain)
        expected, expected_gradients = train_step(patched, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-7, atol=1e-8)
    buffers = dict(patched.named_buffers())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])
    masked, _ = train_step(give_masks(model, report, plan), x)
    assert not torch.allclose(y, masked)


@pytest.mark.parametrize("net", [
    NETS["timm-mobilenet-v4"],
    Net(
        maxxvit(transformer={"use_nchw_attn": True, "norm_layer": "batchnorm2d"}),
        ("MbConvBlock", "PartitionAttention2d"),
    ),
], ids=["mobilenet-v4", "maxvit"])  # fmt: skip
def test_running_statistics_stay_without_rows(net):
    """Attention runs a sample of ones then, which is none of the data."""
    model = net.model().train()
    report = sdkernels.patch(model, drop_probs=0.5)
    branches = [(e.block, part) for e in report.patched for b in e.branches for part in b.parts]
    parts = [attrgetter(part)(block) for block, part in branches]
    norms = [
        m
        for part in parts
        if isinstance(part, nn.Module)
        for m in part.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    assert norms
    before = copy.deepcopy([norm.state_dict() for norm in norms])
    rows = KeptRows.from_mask(torch.zeros(BATCH, dtype=torch.bool))
    with report.use([rows] * len(report.drop_probs)):
        train_step(model, net.inputs(BATCH))
    for norm, state in zip(norms, before, strict=True):
        assert norm.training
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(norm.state_dict()[name], state[name]), name
        for parameter in norm.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()


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
    """Without a plan rows are drawn; a step still changes every parameter."""
    model = net.model().train()
    report = sdkernels.patch(model, drop_probs=net.drop_probs, sampler="fixed")
    x, everything = net.inputs(6), KeptRows.from_mask(torch.ones(6).bool())
    y, gradients = train_step(model, x)
    with report.use([everything] * len(report.drop_probs)):
        dense, dense_gradients = train_step(model, x)
    assert y.isfinite().all()
    assert not torch.allclose(y, dense)
    for name, expected in dense_gradients.items():
        gradient = gradients[name]
        assert (gradient is None) == (expected is None), name
        if gradient is not None and expected is not None:
            assert gradient.isfinite().all(), name
            assert gradient.any() or not (expected.abs() > 1e-12).any(), name
