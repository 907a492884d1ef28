"""Which entries of args belong to the samples: taken, shared, or refused in a sentence."""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from sdkernels import KeptRows, PerSample, Shared, StochasticDepth, fused_stochastic_depth

B = 4
INDEX = torch.tensor([0, 3])
ROWS = KeptRows.from_index(INDEX, B, 2.0)
NO_ROWS = KeptRows.from_index(INDEX[:0], B)
WHERE = {
    "kept": {"rows": ROWS},
    "no-rows": {"rows": NO_ROWS},
    "ones": {"rows": NO_ROWS, "empty": "ones"},
    "whole": {"rows": ROWS, "min_saving": 1.0},
    "p0": {"p": 0.0},
    "evaluation": {"training": False},
    "in-place-evaluation": {"training": False, "inplace": True},
}
everywhere = pytest.mark.parametrize("options", WHERE.values(), ids=WHERE.keys())


def got(arg: Any, batch: int = B, **options: Any) -> Any:
    """What a branch gets of an entry of args."""
    seen: list[Any] = []

    def branch(kept: Tensor, arg: Any) -> Tensor:
        seen.append(arg)
        return kept

    x = torch.ones(batch, 3)
    fused_stochastic_depth(x, branch, **{"p": 0.5, "args": (arg,), **options})
    return seen[0]


# Tensors


@everywhere
@pytest.mark.parametrize("marked", [False, True])
def test_a_window_mask_is_refused_at_the_first_batch(options, marked):
    """And not only where the batch has another size than the mask has windows."""
    mask = torch.zeros(8, 2, 2)
    if marked:
        assert got(Shared(mask), **options) is mask
        return
    with pytest.raises(ValueError, match=r"^args\[0\]: expected 4 rows .* got shape \(8, 2, 2\); "
                                         r"wrap it in sdkernels\.Shared "):  # fmt: skip
        got(mask, **options)
    with pytest.raises(ValueError, match=r"^args\[0\]: expected 4 rows "):
        got((3, {"mask": [mask]}), **options)


@everywhere
def test_parameters_belong_to_nobody_until_it_is_said(options):
    table = nn.Parameter(torch.zeros(B, 3))
    with pytest.raises(ValueError, match=r"^args\[0\]: .*a parameter of shape \(4, 3\); wrap"):
        got(table, **options)
    assert got(Shared(table), **options) is table
    assert len(got(PerSample(table), rows=ROWS)) == 2
    assert len(got(PerSample(table), training=False)) == 4


@everywhere
def test_one_row_broadcasts(options):
    bias, number, position = torch.ones(1, 3), torch.tensor(2.0), nn.Parameter(torch.ones(1, 5))
    assert got(bias, **options) is bias
    assert got(number, **options) is number
    assert got(position, **options) is position
    with pytest.raises(ValueError, match=r"^args\[0\]: expected 4 rows .* got shape \(1, 3\)"):
        got(PerSample(bias), **options)
    with pytest.raises(ValueError, match=r"^args\[0\]: expected 4 rows .* got shape \(\)"):
        got(PerSample(number), **options)


def test_a_batch_of_one():
    """Its entries may be concatenated with its rows: without any, they have none either."""
    none = KeptRows.from_index(INDEX[:0], 1)
    assert got(torch.ones(1, 3), batch=1, rows=none).shape == (0, 3)
    assert got(nn.Parameter(torch.ones(1, 3)), batch=1, rows=none).shape == (1, 3)


def test_complex_entries_with_the_conjugate_and_the_negative_bit():
    value = torch.randn(B, 3, dtype=torch.complex64)
    assert torch.equal(got(value.conj(), rows=ROWS), value.conj().resolve_conj()[INDEX])
    assert torch.equal(got(value.conj().imag, rows=ROWS), value.conj().resolve_conj().imag[INDEX])


class Subclass(Tensor):
    pass


UNKNOWN = {
    "subclass": (torch.zeros(B, 3).as_subclass(Subclass), "a Subclass"),
    "sparse": (torch.eye(B).to_sparse(), "a sparse_coo tensor"),
}


@everywhere
@pytest.mark.parametrize(("value", "name"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_other_tensors(value, name, options):
    with pytest.raises(TypeError, match=rf"^args\[0\]: expected tensors, .* got {name}, .*Shared"):
        got(value, **options)
    assert got(Shared(value), **options) is value


def test_another_way_to_select():
    """The batch in another dimension, and heads that are folded into it."""
    mask = torch.arange(24).view(3, B, 2)
    taken = got(PerSample(mask, lambda mask, index: mask[:, index]), rows=ROWS)
    assert torch.equal(taken, mask[:, INDEX])
    heads = torch.arange(24).view(2 * B, 3)

    def of_heads(value: Tensor, index: Tensor) -> Tensor:
        return value.unflatten(0, (B, 2))[index].flatten(0, 1)

    assert torch.equal(got(PerSample(heads, of_heads), rows=ROWS), heads[[0, 1, 6, 7]])
    assert got(PerSample(heads, of_heads), training=False) is heads
    captions = ["a", "b", "c", "d"]
    entry = PerSample(captions, lambda captions, index: [captions[i] for i in index.tolist()])
    assert got([entry, 1], rows=ROWS) == [["a", "d"], 1]
    with pytest.raises(TypeError, match=r"^select: expected a function .* got int"):
        PerSample(mask, 1)


# Containers


class Pair(NamedTuple):
    cos: Tensor
    sin: Tensor


class PairWithMethods(namedtuple("PairWithMethods", "cos sin")):
    __slots__ = ()

    def total(self) -> Tensor:
        return self.cos + self.sin


Entry = TypeVar("Entry")
PAIRS: list[Any] = [Pair, PairWithMethods]

if sys.version_info >= (3, 11):  # which can have both bases

    class GenericPair(NamedTuple, Generic[Entry]):
        cos: Entry
        sin: Entry

    PAIRS.append(GenericPair)


@pytest.mark.parametrize("kind", PAIRS)
def test_named_tuples(kind):
    x = torch.arange(4.0).view(4, 1)
    pair = got(kind(x, -x), rows=ROWS)
    assert type(pair) is kind
    assert (pair.cos.tolist(), pair.sin.tolist()) == ([[0], [3]], [[0], [-3]])


class Padded(namedtuple("Padded", "data lengths")):
    """Made of something else than its fields."""

    def __new__(cls, parts: list[Tensor]) -> Padded:
        return super().__new__(cls, torch.stack(parts), torch.tensor([len(p) for p in parts]))


class PairWithAttributes(Pair):
    pass


def with_attributes() -> PairWithAttributes:
    pair = PairWithAttributes(torch.zeros(B), torch.zeros(B))
    pair.length = 3
    return pair


class Output(OrderedDict):  # as ModelOutput
    pass


class Named(dict):
    pass


@dataclass
class Rope:
    cos: Tensor
    base: float = 1.0


@dataclass(slots=True)
class SlottedRope:
    cos: Tensor


class Nested:
    def __init__(self, value: Any) -> None:
        self.inner = {"value": [value, self]}


T = torch.zeros(B, 3)
OBJECTS = {
    "named-tuple-with-a-constructor": Padded([torch.zeros(2)] * B),
    "named-tuple-with-attributes": with_attributes(),
    "structseq": T.max(1),
    "ordered-dict-subclass": Output(hidden=T),
    "dict-subclass": Named(hidden=T),
    "user-dict": UserDict(hidden=T),
    "values": {"hidden": T}.values(),
    "set": {T},
    "deque": deque([T]),
    "dataclass": Rope(T),
    "dataclass-with-slots": SlottedRope(T),
    "object": Nested(T),
    "partial": partial(torch.add, T),
    "array": np.zeros((B, 3)),
    "array-in-object": Nested(np.zeros(B)),
    "iterator": iter([T]),
    "map": map(torch.sin, [T]),
    "generator": (each for each in [T]),
    "weak-reference": weakref.ref(T),
    "storage": T.untyped_storage(),
}


@everywhere
@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS.keys())
def test_objects_that_hold_tensors(value, options):
    name = type(value).__name__
    message = (
        rf"^args\[0\]: expected tensors, .* got a {name}, .*Shared.*PerSample\(value, select\)"
    )
    with pytest.raises(TypeError, match=message) as caught:
        got([value], **options)
    assert "\n" not in str(caught.value)
    assert got(Shared(value), **options) is value
    chosen = got(PerSample(value, lambda value, index: (value, index.tolist())), **options)
    expected = {"kept": [0, 3], "no-rows": [], "ones": [0]}
    name = next(name for name, each in WHERE.items() if each is options)
    assert chosen == (value, expected[name]) if name in expected else chosen is value


class Config:
    def __init__(self) -> None:
        self.width, self.kind, self.me = 3, torch.float32, self


PLAIN = [
    None, 3, 2.5, "text", b"bytes", True, torch.float32, torch.device("cpu"), torch.Size([4, 4]),
    Config(), torch.sin, nn.Linear(4, 4), nn.Linear, np.float32(4.0), frozenset([1]), range(4),
    lambda x, table=T: x + table, nn.Linear(4, 4).forward, partial(torch.sum, dim=0), Ellipsis,
]  # fmt: skip


@everywhere
def test_objects_without_tensors_pass_as_they_are(options):
    assert all(a is b for a, b in zip(got(PLAIN, **options), PLAIN, strict=True))


# PyTorch's own batches


SEQUENCES = [torch.randn(n, 3) for n in (2, 4, 4, 1)]


def make_rnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.GRU(3, 8)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("sort", [False, True])
def test_packed_sequences(seed, sort):
    """Values and gradients of masking, for random lengths and rows."""
    torch.manual_seed(seed)
    rnn, batch = make_rnn(), int(torch.randint(2, 7, ()))
    lengths = torch.randint(1, 6, (batch,))
    if sort:
        lengths = lengths.sort(descending=True).values
    sequences = [torch.randn(n, 3, requires_grad=True) for n in lengths.tolist()]
    mask = torch.rand(batch) < 0.6
    mask[0] = True
    rows = KeptRows.from_mask(mask, 2.0)
    x = torch.randn(batch, 8, requires_grad=True)

    def branch(kept: Tensor, packed: PackedSequence) -> Tensor:
        return kept * rnn(packed)[1][0]

    packed, again = (pack_sequence(sequences, enforce_sorted=sort) for _ in range(2))
    actual = fused_stochastic_depth(x, branch, 0.5, rows=rows, args=(packed,))
    expected = x + branch(x, again) * (2.0 * mask)[:, None]
    torch.testing.assert_close(actual, expected)
    leaves, grad = [x, *sequences, *rnn.parameters()], torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


@everywhere
def test_packed_sequences_of_another_batch(options):
    packed = pack_sequence(SEQUENCES[:3], enforce_sorted=False)
    with pytest.raises(ValueError, match=r"^args\[0\]: expected 4 rows .* a PackedSequence of 3;"):
        got(packed, **options)
    # One does not broadcast either.
    with pytest.raises(ValueError, match=r"^args\[0\]: expected 4 rows .* a PackedSequence of 1;"):
        got(pack_sequence(SEQUENCES[:1]), **options)


def test_packed_sequences_of_no_rows():
    packed = pack_sequence(SEQUENCES, enforce_sorted=False)
    taken = got(packed, rows=NO_ROWS)
    assert (len(taken.data), len(taken.batch_sizes)) == (0, 0)
    # An RNN cannot run on that, but on one sequence.
    rnn, x = make_rnn(), torch.randn(B, 8)

    def branch(kept: Tensor, packed: PackedSequence) -> Tensor:
        return kept + rnn(packed)[1][0]

    y = fused_stochastic_depth(x, branch, 0.5, rows=NO_ROWS, args=(packed,), empty="ones")
    assert torch.equal(y, x)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_nested_tensors(layout):
    parts = [part.clone().requires_grad_() for part in SEQUENCES]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    taken = got(nested, rows=ROWS)
    assert taken.layout == layout
    assert [part.tolist() for part in taken.unbind()] == [parts[i].tolist() for i in (0, 3)]
    sum(part.sum() for part in taken.unbind()).backward()
    assert [float(0 if p.grad is None else p.grad.sum()) for p in parts] == [6.0, 0.0, 0.0, 3.0]
    assert got(nested, rows=NO_ROWS).size(0) == 0
    assert got(nested, training=False) is nested
    with pytest.raises(ValueError, match=r"^args\[0\]: expected 5 rows .* a .* of 4;"):
        got(nested, batch=5)


def test_jagged_tensors_of_one_structure_still_fit_together():
    keys = torch.nested.as_nested_tensor(SEQUENCES, layout=torch.jagged)
    values = (keys * 2).transpose(1, 2)
    a, b = got((keys, values), rows=ROWS)
    total = a + b.transpose(1, 2)
    for part, i in zip(total.unbind(), (0, 3), strict=True):
        torch.testing.assert_close(part, SEQUENCES[i] * 3)
    lengths = torch.tensor([1, 3, 2, 1])  # with holes
    holes = torch.nested.nested_tensor_from_jagged(keys.values(), keys.offsets(), lengths)
    for part, i in zip(got(holes, rows=ROWS).unbind(), (0, 3), strict=True):
        assert torch.equal(part, SEQUENCES[i][: lengths[i]])


@pytest.fixture
def flex() -> Any:
    return pytest.importorskip("torch.nn.attention.flex_attention")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("empty", ["run", "ones"])
def test_block_masks(flex, empty):
    """Documents of each sample: those of the kept ones."""
    torch.manual_seed(0)
    length, heads = 32, 2
    documents = torch.randint(0, 3, (B, length)).sort(1).values

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (documents[b, q] == documents[b, kv]) & (q >= kv)

    mask = flex.create_block_mask(mask_mod, B, None, length, length, device="cpu", BLOCK_SIZE=8)
    x, qkv = (
        torch.randn(B, length, 8),
        nn.Linear(8, 24).requires_grad_(False),
    )  # a CPU has no backward

    def attend(kept: Tensor, mask: Any) -> Tensor:
        q, k, v = qkv(kept).unflatten(2, (3, heads, 4)).permute(2, 0, 3, 1, 4)
        return flex.flex_attention(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)

    def run(rows: KeptRows, mask: Any) -> Tensor:
        return fused_stochastic_depth(x, attend, 0.5, rows=rows, args=(mask,), empty=empty)

    taken = got(mask, rows=ROWS)
    assert torch.equal(taken.to_dense(), mask.to_dense()[INDEX])
    dense = flex.create_mask(taken.mask_mod, 2, None, length, length, device="cpu")
    assert torch.equal(dense, flex.create_mask(mask_mod, B, None, length, length, "cpu")[INDEX])
    kept = (ROWS.slot >= 0).float()[:, None, None]
    torch.testing.assert_close(run(ROWS, mask), x + 2 * kept * attend(x, mask))
    if empty == "ones":
        assert torch.equal(run(NO_ROWS, mask), x)
    for_all = flex.create_block_mask(
        lambda b, h, q, kv: q >= kv, None, None, length, length, device="cpu", BLOCK_SIZE=8
    )
    assert got(for_all, rows=ROWS) is for_all  # of one row: it broadcasts
    assert got(mask, training=False) is mask
    with pytest.raises(ValueError, match=r"^args\[0\]: expected 6 rows .* a BlockMask of 4;"):
        got(mask, batch=6)


# Lists of tensors


def of_list(arg: Any, **options: Any) -> Any:
    seen: list[Any] = []

    def branch(kept: list[Tensor], arg: Any) -> list[Tensor]:
        seen.append(arg)
        return kept

    xs = [torch.ones(4, 2), torch.ones(6, 2)]
    rows = [ROWS, KeptRows.from_index(torch.tensor([1]), 6)]
    call = {"p": 0.5, "rows": rows, **options}
    fused_stochastic_depth(xs, branch, args=(arg,), **call)
    return seen[0]


@pytest.mark.parametrize(
    "options", [{}, {"training": False}, {"rows": None, "p": 0.0}], ids=["kept", "evaluation", "p0"]
)
def test_beside_a_list(options):
    rope = (torch.zeros(4, 3), torch.zeros(4, 3))
    crops = "a list of 2, one entry a tensor of x, got a "
    for arg, name in (
        (T, "strided tensor"), (rope, "tuple"), ([T], "list"), ([T] * 3, "list"), (Rope(T), "Rope"),
        (PerSample(["a", "b"]), "PerSample"), ({"mask": T}, "dict"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=rf"^args\[0\]: expected {crops}{name} .*Shared"):
            of_list(arg, **options)
        assert of_list(Shared(arg), **options) is arg
    with pytest.raises(ValueError, match=r"^args\[0\]\[1\]: expected 6 rows .* got shape \(4, 3\)"):
        of_list([T, T], **options)
    counts = [len(each) for each in of_list([T, torch.zeros(6, 1)], **options)]
    assert counts == ([2, 1] if not options else [4, 6])
    assert of_list(3, **options) == 3
    assert of_list([Shared(T), 1], **options) == [T, 1]


# What remains the user's


def test_the_module_takes_the_same_marks():
    module = StochasticDepth(lambda x, mask, table: x * mask + table.sum(), 0.5)
    x, mask, table = torch.randn(B, 3), torch.rand(B, 1), torch.ones(7)
    for training in (True, False):
        module.train(training)
        with pytest.raises(ValueError, match=r"^args\[1\]: expected 4 rows .* got shape \(7,\)"):
            module(x, mask, table)
    torch.testing.assert_close(module(x, mask, Shared(table)), x + x * mask + 7)


def test_an_entry_that_is_the_stream_itself_in_place():
    """In evaluation, where the branch gets all rows: it may save them for its backward."""
    for training in (True, False):
        leaf = torch.randn(B, 3, dtype=torch.float64, requires_grad=True)
        x = leaf * 1
        rows = KeptRows.from_index(torch.arange(B), B)
        y = fused_stochastic_depth(
            x, torch.mul, 0.5, training=training, rows=rows, args=(x,), inplace=True
        )
        torch.testing.assert_close(y, leaf + leaf.square())
        torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf)[0], 1 + 2 * leaf)
