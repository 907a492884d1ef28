"""The ops below autograd, called directly with what does not fit: none leaves its tensors."""

import pytest
import torch

from sdkernels.backends import namespace

X = torch.arange(12.0).view(4, 3)
OUT = torch.ones(2, 3)
INDEX, SLOT = torch.tensor([0, 2]), torch.tensor([0, -1, 1, -1])
FLOAT8 = torch.float8_e4m3fn

ADD = {
    "residual": X,
    "out": OUT,
    "index": INDEX,
    "slot": SLOT,
    "layer_scale": torch.ones(3),
    "row_weight": torch.ones(2),
    "scale": 1.0,
}
NORMALIZE = {"normalized_shape": [3], "weight": torch.ones(3), "rms": False}
OPS = {
    "compact_rows": {"x": X, "index": INDEX},
    "compact_rows_into": {"kept": OUT, "x": X, "index": INDEX},
    "expand_rows": {"kept": OUT, "index": INDEX, "slot": SLOT},
    "scatter_rows": {"residual": X, "out": OUT, "index": INDEX, "slot": SLOT},
    "scatter_rows_": {"residual": X, "out": OUT, "index": INDEX, "slot": SLOT},
    "scatter_add_rows": ADD,
    "scatter_add_rows_": ADD,
    "scatter_add_rows_backward": {
        "grad": X,
        "out": OUT,
        "index": INDEX,
        "layer_scale": torch.ones(3),
        "row_weight": torch.ones(2),
        "scale": 1.0,
        "dtype": torch.float32,
        "wanted": [True, True],
    },
    "scatter_add_rows_backward_into": {
        "d_out": OUT.clone(),
        "grad": X,
        "out": OUT,
        "index": INDEX,
        "layer_scale": torch.ones(3),
        "row_weight": torch.ones(2),
        "scale": 1.0,
        "wanted": [True, True],
    },
    "scatter_add_relu_rows": ADD,
    "scatter_add_relu_rows_backward": {
        "grad": X,
        "positive": torch.zeros(4, 1, dtype=torch.uint8),
        "index": INDEX,
        "slot": SLOT,
        "layer_scale": torch.ones(3),
        "row_weight": torch.ones(2),
        "scale": 1.0,
        "dtype": torch.float32,
        "memory_format": torch.contiguous_format,
        "wants_out": True,
    },
    "compact_mask": {"mask": SLOT >= 0, "k": 2},
    "compact_norm": {
        **NORMALIZE,
        "x": X,
        "index": INDEX,
        "bias": torch.ones(3),
        "eps": 1e-5,
        "dtype": torch.float32,
        "keep_rows": True,
    },
    "compact_norm_into": {
        **NORMALIZE,
        "normed": OUT.clone(),
        "x": X,
        "index": INDEX,
        "bias": torch.ones(3),
        "eps": 1e-5,
        "keep_rows": True,
    },
    "compact_norm_backward": {
        **NORMALIZE,
        "d_stream": X,
        "d_normed": OUT,
        "kept": OUT,
        "mean": torch.zeros(2),
        "rstd": torch.ones(2),
        "index": INDEX,
        "slot": SLOT,
        "wanted": [True] * 3,
    },
}

# Replacements for an argument of an op, wherever it has one of this name. "rows" replaces several.
WRONG = {
    "index": {
        "too-large": INDEX + 2,
        "huge": INDEX * 2**40,
        "negative": INDEX - 1,
        "duplicate": INDEX[[1, 1]],
        "unsorted": INDEX.flip(0),
        "int32": INDEX.int(),
        "2d": INDEX[None],
        "0d": INDEX[0],
        "strided": torch.tensor([0, 9, 2, 9])[::2],
    },
    "slot": {
        "other": SLOT.flip(0),
        "huge": torch.tensor([0, -1, 1, 2**40]),
        "short": SLOT[:2],
        "int32": SLOT.int(),
        "2d": SLOT[None],
        "strided": torch.stack([SLOT, SLOT], 1)[:, 0],
    },
    "x": {"0d": X[0, 0], "no-rows": X[:0], "few-rows": X[:2]},
    "grad": {"0d": X[0, 0], "few-rows": X[:2], "width": X[:, :2], "int": X.int()},
    "residual": {
        "0d": X[0, 0],
        "few-rows": X[:3],
        "width": X[:, :2],
        "int": X.int(),
        "float8": X.to(FLOAT8),
    },
    "out": {
        "few-rows": OUT[:1],
        "all-rows": X,
        "width": OUT[:, :2],
        "dims": OUT[0],
        "int": OUT.int(),
        "float8": OUT.to(FLOAT8),
    },
    "normed": {"width": OUT[:, :2], "strided": torch.ones(3, 2).T, "int": OUT.int()},
    "d_out": {"width": OUT[:, :2], "strided": torch.ones(3, 2).T, "int": OUT.int()},
    "positive": {
        "bool": X > 0,
        "few-rows": torch.zeros(3, 1, dtype=torch.uint8),
        "wide": torch.zeros(4, 2, dtype=torch.uint8),
        "expanded": torch.zeros(1, 1, dtype=torch.uint8).expand(4, 1),
    },
    "memory_format": {"channels": torch.channels_last, "preserve": torch.preserve_format},
    "kept": {"few-rows": OUT[:1], "all-rows": X, "0d": X[0, 0]},
    "layer_scale": {"width": torch.ones(2), "rows": torch.ones(2, 3), "int": INDEX},
    "row_weight": {"few": torch.ones(1), "2d": torch.ones(2, 1), "int": INDEX},
    "mask": {"int": SLOT, "2d": (SLOT >= 0)[None], "0d": SLOT[0] >= 0},
    "k": {"less": 1, "more": 3, "negative": -1, "batch": 5},
    "normalized_shape": {"width": [5], "none": [], "batch": [4, 3], "negative": [-3]},
    "weight": {"width": torch.ones(2), "2d": torch.ones(1, 3), "int": torch.ones(3).int()},
    "bias": {"width": torch.ones(2), "int": torch.ones(3).int()},
    "d_stream": {"few-rows": X[:3], "width": X[:, :2], "dtype": X.double()},
    "d_normed": {"few-rows": OUT[:1], "width": OUT[:, :2], "int": OUT.int()},
    "mean": {
        "few": torch.zeros(1),
        "dtype": torch.zeros(2).double(),
        "strided": torch.zeros(4)[::2],
    },
    "rstd": {"few": torch.ones(1), "dtype": torch.ones(2).double(), "strided": torch.ones(4)[::2]},
}
# No kept rows: were the check missing, the test would fail, and not write past the end of a tensor.
NONE = {"index": INDEX[:0], "slot": torch.full((4,), -1), "kept": OUT[:0], "d_normed": OUT[:0]}
NONE.update(out=None, layer_scale=None, row_weight=None, mean=torch.zeros(0), rstd=torch.zeros(0))
NO_KERNEL = {
    **{
        f"scatter_add_rows_backward-{dtype}": {"dtype": dtype, "wanted": [False, False]}
        for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, FLOAT8)
    },
    **{f"compact_norm-{dtype}": {"dtype": dtype} for dtype in (torch.int8, FLOAT8, torch.float64)},
    "compact_norm_backward-d_normed": {"d_normed": OUT[:0].to(FLOAT8)},
    "compact_norm_backward-kept": {"kept": OUT[:0].to(FLOAT8), "d_stream": X.to(FLOAT8)},
}


def call(op, changes):
    arguments = OPS[op] | {name: value for name, value in changes.items() if name in OPS[op]}
    getattr(namespace.ops, op)(**arguments)


def assert_refused(op, changes):
    residual = changes.get("residual", X).clone()
    with pytest.raises((TypeError, ValueError)) as caught:
        call(op, {**changes, "residual": residual})
    assert "\n" not in str(caught.value)
    assert torch.equal(residual.double(), changes.get("residual", X).double())


def one_wrong_argument():
    """op-argument-kind -> the op, and what is changed."""
    return {
        f"{op}-{name}-{kind}": (op, {name: value})
        for op, arguments in OPS.items()
        for name, values in WRONG.items()
        for kind, value in values.items()
        if name in arguments
    }


def refusals():
    """The type and the words of every refusal."""
    dtypes = {f"dtype-{case}": (case.split("-")[0], NONE | NO_KERNEL[case]) for case in NO_KERNEL}
    found = {}
    for case, (op, changes) in (one_wrong_argument() | dtypes).items():
        try:
            call(op, {"residual": X.clone()} | changes)
        except (TypeError, ValueError) as error:
            found[case] = [type(error).__name__, str(error)]
    return found


@pytest.mark.parametrize("op", OPS)
def test_what_fits_is_accepted(op):
    call(op, {"residual": X.clone()})


@pytest.mark.parametrize(
    ("op", "changes"), one_wrong_argument().values(), ids=one_wrong_argument().keys()
)
def test_one_wrong_argument(op, changes):
    assert_refused(op, changes)


@pytest.mark.parametrize("case", NO_KERNEL)
def test_dtype_that_no_kernel_has(case):
    assert_refused(case.split("-")[0], NONE | NO_KERNEL[case])
