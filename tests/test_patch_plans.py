"""A patched model with the rows of a plan: checkpointing, lists of crops, masks."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from comparison import assert_same_bits
from patched_models import freeze_norms, give_masks, make_rows, patched_copy, train_step
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import NETS, output_of, timm_vit

import sdkernels
from sdkernels import DepthPlan, KeptRows
from sdkernels.models import use

VIT = NETS["timm-vit"]


def test_a_plan_for_the_whole_model():
    model = VIT.model().train()
    report = sdkernels.patch(model)
    plan = DepthPlan.sample(8, report.drop_probs, sampler="fixed")
    x = VIT.inputs(8)
    with report.use(plan):
        first, again = model(x), model(x)
    assert_same_bits(first, again)
    plan.resample_()
    with use(model, plan):
        assert not torch.equal(model(x), first)
        with use(model, [KeptRows.from_mask(torch.ones(8).bool())] * 4):  # the inner one counts
            model.eval()
            whole = model(x)
            model.train()
            torch.testing.assert_close(model(x), whole)
        assert_same_bits(model(x), model(x))
    assert not torch.equal(model(x), model(x))
    model.eval()
    with report.use(plan):
        assert_same_bits(model(x), whole)
    wrong = DepthPlan.sample(8, [0.5] * 3)
    expected = "plan: expected 4 branches as the model has, got 3"
    with pytest.raises(ValueError, match=expected), report.use(wrong):
        pass
    model.train()
    expected = "rows: made for a batch of 4 rows, but x has 8"
    with pytest.raises(ValueError, match=expected), report.use(report.plan(4)):
        model(x)
    assert not torch.equal(model(x), model(x))  # nothing is left bound by an exception


@pytest.mark.parametrize("name", ["timm-deit3", "timm-swin-v2", "transformers-beit"])
def test_no_row_is_kept(name):
    """The stream is untouched, gradients are zeros, and a NaN of a dropped sample reaches none."""
    net = NETS[name]
    _, report = patched_copy(net.model().train(), net)
    block = report.patched[-1].block
    args = {"timm-swin-v2": (8, 8, 32), "transformers-beit": (17, 32), "timm-deit3": (17, 32)}
    x = torch.randn(4, *args[name], dtype=torch.float64)
    x[0] = float("nan")
    kwargs = {"resolution": (32, 32)} if name == "transformers-beit" else {}
    nothing = KeptRows.from_mask(torch.zeros(4, dtype=torch.bool), 2.0)
    with report.use([nothing] * len(report.drop_probs)):
        y = block(x.requires_grad_(), **kwargs)
    assert_same_bits(y, x)
    y.sum().backward()
    for parameter_name, parameter in block.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert not parameter.grad.any(), parameter_name


def test_weighted_rows():
    """All rows at scale 1 are the plain sum, unless they carry weights, which get gradients."""
    model = VIT.model().train()
    report = sdkernels.patch(model)
    x = VIT.inputs(4)
    everything = torch.ones(4, dtype=torch.bool)
    weight = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    with report.use([KeptRows.from_mask(everything, weight=weight)] * 4):
        weighted = model(x)
    with report.use([KeptRows.from_mask(everything, 0.5)] * 4):
        torch.testing.assert_close(weighted, model(x))
    weighted.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().min() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_plan_with_checkpointing(use_reentrant):
    """A block that runs again in the backward finds its rows, whatever ran in between."""
    model = VIT.model().train()
    report = sdkernels.patch(model, drop_probs=[0.5] * 4, sampler="fixed")
    plan = report.plan(8)
    x = VIT.inputs(8).requires_grad_()

    def run(through: Any) -> list[torch.Tensor]:
        model.zero_grad()
        stream = model.pos_drop(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks:
            stream = through(block, stream)
        stream.square().sum().backward()
        return [p.grad.clone() for p in model.blocks.parameters()]

    def checkpointed(block: nn.Module, stream: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, stream, use_reentrant=use_reentrant)

    with report.use(plan):
        expected = run(lambda block, stream: block(stream))
        actual = run(checkpointed)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    # Without a plan the generator's state brings the rows back.
    run(checkpointed)
    with report.use(plan):
        stream = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            stream = checkpointed(block, stream)
    with pytest.raises(RuntimeError, match=r"call backward\(\) inside the with statement"):
        stream.sum().backward()
    del stream
    run(checkpointed)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_with_other_rows_is_refused(use_reentrant):
    """Never another function's gradient: what cannot be told apart is an error."""
    model = VIT.model().train()
    report = sdkernels.patch(model)
    plan, other = (DepthPlan.sample(8, report.drop_probs, sampler="fixed") for _ in range(2))
    x = VIT.inputs(8)

    def forward() -> torch.Tensor:
        stream = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            stream = checkpoint(block, stream, use_reentrant=use_reentrant)
        return model.norm(stream).sum()

    def refuse(losses: list[torch.Tensor]) -> None:
        with pytest.raises(RuntimeError, match=r"^plan: a checkpointed block is run again"):
            sum(losses).backward()
        losses.clear()

    with report.use(plan):
        losses = [forward()]
    with torch.no_grad():
        model(x)  # the figure of a log
    refuse(losses)
    with report.use(plan):
        losses = [forward()]
    with report.use(other):
        losses.append(forward())
        refuse(losses)
    with report.use(plan):
        losses = [forward()]
        plan.resample_()
        refuse(losses)
    # A step that is given up leaves nothing behind, and two forwards of one plan are no doubt.
    with report.use(plan):
        forward()
    with report.use(other):
        (forward() + forward()).backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_inside_of_use_is_bound_to_no_plan(copied):
    model = VIT.model().train()
    report = sdkernels.patch(model)
    with report.use(DepthPlan.sample(8, report.drop_probs, sampler="fixed")):
        model(VIT.inputs(8))
        clone = copied(model)
    assert not torch.equal(clone(VIT.inputs(8)), clone(VIT.inputs(8)))
    clone(VIT.inputs(3))


def test_use_from_another_thread_is_refused():
    model = VIT.model().train()
    report = sdkernels.patch(model)
    plan = DepthPlan.sample(8, report.drop_probs)
    errors = []

    def other() -> None:
        try:
            with report.use(plan):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with report.use(plan):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert errors == ["plan: another thread is using this model with a plan of its own"]
    other()
    assert len(errors) == 1


@pytest.mark.parametrize("entry", [None, 3, [None]])
def test_a_plan_of_something_else(entry):
    model = VIT.model().train()
    report = sdkernels.patch(model)
    plan = [*DepthPlan.sample(8, report.drop_probs)][:-1]
    with pytest.raises(TypeError, match=r"^plan: expected KeptRows"), report.use([*plan, entry]):
        pass


@pytest.mark.parametrize("name", ["timm-deit3", "timm-eva", "transformers-dinov2"])
def test_a_list_of_crops(name):
    """Crops of other sizes and batches: as one after the other, with rows for each."""
    net = NETS[name]
    _, report = patched_copy(net.model().train(), net)
    block = report.patched[-1].block
    crops = [torch.randn(b, n, 32, dtype=torch.float64) for b, n in ((4, 17), (8, 5), (6, 5))]
    rows = [make_rows(4, len(crop)) for crop in crops]
    plan: list[Any] = [None] * (len(report.drop_probs) - 2)
    plan += [[r[0] for r in rows], [r[3] for r in rows]]
    plan = [plan[-1] if entry is None else entry for entry in plan]
    kwargs: dict[str, Any] = {}
    if name == "timm-eva":
        rope = torch.randn(16, 32, dtype=torch.float64)
        each = torch.randn(8, 1, 4, 32, dtype=torch.float64)  # of the samples: patches dropped
        kwargs = {"rope": [rope, each, rope[:4]]}
    with report.use(plan):
        ys = block(list(crops), **kwargs)
    assert [y.shape for y in ys] == [crop.shape for crop in crops]
    for i, (y, crop) in enumerate(zip(ys, crops, strict=True)):
        alone = {key: value[i] for key, value in kwargs.items()}
        single = [entry[i] for entry in plan]
        with report.use(single):
            torch.testing.assert_close(block(crop, **alone), y)
    drawn = block(list(crops), **kwargs)
    assert len(drawn) == 3
    block.eval()
    first = "hidden_states" if name == "transformers-dinov2" else "x"
    for ys in (block(list(crops), **kwargs), block(**{first: list(crops)}, **kwargs)):
        for i, (y, crop) in enumerate(zip(ys, crops, strict=True)):
            assert_same_bits(y, block(crop, **{key: value[i] for key, value in kwargs.items()}))
    block.train()
    with report.use(plan):
        by_position, by_name = block(list(crops), **kwargs), block(**{first: crops}, **kwargs)
    for a, b in zip(by_position, by_name, strict=True):
        assert_same_bits(a, b)


def test_masks_and_ropes():
    """What belongs to the samples is compacted with them; what merely has that size is not."""
    net = NETS["timm-eva"]
    model = net.model().train()
    report = sdkernels.patch(model)
    block = model.blocks[1]
    plan = [*make_rows(1), *make_rows(1)] * 2
    x = torch.randn(4, 5, 32, dtype=torch.float64)
    ropes = {
        "of the samples": torch.randn(4, 1, 4, 32, dtype=torch.float64),
        "as many tokens as samples": torch.randn(4, 32, dtype=torch.float64),
    }
    masks = [
        None,
        torch.rand(4, 1, 5, 5) < 0.7,
        torch.rand(5, 5) < 0.7,
        torch.rand(1, 1, 5, 5) < 0.7,
    ]
    for rope in ropes.values():
        for mask in masks:
            if mask is not None:
                mask = mask | torch.eye(5).bool()
            with report.use(plan):
                y = block(x, rope=rope, attn_mask=mask)
            block.eval()
            full = block(x, rope=rope, attn_mask=mask)
            block.train()
            dropped = plan[0].slot < 0
            assert_same_bits(y[dropped], x[dropped])
            ones = [KeptRows.from_mask(rows.slot >= 0) for rows in plan]
            with report.use(ones):
                y = block(x, rope=rope, attn_mask=mask)
            torch.testing.assert_close(y[~dropped], full[~dropped])


def test_multi_crop_through_a_whole_model():
    """One plan for crops of several sizes; the model's blocks one after another on the list."""
    torch.manual_seed(1)
    model = timm_vit(dynamic_img_size=True, init_values=0.5)().train()
    report = sdkernels.patch(model)
    crops = [torch.randn(4, 3, 32, 32), torch.randn(8, 3, 16, 16)]
    plan = DepthPlan.sample([4, 8], report.drop_probs)

    def embed(crop: torch.Tensor) -> torch.Tensor:
        return model.norm_pre(model._pos_embed(model.patch_embed(crop)))

    with report.use(plan):
        xs = [embed(crop) for crop in crops]
        for block in model.blocks:
            xs = block(xs)
    for i, (x, crop) in enumerate(zip(xs, crops, strict=True)):
        y = embed(crop)
        with report.use([entry[i] for entry in plan]):
            for block in model.blocks:
                y = block(y)
        torch.testing.assert_close(x, y)


def test_checkpointing_of_transformers():
    net = NETS["transformers-dinov2"]
    model, report = patched_copy(net.model().train(), net)
    x, calls = net.inputs(4), []
    model.encoder.layer[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    with report.use(make_rows(4)):
        y, gradients = train_step(model, x)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        again, again_gradients = train_step(model, x)
    assert len(calls) == 3  # once, and twice
    assert_same_bits(again, y)
    for name, gradient in gradients.items():
        if gradient is not None:
            assert_same_bits(again_gradients[name], gradient)


AUTOCAST = ("timm-deit3", "timm-swin", "timm-resnet", "torchvision-maxvit", "transformers-swin")


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name):
    """As close to float32 as masking under autocast, and of the same dtype."""
    net = NETS[name]
    model = net.model().float().train()
    freeze_norms(model)
    patched, report = patched_copy(model, net)
    plan = make_rows(len(report.drop_probs))
    masked = give_masks(model, report, plan)
    x = net.inputs(4).float()
    exact = output_of(masked(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = output_of(masked(x))
        with report.use(plan):
            y = output_of(patched(x))
    assert y.dtype == expected.dtype
    error = (expected - exact).abs().max().item()
    assert (y - exact).abs().max().item() < 3 * error


def test_attention_without_the_fused_kernel():
    """timm computes attention by hand there, in ParallelScalingBlock inside of the block."""
    net = NETS["timm-vit-parallel"]
    model = net.model().train()
    for block in model.blocks:
        block.fused_attn = False
    patched, report = patched_copy(model, net)
    plan = [make_rows(1)[0]] * 2
    x, mask = torch.randn(4, 5, 32, dtype=torch.float64), torch.rand(4, 1, 5, 5) < 0.5
    masked = give_masks(model, report, plan)
    mask |= torch.eye(5, dtype=torch.bool)
    with report.use(plan):
        y = patched.blocks[1](x, attn_mask=mask)
        causal = patched.blocks[1](x, is_causal=True)
    torch.testing.assert_close(y, masked.blocks[1](x, attn_mask=mask))
    torch.testing.assert_close(causal, masked.blocks[1](x, is_causal=True))


@pytest.mark.parametrize("name", ["timm-vit", "timm-convnext", "torchvision-swin"])
def test_evaluation_compiles_and_exports_without_a_trace(name):
    net = NETS[name]
    model = net.model()
    sdkernels.patch(model)
    model.eval()
    x = net.inputs(2)
    expected = model(x)
    assert_same_bits(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    program = torch.export.export(model, (x,))
    assert not [node for node in program.graph.nodes if "sdkernels" in str(node.target)]
    torch.testing.assert_close(program.module()(x), expected)
