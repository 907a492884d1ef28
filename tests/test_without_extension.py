"""The Python that stands in for the extension: the same rows, the same words, the same tests."""

import json
import os
from pathlib import Path

import processes
import pytest
import test_bad_ops
import torch
from backends import native

from sdkernels import DepthPlan
from sdkernels.backends import extension, sampler

pytestmark = native

TESTS = Path(__file__).resolve().parent
HOST = extension.module  # the extension's sampler

BATCHES = [0, 1, 2, 3, 7, 8, 63, 64, 65, 255, 256, 257, 1000]
KEEPS = [0.0, 2.0**-53, 0.1, 0.5, 0.9, 1 - 2.0**-53, 1.0]


def laws(batch):
    """Keep, count, whole_batch."""
    yield from ((keep, -1, False) for keep in KEEPS)
    yield from ((keep, -1, True) for keep in KEEPS)
    yield from ((0.5, count, False) for count in {0, min(1, batch), batch // 2, batch})


def generators(seed):
    return [torch.Generator().manual_seed(seed) for _ in range(2)]


@pytest.mark.parametrize("batch", BATCHES)
def test_a_seed_gives_the_same_rows(batch):
    for seed, law in enumerate(laws(batch)):
        theirs, ours = generators(seed)
        for _ in range(3):  # the generator goes on from where the draw before has left it
            expected = HOST.sample_rows(batch, HOST.Draw(*law), theirs, None)
            actual = sampler.sample_rows(batch, sampler.Draw(*law), ours, None)
            assert [rows.tolist() for rows in actual] == [rows.tolist() for rows in expected]
            assert all(rows.dtype == torch.int64 and rows.is_contiguous() for rows in actual)
        assert torch.equal(theirs.get_state(), ours.get_state())


@pytest.mark.parametrize("batch", [0, 8, 300])
def test_neither_a_default_device_nor_a_transform_changes_rows(batch):
    """One draw for all that a transform runs at once, as the extension's."""

    def rows():
        torch.manual_seed(2)
        draws = [sampler.Draw(*law) for law in laws(batch)]
        drawn = [tensor for d in draws for tensor in sampler.sample_rows(batch, d, None, None)]
        return [tensor.tolist() for tensor in drawn]

    def plans():
        draws = [sampler.Draw(0.5, count, False) for count in (-1, -1, batch, 0)]
        steps = (None, sampler.StepKey(1, 2, 3))
        plans = [sampler.sample_plan([batch, 3], draws, None, step, False) for step in steps]
        return [(rows.tolist(), kept) for rows, kept in plans]

    with torch.device("meta"):
        actual = rows(), plans()
    assert actual == (rows(), plans())
    inside = []
    torch.func.vmap(lambda x: (inside.append(rows()), x)[1])(torch.ones(2))
    torch.func.grad(lambda x: (inside.append(rows()), x)[1])(torch.ones(()))
    assert inside == [rows()] * 2


def test_a_default_device_at_import():
    script = "import torch; torch.set_default_device('meta'); from sdkernels import DepthPlan; "
    result = run("-c", script + "print(DepthPlan.for_step(1, 2, 8, [0.5])[0].slot.tolist())")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == DepthPlan.for_step(1, 2, 8, [0.5])[0].slot.tolist()


class Words:
    """Words that a generator would give once in 2**62 times."""

    def __init__(self):
        self.given = [5, 0, 7, 2**62 + 1, -3, 11]

    def take(self, count):
        words, self.given = self.given[:count], self.given[count:]
        return torch.tensor(words)


def test_a_word_below_the_remainder_is_thrown_away():
    """2**64 mod 3 is 1: the word 0 would favour a row, and the next one takes its place."""
    words = Words()
    # Rows 0 to 3, with 4, 3, 2 and 1 rows left: 5 % 4 = 1 < 2 keeps row 0, 0 is rejected for 3,
    # 7 % 3 = 1 drops nothing of the one still wanted: 1 < 1 is false; (2**62 + 1) % 2 = 1 neither;
    # the last row is always taken.
    assert sampler._choose_rows(4, 2, words) == [0, 3]
    assert words.given == [11]


STEPS = [
    None,
    (0, 0, 0),
    (2**64 - 1, 2**64 - 1, 2**32 - 1),
    (123456789012345, 77, 3),
    (5, 2**40, 1),
]
PLANS = {
    "bernoulli": [(0.5, -1, False), (0.9, -1, False), (0.0, -1, False)],
    "batch": [(0.5, -1, True), (0.3, -1, True)],
    "fixed": [(0.5, 2, False), (0.5, 1, False), (0.5, 0, False)],
    "mixed": [(0.5, 2, False), (0.1, -1, False), (0.3, -1, True)],
    "none": [],
}


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("draws", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("batches", [[4], [5, 3], [7, 0, 2], [300, 65]], ids=str)
def test_a_seed_gives_the_same_plan(batches, draws, step):
    laws = [(keep, min(count, b), whole) for keep, count, whole in draws for b in batches]
    theirs, ours = generators(1)
    results = []
    for module, generator in ((HOST, theirs), (sampler, ours)):
        key = None if step is None else module.StepKey(*step)
        drawn = [module.Draw(*law) for law in laws]
        rows, kept = module.sample_plan(batches, drawn, generator, key, False)
        results.append((rows.tolist(), kept))
    assert results[0] == results[1]
    assert torch.equal(theirs.get_state(), ours.get_state())


def run(*arguments, **environ):
    """Run this Python without the extension."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SDKERNELS_")}
    env = clean | {"OMP_NUM_THREADS": "2", "SDKERNELS_EXTENSION": "off"} | environ
    return processes.run(*arguments, cwd=TESTS.parent, env=env)


REFUSALS = """
import json, sys
sys.path.insert(0, "tests")
import test_bad_ops
json.dump(test_bad_ops.refusals(), sys.stdout)
"""


def test_refusals_have_the_same_words():
    result = run("-c", REFUSALS)
    assert result.returncode == 0, result.stderr
    without, with_extension = json.loads(result.stdout), test_bad_ops.refusals()
    assert len(without) > 150
    assert without == with_extension


# What depends on who does the work: values and gradients, what is saved and refused, the rows, and
# all that PyTorch does with autograd functions. Other tests stand above that; compiled code is
# the same, and so are the laws of rows that are the same.
CORE = [
    "test_accuracy.py",
    "test_activation.py",
    "test_autograd.py",
    "test_bad_blocks.py",
    "test_bad_input.py",
    "test_bad_law.py",
    "test_bad_ops.py",
    "test_bad_rows.py",
    "test_checkpointing.py",
    "test_compile_graphs.py::test_bernoulli_rows_drawn_inside",
    "test_compile_graphs.py::test_sampling_op",
    "test_determinism.py",
    "test_distributed.py",
    "test_dropped_rows.py",
    "test_forward_mode.py",
    "test_functional.py",
    "test_inplace.py",
    "test_layer_dropout.py",
    "test_layouts.py",
    "test_memory.py",
    "test_min_saving.py",
    "test_modules.py",
    "test_norm_hooks.py",
    "test_ops.py",
    "test_options.py",
    "test_packed.py",
    "test_patch_inplace.py",
    "test_plan.py",
    "test_plan_of_lists.py",
    "test_regressions.py",
    "test_row_weights.py",
    "test_rows.py",
    "test_seeds.py",
    "test_torch_integration.py",
    "test_training.py",
]


# The named cases, and what C++ and Python each say for themselves.
FEW = ["test_functional.py", "test_autograd.py", "test_packed.py", "test_bad_ops.py"]
FEW_OF_THEM = "named_cases or test_autograd or test_packed or test_bad_ops"


@pytest.mark.parametrize("files", [FEW, pytest.param(CORE, marks=pytest.mark.whole)])
def test_the_core_tests_pass(files):
    options = ["-q", "-p", "no:cacheprovider", "--hypothesis-profile=brief"]
    options += ["-k", FEW_OF_THEM] if files is FEW else []
    result = run("-m", "pytest", *options, *(str(TESTS / file) for file in files))
    assert result.returncode == 0, result.stdout + result.stderr


WITH_OUR_NODES = """
import sys, pytest
from sdkernels.backends import autograd
autograd._FEW_ELEMENTS = -1
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.whole
def test_larger_tensors_have_nodes_of_our_own():
    """What tests take for an example is small, and PyTorch's own nodes serve it."""
    options = ["-q", "-p", "no:cacheprovider", "--hypothesis-profile=brief"]
    files = [str(TESTS / f"test_{name}.py") for name in ("autograd", "functional", "memory")]
    result = run("-c", WITH_OUR_NODES, *options, *files)
    assert result.returncode == 0, result.stdout + result.stderr
