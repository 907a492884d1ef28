"""Bad input of the building blocks is refused in one sentence, and before anything is written."""

import pytest
import torch

from sdkernels import (
    KeptRows,
    compact_layer_norm,
    compact_rms_norm,
    compact_rows,
    scatter_add_rows,
)

X = torch.arange(12.0).view(4, 3)
OUT = torch.ones(2, 3)
INDEX, SLOT = torch.tensor([0, 2]), torch.tensor([0, -1, 1, -1])
ROWS = KeptRows(INDEX, SLOT)
FLOAT8 = torch.float8_e4m3fn


def assert_refused(call, error, message=""):
    with pytest.raises(error, match=f"^{message}") as caught:
        call()
    assert "\n" not in str(caught.value)


KEPT = "rows: expected KeptRows, got "
CPU = "expected the device of .*, cpu, got meta"
SCALE = r"layer_scale: shape \[2, 1\] does not broadcast against .*\[3\]"
WEIGHT = r".*weight: expected shape \[3\], got \[2\]"
BIAS = r".*bias: expected shape \[3\], got \[2\]"

NORM = {
    "x-str": (("x", ROWS, 3), TypeError, "x: .*got str"),
    "x-int": ((X.int(), ROWS, 3), TypeError, "x: .*got .*[Ii]nt"),
    "x-float8": ((X.to(FLOAT8), ROWS, 3), TypeError, "x: .*got .*loat8"),
    "x-0d": ((X[0, 0], ROWS, 3), ValueError, "x: .*got 0 dimensions"),
    "rows-none": ((X, None, 3), TypeError, KEPT + "NoneType"),
    "rows-batch": ((X[:3], ROWS, 3), ValueError, "rows: made for a batch of 4 rows, .* 3"),
    "shape-str": ((X, ROWS, "3"), TypeError, "normalized_shape: .*got str"),
    "shape-width": ((X, ROWS, 5), ValueError, r"norm.*\[5\].*shape \[4, 3\]"),
    "shape-none": ((X, ROWS, ()), ValueError, r"norm.*\[\].*shape \[4, 3\]"),
    "shape-batch": ((X, ROWS, (4, 3)), ValueError, r"norm.*\[4, 3\].*shape \[4, 3\]"),
    "shape-longer": ((X, ROWS, (2, 4, 3)), ValueError, r"norm.*\[2, 4, 3\].*shape \[4, 3\]"),
    "shape-negative": ((X, ROWS, -1), ValueError, r"norm.*\[-1\].*shape \[4, 3\]"),
    "weight-number": ((X, ROWS, 3, 1.0), TypeError, ".*weight: .*got float"),
    "weight-width": ((X, ROWS, 3, torch.ones(2)), ValueError, WEIGHT),
    "weight-int": ((X, ROWS, 3, torch.ones(3).int()), TypeError, ".*weight: .*got Int"),
    "weight-device": ((X, ROWS, 3, torch.ones(3, device="meta")), ValueError, f".*weight: {CPU}"),
}
BLOCKS = {
    compact_rows: {
        "x-str": (("x", ROWS), TypeError, "x: .*got str"),
        "x-0d": ((X[0, 0], ROWS), ValueError, "x: .*got 0 dimensions"),
        "rows-batch": ((X[:3], ROWS), ValueError, "rows: made for a batch of 4 rows, .* 3"),
        "rows-device": ((X, ROWS.to("meta")), ValueError, f"rows.*: {CPU}"),
        "rows-tensor": ((X, INDEX), TypeError, KEPT + "Tensor"),
        "rows-list": ((X, [0, 2]), TypeError, KEPT + "list"),
    },
    compact_layer_norm: {
        **NORM,
        "bias-width": ((X, ROWS, 3, torch.ones(3), torch.ones(2)), ValueError, BIAS),
        "bias-alone": ((X, ROWS, 3, None, torch.ones(2)), ValueError, BIAS),
    },
    compact_rms_norm: NORM,
    scatter_add_rows: {
        "x-int": ((X.int(), OUT, ROWS), TypeError, "x: .*got .*[Ii]nt"),
        "x-str": (("x", OUT, ROWS), TypeError, "x: .*got str"),
        "rows-batch": ((X[:3], OUT, ROWS), ValueError, "rows: made for a batch of 4 rows, .* 3"),
        "rows-none": ((X, OUT, None), TypeError, KEPT + "NoneType"),
        "out-list": ((X, [1.0], ROWS), TypeError, "out: .*got list"),
        "out-int": ((X, OUT.int(), ROWS), TypeError, "out: .*got Int"),
        "out-rows": ((X, X, ROWS), ValueError, r"out: expected 2 .*got \[4, 3\]"),
        "out-width": ((X, OUT[:, :1], ROWS), ValueError, r"out: expected 2 .*got \[2, 1\]"),
        "out-device": ((X, OUT.to("meta"), ROWS), ValueError, f"out: {CPU}"),
        "scale-number": ((X, OUT, ROWS, 0.1), TypeError, "layer_scale: .*got float"),
        "scale-rows": ((X, OUT, ROWS, torch.ones(2, 1)), ValueError, SCALE),
        "scale-int": ((X, OUT, ROWS, INDEX), TypeError, "layer_scale: .*got Long"),
    },
}


@pytest.mark.parametrize(
    ("block", "arguments", "error", "message"),
    [
        pytest.param(block, *case, id=f"{block.__name__}-{name}")
        for block, cases in BLOCKS.items()
        for name, case in cases.items()
    ],
)
def test_building_block(block, arguments, error, message):
    assert_refused(lambda: block(*arguments), error, message)
    if block is scatter_add_rows:
        x = arguments[0].clone() if isinstance(arguments[0], torch.Tensor) else arguments[0]
        assert_refused(lambda: block(x, *arguments[1:], inplace=True), error, message)
        assert x == arguments[0] if isinstance(x, str) else torch.equal(x, arguments[0])


OVERLAPS = {
    "out": lambda x: scatter_add_rows(x, x[1:3], ROWS, inplace=True),
    "layer_scale": lambda x: scatter_add_rows(x, OUT, ROWS, x[0], inplace=True),
}


@pytest.mark.parametrize("part", [X[:1], X[:, :1]], ids=["rows", "columns"])
def test_residual_that_overlaps_itself(part):
    x = part.clone().expand(X.shape)
    before = x.clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.ops.sdkernels.scatter_add_rows_(x, OUT, INDEX, SLOT, None, None, 1.0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("add", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_input_that_overlaps_what_is_written(add):
    x = X.clone()
    with pytest.raises(RuntimeError, match=r"overlap|single memory location"):
        add(x)
    assert torch.equal(x, X)
