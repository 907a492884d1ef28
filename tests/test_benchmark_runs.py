"""The benchmarks' harness, run: to the report, and where something goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest

# Nothing here is needed to use the package.
for package in ("matplotlib", "pytest_benchmark", "rich", "sklearn"):
    pytest.importorskip(package)

from benchmarks.cases import presets  # noqa: E402
from benchmarks.measure import store  # noqa: E402
from benchmarks.providers import residuals  # noqa: E402
from benchmarks.report import figures  # noqa: E402

ROOT = Path(__file__).parents[1]
TINY = presets.TINY.name


def command(*arguments, program=("-m", "benchmarks")):
    return [sys.executable, *program, *arguments]


def run(*arguments, program=("-m", "benchmarks")):
    return processes.run(*program, *arguments, cwd=ROOT, env=os.environ, timeout=300)


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_run_end_to_end(tmp_path):
    result = run("--preset", "smoke", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    for said in ("naive masking", "sdkernels", "Host time", "Digits", str(tmp_path)):
        assert said in result.stdout
    assert "timing 1/17: op-compact" in result.stdout
    assert max(map(len, result.stdout.partition("naive masking")[2].splitlines())) <= 80
    assert result.stderr == ""  # not even of the profiler
    report = (tmp_path / "report.md").read_text()
    for table in ("Ops", "Blocks", "Host cost", "Training", "Reach"):
        assert f"## {table}" in report
    written = results_in(tmp_path)
    assert written["schema"] == figures.SCHEMA
    assert written["complete"]
    assert "--preset smoke" in written["command"]
    assert [case["name"] for case in written["cases"]] == presets.PRESETS["smoke"].names()[:-1]
    block = next(case for case in written["cases"] if case["kind"] == "block")
    timed = block["providers"].keys()
    assert timed | block["skipped"].keys() >= residuals.RULES.keys()
    fused = block["providers"]["fused"]
    assert fused["memory"]["bytes"] > 0
    # The work of half of the rows.
    assert fused["flops"] / block["providers"]["naive"]["flops"] == pytest.approx(0.5, abs=0.01)
    rounds = presets.PRESETS["smoke"].rounds["block"]
    assert fused["samples"] == rounds.repeats * rounds.rounds
    # Same kept rows from the same seed: eleven steps stay together to rounding.
    assert written["training"]["largest_loss_difference"]["fused"] < 1e-4
    assert not (tmp_path / store.FOLDER).exists()
    assert report.startswith("#")


def test_cases_run_as_a_plain_pytest():
    result = subprocess.run(
        command(
            *("benchmarks", "--bench-preset=smoke", f"--bench-filter=block-{TINY},op-compact,host"),
            *("--benchmark-disable", "-q", "-p", "no:cacheprovider"),
            program=("-m", "pytest"),
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


WRONG = """if True:
    import sys
    from benchmarks.providers import residuals
    right, draws = residuals.RULES["dinov3"]
    residuals.RULES["fused"] = (lambda *a, **k: 1.01 * right(*a, **k), draws)
    from benchmarks.__main__ import main
    sys.exit(main(sys.argv[1:]))
"""


def test_wrong_provider_stops_the_run(tmp_path):
    arguments = ("--preset", "smoke", "--filter", f"host,{TINY}", "--out", str(tmp_path))
    result = run(*arguments, program=("-c", WRONG))
    assert result.returncode == 1
    assert "provider 'fused' differs" in " ".join(result.stdout.split())
    assert "median" not in result.stdout
    assert list(tmp_path.iterdir()) == []  # not even what was timed before


SHORT_OF_MEMORY = """if True:
    import sys
    import torch
    from benchmarks.providers import residuals
    right, draws = residuals.RULES["dinov2"]

    def hungry(x, *arguments, **options):
        if options["rows"] is None:  # it is checked with rows given, and timed without
            x = x + torch.empty(2**50)
        return right(x, *arguments, **options)

    residuals.RULES["dinov2"] = (hungry, True)
    from benchmarks.__main__ import main
    sys.exit(main(sys.argv[1:]))
"""


def test_out_of_memory_is_recorded_and_skipped(tmp_path):
    arguments = ("--preset", "smoke", "--filter", f"block-{TINY}", "--out", str(tmp_path))
    result = run(*arguments, program=("-c", SHORT_OF_MEMORY))
    assert result.returncode == 0, result.stdout + result.stderr
    (case,) = results_in(tmp_path)["cases"]
    assert case["skipped"]["dinov2"].startswith("out of memory")
    assert "dinov2" not in case["providers"]
    assert {"naive", "fused", "dense"} <= case["providers"].keys()


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path):
    arguments = ("--preset", "smoke", "--filter", "op,host,train", "--out", str(tmp_path))
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        for line in process.stdout:
            if ": host" in line:  # the ops before it are done
                break
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, rest
    assert "Interrupted" in rest
    first = results_in(tmp_path)
    assert not first["complete"]
    measured = {case["name"]: case for case in first["cases"]}
    assert len(measured) >= 3
    assert first["training"] is None

    again = run(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "measured before the run was stopped" in again.stdout
    second = results_in(tmp_path)
    assert second["complete"]
    assert second["training"] is not None
    for case in second["cases"]:
        if case["name"] in measured:
            assert case == measured[case["name"]]  # to the last sample: not run again
    assert second["seconds"] > first["seconds"]
    assert not (tmp_path / store.FOLDER).exists()


def test_other_arguments_do_not_mix_with_an_unfinished_run(tmp_path):
    folder = tmp_path / store.FOLDER
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"preset": "full"}))
    arguments = ("--preset", "smoke", "--filter", "host", "--out", str(tmp_path))
    refused = run(*arguments)
    assert refused.returncode == 2
    assert "--fresh" in refused.stderr
    assert run(*arguments, "--fresh").returncode == 0


@pytest.mark.parametrize(
    "program", [("-m", "benchmarks"), ("-m", "benchmarks", "host-cost"), ("-m", "benchmarks.paper")]
)
def test_a_folder_that_cannot_be_made_is_one_sentence(program):
    rest = ("claim", "decay") if program[-1].endswith("paper") else ()
    result = run(*rest, "--out", "/proc/x", program=program)
    assert result.returncode == 2
    assert "expected a folder to write to, got /proc/x" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("lines", [0, 3])
def test_a_reader_that_leaves_is_no_traceback(lines, tmp_path):
    """As ``| head`` does."""
    arguments = ("--preset", "smoke", "--filter", "op", "--out", str(tmp_path))
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert error == "python -m benchmarks: the output was closed before its end\n"
    assert process.returncode == 141
