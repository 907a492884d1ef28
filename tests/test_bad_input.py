"""Bad input of the op is refused in one sentence, and before anything is written."""

import copy

import pytest
import torch
from torch import nn

from sdkernels import (
    KeptRows,
    Shared,
    StochasticDepth,
    compact_layer_norm,
    compact_rows,
    fused_stochastic_depth,
    scatter_add_rows,
)

X = torch.arange(12.0).view(4, 3)
INDEX = torch.tensor([0, 2])
ROWS = KeptRows.from_index(INDEX, 4, scale=2.0)
FLOAT8, WIDE = torch.float8_e4m3fn, torch.complex128


def identity(x, *args):
    return x


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list):
        return [tensor for each in value for tensor in tensors(each)]
    return []


def assert_refused(changes, error, message, **options):
    """The op raises `error`, says `message` in one line and leaves x and residual as they were."""
    call = {"x": X, "branch": identity, "p": 0.5, **options, **changes}
    given = copy.deepcopy({name: call[name] for name in ("x", "residual") if name in call})
    call.update(given)
    before = [tensor.clone() for tensor in tensors(list(given.values()))]
    with pytest.raises(error, match=f"^{message}") as caught:
        fused_stochastic_depth(**call)
    assert "\n" not in str(caught.value)
    for now, then in zip(tensors(list(given.values())), before, strict=True):
        assert now.device.type == "meta" or torch.equal(now.to(WIDE), then.to(WIDE))


def cases(table):
    return pytest.mark.parametrize(
        ("changes", "error", "message"), table.values(), ids=table.keys()
    )


either_place = pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])

FLOATING = r"expected .*float.*, got (torch\.)?"
INPUT = {
    "x-none": ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
    "x-nested-list": ({"x": [[1.0]]}, TypeError, "x: expected a tensor, got list"),
    "x-int": ({"x": X.int()}, TypeError, f"x: {FLOATING}int32"),
    "x-bool": ({"x": X > 0}, TypeError, f"x: {FLOATING}bool"),
    "x-complex": ({"x": X.to(torch.complex64)}, TypeError, f"x: {FLOATING}complex64"),
    "x-float8": ({"x": X.to(FLOAT8)}, TypeError, f"x: {FLOATING}.*loat8"),
    "x-0d": ({"x": X[0, 0]}, ValueError, "x: expected .* batch dimension, got 0 dimensions"),
    "residual-list": ({"residual": [X]}, TypeError, "residual: expected a tensor, got list"),
    "residual-int": ({"residual": X.int()}, TypeError, f"residual: {FLOATING}int32"),
    "residual-float8": ({"residual": X.to(FLOAT8)}, TypeError, f"residual: {FLOATING}.*loat8"),
    "residual-0d": ({"residual": X[0, 0]}, ValueError, "residual: .*got 0 dimensions"),
    "residual-rows": ({"residual": X[:3]}, ValueError, "residual: expected 4 rows .*got 3"),
}


@either_place
@pytest.mark.parametrize(
    "options", [{}, {"p": 0.0}, {"training": False}], ids=["", "p0", "evaluation"]
)
@cases(INPUT)
def test_input(changes, error, message, options, inplace):
    assert_refused(changes, error, message, inplace=inplace, **options)


def nested(layout):
    return torch.nested.as_nested_tensor([*X], layout=layout)


DENSE = "{}: expected a dense tensor, got a {}"
TO_DENSE = {
    "jagged": (lambda: nested(torch.jagged), r"nested tensor \(jagged\); pad it with "),
    "nested": (lambda: nested(torch.strided), r"nested tensor \(strided\); pad it with "),
    "sparse": (X.to_sparse, r"sparse_coo tensor; make it dense with to_dense\(\)"),
}
TENSORS = {
    "x": lambda t: {"x": t},
    "x-of-list": lambda t: {"x": [X, t], "rows": [ROWS, ROWS]},
    "residual": lambda t: {"residual": t},
    "layer_scale": lambda t: {"layer_scale": t},
    "out": lambda t: {"branch": lambda kept: t},
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "call"), TENSORS.items(), ids=TENSORS.keys())
@pytest.mark.parametrize(("make", "got"), TO_DENSE.values(), ids=TO_DENSE.keys())
def test_nested_and_sparse_tensors(make, got, name, call, training):
    changes = {"x": X, "branch": identity, "rows": ROWS, **call(make())}
    message = "^" + DENSE.format(name.partition("-")[0], got)
    with pytest.raises(TypeError, match=message) as caught:
        fused_stochastic_depth(p=0.5, training=training, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize(("make", "got"), TO_DENSE.values(), ids=TO_DENSE.keys())
def test_nested_and_sparse_tensors_in_building_blocks(make, got):
    for function, name in (
        (lambda t: compact_rows(t, ROWS), "x"),
        (lambda t: compact_layer_norm(t, ROWS, 3), "x"),
        (lambda t: compact_layer_norm(X, ROWS, 3, t), "weight"),
        (lambda t: scatter_add_rows(t, X[:2], ROWS), "x"),
        (lambda t: scatter_add_rows(X, t, ROWS), "out"),
    ):
        with pytest.raises(TypeError, match="^" + DENSE.format(name, got)):
            function(make())


@pytest.fixture
def distributed():
    """DTensors of one process."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("PyTorch was built without torch.distributed")
    from torch.distributed import tensor

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = distributed.init_device_mesh("cpu", (1,))
    yield lambda local: tensor.distribute_tensor(local, mesh, [tensor.Replicate()])
    distributed.destroy_process_group()


def test_tensors_of_several_processes(distributed):
    stream, norm = distributed(X), nn.LayerNorm(3)
    norm.weight = nn.Parameter(distributed(torch.ones(3)))
    changes = {
        "x": {"x": stream},
        "residual": {"residual": stream},
        "layer_scale": {"layer_scale": distributed(torch.ones(3))},
        "norm.weight": {"norm": norm},
        "out": {"branch": lambda kept: distributed(kept)},
    }
    for name, change in changes.items():
        message = rf"{name}: expected a tensor of this process, got a DTensor; .*to_local\(\)"
        call = {"x": X, "branch": identity, "p": 0.5, "rows": ROWS, **change}
        with pytest.raises(TypeError, match=f"^{message}"):
            fused_stochastic_depth(**call)
    with pytest.raises(TypeError, match=r"^args\[0\]: expected tensors, .* got a DTensor"):
        fused_stochastic_depth(X, identity, 0.5, args=(stream,))
    for function in (
        lambda: compact_rows(stream, ROWS),
        lambda: scatter_add_rows(X, distributed(X[:2]), ROWS),
        lambda: fused_stochastic_depth([X, stream], identity, 0.5),
    ):
        with pytest.raises(TypeError, match=r"^(x|out): expected a tensor of this process"):
            function()
    # Evaluation is plain PyTorch.
    y = fused_stochastic_depth(stream, torch.sin, 0.5, training=False)
    torch.testing.assert_close(y.to_local(), X + X.sin())


def test_the_negative_bit_in_place():
    value = torch.randn(4, 3, dtype=torch.complex64)
    for training in (True, False):
        for call in ({"x": value.conj().imag}, {"x": X, "residual": value.conj().imag}):
            name = "residual" if "residual" in call else "x"
            with pytest.raises(ValueError, match=rf"^{name}: expected .*negative bit.*resolve_neg"):
                fused_stochastic_depth(
                    branch=torch.sin, p=0.5, training=training, rows=ROWS, inplace=True, **call
                )
        x = value.conj().imag
        y = fused_stochastic_depth(x, torch.sin, 0.5, training=training, rows=ROWS)
        plain = x.resolve_neg()
        assert torch.equal(
            y, fused_stochastic_depth(plain, torch.sin, 0.5, training=training, rows=ROWS)
        )
    with pytest.raises(ValueError, match=r"^x: expected .*negative bit.*resolve_neg"):
        scatter_add_rows(value.conj().imag, torch.ones(2, 3), ROWS, inplace=True)


KEPT = r"out: expected 2 kept rows of residual's shape \[4, 3\], got "
BRANCH = {
    "none": (lambda x: None, TypeError, "branch: expected to return a tensor, got NoneType"),
    "number": (lambda x: 1.0, TypeError, "branch: expected to return a tensor, got float"),
    "tuple": (lambda x: (x, x), TypeError, "branch: expected to return a tensor, got tuple"),
    "width": (lambda x: x[:, :2], ValueError, KEPT + r"\[2, 2\]"),
    "width-1": (lambda x: x[:, :1], ValueError, KEPT + r"\[2, 1\]"),
    "fewer-rows": (lambda x: x[:1], ValueError, KEPT + r"\[1, 3\]"),
    "no-rows": (lambda x: x[:0], ValueError, KEPT + r"\[0, 3\]"),
    "all-rows": (lambda x: X.clone(), ValueError, KEPT + r"\[4, 3\]"),
    "one-dimension-less": (lambda x: x[:, 0], ValueError, KEPT + r"\[2\]"),
    "one-dimension-more": (lambda x: x[None], ValueError, KEPT + r"\[1, 2, 3\]"),
    "0d": (lambda x: x.sum(), ValueError, KEPT + r"\[\]"),
    "int": (lambda x: x.int(), TypeError, f"out: {FLOATING}Int"),
    "complex": (lambda x: x.to(torch.complex64), TypeError, f"out: {FLOATING}ComplexFloat"),
    "float8": (lambda x: x.to(FLOAT8), TypeError, f"out: {FLOATING}Float8"),
    "device": (lambda x: x.to("meta"), ValueError, "out: .*device of residual, cpu, got meta"),
}


@either_place
@cases(BRANCH)
def test_branch_output(changes, error, message, inplace):
    assert_refused({"branch": changes}, error, message, rows=ROWS, inplace=inplace)


def ones(*shape, **options):
    return torch.ones(shape, **options)


NORM = "norm: expected nn.LayerNorm or nn.RMSNorm, got "
WIDTH = r"norm: normalizes over \[5\], which are not .* shape \[4, 3\]"
ROW = r"layer_scale: shape {} does not broadcast against one row of shape \[3\]"
OPTIONS = {
    "layer_scale-width": ({"layer_scale": ones(2)}, ValueError, ROW.format(r"\[2\]")),
    "layer_scale-of-rows": ({"layer_scale": ones(4, 1)}, ValueError, ROW.format(r"\[4, 1\]")),
    "layer_scale-enlarges": ({"layer_scale": ones(5, 3)}, ValueError, ROW.format(r"\[5, 3\]")),
    "layer_scale-int": ({"layer_scale": ones(3).int()}, TypeError, f"layer_scale: {FLOATING}Int"),
    "layer_scale-number": ({"layer_scale": 0.1}, TypeError, "layer_scale: .*got float"),
    "layer_scale-device": (
        {"layer_scale": ones(3, device="meta")},
        ValueError,
        "layer_scale: expected the device of .*, cpu, got meta",
    ),
    "norm-width": ({"norm": nn.LayerNorm(5)}, ValueError, WIDTH),
    "norm-rms-width": ({"norm": nn.RMSNorm(5)}, ValueError, WIDTH),
    "norm-of-the-batch": ({"norm": nn.LayerNorm((4, 3))}, ValueError, r"norm: .*over \[4, 3\]"),
    "norm-batch": ({"norm": nn.BatchNorm1d(3)}, TypeError, NORM + "BatchNorm1d"),
    "norm-function": ({"norm": torch.neg}, TypeError, NORM + "builtin_function"),
    "norm-device": (
        {"norm": nn.LayerNorm(3, device="meta")},
        ValueError,
        "norm.weight: expected the device of x, cpu, got meta",
    ),
    "residual-shape": ({"residual": ones(4, 5)}, ValueError, r".*residual's shape \[4, 5\]"),
    "residual-device": ({"residual": X.to("meta")}, ValueError, "residual: .*cpu, got meta"),
    "rows-tensor": ({"rows": INDEX}, TypeError, "rows: expected KeptRows, got Tensor"),
    "rows-list": ({"rows": [ROWS]}, TypeError, "rows: expected KeptRows, got list"),
    "rows-of-another-batch": (
        {"rows": KeptRows.from_index(INDEX, 5)},
        ValueError,
        "rows: made for a batch of 5 rows, but x has 4",
    ),
    "rows-device": ({"rows": ROWS.to("meta")}, ValueError, r"rows.*device of x, cpu, got meta"),
    "args-device": (
        {"args": (ones(4, device="meta"),)},
        ValueError,
        r"args\[0\]: expected a tensor of the batch on cpu, got one on meta .*Shared",
    ),
    "args-tensor": ({"args": ones(4, 3)}, TypeError, "args: expected .*got Tensor"),
}


@either_place
@cases(OPTIONS)
def test_options(changes, error, message, inplace):
    assert_refused(changes, error, message, inplace=inplace, **{"rows": ROWS, **changes})


# A branch whose output broadcasts against the stream, an option that training does not take: where
# every row runs the branch, plain PyTorch computes something else without a word.
PLAIN = {
    "branch-none": ({"branch": lambda x: None}, TypeError, "branch: .*got NoneType"),
    "branch-number": ({"branch": lambda x: 1.0}, TypeError, "branch: .*got float"),
    "branch-width": ({"branch": lambda x: x[:, :1]}, ValueError, r"(branch|out).*got .4, 1"),
    "branch-rows": ({"branch": lambda x: x[:1]}, ValueError, r"(branch|out).*got .1, 3"),
    "branch-0d": ({"branch": torch.sum}, ValueError, "(branch|out).*got "),
    "branch-dims": ({"branch": lambda x: x[None]}, ValueError, r"(branch|out).*got .1, 4, 3"),
    "residual-width": ({"residual": ones(4, 1)}, ValueError, r".*residual.*.4, 1"),
    "layer_scale-of-rows": ({"layer_scale": ones(4, 1)}, ValueError, "layer_scale: .*4, 1"),
    "layer_scale-number": ({"layer_scale": 0.1}, TypeError, "layer_scale: .*float"),
    "norm-batch": ({"norm": nn.BatchNorm1d(3)}, TypeError, NORM + "BatchNorm1d"),
    "norm-function": ({"norm": torch.neg}, TypeError, NORM + "builtin_function"),
    "args-tensor": ({"args": ones(4, 3)}, TypeError, "args: .*Tensor"),
}


@pytest.mark.parametrize("options", [{"p": 0.0}, {"training": False}], ids=["p0", "evaluation"])
@cases(PLAIN)
def test_where_every_row_runs(changes, error, message, options):
    assert_refused(changes, error, message, **options)
    branch = changes.get("branch", identity)
    several = {"x": [X, X], "branch": lambda xs, *args: [identity(xs[0]), branch(xs[1])]}
    if "residual" in changes:
        several["residual"] = [X, changes["residual"]]
    assert_refused(changes | several, error, message, **options, inplace=True)


def test_shared_argument_of_the_batch_size_stays_whole():
    table, seen = ones(4, 5), []
    for device in ("cpu", "meta"):
        args = (Shared(table.to(device)), table)
        fused_stochastic_depth(
            X, lambda x, *got: (seen.append(got), x)[1], 0.5, args=args, rows=ROWS
        )
    assert [[tuple(arg.shape) for arg in got] for got in seen] == [[(4, 5), (2, 5)]] * 2


MANY = "expected a list .*2.*, got "
LISTS = {
    "x-empty": ({"x": []}, ValueError, "x: expected at least one tensor, got an empty list"),
    "x-entry": ({"x": [X, None]}, TypeError, "x: expected a tensor, got NoneType"),
    "x-entry-int": ({"x": [X, X.int()]}, TypeError, f"x: {FLOATING}int32"),
    "rows": ({"rows": ROWS}, ValueError, f"rows: {MANY}KeptRows"),
    "rows-too-few": ({"rows": [ROWS]}, ValueError, f"rows: {MANY}1 entries"),
    "rows-entry": ({"rows": [ROWS, INDEX]}, TypeError, "rows: expected KeptRows, got Tensor"),
    "residual": ({"residual": X}, ValueError, f"residual: {MANY}Tensor"),
    "residual-many": ({"residual": [X] * 3}, ValueError, f"residual: {MANY}3 entries"),
    "residual-entry": ({"residual": [X, X[:3]]}, ValueError, "residual: expected 4 rows .*got 3"),
    "out": ({"branch": lambda xs: xs[0]}, ValueError, f"branch.*{MANY}Tensor"),
    "out-few": ({"branch": lambda xs: xs[:1]}, ValueError, f"branch.*{MANY}1 entries"),
    "out-entry": ({"branch": lambda xs: [xs[0], None]}, TypeError, "branch.*got NoneType"),
    "out-width": ({"branch": lambda xs: [xs[0], xs[1][:, :2]]}, ValueError, KEPT + r"\[2, 2\]"),
    "layer_scale": ({"layer_scale": ones(2)}, ValueError, ROW.format(r"\[2\]")),
}


@either_place
@cases(LISTS)
def test_lists(changes, error, message, inplace):
    call = {"x": [X, X], "rows": [ROWS, ROWS], "inplace": inplace, **changes}
    assert_refused(call, error, message)


PLACES = {
    "x": lambda x: {"x": x},
    "residual": lambda x: {"x": X, "residual": x},
    "list": lambda x: {"x": [X.clone(), x], "rows": [ROWS, ROWS]},
}
WHERE = {
    "": {"rows": ROWS},
    "no-rows": {"rows": KeptRows.from_index(INDEX[:0], 4)},
    "p0": {"p": 0.0},
    "evaluation": {"training": False},
}


TARGETS = {
    "leaf": (lambda: X.clone().requires_grad_(), "a leaf Variable that requires grad"),
    "expanded": (lambda: torch.zeros(1, 3).expand(4, 3), "more than one element of the written-to"),
}


@pytest.mark.parametrize("options", WHERE.values(), ids=WHERE.keys())
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize(("make", "message"), TARGETS.values(), ids=TARGETS.keys())
def test_inplace_where_pytorch_forbids_it(make, message, place, options):
    call = {"p": 0.5, "inplace": True, **options, **place(make())}
    given = tensors([call["x"], call.get("residual")])
    before = [tensor.detach().clone() for tensor in given]
    with pytest.raises(RuntimeError, match=message):
        fused_stochastic_depth(branch=lambda *_: pytest.fail("the branch ran first"), **call)
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now, then)


def test_a_branch_is_not_its_output():
    message = r"^branch: expected a callable, got Tensor \(pass the branch, not its output\)$"
    linear = nn.Linear(3, 3)
    for training in (True, False):
        with pytest.raises(TypeError, match=message):
            fused_stochastic_depth(X, linear(torch.ones(2, 3)), 0.5, training=training)
    with pytest.raises(TypeError, match=message):
        StochasticDepth(linear(torch.ones(2, 3)), 0.5)


@pytest.mark.parametrize("p", [0.5, 1])
def test_the_order_of_torchvision(p):
    message = (
        rf"^branch: expected a callable, got {type(p).__name__} \(the order is x, branch, p: "
        r"stochastic_depth\(branch\(x\), p\) of torchvision becomes "
        r"fused_stochastic_depth\(x, branch, p\)\)$"
    )
    with pytest.raises(TypeError, match=message):
        fused_stochastic_depth(X, p, "row", True)
