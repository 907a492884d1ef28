"""The op in training loops: precision, accumulation, averages of weights, failures, graphs."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sdkernels import DepthPlan, KeptRows, StochasticDepth, fused_stochastic_depth
from sdkernels.reference import naive_masking

WIDTH, DEPTH, BATCH = 16, 3, 8
PROBS = [0.2, 0.4, 0.6]


class Model(nn.Module):
    """A residual network; `naive` makes it mask instead of compact, with the same rows."""

    def __init__(self, naive: bool = False, **options: object) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(
            StochasticDepth(
                nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
                p,
                norm=nn.LayerNorm(WIDTH),
                layer_scale=nn.Parameter(torch.full((WIDTH,), 0.5)),
                **options,
            )
            for p in PROBS
        )
        self.head = nn.Linear(WIDTH, 1)
        self.naive = naive

    def forward(self, x: Tensor, rows: Sequence[KeptRows] | DepthPlan | None = None) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            each = None if rows is None else rows[i]
            if self.naive:
                options = {"norm": block.norm, "layer_scale": block.layer_scale, "rows": each}
                x = naive_masking(x, block.branch, block.p, training=self.training, **options)
            else:
                x = block(x, rows=each)
        return self.head(x)


def make_model(**options: object) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def data(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, 5, 4, generator=torch.Generator().manual_seed(step))
    return x, x.sum(-1, keepdim=True).tanh()


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y.float() - target).square().mean()


def plan_of(step: int, **law: object) -> DepthPlan:
    return DepthPlan.for_step(1, step, BATCH, PROBS, **law)


# Precision. Losses of naive masking, trained beside it in the same precision, on the same rows.

PRECISIONS = {
    "float32": (torch.float32, None),
    "autocast-bfloat16": (torch.float32, torch.bfloat16),
    "autocast-float16": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, None),
}


def train(model: Model, precision: str, steps: int, scale: float = 2.0**10) -> list[float]:
    """With a GradScaler where gradients are float16; it skips steps whose gradients overflow."""
    dtype, autocast = PRECISIONS[precision]
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", scale, enabled=autocast == torch.float16)
    losses = []
    for step in range(steps):
        x, target = data(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            y = model(x.to(dtype), plan_of(step))
        loss = loss_of(y, target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    model.scale_at_the_end = scaler.get_scale()
    return losses


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision):
    exact = torch.tensor(train(make_model(naive=True), "float32", 40))
    naive = torch.tensor(train(make_model(naive=True), precision, 40))
    fused = torch.tensor(train(make_model(), precision, 40))
    # As close to float32 as naive masking in the same precision is, or a few roundings of it.
    allowed = 2 * (naive - exact).abs().max() + 1e-5
    assert (fused - exact).abs().max() <= allowed
    assert fused[-10:].mean() < 0.7 * fused[:10].mean()


def test_stream_stays_in_float32_under_autocast():
    model = make_model()
    streams, branches = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, y: streams.append(y.dtype))
        block.branch.register_forward_hook(lambda module, args, y: branches.append(y.dtype))
    x, _ = data(0)
    with torch.autocast("cpu", torch.bfloat16):
        stem = model.stem(x).float()
        for block in model.blocks:
            stem = block(stem)
    assert streams == [torch.float32] * DEPTH
    assert branches == [torch.bfloat16] * DEPTH


def test_grad_scaler_skips_a_step_that_overflows():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    train(model, "autocast-float16", 1, scale=2.0**60)
    assert model.scale_at_the_end == 2.0**59
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# Accumulation, averages


@pytest.mark.parametrize("options", [{}, {"min_saving": 0.5}, {"inplace": True}], ids=str)
def test_gradient_accumulation(options):
    model, naive = make_model(**options), make_model(naive=True)
    for step in range(4):
        x, target = data(step)
        for each in (model, naive):
            loss_of(each(x, plan_of(step)), target).backward()
    for a, e in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


def test_averaged_model():
    """A moving average trains nothing, draws nothing, and evaluates as its weights say."""
    model = make_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(4):
        x, target = data(step)
        optimizer.zero_grad()
        loss_of(model(x), target).backward()
        optimizer.step()
        average.update_parameters(model)
        if step == 0:  # the first update copies
            expected = [p.detach().clone() for p in model.parameters()]
        else:
            expected = [
                0.5 * e + 0.5 * p.detach()
                for e, p in zip(expected, model.parameters(), strict=True)
            ]
    for a, e in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(a.detach(), e)
    average.eval()
    state = torch.get_rng_state()
    x, _ = data(9)
    y = average(x)
    assert torch.equal(torch.get_rng_state(), state)
    plain = make_model().eval()
    plain.load_state_dict(average.module.state_dict())
    assert torch.equal(y, plain(x))


# DataParallel


def test_data_parallel_without_gpus_is_the_module_itself():
    model = make_model()
    wrapped = nn.DataParallel(model)
    x, target = data(0)
    assert torch.equal(wrapped(x, plan_of(0)), model(x, plan_of(0)))
    loss_of(wrapped(x), target).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_data_parallel_on_gpus():
    """Each replica draws rows for its own share of the batch."""
    model = make_model().cuda()
    x, target = (each.cuda() for each in data(0))
    loss_of(nn.DataParallel(model)(x), target).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Failures


class Broken(Exception):
    pass


FORMS = {
    "plain": {},
    "inplace": {"inplace": True},
    "min_saving": {"min_saving": 1.0},
    "fixed": {"sampler": "fixed"},
}


@pytest.mark.parametrize("where", ["branch", "backward"])
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS.keys())
def test_a_step_after_an_exception_is_right(options, where):
    """What raises inside a branch, or in its backward, leaves no trace in the next step."""
    model, twin = make_model(**options), make_model(**options)
    x, target = data(0)

    def explode(*_: object) -> None:
        raise Broken

    for _ in range(3):
        branch = model.blocks[1].branch
        if where == "branch":
            handle = branch[1].register_forward_pre_hook(explode)
        else:
            handle = branch[2].register_full_backward_hook(explode)
        with pytest.raises(Broken):
            loss_of(model(x), target).backward()
        handle.remove()
    model.zero_grad()
    results = []
    for each in (model, twin):
        torch.manual_seed(5)
        loss = loss_of(each(x), target)
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in each.parameters())))
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS.keys())
def test_an_exception_writes_nothing(options):
    """The values of x are those of before, in a list too, whichever tensor it was."""
    x = torch.randn(8, 3)
    before = x.clone()

    def fail(*_: object) -> Tensor:
        raise Broken

    for grad in (False, True):
        leaf = x.clone().requires_grad_(grad)
        stream = leaf * 1.0
        with pytest.raises(Broken):
            fused_stochastic_depth(stream, fail, 0.5, norm=nn.LayerNorm(3), **options)
        assert torch.equal(stream, before)
        streams = [leaf * 1.0, leaf[:5] * 1.0]
        with pytest.raises(Broken):
            fused_stochastic_depth(streams, fail, 0.5, **options)
        # One result of the right shape, one that is not: neither is added.
        with pytest.raises(ValueError, match=r"^out: "):
            fused_stochastic_depth(streams, lambda kept: [kept[0], kept[1][:, :2]], 0.5, **options)
        assert torch.equal(streams[0], before)
        assert torch.equal(streams[1], before[:5])


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS.keys())
def test_a_list_after_an_exception_is_right(options):
    leaf, norm = torch.randn(8, 3, requires_grad=True), nn.LayerNorm(3)
    rows = [KeptRows.sample(8, 0.5), KeptRows.sample(5, 0.5)]

    def step(branch: object) -> list[Tensor]:
        streams = [leaf * 1.0, leaf[:5] * 2.0]
        ys = fused_stochastic_depth(streams, branch, 0.5, norm=norm, rows=rows, **options)
        return list(torch.autograd.grad(sum(y.square().sum() for y in ys), [leaf, norm.weight]))

    def fail_late(kept: list[Tensor]) -> list[Tensor]:
        kept[1].sin()
        raise Broken

    with pytest.raises(Broken):
        step(fail_late)
    found = step(lambda kept: [t.sin() for t in kept])
    masked = [
        naive_masking(x, torch.sin, 0.5, norm=norm, rows=each)
        for x, each in zip([leaf * 1.0, leaf[:5] * 2.0], rows, strict=True)
    ]
    expected = torch.autograd.grad(sum(y.square().sum() for y in masked), [leaf, norm.weight])
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


# CUDA graphs


def test_shapes_and_addresses_of_a_plan_are_static():
    """What a captured graph needs: nothing but the contents changes from step to step."""
    plan = plan_of(0, sampler="fixed")
    tensors = [tensor for rows in plan for tensor in (rows.index, rows.slot)]
    layout = [(t.data_ptr(), t.shape, t.stride()) for t in tensors]
    seen = set()
    for _ in range(10):
        plan.resample_()
        now = [tensor for rows in plan for tensor in (rows.index, rows.slot)]
        assert [(t.data_ptr(), t.shape, t.stride()) for t in now] == layout
        assert [(t.data_ptr(), t.shape, t.stride()) for t in tensors] == layout
        seen.add(str([t.tolist() for t in tensors]))
    assert len(seen) > 5


def test_tensors_of_a_step_have_static_shapes():
    """Every tensor that the op makes or saves has the same shape whatever rows are kept."""
    model, plan = make_model(), plan_of(0, sampler="fixed")
    x, target = data(0)
    shapes = []
    for _ in range(5):
        saved: list[tuple[object, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append((t.shape, t.stride(), t.dtype)), t)[1], lambda t: t
        ):
            loss = loss_of(model(x, plan), target)
        loss.backward()
        shapes.append(saved)
        plan.resample_()
    assert len(shapes[0]) > 10
    assert all(each == shapes[0] for each in shapes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_replays_with_new_rows():
    """Captured once; resample_() between replays gives what eager steps give with the same rows."""
    model, eager = make_model().cuda(), make_model().cuda()
    plan, twin = (plan_of(0, sampler="fixed", device="cuda") for _ in range(2))
    x, target = (each.cuda() for each in data(0))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            loss_of(model(x, plan), target).backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(model(x, plan), target)
        loss.backward()
    for _ in range(5):
        for each in (plan, twin):
            each.resample_()
        graph.replay()
        eager.zero_grad()
        expected = loss_of(eager(x, twin), target)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for a, e in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, e.grad)


# torch.compile


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Dynamo's
@pytest.mark.parametrize("options", [{}, {"min_saving": 1.0}, {"min_saving": "auto"}], ids=str)
def test_compiled_model_has_no_graph_breaks(options):
    model, eager = make_model(**options), make_model(**options)
    x, target = data(0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(2):
        rows = list(plan_of(step, sampler="fixed"))
        for each, owner in ((compiled, model), (eager, eager)):
            owner.zero_grad()
            loss_of(each(x, rows), target).backward()
        for a, e in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, e.grad)


# Rows from masks that ranks or gates make, in a training step


def test_rows_that_change_their_number_from_step_to_step():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    naive = make_model(naive=True)
    other = torch.optim.SGD(naive.parameters(), lr=0.1)
    for step in range(6):
        x, target = data(step)
        generator = torch.Generator().manual_seed(step)
        masks = torch.rand(DEPTH, BATCH, generator=generator) < step / 5
        rows = [KeptRows.from_mask(mask, scale=1.5) for mask in masks]
        for each, steps in ((model, optimizer), (naive, other)):
            steps.zero_grad()
            loss_of(each(x, rows), target).backward()
            steps.step()
    for a, e in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a, e)
