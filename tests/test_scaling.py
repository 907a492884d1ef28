"""What the slowest of many ranks costs: expectations against drawn ranks, and one tiny run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

np = pytest.importorskip("numpy")  # what the benchmarks need, the package does not
for package in ("matplotlib", "rich", "scipy"):
    pytest.importorskip(package)

from benchmarks.measure.store import read_json  # noqa: E402
from benchmarks.studies.scaling import command, law, processes, report  # noqa: E402
from benchmarks.studies.scaling.law import KINDS, SAMPLERS, SYNCS, Layers  # noqa: E402
from sdkernels import DepthPlan, linear_decay, uniform  # noqa: E402

ROOT = Path(__file__).parents[1]
BRANCHES = 24
RANKS = (1, 2, 8, 64, 512)


def lines(batch, fixed=(0.5, 0.5), per_row=(1.0, 1.0)):
    """A table of costs that are straight lines."""
    counts = np.arange(batch + 1)
    return np.array([a + b * counts for a, b in zip(fixed, per_row, strict=True)])


@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_dropped_is_the_same_on_every_rank(sampler, sync):
    found = law.expected(sampler, Layers(8, (0.0,) * BRANCHES), lines(8), RANKS, sync)
    assert found == pytest.approx([BRANCHES * (0.5 + 8)] * len(RANKS), rel=1e-3)


@pytest.mark.parametrize("schedule", [linear_decay, uniform], ids=lambda each: each.__name__)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_rank_takes_the_mean_and_more_take_no_less(sampler, schedule):
    # 10 * (1 - p) is whole for the uniform schedule, so the fixed count has nothing to round.
    layers = Layers(10, tuple(schedule(BRANCHES, 0.5)))
    table = lines(10, per_row=(1.0, 2.0))
    step, block = (law.expected(sampler, layers, table, RANKS, sync) for sync in SYNCS)
    # Its total is rounded alike on all ranks, and few steps are drawn.
    bias = {"fixed": 0.02 * (schedule is linear_decay), "balanced": 0.01}.get(sampler, 0.0) + 0.003
    assert step[0] == pytest.approx(layers.ideal(table), rel=bias)
    assert block[0] == pytest.approx(step[0], rel=1e-3)
    assert step == sorted(step)
    assert block == sorted(block)
    if sampler in ("fixed", "rounded"):
        assert len({*step, *block}) <= 2  # but for the order of the additions
    else:
        assert block[-1] > 1.2 * block[0]


def test_balanced_counts_are_the_packages():
    """Numbers kept in each branch, and in each kind together: means, variances, equal ranks."""
    layers, steps = Layers(6, (0.0, 0.1, 0.35, 0.5, 0.83, 0.6)), 400
    ours = {"sampler": "balanced", "kinds": KINDS}
    plans = [DepthPlan.for_step(1, 0, 6, layers.drop_probs, rank=r, **ours) for r in range(2)]
    actual = np.array([[[rows.k for rows in p.resample_()] for p in plans] for _ in range(steps)])
    drawn = law.draw("balanced", layers, steps, 2)
    for counts in (actual, drawn):
        for kind in range(KINDS):
            assert (np.ptp(counts[:, :, kind::KINDS].sum(2), axis=1) == 0).all()
        error = 5 * np.sqrt(layers.batch * 0.25 / steps)
        np.testing.assert_allclose(counts.mean((0, 1)), layers.batch * layers.keep, atol=error)
    np.testing.assert_allclose(actual.var((0, 1)), drawn.var((0, 1)), rtol=0.25, atol=1e-9)


@pytest.mark.parametrize("sync", SYNCS)
def test_bernoulli_is_what_drawn_ranks_take(sync):
    """Of costs that are no straight lines, with rows that the package draws."""
    layers = Layers(8, tuple(linear_decay(6, 0.5)))
    table = np.array([[0.1, 1.0, 1.5, 3.0, 3.5, 5.0, 6.0, 6.5, 9.0], np.arange(9) ** 1.1])
    counts = law.draw("bernoulli", layers, 400, 8)
    costs = table[np.arange(6) % KINDS, counts]
    for ranks, found in zip((1, 2, 8), law.bernoulli(layers, table, (1, 2, 8), sync), strict=True):
        waited = law.slowest(costs, ranks, sync)
        assert found == pytest.approx(
            waited, abs=4 * costs.sum(2).std() / math.sqrt(400 * 8 / ranks)
        )


def expected_largest_normal(number):
    """The mean of the largest of that many standard normal variables."""
    x = np.linspace(-8, 8, 40001)
    below = np.array([0.5 * math.erfc(-each / math.sqrt(2)) for each in x])
    return float(np.sum((x[1:] + x[:-1]) / 2 * np.diff(below**number)))


def test_bernoulli_follows_the_largest_of_normal_variables():
    batch, p, ranks = 32, 0.5, (2, 8, 64, 512)
    layers = Layers(batch, (p,) * BRANCHES)
    found = law.bernoulli(layers, lines(batch), ranks, "step")
    deviation = math.sqrt(batch * BRANCHES * p * (1 - p))
    for number, seconds in zip(ranks, found, strict=True):
        excess = (seconds - layers.ideal(lines(batch))) / deviation
        assert excess == pytest.approx(expected_largest_normal(number), abs=0.02)


def test_largest_of_very_many():
    # P(two fair coins both heads) = 1/4; of n throws, none so: (3/4)^n.
    coins = np.array([0.25, 0.5, 0.25])
    assert law.expected_largest(1.0, coins, 10) == pytest.approx(2 - 0.75**10 - 0.25**10)
    rare = np.array([1 - 1e-12, 1e-12])
    assert law.expected_largest(1.0, rare, 4e11) == pytest.approx(-math.expm1(-0.4), rel=1e-4)


def test_what_is_left_of_the_law():
    layers = Layers(8, (0.5,) * BRANCHES)
    bernoulli, fixed, balanced = (
        law.summarise(law.draw(sampler, layers, 200, 8), layers)
        for sampler in ("bernoulli", "fixed", "balanced")
    )
    assert bernoulli["row_correlation"] == pytest.approx(0, abs=0.01)
    assert bernoulli["total_variance"] == pytest.approx(1, abs=0.15)
    assert fixed["row_correlation"] == pytest.approx(-1 / 7)
    assert balanced["total_variance"] == pytest.approx(0)
    assert balanced["count_variance"] == pytest.approx(1, abs=0.1)
    few = Layers(8, (0.1,) * 2)
    assert law.summarise(law.draw("fixed", few, 5, 1), few)["keep_error"] == pytest.approx(0.025)


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
    found = processes.over_mean(step, blocks)
    assert found["step"][0] == pytest.approx((10 - 9) / 9)
    # 2 + 3 + 2 + 1 in blocks and 3 outside on average
    assert found["block"][0] == pytest.approx((8 + 3 - 9) / 9)


def test_processes_that_do_as_expected():
    """Records of processes whose times are exactly the table's, two thirds of them backward."""
    table, rest = lines(8, fixed=(0.2, 0.1), per_row=(1.0, 1.5)), 30.0
    layers, records = Layers(8, (0.5,) * 4), [[] for _ in range(4)]
    for sampler in SAMPLERS:
        counts = law.draw(sampler, layers, 40, 4)
        costs = table[np.arange(4) % KINDS, counts]
        for step in range(40):
            for rank, own in enumerate(records):
                seconds = costs[step, rank]
                passes = {"forward": (seconds / 3).tolist(), "backward": (seconds / 1.5).tolist()}
                cpu, kept = rest + seconds.sum(), counts[step, rank].tolist()
                own.append({"sampler": sampler, "counts": kept, "cpu": cpu, **passes})
    found = processes.compare(records, table)
    for sync in SYNCS:
        bernoulli = found["bernoulli"]["excess"][sync]
        assert bernoulli["counts"] > 0.01
        assert bernoulli["measured"] == pytest.approx(bernoulli["counts"])
        assert bernoulli["counts_and_noise"] == pytest.approx(bernoulli["counts"])
        low, high = bernoulli["interval"]
        assert low < bernoulli["measured"] < high
        assert found["fixed"]["excess"][sync]["measured"] == pytest.approx(0, abs=1e-12)
    assert found["balanced"]["excess"]["step"]["measured"] == pytest.approx(0, abs=1e-12)
    assert found["balanced"]["excess"]["block"]["measured"] > 0.005
    assert found["bernoulli"]["correlation"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["law", "network"])
def test_examples(name):
    import doctest
    import importlib

    assert doctest.testmod(importlib.import_module(f"benchmarks.studies.scaling.{name}"))[0] == 0


def test_a_rank_that_fails_is_reported(tmp_path):
    case = processes.ProcessCase(command.TINY, batch=4, p=2.0, steps=1)
    with pytest.raises(ProcessRaisedException, match=r"\[0, 1\], got 2"):
        processes.launch(case, 1, tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("out of memory\nand more"), "out of memory"),
        (
            ProcessRaisedException("\n-- Process 0\nTraceback\nValueError: no", 0, 1),
            "ValueError: no",
        ),
        (ProcessExitedException("process 0 terminated with signal SIGKILL", 0, 1, -9), "SIGKILL"),
    ],
)
def test_a_run_that_fails_says_so_in_a_sentence(error, said, tmp_path, monkeypatch, capsys):
    def fail(preset, device):
        raise error

    monkeypatch.setattr(command, "run", fail)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    assert command.main(["--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m benchmarks scaling: ")
    assert line.endswith(said)


def test_the_recorded_run_names_its_samplers():
    recorded = ROOT / "benchmarks/results/cpu-epyc-2-cores/scaling/scaling.json"
    text = "\n".join(report.processes_section(read_json(recorded)))
    assert text.count("| balanced |") == 4
    assert "| total |" not in text


def test_run_end_to_end(tmp_path):
    program = (sys.executable, "-m", "benchmarks", "scaling", "--preset", "smoke")
    result = subprocess.run(
        (*program, "--out", str(tmp_path)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert written["schema"] == command.SCHEMA
    assert written["measured"].keys() == {"4"}
    (outcome,) = written["validation"]
    assert outcome["ranks"] == 2
    assert outcome["samplers"].keys() == {*SAMPLERS}
    assert outcome["samplers"]["fixed"]["excess"]["step"]["measured"] >= 0
    text = (tmp_path / "scaling.md").read_text()
    assert text.count("| bernoulli |") == 2 * 6 + 2
    assert "once a block (every parameter sharded)" in result.stdout
    (tmp_path / "ranks.png").unlink()
    (tmp_path / "scaling.md").unlink()
    assert command.main(["--rebuild", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "scaling.md").read_text() == text
    assert (tmp_path / "ranks.png").stat().st_size > 5000
