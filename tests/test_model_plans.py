"""Plans that are drawn as the blocks of a patched model say, and plans that are refused."""

import pytest
import torch
from comparison import assert_same_bits
from zoo import NETS

import sdkernels
from sdkernels import DepthPlan, KeptRows
from sdkernels.models import drop_probs, plan_for_step, sample_plan, use

VIT = NETS["timm-vit"]


def kept_and_scales(plan: DepthPlan) -> list[tuple[int, float]]:
    return [(rows.k, round(rows.scale, 6)) for rows in plan]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": "fixed"}, [(8, 1.0), (8, 1.0), (6, 1.333333), (6, 1.333333)]),
        ({"sampler": "fixed", "rescale": "none"}, [(8, 1.0), (8, 1.0), (6, 1.0), (6, 1.0)]),
        ({"sampler": "fixed", "rescale": "eval"}, [(8, 1.0), (8, 1.0), (6, 1.0), (6, 1.0)]),
    ],
)
def test_options_of_patch(options, expected):
    model = VIT.model().train()
    report = sdkernels.patch(model, drop_probs=[0.0, 0.0, 0.25, 0.25], **options)
    plan = report.plan(8)
    assert kept_and_scales(plan) == expected
    with report.use(plan):
        model(VIT.inputs(8))


def test_a_plan_draws_what_the_blocks_draw():
    """Scale and expectation: the mean over plans is what evaluation computes."""
    model = VIT.model().train()
    report = sdkernels.patch(model, drop_probs=[0.5] * 4)
    counts = torch.tensor([[rows.k for rows in report.plan(64)] for _ in range(50)]).float()
    assert 30 < counts.mean() < 34
    assert counts.std() > 2
    assert {rows.scale for rows in report.plan(64)} == {2.0}
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    a, b = (sample_plan(model, 64, generator=g) for g in generators)
    assert all(torch.equal(x.slot, y.slot) for x, y in zip(a, b, strict=True))
    assert report.plan([8, 20]).batch == [8, 20]
    assert report.plan(8).device == next(model.parameters()).device
    assert report.plan(8, device="meta").device.type == "meta"


def test_modes_of_the_blocks():
    """One plan for blocks of which some keep all rows or none."""
    net = NETS["torchvision-convnext"]
    model = net.model().train()
    report = sdkernels.patch(model)
    report.patched[-1].block.stochastic_depth.mode = "batch"
    report.patched[-2].block.stochastic_depth.p = 0.5
    plans = [report.plan(16) for _ in range(30)]
    assert {plan[len(plan) - 1].k for plan in plans} == {0, 16}
    assert len({plan[len(plan) - 2].k for plan in plans} - {0, 16}) > 3
    with report.use(plans[0]):
        model(net.inputs(16))


def test_a_mode_that_changed_under_the_fixed_sampler():
    model = NETS["torchvision-convnext"].model().train()
    report = sdkernels.patch(model, sampler="fixed")
    report.patched[-1].block.stochastic_depth.mode = "batch"
    with pytest.raises(ValueError, match=r'^sampler: "fixed" keeps a fixed number of rows'):
        report.plan(16)


def test_timm_without_scaling():
    """scale_by_keep=False: kept rows are added as they are."""
    model = VIT.model().train()
    model.blocks[1].drop_path1.scale_by_keep = False
    report = sdkernels.patch(model)
    assert [rows.scale for rows in report.plan(8)] == [1.0, 1.0, 1.0, 2.0]
    with report.use(report.plan(8)):
        model(VIT.inputs(8))
    expected = r"^plan: branch 2 was drawn with rescale='train', and the model's rule is 'none'"
    with (
        pytest.raises(ValueError, match=expected),
        report.use(DepthPlan.sample(8, report.drop_probs)),
    ):
        pass


def test_for_step():
    """A function of seed, step and rank alone, and of what the blocks say."""
    model = VIT.model().train()
    report = sdkernels.patch(model, drop_probs=[0.5] * 4, sampler="fixed")
    state = torch.get_rng_state()
    plan = report.plan_for_step(7, 3, 8)
    assert torch.equal(torch.get_rng_state(), state)
    expected = DepthPlan.for_step(7, 3, 8, [0.5] * 4, sampler="fixed")
    for made in (plan, plan_for_step(model, 7, 2, 8).resample_()):
        for a, b in zip(made, expected, strict=True):
            assert torch.equal(a.slot, b.slot)
            assert a.scale == b.scale
    other = report.plan_for_step(7, 3, 8, rank=1)
    assert any(not torch.equal(a.slot, b.slot) for a, b in zip(other, expected, strict=True))
    with pytest.raises(ValueError, match=r"^step: expected an integer from 0"):
        report.plan_for_step(7, -1, 8)


# Refusals


@pytest.mark.parametrize(
    ("patched", "drawn", "message"),
    [
        ({}, {"rescale": "none"}, "drawn with rescale='none', and the model's rule is 'train'"),
        ({"rescale": "eval"}, {}, "drawn with rescale='train', and the model's rule is 'eval'"),
        ({"rescale": "none"}, {}, "drawn with rescale='train', and the model's rule is 'none'"),
    ],
)
@pytest.mark.parametrize("batch", [8, [8, 4]])
def test_another_rescaling_is_refused(patched, drawn, message, batch):
    """Training would average to something else than evaluation computes."""
    model = VIT.model().train()
    report = sdkernels.patch(model, **patched)
    plan = DepthPlan.sample(batch, report.drop_probs, sampler="fixed", **drawn)
    expected = rf"^plan: branch 2 was {message}; draw it with"
    with pytest.raises(ValueError, match=expected), report.use(plan):
        pass
    with report.use(list(plan)):  # rows that are taken as they are
        pass


def test_other_probabilities_are_refused():
    """A schedule of drop rates that a plan has not followed, for example."""
    model = VIT.model().train()
    report = sdkernels.patch(model)
    plan = report.plan(8)
    for name in ("drop_path1", "drop_path2"):
        getattr(model.blocks[1], name).drop_prob = 0.25
    expected = "^plan: branch 2 was drawn with a drop probability of 0.5, and the model has 0.25; "
    with pytest.raises(ValueError, match=expected), report.use(plan.resample_()):
        pass
    with report.use(report.plan(8)):
        model(VIT.inputs(8))


def test_what_is_accepted():
    """Sampler and mode are a plan's own choice; float32's rounding of a probability is no other."""
    model = VIT.model().train()
    report = sdkernels.patch(model)
    x = VIT.inputs(8)
    nearly = [p * (1 + 1e-8) for p in drop_probs(model)]
    for law in ({}, {"sampler": "fixed"}, {"mode": "batch"}):
        plan = DepthPlan.sample(8, nearly, **law)
        with use(model, plan):
            assert_same_bits(model(x), model(x))
    with report.use([KeptRows.from_mask(torch.ones(8).bool(), 3.0)] * 4):
        pass


def test_a_model_that_is_not_patched():
    model = VIT.model()
    assert len(sample_plan(model, 8)) == 0
    with pytest.raises(TypeError, match=r"^model: expected an nn\.Module, got str"):
        sample_plan("model", 8)
    with pytest.raises(ValueError, match=r"^batch: expected the number of rows"):
        sample_plan(model, -1)
