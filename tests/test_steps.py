"""Which rows a step has: from its number, whatever else draws; from a generator, when resumed."""

import copy
import pickle
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_samplers import assert_binomial
from torch.utils.data import DataLoader, Dataset

from sdkernels import DepthPlan, KeptRows, StochasticDepth, linear_decay

LAWS = {"row": {"mode": "row"}, "batch": {"mode": "batch"}, "fixed": {"sampler": "fixed"}}
each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())

PROBS = [0.5] * 8
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def slots(plan):
    return torch.stack([rows.slot for rows in plan]).tolist()


# The rows of seed 7, step 3: a change of the stream breaks everybody's checkpoints.
ANCHORS = {
    "row": [[0, 3, 5, 6, 7, 11, 12, 13, 14], [0, 1, 2, 8, 10, 11, 12, 15]],
    "batch": [list(range(16)), []],
    "fixed": [[1, 3, 4, 5, 7, 12, 13, 15], [4, 6, 8, 9, 11, 12, 13, 15]],
}


@pytest.mark.parametrize("name", LAWS)
def test_rows_of_a_step_never_change(name):
    plan = DepthPlan.for_step(7, 3, 16, [0.5, 0.5], rank=1, **LAWS[name])
    assert [rows.index.tolist() for rows in plan] == ANCHORS[name]


def test_the_numbers_are_those_of_philox():
    """Known answers of Philox4x32-10 (the test vectors of its authors), through Bernoulli draws.

    Random bits 0x6627e8d5 0xe169c58d (low, high) of a zero key and counter make the first number
    0xe169c58d6627e8d5 >> 11 as 53 bits: a row survives exactly below it.
    """
    first = (0xE169C58D6627E8D5 >> 11) * 2.0**-53
    second = (0x9B00DBD8BC57AC4C >> 11) * 2.0**-53
    for number, batch, row in ((first, 1, 0), (second, 2, 1)):
        for keep, kept in ((number, False), (number + 2.0**-53, True)):
            (rows,) = DepthPlan.for_step(0, 0, batch, [1 - keep], rank=0)
            assert 1 - (1 - keep) == keep
            assert (rows.slot[row].item() >= 0) == kept


@each_law
def test_other_seeds_steps_and_ranks_have_other_rows(law):
    keys = [(1, 1, 0), (1, 2, 0), (1, 1, 1), (2, 1, 0), (1, 2**32 + 1, 0), (2**32 + 1, 1, 0)]
    plans = [DepthPlan.for_step(s, t, 32, PROBS * 8, rank=r, **law) for s, t, r in keys]
    for a, b in combinations(plans, 2):
        assert slots(a) != slots(b)


@pytest.mark.parametrize("vary", ["seed", "step", "rank"])
def test_law_across_steps(vary):
    """Successive seeds, steps or ranks make independent rows: no correlation with the next."""
    key = {"seed": 5, "step": 5, "rank": 5}
    masks = []
    for i in range(2000):
        (rows,) = DepthPlan.for_step(**{**key, vary: i}, batch=16, drop_probs=[0.3])
        masks.append(rows.slot >= 0)
    masks = torch.stack(masks)
    assert_binomial(masks.sum(0), 2000, 0.7)
    assert_binomial((masks[1:] == masks[:-1]).sum(0), 1999, 0.7**2 + 0.3**2)


@each_law
@pytest.mark.parametrize("device", DEVICES)
def test_generators_and_devices_have_no_say(device, law):
    torch.manual_seed(1)
    expected = slots(DepthPlan.for_step(3, 4, 32, PROBS, **law))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    plan = DepthPlan.for_step(3, 4, 32, PROBS, device=device, **law)
    assert slots(plan) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert plan.device.type == device
    assert [rows.scale for rows in plan] == [KeptRows.sample(32, 0.5, **law).scale] * 8


@each_law
def test_resample_goes_on_to_the_next_step(law):
    plan = DepthPlan.for_step(3, 10, 32, PROBS, rank=2, **law)
    torch.manual_seed(0)
    for step in range(11, 15):
        expected = DepthPlan.for_step(3, step, 32, PROBS, rank=2, **law)
        assert slots(plan.resample_()) == slots(expected)
        assert [rows.k for rows in plan] == [rows.k for rows in expected]
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert slots(twin) == slots(plan)
        assert slots(twin.resample_()) == slots(DepthPlan.for_step(3, 15, 32, PROBS, rank=2, **law))


def test_resampling_past_the_last_step_starts_again():
    plan = DepthPlan.for_step(3, 2**64 - 1, 32, PROBS)
    assert slots(plan.resample_()) == slots(DepthPlan.for_step(3, 0, 32, PROBS))


def test_list_of_batches():
    plan = DepthPlan.for_step(3, 4, [8, 20], PROBS, sampler="fixed")
    again = DepthPlan.for_step(3, 3, [8, 20], PROBS, sampler="fixed").resample_()
    for branch, other in zip(plan, again, strict=True):
        assert [rows.k for rows in branch] == [4, 10]
        for a, b in zip(branch, other, strict=True):
            assert torch.equal(a.slot, b.slot)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_the_whole_range_of_keys(seed, step, rank):
    plan = DepthPlan.for_step(seed, step, 8, [0.5], rank=rank)
    assert plan[0].index.tolist() == [b for b, slot in enumerate(plan[0].slot) if slot >= 0]


@pytest.mark.parametrize("value", [-1, 2**64, 1.0, "1", None, True], ids=repr)
@pytest.mark.parametrize("name", ["seed", "step", "rank"])
def test_refused(name, value):
    if name == "rank" and value is None:
        return
    call = {"seed": 0, "step": 0, "rank": 0, "batch": 8, "drop_probs": [0.5], name: value}
    bits = 32 if name == "rank" else 64
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer .*2\*\*{bits} - 1, got "):
        DepthPlan.for_step(**call)


# Data loading: its workers draw from PyTorch's generator, how often depends on how it is set up.


class Augmented(Dataset):
    """Every item draws a random number, in this process or in a worker."""

    def __len__(self):
        return 32

    def __getitem__(self, item):
        return torch.full((4,), float(item)) + torch.rand(())


def rows_of_an_epoch(workers, plan_of):
    torch.manual_seed(1)
    loader = DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers)
    return [slots(plan_of(step, len(batch))) for step, batch in enumerate(loader)]


def test_data_loading_has_no_say():
    def by_number(step, batch):
        return DepthPlan.for_step(9, step, batch, PROBS)

    def by_generator(step, batch):
        return DepthPlan.sample(batch, PROBS)

    here, workers = (rows_of_an_epoch(n, by_number) for n in (0, 2))
    assert here == workers
    # What the function of the step number is there for:
    here, workers = (rows_of_an_epoch(n, by_generator) for n in (0, 2))
    assert here != workers


# Resuming


def train(model, optimizer, steps, rows=lambda step: None):
    """Losses of some steps; data that depend on the step alone, dropout from the generator."""
    losses = []
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        plan = rows(step)
        for i, block in enumerate(model):
            x = block(torch.nn.functional.dropout(x, 0.1), rows=plan and plan[i])
        loss = x.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def start():
    torch.manual_seed(4)
    probs = linear_decay(3, 0.6)
    model = torch.nn.ModuleList([StochasticDepth(torch.nn.Linear(6, 6), p) for p in probs])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("how", ["generator", "for_step", "plan"])
def test_resumed_run_is_the_uninterrupted_one(how, tmp_path):
    """Model, optimizer and the state of the CPU generator in a checkpoint; then the same losses."""
    probs = linear_decay(3, 0.6)
    plans = {
        "generator": lambda step: None,
        "for_step": lambda step: DepthPlan.for_step(6, step, 8, probs),
        "plan": lambda step: DepthPlan.sample(8, probs),
    }
    model, optimizer = start()
    expected = train(model, optimizer, range(12), plans[how])

    model, optimizer = start()
    losses = train(model, optimizer, range(5), plans[how])
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pt")

    model, optimizer = start()
    torch.manual_seed(99)
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"])
    losses += train(model, optimizer, range(5, 12), plans[how])
    assert losses == expected
