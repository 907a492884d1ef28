"""Makes the cases of a preset pytest-benchmark tests, ordered so that the providers alternate."""

from __future__ import annotations

import argparse
import gc
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases.presets import PRESETS, Rounds, SelectionError, get_preset, select
from benchmarks.measure import correctness, flops, memory
from benchmarks.measure.clocks import Clocks
from benchmarks.measure.store import Store
from benchmarks.measure.workload import Case, Workload


@dataclass(frozen=True)
class Turn:
    """One provider's turn in one repeat of one case: a test."""

    case: Case
    repeat: int
    provider: str
    rounds: Rounds
    last: bool  # of its case


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("sdkernels benchmarks").addoption
    add("--bench-preset", default="quick", help=f"one of {', '.join(PRESETS)} (default: quick)")
    add("--bench-filter", help="comma-separated patterns; see python -m benchmarks --help")
    text = "cpu or cuda (default: cpu)"
    add("--bench-device", type=torch.device, default=torch.device("cpu"), help=text)
    text = "folder of finished cases, which are not run again"
    add("--bench-store", type=lambda folder: Store(Path(folder)), help=text)


def _turns(options: argparse.Namespace) -> list[Turn]:
    """Case, then repeat, then provider: what disturbs the machine meets every provider alike."""
    try:
        preset = get_preset(options.bench_preset)
        names = set(select(preset, options.bench_filter))
    except SelectionError as error:
        raise pytest.UsageError(str(error)) from None
    store, turns = options.bench_store, []
    for case in preset.cases:
        if case.name in names and (store is None or store.load(case.name) is None):
            rounds = preset.rounds[case.kind]
            usable = case.usable(options.bench_device)
            order = list(itertools.product(range(rounds.repeats), usable))
            turns += [Turn(case, *each, rounds, last=each == order[-1]) for each in order]
    return turns


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "turn" in metafunc.fixturenames:
        turns = _turns(metafunc.config.option)
        ids = [f"{turn.case.name}-repeat{turn.repeat}-{turn.provider}" for turn in turns]
        metafunc.parametrize("turn", turns, ids=ids)


class Runner:
    """Checks, times and records one case after the other."""

    def __init__(self, device: torch.device, store: Store | None) -> None:
        self.device, self.store = device, store
        self._case: Case | None = None
        self._workloads: dict[str, Workload] = {}
        self._record: dict[str, Any] = {}

    def run(self, turn: Turn, benchmark: Any) -> None:
        """One turn, timed by pytest-benchmark."""
        if self._case != turn.case:
            self._begin(turn.case)
        if turn.provider in self._workloads:
            try:
                self._time(turn, benchmark)
            except (RuntimeError, MemoryError) as error:
                self._skip(turn.provider, error)
        if turn.last and self.store is not None:
            self.store.save(turn.case.name, self._record)
        skipped = self._record["skipped"]
        if reason := skipped.get(turn.provider) or skipped.get("*"):
            pytest.skip(reason)

    def _begin(self, case: Case) -> None:
        """Every provider is checked before the first clock of its case starts."""
        self._workloads = {}  # free the old tensors before the new ones are made
        gc.collect()  # pytest-benchmark switches it off; modules and closures refer to each other
        reasons = case.providers(self.device)
        told = {key: getattr(case, key) for key in ("name", "kind", "baseline", "floor")}
        self._case = case
        self._record = {
            "case": told | case.describe(),
            "skipped": {name: reason for name, reason in reasons.items() if reason},
            "turns": {name: [] for name, reason in reasons.items() if not reason},
            "extras": {},
        }
        try:
            correctness.check(case, self.device)
            self._workloads = case.workloads(self.device)
        except correctness.ProviderMismatch as error:
            pytest.exit(f"no figures are to be trusted: {error}", pytest.ExitCode.TESTS_FAILED)
        except (RuntimeError, MemoryError) as error:
            self._skip("*", error)

    def _skip(self, provider: str, error: BaseException) -> None:
        """A provider, or "*" for all of them, that memory does not suffice for."""
        if not memory.is_out_of_memory(error):
            raise error
        self._record["skipped"][provider] = f"out of memory: {str(error).splitlines()[0]}"[:300]
        for name in [*self._record["turns"]] if provider == "*" else [provider]:
            self._record["turns"].pop(name)
            self._workloads.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _time(self, turn: Turn, benchmark: Any) -> None:
        workload, rounds = self._workloads[turn.provider], turn.rounds
        benchmark.group = turn.case.name
        benchmark.extra_info.update(self._record["case"], provider=turn.provider)
        clocks = Clocks(workload, self.device)
        with workload.context():
            benchmark.pedantic(
                clocks.run,
                rounds=rounds.rounds,
                iterations=rounds.iterations,
                warmup_rounds=workload.warm_up,
            )
            if turn.repeat == 0:  # what is the same in every call
                used, counted = memory.measure(workload, self.device), None
                if workload.forward is not None and turn.case.kind in ("block", "model"):
                    counted = flops.count(workload.run)
                self._record["extras"][turn.provider] = {"memory": used, "flops": counted}
        if benchmark.stats is not None:  # None under --benchmark-disable
            timed = clocks.read(rounds.rounds * rounds.iterations)
            record = {"wall": list(benchmark.stats.stats.data), **timed}
            self._record["turns"][turn.provider].append(record)


@pytest.fixture(scope="session")
def runner(pytestconfig: pytest.Config) -> Runner:
    return Runner(pytestconfig.option.bench_device, pytestconfig.option.bench_store)
