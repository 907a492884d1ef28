"""torch.compile: how many graphs, what they hold, and rows that are drawn inside of them."""

import warnings
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from compiling import assert_same, compilation, make_block, needs_inductor, results
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdkernels import (
    DepthPlan,
    KeptRows,
    StochasticDepth,
    fused_stochastic_depth,
    linear_decay,
    sampling,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

B = 16


def kept_rows(k: int) -> KeptRows:
    index = torch.randperm(B)[:k].sort().values
    return KeptRows.from_index(index, B, B / max(k, 1))


def index_add(x: Tensor, block: StochasticDepth, rows: KeptRows) -> Tensor:
    """Gather and index_add, as DINOv2 and DINOv3 write it."""
    out = block.layer_scale * block.branch(block.norm(x[rows.index]))
    return torch.index_add(x, 0, rows.index, out, alpha=rows.scale)


# Rows from outside


@needs_inductor
def test_one_compilation_serves_every_count():
    """No atomics in its code, k = B included; what peers write has them, or the count is wrong."""
    block, x = make_block(), torch.randn(B, 5, 6, requires_grad=True)
    leaves = [x, *block.parameters()]

    def function(x: Tensor, rows: KeptRows) -> Tensor:
        return block(x, rows=rows)

    with compilation() as compiled:
        compiled_function = torch.compile(function, fullgraph=True)
        # A size that has changed once is dynamic.
        for k in (5, 9):
            kept = kept_rows(k)
            actual = results(compiled_function, leaves, x, kept)
            assert_same(actual, results(function, leaves, x, kept))
        assert (compiled.graphs, compiled.atomics) == (2, 0)
        for k in (B, 2, 12):
            kept = kept_rows(k)
            actual = results(compiled_function, leaves, x, kept)
            assert_same(actual, results(function, leaves, x, kept))
        assert compiled.graphs == 2
    with compilation() as compiled:
        peer = torch.compile(lambda x, rows: index_add(x, block, rows), dynamic=True)
        with torch.no_grad():
            peer(x, kept_rows(5))
        assert compiled.atomics > 0


@needs_inductor
@pytest.mark.parametrize("k", [5, B])
def test_static_counts(k):
    block, x, kept = make_block(), torch.randn(B, 5, 6, requires_grad=True), kept_rows(k)
    leaves = [x, *block.parameters()]
    with compilation() as compiled:
        function = torch.compile(lambda x: block(x, rows=kept), fullgraph=True, dynamic=False)
        results(function, leaves, x)
        assert (compiled.graphs, compiled.atomics) == (1, 0)


@needs_inductor
def test_one_graph_for_every_count_at_all():
    """Sizes marked unbacked are never specialised, to no row and one row neither."""
    block, x = make_block(), torch.randn(B, 5, 6, requires_grad=True)
    leaves = [x, *block.parameters()]

    def function(x: Tensor, rows: KeptRows) -> Tensor:
        return block(x, rows=rows)

    with compilation() as compiled:
        compiled_function = torch.compile(function, fullgraph=True)
        for k in (5, 0, 1, B):
            kept = replace(kept_rows(k), scale=2.0)
            torch._dynamo.decorators.mark_unbacked(kept.index, 0)
            actual = results(compiled_function, leaves, x, kept)
            assert_same(actual, results(function, leaves, x, kept))
        assert (compiled.graphs, compiled.atomics) == (1, 0)


@needs_inductor
def test_training_steps_follow_eager_code():
    """20 steps of two blocks on a fixed plan that is drawn anew in its place: one compilation."""

    def train(compiled: bool) -> list[float]:
        blocks = nn.ModuleList([make_block(), make_block()])
        optimizer = torch.optim.SGD(blocks.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(7)
        x, target = torch.randn(B, 5, 6), torch.randn(B, 5, 6)
        plan = DepthPlan.sample(B, [0.25, 0.5], sampler="fixed")

        def step(x: Tensor, plan: Iterable[KeptRows]) -> Tensor:
            for block, kept in zip(blocks, plan, strict=True):
                x = block(x, rows=kept)
            return (x - target).square().mean()

        if compiled:
            step = torch.compile(step, fullgraph=True, mode="reduce-overhead")
        losses = []
        for _ in range(20):
            loss = step(x, list(plan))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            plan.resample_()
        return losses

    expected = train(compiled=False)
    with compilation() as compiled:
        actual = train(compiled=True)
        assert (compiled.graphs, compiled.breaks, compiled.atomics) == (1, 0, 0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert len(set(expected)) == 20


RATES = [0.05 * step for step in range(11)]


@pytest.mark.parametrize("sampler", ["fixed", "bernoulli", "rounded"])
def test_a_schedule_of_rates_wants_a_plan(sampler):
    """The scale of a plan's rows is an input of the graph."""
    block, x = make_block(sampler=sampler), torch.randn(20, 5, 6)
    with compilation() as compiled:
        step = torch.compile(block, backend="aot_eager", fullgraph=True)
        for p in RATES:
            (rows,) = DepthPlan.sample(20, [p], sampler=sampler)
            torch.testing.assert_close(step(x, rows=rows), block(x, rows=rows))
        assert compiled.graphs <= (2 if sampler == "fixed" else 3)


@pytest.mark.parametrize("sampler", ["fixed", "bernoulli"])
def test_a_schedule_of_many_branches_starts_with_its_ends(sampler):
    """As docs/pitfalls.md has it: their counts would change one after the other."""
    x = torch.randn(16, 6)

    def step(x: Tensor, rows: list[KeptRows]) -> Tensor:
        for kept in rows:
            x = fused_stochastic_depth(x, torch.sin, 0.5, rows=kept)
        return x

    with compilation() as compiled:
        compiled_step = torch.compile(step, backend="aot_eager", fullgraph=True)
        for p in [RATES[-1], RATES[0], *RATES]:
            drop_probs = linear_decay(12, p)
            rows = list(DepthPlan.sample(16, drop_probs, sampler=sampler))
            for kept in rows:
                torch._dynamo.maybe_mark_dynamic(kept.index, 0)
            torch.testing.assert_close(compiled_step(x, rows), step(x, rows))
        assert compiled.graphs == 2


def test_a_rate_on_the_module_is_a_constant():
    block, x = make_block(sampler="fixed"), torch.randn(20, 5, 6)
    with compilation() as compiled:
        step = torch.compile(block, backend="aot_eager")
        for block.p in RATES[:5]:
            step(x)
        assert compiled.graphs == 5


def test_a_plan_as_input():
    """Taken apart inside the graph; indexing it outside beforehand makes no difference."""
    block, x = make_block(), torch.randn(B, 5, 6, requires_grad=True)
    leaves = [x, *block.parameters()]

    def function(x: Tensor, plan: DepthPlan) -> Tensor:
        for kept in plan:
            x = block(x, rows=kept)
        return block(x, rows=plan[0])

    with compilation() as compiled:
        compiled_function = torch.compile(function, backend="aot_eager", fullgraph=True)
        plan = DepthPlan.sample(B, [0.25, 0.5], sampler="fixed")
        for _ in range(3):
            actual = results(compiled_function, leaves, x, plan)
            assert_same(actual, results(function, leaves, x, plan))
            plan.resample_()
        assert compiled.graphs == 1


def test_scales_do_not_compile_anew():
    """Each number of rows has a scale of its own: a scale that has changed is an input."""
    block, x = make_block(), torch.randn(B, 6)
    with compilation() as compiled:
        function = torch.compile(lambda x, rows: block(x, rows=rows), backend="aot_eager")
        for scale in (1.5, 2.0, 2.5, 3.0):
            kept = KeptRows.from_index(torch.arange(5), B, scale)
            torch.testing.assert_close(function(x, kept), block(x, rows=kept))
        assert compiled.graphs == 2


def test_evaluation_is_one_graph():
    block, x = make_block().eval(), torch.randn(B, 6)
    with compilation() as compiled:
        function = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(function(x), block(x))
        block.train()
        torch.testing.assert_close(function(x, rows=kept_rows(3)).shape, x.shape)
        block.eval()
        torch.testing.assert_close(function(x), block(x))
        assert compiled.graphs == 2


# Rows drawn inside


def kept_in(y: Tensor, x: Tensor) -> tuple[int, ...]:
    return tuple((y != x).flatten(1).any(1).nonzero().flatten().tolist())


@needs_inductor
def test_fixed_rows_are_drawn_at_every_call():
    """Those of eager code from the same seed, in one graph with gradients; no frozen dice."""
    blocks = [make_block(sampler="fixed") for _ in range(2)]
    x = torch.randn(B, 5, 6, requires_grad=True)
    leaves = [x, *(p for block in blocks for p in block.parameters())]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        ys = [x]
        for block in blocks:
            ys.append(block(ys[-1]))
        return tuple(ys)

    def run(function) -> list[list[Tensor]]:
        torch.manual_seed(5)
        steps = []
        for _ in range(5):
            ys = function(x)
            steps.append([*ys, *torch.autograd.grad(ys[-1].square().sum(), leaves)])
        return steps

    expected = run(function)
    with compilation() as compiled:
        actual = run(torch.compile(function, fullgraph=True))
        assert (compiled.graphs, compiled.breaks, compiled.atomics) == (1, 0, 0)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)
    kept = [kept_in(step[i + 1], step[i]) for step in actual for i in range(2)]
    assert {len(rows) for rows in kept} == {8}
    # 10 draws out of 12870 sets: layers differ within a step, and steps from one another.
    assert len(set(kept)) == 10


@pytest.mark.parametrize(
    "option", [{"aggressive_recomputation": True}, {"activation_memory_budget": 0.0}], ids=str
)
@needs_inductor
def test_rows_that_a_partitioner_would_draw_again(option):
    """They are drawn outside of the graph then: the gradient belongs to the rows of the forward."""
    sampling._warned.clear()
    x = torch.ones(512, 1, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return fused_stochastic_depth(
            x, lambda kept: kept.sin().cos() * kept, 0.5, sampler="fixed", rescale="none"
        )

    with torch._functorch.config.patch(option), compilation() as compiled:
        with pytest.warns(UserWarning, match="aggressive_recomputation or activation_memory"):
            y = torch.compile(function)(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert compiled.breaks > 0
    assert torch.equal(y != 1, grad != 1)
    assert (y != 1).sum() == 256


def test_checkpointed_rows_are_those_of_the_forward():
    blocks = [make_block(sampler="fixed") for _ in range(2)]
    x = torch.randn(B, 5, 6, requires_grad=True)
    leaves = [x, *(p for block in blocks for p in block.parameters())]

    def function(x: Tensor, recompute: bool = True) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    torch.manual_seed(5)
    expected = results(function, leaves, x, False)
    after = torch.rand(1)
    with compilation() as compiled:
        compiled_function = torch.compile(function, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            torch.manual_seed(5)
            assert_same(results(compiled_function, leaves, x), expected)
            assert torch.equal(torch.rand(1), after)  # the recomputation leaves no trace
        assert compiled.graphs == 1


def test_fixed_counts_follow_the_batch():
    """k is exact for each number of rows: one graph for each."""
    block = make_block(sampler="fixed")
    with compilation() as compiled:
        function = torch.compile(block, backend="aot_eager", fullgraph=True)
        for batch in (16, 12, 14, 16):
            x = torch.randn(batch, 6)
            assert len(kept_in(function(x), x)) == batch // 2
        assert compiled.graphs <= 4


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "Bernoulli"),
        ({"mode": "batch"}, "Bernoulli"),
        ({"sampler": "rounded"}, "rounded"),
    ],
    ids=["row", "batch", "rounded"],
)
def test_bernoulli_rows_drawn_inside(options, kind):
    """The graph breaks at the draw, which is said once; rows are those of eager code."""
    sampling._warned.clear()
    block = make_block(**options)
    x = torch.randn(B - 1, 5, 6, requires_grad=True)  # half of which is no whole number
    leaves = [x, *block.parameters()]

    def run(function: nn.Module) -> list[list[Tensor]]:
        torch.manual_seed(5)
        return [results(function, leaves, x) for _ in range(6)]

    expected = run(block)
    with compilation() as compiled, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = run(torch.compile(block, backend="aot_eager"))
        assert compiled.breaks > 0
        # Before and after the draw; no, one and more rows are graphs of their own.
        assert compiled.graphs <= 4
    assert [str(w.message).count(f"{kind} rows") for w in caught].count(1) == 1
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)
    assert len({len(kept_in(step[0], x)) for step in actual}) > 1


@needs_inductor
def test_bernoulli_rows_in_one_graph():
    """``fullgraph=True`` admits sizes that depend on data: any number of rows, none included."""
    block, x = make_block(), torch.randn(3, 5, 6, requires_grad=True)
    leaves = [x, *block.parameters()]

    def run(function: nn.Module) -> list[list[Tensor]]:
        torch.manual_seed(5)
        return [results(function, leaves, x) for _ in range(12)]

    expected = run(block)
    with compilation() as compiled:
        actual = run(torch.compile(block, fullgraph=True))
        assert (compiled.graphs, compiled.breaks, compiled.atomics) == (1, 0, 0)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)
    assert {len(kept_in(step[0], x)) for step in actual} == {0, 1, 2, 3}


def test_rows_of_a_generator_drawn_inside():
    sampling._warned.clear()
    block, x = make_block(sampler="fixed"), torch.randn(B, 6)

    def run(function: nn.Module) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        return [function(x, generator=generator) for _ in range(4)]

    with compilation(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = run(torch.compile(block, backend="aot_eager"))
    assert [str(w.message).count("generator= of their own") for w in caught].count(1) == 1
    assert_same(actual, run(block))
    assert len({kept_in(y, x) for y in actual}) == 4


def test_sampling_op():
    """Its fake has the shapes of the op; passes over graphs are told what it is."""
    op = torch.ops.sdkernels.sample_rows.default
    assert {torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe} <= set(op.tags)
    cpu = torch.device("cpu")
    tests = ("test_schema", "test_faketensor")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for sampler in ("fixed", "bernoulli", "rounded"):
            args = (B, 0.5, "row", sampler, 0, False)
            torch.library.opcheck(op, args, {"device": cpu}, test_utils=tests)
