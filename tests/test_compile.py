"""torch.compile: the values and gradients of eager code, for every option."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from cases import NAMED_CASES, Case
from comparison import assert_same_bits, assert_same_results, run_reference
from compiling import assert_same, compilation, inductor, make_block, needs_inductor, results
from torch import Tensor

from sdkernels import (
    KeptRows,
    Shared,
    compact_layer_norm,
    compact_rms_norm,
    compact_rows,
    fused_stochastic_depth,
    scatter_add_rows,
)

# Newer compilers warn of older modules of their own.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # Dynamo looks at every input
)

ROWS = KeptRows.from_index(torch.tensor([0, 2, 3]), batch=8, scale=2.0)
NO_ROWS = KeptRows.from_index(torch.tensor([], dtype=torch.int64), batch=8, scale=2.0)

# Inductor is slow; what it adds to AOTAutograd's graph does not depend on every option.
INDUCTOR_CASES = [
    Case(norm="layer", layer_scale="C", weighted=True, conditions=1),
    Case(dtype=torch.bfloat16, branch_dtype=torch.bfloat16, norm="rms", layer_scale="C"),
    Case("conv", branch_dtype=torch.bfloat16, layout="channels_last", layer_scale="C1"),
    Case("vit", kept=0, norm="layer", layer_scale="C", weighted=True),
]


def run_compiled(case: Case, backend: str, **options: Any) -> dict[str, Tensor | None]:
    """As comparison.run_fused, with the call compiled."""
    inputs = case.inputs()
    call = inputs.call()

    def function(x: Tensor, rows: KeptRows) -> Tensor:
        return fused_stochastic_depth(x, inputs.branch, 0.5, **{**call, "rows": rows}, **options)

    # In place, x may not be a leaf.
    x = inputs.x * 1.0 if options.get("inplace") else inputs.x
    with compilation() as compiled:
        y = torch.compile(function, backend=backend, fullgraph=True)(x, inputs.rows)
        assert compiled.graphs == 1
        y.backward(inputs.grad)
    assert (y is x) == options.get("inplace", False)
    stream = inputs.residual if inputs.residual is not None else x
    assert y.stride() == torch.empty_like(stream).stride()
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in inputs.leaves().items()}


@pytest.mark.parametrize("case", NAMED_CASES, ids=str)
def test_traced_code(case):
    """The code that Inductor is given."""
    assert_same_results(
        run_compiled(case, "aot_eager"), run_reference(case.inputs()), case.tolerance
    )


@needs_inductor
@pytest.mark.parametrize("case", INDUCTOR_CASES, ids=str)
def test_compiled_code(case):
    assert_same_results(
        run_compiled(case, "inductor"), run_reference(case.inputs()), case.tolerance
    )


@pytest.mark.parametrize(
    "case", [Case(norm="layer", layer_scale="C"), Case("conv", kept=0, layout="channels_last")]
)
def test_in_place(case):
    actual = run_compiled(case, "aot_eager", inplace=True)
    assert_same_results(actual, run_reference(case.inputs()), case.tolerance)


def test_in_place_where_autograd_forbids_it():
    x = torch.randn(8, 6, requires_grad=True)
    compiled = torch.compile(lambda x: scatter_add_rows(x, torch.ones(3, 6), ROWS, inplace=True))
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        compiled(x)


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_dropped_rows_are_untouched(backend):
    """To the last bit, -0 and NaN included; and what they hold reaches no gradient."""
    block = make_block()
    x = torch.randn(8, 5, 6)
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, 1e-45])
    dropped = ROWS.slot < 0
    x[dropped] = special.expand(5, 5, 6)
    leaf = x.clone().requires_grad_()
    with compilation():
        y = torch.compile(block, backend=backend, fullgraph=True)(leaf, rows=ROWS)
        grad = torch.randn(8, 5, 6)
        y.backward(grad)
    assert_same_bits(y[dropped], x[dropped])
    assert_same_bits(leaf.grad[dropped], grad[dropped])
    for p in (leaf, *block.parameters()):
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_no_kept_rows(backend):
    """The branch runs on an empty batch: its parameters have gradients, and they are zero."""
    block, x = make_block(), torch.randn(8, 5, 6, requires_grad=True)
    with compilation():
        y = torch.compile(block, backend=backend, fullgraph=True)(x, rows=NO_ROWS)
        y.sum().backward()
    assert_same_bits(y, x)
    assert torch.equal(x.grad, torch.ones_like(x))
    for parameter in block.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@needs_inductor
def test_building_blocks():
    """All of them in one graph: compact, both norms, scatter-add with every factor."""
    x, out = torch.randn(8, 5, 6, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
    weight, bias, layer_scale = (torch.rand(6, requires_grad=True) for _ in range(3))
    gate = torch.rand(3, requires_grad=True)
    leaves = [x, out, weight, bias, layer_scale, gate]

    def function(x: Tensor, rows: KeptRows, gate: Tensor) -> Tensor:
        rows = dataclasses.replace(rows, weight=gate)
        total = compact_rows(x.sin(), rows) + compact_layer_norm(x, rows, 6, weight, bias)
        total = total * compact_rms_norm(x, rows, (6,), weight)
        y = scatter_add_rows(x, total * out, rows, layer_scale).cos()
        return scatter_add_rows(y, out, rows, layer_scale, activation="relu")

    with compilation() as compiled:
        actual = results(torch.compile(function, fullgraph=True), leaves, x, ROWS, gate)
        assert compiled.graphs == 1
        assert compiled.atomics == 0
    assert_same(actual, results(function, leaves, x, ROWS, gate))


def test_relu_of_what_is_stored():
    """A sum that is rounded to zero passes no gradient, as in eager code."""
    x = torch.full((8, 6), -1e-4, dtype=torch.float16, requires_grad=True)
    out = torch.full((3, 6), 1e-4, dtype=torch.float16)
    rows = dataclasses.replace(ROWS, scale=1.0 + 1e-5)
    function = torch.compile(
        lambda x: scatter_add_rows(x, out, rows, activation="relu"),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    with compilation():
        y = function(x)
        assert not y.any()
        y.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("several", [False, True])
def test_evaluation_with_symbolic_sizes(several):
    gamma = torch.rand(6)

    def evaluate(x: Any) -> Any:
        branch = (lambda xs: [2 * x for x in xs]) if several else (lambda x: 2 * x)
        return fused_stochastic_depth(x, branch, 0.5, training=False, layer_scale=gamma)

    with compilation():
        compiled = torch.compile(evaluate, backend="eager", fullgraph=True, dynamic=True)
        for batch in (3, 5):
            x = torch.randn(batch, 4, 6)
            given = [x, x[:2]] if several else x
            torch.testing.assert_close(compiled(given), evaluate(given))


def test_options():
    """Those that change what is traced, in one graph each."""
    block, x = make_block(), torch.randn(8, 5, 6, requires_grad=True)
    other = torch.randn(8, 5, 6)
    call = {"norm": block.norm, "layer_scale": block.layer_scale, "rows": ROWS}

    def hooked(x: Tensor) -> Tensor:
        return fused_stochastic_depth(x, block.branch, 0.5, **{**call, "norm": with_hook})

    def arguments(x: Tensor) -> Tensor:
        def branch(kept: Tensor, a: Tensor, b: dict[str, Tensor], c: Tensor) -> Tensor:
            return block.branch(kept) * a + b["b"] + c.sum()

        args = (other, {"b": other.sin()}, Shared(other))
        return fused_stochastic_depth(x, branch, 0.5, args=args, **call)

    def lists(x: Tensor) -> Tensor:
        def branch(kept: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
            return [block.branch(k) * s for k, s in zip(kept, scales, strict=True)]

        a, b = fused_stochastic_depth(
            [x, x[:, :2]], branch, 0.5, args=([other, other[:, :2]],),
            **{**call, "rows": [ROWS, NO_ROWS]},
        )  # fmt: skip
        return a + b.sum()

    def residual(x: Tensor) -> Tensor:
        return fused_stochastic_depth(x, block.branch, 0.5, residual=other, **call)

    def relu(x: Tensor) -> Tensor:
        y = fused_stochastic_depth(x, block.branch, 0.5, activation="relu", **call)
        stream = fused_stochastic_depth(
            y * 1.5 - 1, block.branch, 0.5, inplace=True, activation="relu", **call
        )
        evaluated = fused_stochastic_depth(x, block.branch, 0.5, "row", False, activation="relu")
        return y + stream + evaluated

    def plain(x: Tensor) -> Tensor:
        return fused_stochastic_depth(x, block.branch, 0.0, norm=block.norm)

    def skipped(x: Tensor) -> Tensor:
        rows = {**call, "rows": NO_ROWS}
        return fused_stochastic_depth(x, block.branch, 0.5, empty="skip", **rows) * 2

    def evaluation(x: Tensor) -> Tensor:
        return fused_stochastic_depth(x, block.branch, 0.25, "row", False, rescale="eval")

    with_hook = copy.deepcopy(block.norm)
    with_hook.register_forward_hook(lambda module, args, output: output * 2)
    for function in (hooked, arguments, lists, residual, relu, plain, skipped, evaluation):
        with compilation() as compiled:
            compiled_function = torch.compile(function, backend="aot_eager", fullgraph=True)
            assert_same(results(compiled_function, [x], x), results(function, [x], x))
            assert compiled.graphs == 1, function.__name__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The fused norm writes the autocast dtype; the stream stays in float32."""
    block, x = make_block(), torch.randn(8, 5, 6, requires_grad=True)
    seen: list[torch.dtype] = []

    def function(x: Tensor) -> Tensor:
        def branch(kept: Tensor) -> Tensor:
            seen.append(kept.dtype)
            return block.branch(kept)

        with torch.autocast("cpu", dtype=dtype):
            return fused_stochastic_depth(x, branch, 0.5, norm=block.norm, rows=ROWS)

    leaves = [x, *block.norm.parameters(), *block.branch.parameters()]
    expected = results(function, leaves, x)
    with compilation():
        actual = results(torch.compile(function, backend="aot_eager"), leaves, x)
    assert seen == [dtype] * len(seen)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=0.02, atol=0.02 * e.abs().max().item())


def test_autocast_is_asked_for_at_import(monkeypatch):
    """Not in the graph: PyTorch 2.11 cannot trace the question."""

    def asked(device: str) -> bool:
        raise AssertionError("asked again")

    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    block, x = make_block(), torch.randn(8, 5, 6)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, rows=ROWS), compiled(x, rows=ROWS))
    block(x, rows=ROWS)


@pytest.mark.parametrize(("function", "message"), [
    (lambda x: fused_stochastic_depth(x, lambda kept: kept[:1], 0.5, rows=ROWS),
     r"out: expected 3 kept rows of residual's shape \[8, 5, 6\], got \[1, 5, 6\]"),
    (lambda x: scatter_add_rows(x, x[:3], ROWS, torch.ones(5, 5, 6)),
     r"layer_scale: shape \[5, 5, 6\] does not broadcast against one row of shape \[5, 6\]"),
    (lambda x: compact_layer_norm(x, ROWS, 5),
     r"norm: normalizes over \[5\], which are not the last dimensions of one row of x"),
    (lambda x: fused_stochastic_depth(x[:7], torch.sin, 0.5, rows=ROWS),
     "rows: made for a batch of 8 rows, but x has 7"),
    (lambda x: fused_stochastic_depth(x, torch.sin, 1.5), "p: expected a drop probability"),
])  # fmt: skip
def test_bad_input(function, message):
    """What broadcasting would let pass is refused as in eager code."""
    with compilation(), pytest.raises(ValueError, match=message):
        torch.compile(function, backend="aot_eager")(torch.randn(8, 5, 6))


# Derivatives of other kinds


def test_double_backward_is_refused():
    """AOTAutograd has none, for whatever it compiles; it must not come out wrong."""
    block, x = make_block(), torch.randn(8, 5, 6, requires_grad=True)
    with compilation():
        y = torch.compile(block, backend="aot_eager", fullgraph=True)(x, rows=ROWS)
        (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            grad.square().sum().backward()


@pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="PyTorch 2.10 traces no autograd.Function under torch.func"
)
def test_func_transforms_in_a_graph():
    """torch.func goes through traced code, which is plain PyTorch."""
    block, x = make_block(), torch.randn(8, 5, 6)

    def grad(x: Tensor) -> Tensor:
        return torch.func.grad(lambda t: block(t, rows=ROWS).square().sum())(x)

    def vmap(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda t: block(t, rows=ROWS))(torch.stack([x, x.sin()]))

    with compilation():
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(block(leaf, rows=ROWS).square().sum(), leaf)[0]
        actual = torch.compile(grad, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(actual, expected)
        expected = torch.stack([block(x, rows=ROWS), block(x.sin(), rows=ROWS)])
        actual = torch.compile(vmap, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(actual, expected)
