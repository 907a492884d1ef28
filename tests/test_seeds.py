"""Which seed gives which rows, and which generator pays for them."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdkernels import DepthPlan, KeptRows, fused_stochastic_depth

DEVICES = ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])]
LAWS = {"row": {"mode": "row"}, "batch": {"mode": "batch"}, "fixed": {"sampler": "fixed"}}

each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_same_rows(a, b):
    assert a.index.tolist() == b.index.tolist()
    assert a.slot.tolist() == b.slot.tolist()
    assert a.scale == b.scale


# The rows that torch.manual_seed(0) gives: a change of the stream breaks everybody's checkpoints.
ANCHORS = {
    "row": [4, 6, 9, 14, 15],
    "batch": [],
    "fixed": [3, 6, 8, 9, 10, 11, 12, 13],
}


@pytest.mark.parametrize("name", LAWS)
def test_rows_of_a_seed_never_change(name):
    torch.manual_seed(0)
    assert KeptRows.sample(16, 0.5, **LAWS[name]).index.tolist() == ANCHORS[name]
    private = KeptRows.sample(16, 0.5, generator=seeded(0), **LAWS[name])
    assert private.index.tolist() == ANCHORS[name]


@each_law
def test_every_draw_advances_the_generator(law):
    def draws():
        return [KeptRows.sample(16, 0.5, **law).slot.tolist() for _ in range(8)]

    torch.manual_seed(3)
    first, second = draws(), draws()
    assert len({tuple(slot) for slot in first}) > 1
    assert first != second
    torch.manual_seed(3)
    assert [draws(), draws()] == [first, second]
    torch.manual_seed(4)
    assert draws() != first


@each_law
def test_generators_do_not_disturb_each_other(law):
    private, default = seeded(5), torch.get_rng_state()
    before = private.get_state()
    KeptRows.sample(16, 0.5, generator=private, **law)
    assert torch.equal(torch.get_rng_state(), default)
    after = private.get_state()
    assert not torch.equal(after, before)
    KeptRows.sample(16, 0.5, **law)
    assert not torch.equal(torch.get_rng_state(), default)
    assert torch.equal(private.get_state(), after)


@each_law
def test_saved_states_replay(law):
    torch.manual_seed(6)
    state = torch.get_rng_state()
    rows = KeptRows.sample(16, 0.5, **law)
    torch.set_rng_state(state)
    assert_same_rows(KeptRows.sample(16, 0.5, **law), rows)
    torch.set_rng_state(state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        KeptRows.sample(16, 0.5, **law)
    assert_same_rows(KeptRows.sample(16, 0.5, **law), rows)


@each_law
@pytest.mark.parametrize("device", DEVICES)
def test_seed_gives_the_same_rows_on_every_device(device, law):
    torch.manual_seed(8)
    here, state = KeptRows.sample(64, 0.5, **law), torch.get_rng_state()
    for argument in (device, torch.device(device)):
        torch.manual_seed(8)
        there = KeptRows.sample(64, 0.5, device=argument, **law)
        assert {there.index.device.type, there.slot.device.type} == {device}
        assert (there.k, there.batch, there.scale) == (here.k, here.batch, here.scale)
        assert torch.equal(torch.get_rng_state(), state)
        if device != "meta":
            assert_same_rows(there, here)


def drawn_everywhere(sampler):
    """The rows of a seed: of draws, of the op, of plans and of their next steps."""
    torch.manual_seed(8)
    plans = [
        DepthPlan.sample([300, 7], [0.5, 0.1], sampler=sampler),
        DepthPlan.for_step(1, 2, 8, [0.5, 0.1], sampler=sampler),
    ]
    found = [rows for plan in plans for _ in range(2) for rows in plan.resample_()]
    rows = [each for one in found for each in (one if isinstance(one, list) else [one])]
    seen = []
    if sampler != "balanced":
        rows += [KeptRows.sample(batch, 0.5, sampler=sampler) for batch in (0, 8, 300)]
        x = torch.arange(16.0, device="cpu")[:, None]
        fused_stochastic_depth(x, lambda kept: (seen.append(kept), kept)[1], 0.5, sampler=sampler)
    assert all(each.index.is_cpu and each.slot.is_cpu for each in rows)
    tensors = [*(tensor for each in rows for tensor in (each.index, each.slot)), *seen]
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize("sampler", ["bernoulli", "fixed", "rounded", "balanced"])
def test_a_default_device_changes_no_rows(sampler):
    """As torch.set_default_device makes one: rows are drawn on the host."""
    expected = drawn_everywhere(sampler)
    with torch.device("meta"):
        assert drawn_everywhere(sampler) == expected


@each_law
def test_the_op_draws_as_sample_does(law):
    x, seen = torch.arange(16.0)[:, None], []
    options = {"generator": seeded(9), **law}
    rows = [KeptRows.sample(16, 0.4, generator=options["generator"], **law) for _ in range(4)]
    options["generator"].manual_seed(9)
    for _ in range(4):
        fused_stochastic_depth(x, lambda kept: (seen.append(kept), kept)[1], 0.4, **options)
    for kept, each in zip(seen, rows, strict=True):
        assert kept.flatten().tolist() == each.index.tolist()


QUIET = {
    "evaluation": {"training": False},
    "p0": {"p": 0.0},
    "rows": {"rows": KeptRows.from_index(torch.tensor([0, 2]), 4)},
}


@each_law
@pytest.mark.parametrize("options", QUIET.values(), ids=QUIET.keys())
def test_the_op_draws_only_when_it_must(options, law):
    state = torch.get_rng_state()
    call = {"x": torch.ones(4, 2), "branch": torch.neg, "p": 0.5, **options, **law}
    fused_stochastic_depth(**call)
    assert torch.equal(torch.get_rng_state(), state)


@each_law
def test_a_plan_draws_as_its_branches_would_one_by_one(law):
    drop_probs = [0.0, 0.3, 0.3, 1.0, 0.5]
    torch.manual_seed(10)
    rows = [KeptRows.sample(16, p, **law) for p in drop_probs * 2]
    state = torch.get_rng_state()
    torch.manual_seed(10)
    plan = DepthPlan.sample(16, drop_probs, **law)
    drawn = [*plan, *DepthPlan.sample(16, drop_probs, **law)]
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(drawn, rows, strict=True):
        assert_same_rows(a, b)
    torch.manual_seed(10)
    for a, b in zip(plan.resample_(), rows, strict=False):
        assert_same_rows(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_a_plan_keeps_its_generator(device):
    generator, default = seeded(11), torch.get_rng_state()
    plan = DepthPlan.sample(16, [0.5, 0.3], generator=generator, device=device)
    plan.resample_()
    assert torch.equal(torch.get_rng_state(), default)
    expected = seeded(11)
    for _ in range(2):
        rows = [KeptRows.sample(16, p, generator=expected) for p in (0.5, 0.3)]
    assert torch.equal(generator.get_state(), expected.get_state())
    assert [each.k for each in plan] == [each.k for each in rows]
    if device != "meta":
        for a, b in zip(plan, rows, strict=True):
            assert_same_rows(a, b)


class Sent(NamedTuple):
    """A copy to the device that has not taken place yet."""

    source: Tensor  # holds its memory, as a pinned buffer's allocator does until the copy is done
    values: Tensor  # what it held when the copy was asked for


class DelayedCopies(TorchDispatchMode):
    """A device that copies as late as it may: when it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        source = {"aten::_to_copy": 0, "aten::copy_": 1}.get(func._schema.name)
        if source is not None and result.is_meta and args[source].device.type == "cpu":
            assert kwargs.get("non_blocking") or args[source + 1 :] == (True,), func
            self.sent.append(Sent(args[source], args[source].clone()))
        return result

    def assert_arrived(self, count: int) -> None:
        """`count` of them, each with what was sent."""
        assert len(self.sent) == count
        for sent in self.sent:
            assert torch.equal(sent.source, sent.values)


@each_law
def test_copies_to_the_device_may_be_late(law):
    """The host's memory is not written to again: a copy from pinned memory may still read it."""
    with DelayedCopies() as device:
        for _ in range(4):
            KeptRows.sample(16, 0.5, device="meta", **law)
    device.assert_arrived(4)


@pytest.mark.parametrize("sampler", ["bernoulli", "fixed", "rounded", "balanced"])
def test_copies_of_a_plan_may_be_late(sampler):
    with DelayedCopies() as device:
        plan = DepthPlan.sample(16, [0.1, 0.5, 0.5], sampler=sampler, device="meta")
        for _ in range(4):
            plan.resample_()
        for step in range(3):
            DepthPlan.for_step(0, step, 16, [0.1, 0.5, 0.5], sampler=sampler, device="meta")
    device.assert_arrived(8)


def test_a_buffer_used_again_is_noticed():
    """By the tests above."""
    buffer = torch.empty(16, dtype=torch.int64)
    with DelayedCopies() as device:
        for number in range(2):
            buffer.fill_(number).to("meta", non_blocking=True)
    with pytest.raises(AssertionError):
        device.assert_arrived(2)
