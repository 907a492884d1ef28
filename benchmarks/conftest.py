"""Makes the cases of a preset pytest-benchmark tests, ordered so that the providers alternate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks import correctness, memory
from benchmarks.models import Case
from benchmarks.presets import PRESETS, Rounds, SelectionError, get_preset, select
from benchmarks.providers import Workload


@dataclass(frozen=True)
class Turn:
    """One provider's turn in one repeat of one case: a test."""

    case: Case
    repeat: int
    provider: str
    rounds: Rounds


class Hooks:
    """Hooks that a plugin may implement beside pytest's own."""

    @pytest.hookspec
    def pytest_providers_checked(self, case: Case) -> None:
        """All providers of ``case`` agree with their reference."""


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


def _turns(config: pytest.Config) -> list[Turn]:
    """Case, then repeat, then provider: what disturbs the machine meets every provider alike."""
    try:
        preset = get_preset(config.getoption("--bench-preset"))
        selected = set(select(preset, config.getoption("--bench-filter")))
    except SelectionError as error:
        raise pytest.UsageError(str(error)) from None
    return [
        Turn(case, repeat, provider, preset.rounds[case.kind])
        for case in preset.cases
        if case.name in selected
        for repeat in range(preset.rounds[case.kind].repeats)
        for provider in case.providers
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "turn" in metafunc.fixturenames:
        turns = _turns(metafunc.config)
        ids = [f"{turn.case.name}-repeat{turn.repeat}-{turn.provider}" for turn in turns]
        metafunc.parametrize("turn", turns, ids=ids)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Checks every provider of every selected case before the first clock starts.

    One wrong provider ends the run.
    """
    if session.config.option.collectonly:
        return
    device = torch.device(session.config.getoption("--bench-device"))
    turns = [
        item.callspec.params["turn"]
        for item in session.items
        if "turn" in getattr(item, "fixturenames", ())
    ]
    for case in dict.fromkeys(turn.case for turn in turns):
        try:
            correctness.check(case, device)
        except correctness.ProviderMismatch as error:
            pytest.exit(f"nothing was timed: {error}", returncode=pytest.ExitCode.TESTS_FAILED)
        session.config.hook.pytest_providers_checked(case=case)


class WorkloadCache:
    """The workloads of the current case, built once for all its repeats."""

    def __init__(self) -> None:
        self._case: Case | None = None
        self._workloads: dict[str, Workload] = {}

    def get(self, turn: Turn, device: torch.device) -> Workload:
        if self._case != turn.case:
            self._workloads = {}  # free the old tensors before the new ones are made
            self._workloads = turn.case.workloads(device)
            self._case = turn.case
        return self._workloads[turn.provider]


@pytest.fixture(scope="session")
def workload_cache() -> WorkloadCache:
    return WorkloadCache()


@pytest.fixture
def time_turn(benchmark: Any, workload_cache: WorkloadCache, pytestconfig: pytest.Config) -> Any:
    """Times one turn and notes beside the samples what they belong to."""
    device = torch.device(pytestconfig.getoption("--bench-device"))

    def time_it(turn: Turn) -> None:
        workload = workload_cache.get(turn, device)
        if device.type == "cuda":

            def run() -> None:
                workload.run()
                torch.cuda.synchronize(device)
        else:

            def run() -> None:
                workload.run()  # the result dies here, inside the clock, for every provider alike

        benchmark.group = turn.case.name
        benchmark.extra_info.update(
            case={"name": turn.case.name, "kind": turn.case.kind, **turn.case.describe()},
            baseline=turn.case.baseline,
            floor=turn.case.floor,
            provider=turn.provider,
            repeat=turn.repeat,
        )
        rounds = turn.rounds
        # One call first: the caches hold the previous provider's data.
        benchmark.pedantic(run, rounds=rounds.rounds, iterations=rounds.iterations, warmup_rounds=1)
        if turn.repeat == 0:
            benchmark.extra_info["memory"] = memory.measure(workload, device)

    return time_it
