"""The simulation of many ranks: its laws against exact ones, and one tiny run of everything."""

import doctest
import importlib
import json
import math
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")  # what the benchmarks need, the package does not
for package in ("matplotlib", "pytest_benchmark", "rich", "sklearn"):
    pytest.importorskip(package)

from benchmarks.studies.scaling import command, processes, simulation, validation  # noqa: E402
from benchmarks.studies.scaling.simulation import KINDS, SAMPLERS, SYNCS, Layers  # noqa: E402
from sdkernels import DepthPlan, KeptRows, linear_decay, uniform  # noqa: E402

ROOT = Path(__file__).parents[1]
BRANCHES = 24
RANKS = (1, 2, 8, 64, 512)


def lines(batch, fixed=(0.5, 0.5), per_row=(1.0, 1.0)):
    """A table of costs that are straight lines."""
    counts = np.arange(batch + 1)
    return np.array([a + b * counts for a, b in zip(fixed, per_row, strict=True)])


def generator(seed=0):
    return np.random.default_rng(seed)


def simulate(sampler, layers, table, ranks, steps):
    """Expectations by ``sync`` and number of ranks."""
    tables = {"table": table}
    found = simulation.simulate(sampler, layers, tables, ranks, steps, generator())["table"]
    return {sync: dict(zip(ranks, each, strict=True)) for sync, each in found.items()}


def rank_time(layers, table):
    """What a rank takes on average where costs are straight lines."""
    kinds = np.arange(len(layers.drop_probs)) % KINDS
    means = layers.batch * layers.keep
    return float((table[kinds, 0] + means * (table[kinds, 1] - table[kinds, 0])).sum())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_dropped_is_the_same_on_every_rank(sampler):
    layers = Layers(8, (0.0,) * BRANCHES)
    results = simulate(sampler, layers, lines(8), RANKS, 2)
    full = BRANCHES * (0.5 + 8)
    assert {each.mean for of_sync in results.values() for each in of_sync.values()} == {full}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [linear_decay, uniform], ids=lambda each: each.__name__)
def test_one_rank_takes_the_mean(sampler, schedule):
    # 10 * (1 - p) is whole for the uniform schedule, so the fixed count has nothing to round.
    layers = Layers(10, tuple(schedule(BRANCHES, 0.5)))
    table = lines(10, per_row=(1.0, 2.0))
    results = simulate(sampler, layers, table, (1, 64), 60)
    for sync in SYNCS:
        one = results[sync][1]
        mean = rank_time(layers, table)
        bias = 0.02 * mean if sampler == "fixed" and schedule is linear_decay else 0.0
        # dealt, rounded and total draw less than 64 * 60 independent times
        assert abs(one.mean - mean) <= 4 * one.error + bias + 0.005 * mean


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_ranks_never_take_less(sampler):
    layers = Layers(8, tuple(linear_decay(BRANCHES, 0.5)))
    results = simulate(sampler, layers, lines(8), RANKS, 6)
    for sync in SYNCS:
        means = [results[sync][number].mean for number in RANKS]
        if sampler == "dealt":  # whose law depends on the number of ranks: more share more evenly
            assert means[0] < means[-1]
        else:
            assert means == sorted(means)
    for number in RANKS[1:]:
        assert results["block"][number].mean >= results["step"][number].mean


@pytest.mark.parametrize("sampler", ["fixed", "rounded"])
def test_equal_counts_cost_nothing_at_any_scale(sampler):
    layers = Layers(8, tuple(uniform(BRANCHES, 0.3)))
    results = simulate(sampler, layers, lines(8), RANKS, 6)
    assert len({each.mean for of_sync in results.values() for each in of_sync.values()}) == 1


def expected_largest_normal(number):
    """The mean of the largest of that many standard normal variables."""
    x = np.linspace(-8, 8, 40001)
    below = np.array([0.5 * math.erfc(-each / math.sqrt(2)) for each in x])
    return float(np.sum((x[1:] + x[:-1]) / 2 * np.diff(below**number)))


@pytest.mark.parametrize("number", [2, 8, 64, 512])
def test_bernoulli_follows_the_largest_of_normal_variables(number):
    batch, p = 32, 0.5
    layers = Layers(batch, (p,) * BRANCHES)
    found = simulate("bernoulli", layers, lines(batch), (1, number), 60)["step"]
    deviation = math.sqrt(batch * BRANCHES * p * (1 - p))
    excess = (found[number].mean - rank_time(layers, lines(batch))) / deviation
    error = found[number].error / deviation
    assert excess == pytest.approx(expected_largest_normal(number), abs=4 * error + 0.02)
    assert excess < math.sqrt(2 * math.log(number)) + 4 * error
    assert simulation.rule_of_thumb(layers, number) == pytest.approx(
        math.sqrt(2 * math.log(number)) * deviation / (batch * BRANCHES * (1 - p))
    )


@pytest.mark.parametrize("number", [1, 8, 512])
def test_simulation_agrees_with_the_exact_law(number):
    layers = Layers(8, tuple(linear_decay(BRANCHES, 0.5)))
    per_row = (1.0, 1.7)
    table = lines(8, per_row=per_row)
    found = simulate("bernoulli", layers, table, (1, 512), 40)["step"]
    if number == 8:
        found = simulate("bernoulli", layers, table, (8,), 3000)["step"]
    values, probabilities = simulation.bernoulli_distribution(layers, per_row)
    assert probabilities.sum() == pytest.approx(1)
    exact = BRANCHES * 0.5 + values @ simulation.largest_of(values, probabilities, number)
    assert found[number].mean == pytest.approx(exact, abs=4 * found[number].error)


def test_largest_of_very_many():
    # P(two fair coins both heads) = 1/4; of n throws, none so: (3/4)^n.
    values, probabilities = np.array([0.0, 1.0, 2.0]), np.array([0.25, 0.5, 0.25])
    assert simulation.largest_of(values, probabilities, 10)[2] == pytest.approx(1 - 0.75**10)
    rare = np.array([1 - 1e-12, 1e-12])
    largest = simulation.largest_of(np.array([0.0, 1.0]), rare, 4e11)
    assert largest[1] == pytest.approx(-math.expm1(-0.4), rel=1e-6)


@pytest.mark.parametrize(
    ("sampler", "total_spread", "branch_spread"),
    [
        ("bernoulli", None, None),
        ("fixed", 0, 0),
        ("rounded", 0, 0),
        ("dealt", 1, 1),
        ("total", 0, None),
    ],
)
def test_what_ranks_share(sampler, total_spread, branch_spread):
    """Differences between ranks: of all rows of a kind, and of the rows of a branch."""
    layers = Layers(8, tuple(linear_decay(BRANCHES, 0.45)))
    counts = SAMPLERS[sampler](layers, 50, 16, generator())
    assert counts.shape == (50, 16, BRANCHES)
    assert counts.min() >= 0
    assert counts.max() <= 8
    for kind in range(KINDS):
        totals = np.ptp(counts[:, :, kind::KINDS].sum(2), axis=1)
        assert totals.max() > 3 if total_spread is None else totals.max() <= total_spread
    branches = np.ptp(counts, axis=1)
    assert branches.max() > 3 if branch_spread is None else branches.max() <= branch_spread


@pytest.mark.parametrize("sampler", ["bernoulli", "rounded", "dealt", "total"])
def test_every_branch_keeps_its_share(sampler):
    layers = Layers(6, (0.0, 0.1, 0.35, 0.5, 0.83, 1.0))
    counts = SAMPLERS[sampler](layers, 3000, 3, generator())
    error = 6 * np.sqrt(layers.keep * (1 - layers.keep) / (6 * 3000)) + 1e-12
    assert (np.abs(counts.mean((0, 1)) / 6 - layers.keep) <= error).all()


def test_law_of_one_rank_dealt_is_bernoulli():
    layers = Layers(8, (0.5,) * BRANCHES)
    law = simulation.summarise_law(SAMPLERS["dealt"](layers, 4000, 1, generator()), layers)
    assert law["count_variance"] == pytest.approx(1, abs=0.03)
    assert law["total_variance"] == pytest.approx(1, abs=0.1)


def test_law_is_summarised():
    layers = Layers(8, (0.5,) * BRANCHES)
    bernoulli = simulation.summarise_law(SAMPLERS["bernoulli"](layers, 500, 8, generator()), layers)
    fixed = simulation.summarise_law(SAMPLERS["fixed"](layers, 5, 8, generator()), layers)
    assert bernoulli["row_correlation"] == pytest.approx(0, abs=0.01)
    assert bernoulli["total_variance"] == pytest.approx(1, abs=0.1)
    assert fixed["row_correlation"] == pytest.approx(-1 / 7)
    rounded_down = simulation.summarise_law(
        SAMPLERS["fixed"](Layers(8, (0.1,) * 2), 5, 8, generator()), Layers(8, (0.1,) * 2)
    )
    assert rounded_down["keep_error"] == pytest.approx(0.9 - 7 / 8)


def test_bad_arguments():
    with pytest.raises(ValueError, match="ranks: expected divisors of the largest, 8, got"):
        simulate("bernoulli", Layers(4, (0.5, 0.5)), lines(4), (3, 8), 2)
    with pytest.raises(ValueError, match="sync: expected one of step, block, got 'layer'"):
        simulation.parts_between(np.zeros((1, 1, 2)), "layer")


@pytest.mark.parametrize(
    ("simulated", "options"),
    [("rounded", {"sampler": "rounded"}), ("total", {"sampler": "balanced", "kinds": KINDS})],
)
def test_the_public_samplers_are_the_simulated_ones(simulated, options):
    """Numbers kept in each branch, and in each kind together: means, variances, equal ranks."""
    layers = Layers(6, (0.0, 0.1, 0.35, 0.5, 0.83, 0.6))
    steps = 800
    expected = SAMPLERS[simulated](layers, steps, 2, np.random.default_rng(5))
    drawn = [
        DepthPlan.for_step(1, 0, layers.batch, layers.drop_probs, rank=rank, **options)
        for rank in range(2)
    ]
    actual = np.array(
        [[[rows.k for rows in plan.resample_()] for plan in drawn] for _ in range(steps)]
    )
    for counts in (actual, expected):
        assert (np.ptp(counts[:, :, ::KINDS].sum(2), axis=1) == 0).all()
        assert (np.ptp(counts[:, :, 1::KINDS].sum(2), axis=1) == 0).all()
        error = 5 * np.sqrt(layers.batch * 0.25 / steps)
        np.testing.assert_allclose(counts.mean((0, 1)), layers.batch * layers.keep, atol=error)
    np.testing.assert_allclose(actual.var((0, 1)), expected.var((0, 1)), rtol=0.25, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 3, 7, 32, 100, 256])
def test_a_fixed_count_can_be_asked_for_by_probability(batch):
    plan = DepthPlan.sample(batch, [1 - k / batch for k in range(1, batch + 1)], sampler="fixed")
    assert [rows.k for rows in plan] == list(range(1, batch + 1))
    assert KeptRows.sample(batch, 1.0).k == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "abacus"], "--device: expected a device at hand, got 'abacus'"),
        (["--rebuild", "--out", "nowhere"], "--rebuild: expected a run in --out, got no nowhere"),
    ],
)
def test_bad_command_lines(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_slowest_rank_over_the_mean():
    # Two ranks, two blocks: 1 + 3 forward, 1 + 1 backward, 4 outside; 2 + 1, 2 + 1, 2.
    blocks = np.array([[[[1.0, 3.0], [1.0, 1.0]], [[2.0, 1.0], [2.0, 1.0]]]])
    step = np.array([[10.0, 8.0]])
    found = validation.over_mean(step, blocks)
    assert found["step"][0] == pytest.approx((10 - 9) / 9)
    # 2 + 3 + 2 + 1 in blocks and 3 outside on average
    assert found["block"][0] == pytest.approx((8 + 3 - 9) / 9)


def recorded(case, sampler, steps, ranks, table, rest):
    """Records of processes whose times are exactly the table's, two thirds of them backward."""
    layers = Layers(case.batch, tuple(case.drop_probs))
    counts = SAMPLERS[sampler](layers, steps, ranks, generator(7))
    costs = simulation.costs_of(counts, table)
    return [
        [
            {
                "sampler": sampler,
                "counts": counts[step, rank].tolist(),
                "cpu": rest + costs[step, rank].sum(),
                "wall": 1.0,
                "forward": (costs[step, rank] / 3).tolist(),
                "backward": (costs[step, rank] * 2 / 3).tolist(),
            }
            for step in range(steps)
        ]
        for rank in range(ranks)
    ]


def test_processes_that_do_as_simulated():
    shape = command.PRESETS["smoke"].process_case.shape
    samplers = ("bernoulli", "fixed", "total")
    case = processes.ProcessCase(shape, 8, 0.5, steps=400, samplers=samplers)
    table, rest = lines(8, fixed=(0.2, 0.1), per_row=(1.0, 1.5)), 30.0
    of_each = [recorded(case, sampler, 400, 4, table, rest) for sampler in samplers]
    records = [list(chain(*rank)) for rank in zip(*of_each, strict=True)]
    found = validation.compare(case, records, table, rest)
    for sync in SYNCS:
        bernoulli = found["bernoulli"]["excess"][sync]
        assert bernoulli["counts"] > 0.01
        assert bernoulli["measured"] == pytest.approx(bernoulli["counts"], rel=0.1)
        assert bernoulli["counts_and_noise"] == pytest.approx(bernoulli["counts"], abs=1e-9)
        low, high = bernoulli["interval"]
        assert low < bernoulli["measured"] < high
        assert found["fixed"]["excess"][sync]["measured"] == pytest.approx(0, abs=1e-12)
    assert found["total"]["excess"]["step"]["measured"] == pytest.approx(0, abs=1e-12)
    assert found["total"]["excess"]["block"]["measured"] > 0.005
    assert found["bernoulli"]["correlation"] == pytest.approx(1)
    assert found["fixed"]["mean_seconds"] == pytest.approx(found["fixed"]["alone_seconds"])


def test_table_of_a_sweep():
    table = lines(4, fixed=(0.2, 0.1), per_row=(1.0, 1.5))
    records = []
    for k in [0, 1, 2, 4] * 3:
        costs = simulation.costs_of(np.full((1, 1, 4), k), table)[0, 0]
        times = {"cpu": 3 + costs.sum(), "forward": costs / 3, "backward": costs * 2 / 3}
        records.append({"sampler": processes.SWEEP, "counts": [k] * 4, **times})
    found, rest = validation.table_of_sweep([records], 4)
    assert found == pytest.approx(table)  # 3 lies between 2 and 4
    assert rest == pytest.approx(3)


@pytest.mark.parametrize("name", ["simulation", "command", "model", "report", "processes"])
def test_examples(name):
    assert (
        doctest.testmod(importlib.import_module(f"benchmarks.studies.scaling.{name}")).failed == 0
    )


def test_a_rank_that_fails_is_reported(tmp_path):
    case = command.PRESETS["smoke"].process_case
    broken = processes.ProcessCase(case.shape, case.batch, p=2.0, steps=1)
    with pytest.raises(RuntimeError, match=r"rank \d of 1: exit code 1\n(.|\n)*\[0, 1\], got 2"):
        processes.launch(broken, 1, tmp_path)


def test_run_end_to_end(tmp_path):
    result = subprocess.run(
        (
            sys.executable,
            "-m",
            "benchmarks",
            "scaling",
            "--preset",
            "smoke",
            "--out",
            str(tmp_path),
        ),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert written["schema"] == command.SCHEMA
    assert {case["p"] for case in written["cases"]} == {0.0, 0.5}
    for case in written["cases"]:
        assert case["samplers"].keys() == SAMPLERS.keys()
        over = case["samplers"]["bernoulli"]["step"]["over_ideal"]
        assert over == sorted(over)
        if case["p"] == 0.0:
            assert over == pytest.approx([0] * len(over), abs=1e-9)
    (processes,) = written["validation"]
    assert processes["ranks"] == 2
    assert processes["samplers"]["bernoulli"]["steps"] == 3
    assert processes["samplers"]["fixed"]["excess"]["step"]["measured"] >= 0
    report = tmp_path / "scaling.md"
    text = report.read_text()
    report.unlink()
    assert command.main(["--rebuild", "--out", str(tmp_path)]) == 0
    assert report.read_text() == text
    assert "What to use when" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "branches.png",
        "processes.png",
        "ranks.png",
        "slowest-rank.png",
    }
