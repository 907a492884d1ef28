"""Makes the cases of a preset pytest-benchmark tests, ordered so that the providers alternate."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.cases.presets import PRESETS, Preset, Rounds, SelectionError, get_preset, select
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


class Hooks:
    """Hooks that a plugin may implement beside pytest's own."""

    @pytest.hookspec(firstresult=True)
    def pytest_benchmark_store(self) -> Store | None:  # type: ignore[empty-body]
        """Where finished cases are kept; those that are there are not run again."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sdkernels benchmarks")
    group.addoption(
        "--bench-preset", default="quick", help=f"one of {', '.join(PRESETS)} (default: quick)"
    )
    group.addoption(
        "--bench-filter",
        default=None,
        help="comma-separated patterns; see python -m benchmarks --help",
    )
    group.addoption("--bench-device", default="cpu", help="cpu or cuda (default: cpu)")


def _selected(config: pytest.Config) -> tuple[Preset, list[Case]]:
    try:
        preset = get_preset(config.getoption("--bench-preset"))
        names = set(select(preset, config.getoption("--bench-filter")))
    except SelectionError as error:
        raise pytest.UsageError(str(error)) from None
    return preset, [case for case in preset.cases if case.name in names]


def _turns(config: pytest.Config) -> list[Turn]:
    """Case, then repeat, then provider: what disturbs the machine meets every provider alike."""
    preset, cases = _selected(config)
    device = torch.device(config.getoption("--bench-device"))
    store: Store | None = config.hook.pytest_benchmark_store()
    turns = []
    for case in cases:
        if store is not None and store.load(case.name) is not None:
            continue
        rounds = preset.rounds[case.kind]
        usable = [name for name, reason in case.providers(device).items() if reason is None]
        for repeat, name in itertools.product(range(rounds.repeats), usable):
            turns.append(Turn(case, repeat, name, rounds))
    return turns


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "turn" in metafunc.fixturenames:
        turns = _turns(metafunc.config)
        ids = [f"{turn.case.name}-repeat{turn.repeat}-{turn.provider}" for turn in turns]
        metafunc.parametrize("turn", turns, ids=ids)


class Runner:
    """Checks, times and records one case after the other."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = torch.device(config.getoption("--bench-device"))
        self.store: Store | None = config.hook.pytest_benchmark_store()
        self._case: Case | None = None
        self._workloads: dict[str, Workload] = {}
        self._record: dict[str, Any] = {}

    def _begin(self, case: Case) -> None:
        """Every provider is checked before the first clock of its case starts."""
        self._workloads = {}  # free the old tensors before the new ones are made
        gc.collect()  # pytest-benchmark switches it off; modules and closures refer to each other
        reasons = case.providers(self.device)
        self._case = case
        self._record = {
            "case": {
                **{key: getattr(case, key) for key in ("name", "kind", "baseline", "floor")},
                **case.describe(),
            },
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
            if not memory.is_out_of_memory(error):
                raise
            self._skip("*", error)

    def _skip(self, provider: str, error: BaseException) -> None:
        reason = f"out of memory: {str(error).splitlines()[0]}"[:300]
        self._record["skipped"][provider] = reason
        if provider == "*":
            self._record["turns"] = {}
            self._workloads = {}
        else:
            self._record["turns"].pop(provider, None)
            self._workloads.pop(provider, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def run(self, turn: Turn, benchmark: Any) -> None:
        """One turn, timed by pytest-benchmark."""
        if self._case != turn.case:
            self._begin(turn.case)
        workload = self._workloads.get(turn.provider)
        if workload is None:
            skipped = self._record["skipped"]
            pytest.skip(skipped.get(turn.provider) or skipped["*"])
        benchmark.group = turn.case.name
        benchmark.extra_info.update(self._record["case"], provider=turn.provider)
        clocks = Clocks(workload, self.device)
        rounds = turn.rounds
        try:
            with workload.context():
                # One call first: the caches hold the previous provider's data.
                benchmark.pedantic(
                    clocks.run, rounds=rounds.rounds, iterations=rounds.iterations, warmup_rounds=1
                )
                if turn.repeat == 0:
                    self._measure_once(turn, workload)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            self._skip(turn.provider, error)
            pytest.skip(self._record["skipped"][turn.provider])
        if benchmark.stats is not None:  # None under --benchmark-disable
            timed = clocks.read(rounds.rounds * rounds.iterations)
            record = {"wall": list(benchmark.stats.stats.data), **timed}
            self._record["turns"][turn.provider].append(record)

    def _measure_once(self, turn: Turn, workload: Workload) -> None:
        """Memory and operations, which are the same in every call."""
        used = memory.measure(workload, self.device)
        counted = None
        if workload.forward is not None and turn.case.kind in ("block", "model"):
            counted = flops.count(workload.run)
        self._record["extras"][turn.provider] = {"memory": used, "flops": counted}

    def finish(self, case: Case) -> None:
        """After the last turn of a case."""
        if self.store is not None and self._case is case:
            self.store.save(case.name, self._record)


RUNNER = pytest.StashKey[Runner]()


@pytest.fixture
def time_turn(benchmark: Any, pytestconfig: pytest.Config) -> Any:
    """Times one turn."""
    runner = pytestconfig.stash.setdefault(RUNNER, Runner(pytestconfig))
    return lambda turn: runner.run(turn, benchmark)


def _turn(item: pytest.Item | None) -> Turn | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("turn")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
    """Keeps the record of a case after its last turn, if all went well."""
    result = yield
    turn, following = _turn(item), _turn(nextitem)
    over = turn is not None and (following is None or following.case != turn.case)
    runner = item.config.stash.get(RUNNER, None)
    if over and runner is not None and not item.session.testsfailed:
        runner.finish(turn.case)
    return result
