"""What comes out of a benchmark run: report, plots, and the comparison of two runs."""

import copy
import gzip
import json
import shutil
from pathlib import Path

import pytest

# Nothing here is needed to use the package.
for package in ("matplotlib", "pytest_benchmark", "rich", "sklearn"):
    pytest.importorskip(package)

import benchmark_results  # noqa: E402

from benchmarks.__main__ import main  # noqa: E402
from benchmarks.cases import presets  # noqa: E402
from benchmarks.measure import ending  # noqa: E402
from benchmarks.report import compare, page, rebuild, summary, table, targets  # noqa: E402
from sdkernels import info  # noqa: E402

ROOT = Path(__file__).parents[1]
EXTRA = (*presets.PRESETS["compile"].cases, *presets.PRESETS["break-even"].cases)


@pytest.fixture(scope="module")
def everything():
    return benchmark_results.result(extra=EXTRA)


def names_of(result, kind):
    return [case["name"] for case in result["cases"] if case["kind"] == kind]


def written_of(result, folder):
    """The plots that a run writes beside its report."""
    rebuild.write(result, folder)
    return sorted(folder.glob("*.png"))


def write(result, path):
    path.write_text(json.dumps(result))
    return str(path)


def test_report_holds_every_kind(everything, tmp_path):
    result = copy.deepcopy(everything)
    result["complete"] = False
    result["cases"][0]["skipped"]["fused"] = "out of memory: 8 GiB"
    written = written_of(result, tmp_path)
    text = (tmp_path / "report.md").read_text()
    for heading in (
        *("Ops", "Blocks, forward", "Models, forward", "Stacks of many", "Blocks under torch"),
        *(
            "Kernels against",
            *("Host cost", "Few rows dropped", "Training a small ViT"),
            *("Reach", "Skipped"),
        ),
    ):
        assert f"## {heading}" in text
    assert "**Incomplete" in text
    assert "out of memory: 8 GiB" in text
    assert result["command"] in text
    assert result["environment"]["cpu"] in text
    assert f"CPU kernels for {info.collect().build['cpu_capability']}" in text
    for path in written:
        assert f"]({path.name})" in text
        assert path.read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in written} >= {
        *("blocks", "scaling-keep", "scaling-batch", "scaling-depth", "models"),
        *("compiled", "break-even", "ops-64x197x384-k32", "training"),
    }
    # As many columns in every line of a table as in its head.
    for made in page.tables(result, []):
        assert {len(row) for group in made.groups for row in group} <= {len(made.columns)}


def test_the_printed_end_fits_one_screen(everything):
    result = copy.deepcopy(everything)
    for case in result["cases"]:
        for figures in case["providers"].values():
            figures["spread"] = 0.3
    text = summary.summary(result, Path("benchmarks/out"), ["blocks.png", "models.png", "x.png"])
    text.encode("ascii")  # whatever the terminal
    lines = text.splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 80
    machine = result["environment"]
    for said in (machine["cpu"], f"backend {machine['backend']}", machine["instruction_set"]):
        assert said in " ".join(text.split())
    for name in ("DINO", "sdkernels", "ViT-S, drop 0.4", "ResNet-50", "1000 small branches"):
        assert name in text
    assert text.count("Noisy") == 1
    assert "losses differ by 1e-07" in text
    assert "benchmarks/out/" in text


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_tables_fit_their_window_and_leave_nothing_out(everything, width):
    for made in page.tables(everything, page.outcomes_of(everything)):
        text = made.text(width)
        if width >= 80:
            assert max(map(len, text.splitlines())) <= width, made.title
        run = "".join(text.split())
        for row in (row for group in made.groups for row in group):
            # Words that were wrapped stand between those of other cells.
            assert all("".join(cell.split()) in run for cell in row[2:-1]), row
        assert "\u2026" not in text
        text.encode("latin-1")


def test_a_table_without_groups_has_its_head():
    text = table.Table("Reach", ("target", "case", "bound"), groups=[]).text(80)
    assert text.splitlines()[0] == "Reach"
    assert text.splitlines()[2].split() == ["target", "case", "bound"]


def test_a_page_is_printed_like_its_tables():
    page_text = "# Head\n\n- a point that goes on\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"
    lines = table.printed(page_text, 14).splitlines()
    assert lines[:4] == ["Head", "", "- a point that", "  goes on"]
    assert "x|y  1" in lines


def outcome(measured, low, high, **options):
    return targets.Outcome("t", "c", 1.0, True, "x", measured, low, high, **options)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (outcome(0.9, 0.8, 0.95), "met"),
        (outcome(1.5, 1.2, 1.8), "missed by 50 %"),
        (outcome(1.1, 0.8, 1.5), "inconclusive (spread 32 %)"),
        (outcome(0.9, 0.8, 1.5), "inconclusive (spread 39 %)"),
        (outcome(0.9, 0.8, 1.5, noise=True), "met"),
        (outcome(1.1, None, None), "missed by 10 %"),
        (outcome(None, None, None), "not measured"),
    ],
)
def test_verdicts(found, verdict):
    assert found.verdict == verdict
    assert found.missed == verdict.startswith("missed")


def test_targets_have_an_exit_code(everything, tmp_path, capsys):
    names = names_of(everything, "block")[:1]
    right = benchmark_results.result(names=names)
    write(right, tmp_path / "results.json")
    assert main(["report", str(tmp_path), "--targets"]) == 0
    assert "0 missed" in capsys.readouterr().out
    write(benchmark_results.result(names=names, slower=("fused",)), tmp_path / "results.json")
    assert main(["report", str(tmp_path)]) == 0
    assert "missed by" not in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--targets"]) == 3
    assert "missed by" in capsys.readouterr().out


def test_the_recorded_break_even(tmp_path, capsys):
    """It has no targets, and its report says what min_saving decides by."""
    recorded = ROOT / "benchmarks/results/cpu-epyc-2-cores/break-even"
    shutil.copy(recorded / "results.json.gz", tmp_path)
    assert main(["report", str(tmp_path), "--targets"]) == 0
    assert "0 targets, 0 missed" in capsys.readouterr().out
    texts = ((folder / "report.md").read_text() for folder in (recorded, tmp_path))
    then, now = ([line.split(" | ") for line in text.splitlines()] for text in texts)
    ratios = [line[-1] for line in then if len(line) == 7 and line[-1][0].isdigit()]
    assert len(ratios) == 42
    assert [line[-1] for line in now if line[1:2] == ["compact"]] == ratios


def test_a_compressed_record_is_read(everything, tmp_path):
    few = everything | {"cases": everything["cases"][:1], "training": None, "reach": []}
    (tmp_path / "results.json.gz").write_bytes(gzip.compress(json.dumps(few).encode()))
    assert main(["report", str(tmp_path)]) == 0
    assert "## Ops" in (tmp_path / "report.md").read_text()
    with pytest.raises(ending.BadInput):
        page.read(tmp_path / "other.json")


def test_clocks_of_a_gpu_are_shown(everything):
    result = copy.deepcopy(everything)
    result["cases"] = [case for case in result["cases"] if case["kind"] == "block"][:1]
    for figures in result["cases"][0]["providers"].values():
        figures |= {"device": 0.25, "host": 0.125}
    (made,) = page.tables({**result, "training": None}, [])[:1]
    assert {"device", "host"} <= set(made.columns)
    assert {len(row) for group in made.groups for row in group} == {len(made.columns)}
    assert "250 ms" in made.markdown()


@pytest.mark.parametrize(
    "kind", ["op", "kernel", "block", "model", "depth", "compile", "host", "break_even"]
)
def test_one_case_alone_is_drawn_and_reported(everything, kind, tmp_path):
    result = copy.deepcopy(everything)
    names = names_of(result, kind)[:1]
    result["cases"] = [case for case in result["cases"] if case["name"] in names]
    result |= {"training": None, "reach": []}
    written = written_of(result, tmp_path)
    # A line takes three depths; kernels and calls have a table alone.
    assert len(written) >= (0 if kind in ("depth", "kernel", "host") else 1)
    assert (tmp_path / "report.md").exists()


def test_a_case_that_could_not_run_is_no_obstacle(everything, tmp_path):
    result = copy.deepcopy(everything)
    for case in result["cases"][::2]:
        case["providers"], case["skipped"] = {}, {"*": "out of memory: 1 TiB"}
    written_of(result, tmp_path)
    assert "skipped: out of memory" in (tmp_path / "report.md").read_text()


def test_rebuild_from_the_command_line(everything, tmp_path, capsys):
    few = everything | {"cases": everything["cases"][:1], "training": None, "reach": []}
    write(few, tmp_path / "results.json")
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/" in out
    assert "report.md" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "expected JSON"),
        ("[]", "something else"),
        ('{"schema": 1}', "got schema 1"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path, capsys):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["compare", str(path), str(path)]) == 2
    assert message in capsys.readouterr().err


# Two runs


@pytest.fixture
def runs(tmp_path):
    """Writes two runs and compares them: the exit code and what was printed."""

    def compared(a, b, *options):
        paths = [write(run, tmp_path / f"{i}.json") for i, run in enumerate((a, b))]
        return main(["compare", *paths, *options])

    return compared


def test_a_run_against_itself(everything, runs, capsys):
    assert runs(everything, everything) == 0
    assert "0 regressions" in capsys.readouterr().out


def test_a_slower_provider_is_a_regression(runs, capsys):
    names = [case.name for case in presets.PRESETS["standard"].cases if case.kind == "block"][:3]
    a = benchmark_results.result(names=names)
    b = benchmark_results.result(names=names, slower=("fused",))
    assert runs(a, b) == 1
    text = capsys.readouterr().out
    assert "3 regressions" in text
    assert runs(a, b, "--threshold", "0.2") == 0
    assert runs(b, a) == 0
    assert "improvement" in capsys.readouterr().out
    assert runs(a, b, "--provider", "dinov2") == 0


def test_a_slower_machine_is_none(runs):
    names = names_of(benchmark_results.result(), "block")[:3]
    a = benchmark_results.result(names=names)
    b = benchmark_results.result(names=names, scale=1.5)
    assert runs(a, b) == 0
    assert runs(a, b, "--seconds") == 1


def test_noise_is_no_regression(runs):
    names = names_of(benchmark_results.result(), "block")[:1]
    a = benchmark_results.result(names=names)
    b = benchmark_results.result(names=names, slower=("fused",))
    assert runs(a, b) == 1
    b["cases"][0]["providers"]["fused"]["spread"] = 0.12
    assert runs(a, b) == 0


def test_memory_is_compared(runs, capsys):
    names = names_of(benchmark_results.result(), "block")[:1]
    a = benchmark_results.result(names=names)
    b = copy.deepcopy(a)
    b["cases"][0]["providers"]["fused"]["memory"]["bytes"] *= 2
    assert runs(a, b) == 1
    assert "memory" in capsys.readouterr().out


def test_what_differs_is_said(everything, runs, capsys):
    b = copy.deepcopy(everything)
    b["environment"]["cpu"] = "another CPU"
    b["complete"] = False
    removed = b["cases"].pop()["name"]
    assert runs(everything, b) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "another CPU" in text
    assert "the second run was stopped" in text
    assert f"only in the first run: {removed}" in text


def test_a_provider_that_no_longer_runs_is_a_regression(runs, capsys):
    names = names_of(benchmark_results.result(), "block")[:2]
    a = benchmark_results.result(names=names)
    b = copy.deepcopy(a)
    del b["cases"][0]["providers"]["fused"]
    b["cases"][0]["skipped"]["fused"] = "out of memory: 8 GiB"
    assert runs(a, b) == 1
    assert "out of memory" in capsys.readouterr().out
    b = copy.deepcopy(a)
    b["cases"][0] |= {"providers": {}, "skipped": {"*": "out of memory: 9 GiB"}}
    assert runs(a, b) == 1
    assert runs(b, a) == 0


def test_a_provider_that_is_no_more_is_named(runs, capsys):
    names = names_of(benchmark_results.result(), "block")[:1]
    a = benchmark_results.result(names=names)
    b = copy.deepcopy(a)
    del b["cases"][0]["providers"]["dinov2"]
    assert runs(a, b, "--provider", "all") == 0
    text = capsys.readouterr().out
    (line,) = (line for line in text.splitlines() if "dinov2" in line)
    assert line.split()[-1] == "gone"
    assert "0 regressions" in text


def test_host_cost_is_compared_by_its_extra(runs):
    names = names_of(benchmark_results.result(), "host")
    a = benchmark_results.result(names=names)
    b = copy.deepcopy(a)
    fused = b["cases"][0]["providers"]["fused"]
    fused["extra"] *= 1.3
    fused["extra_of_baseline"] *= 1.3
    assert runs(a, b) == 1


def test_other_baselines_are_not_compared(runs):
    names = names_of(benchmark_results.result(), "op")[:1]
    a = benchmark_results.result(names=names)
    b = copy.deepcopy(a)
    b["cases"][0]["baseline"] = "copy"
    assert runs(a, b) == 2


def test_cells_do_not_break_a_table():
    made = table.Table("t", ("a", "b"), groups=[[["x|y", "two\nlines"]]])
    assert "| x\\|y | two lines |" in made.markdown()


def test_nothing_in_common(everything, runs, capsys):
    b = copy.deepcopy(everything)
    b["cases"] = []
    assert runs(everything, b) == 2
    assert "share no figure" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(["a", "b", "--threshold", "-1"])
