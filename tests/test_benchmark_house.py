"""The folders of the benchmarks: who may import whom, and the commands that the texts name."""

import ast
import os
import re
from pathlib import Path

import processes
import pytest

from benchmarks import COMMANDS
from benchmarks.__main__ import main

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "benchmarks"
FLOORS = {"measure", "providers", "cases", "report", "studies", "paper"}
FILES = [path for path in sorted(HOUSE.rglob("*.py")) if "out" not in path.parts]


def allowed(floor):
    """What the first file of a folder says that it imports, and the folder itself."""
    told = ast.get_docstring(ast.parse((HOUSE / floor / "__init__.py").read_text()))
    named = re.search(r"^Imports(: .*| nothing else of the benchmarks)\.$", told, re.MULTILINE)
    assert named, f"benchmarks/{floor}/__init__.py says nothing of its imports"
    return {floor, *re.findall(r"\w+", named[1].removeprefix(" nothing else of the benchmarks"))}


def imported(source):
    """Folders (or files) of the benchmarks that a file imports from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name their folder"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("benchmarks."))


def test_every_folder_is_known():
    found = {path.parent.relative_to(HOUSE).parts[0] for path in FILES if path.parent != HOUSE}
    assert found == FLOORS


def test_imports_go_one_way():
    below = {floor: allowed(floor) - {floor} for floor in FLOORS}
    assert all(names <= FLOORS for names in below.values())
    while below:  # floors that stand on nothing are taken away until none is left
        ground = {floor for floor, names in below.items() if not names & below.keys()}
        assert ground, f"these import each other: {sorted(below)}"
        below = {floor: names for floor, names in below.items() if floor not in ground}


@pytest.mark.parametrize("floor", sorted(FLOORS))
def test_no_import_goes_up(floor):
    may = allowed(floor)
    for path in (path for path in FILES if path.relative_to(HOUSE).parts[0] == floor):
        upward = set(imported(path.read_text())) - may
        assert not upward, f"{path.relative_to(ROOT)} imports from {sorted(upward)}"


def test_an_upward_import_is_seen():
    source = "def f():\n    from benchmarks.studies import scaling\n    import benchmarks.run\n"
    assert set(imported(source)) == {"studies", "run"}


TEXTS = [
    *("README.md", "CONTRIBUTING.md", "Makefile", ".ci/gpu_check.py"),
    *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
    *(str(path.relative_to(ROOT)) for path in HOUSE.glob("*.md")),
    *(str(path.relative_to(ROOT)) for path in (*FILES, *(ROOT / "sdkernels").rglob("*.py"))),
]
NAMED = re.compile(r"-m[\", ]+benchmarks(\.[\w.]+)?([\", ]+([a-z][a-z-]*)\b)?(?!\.)")


def test_commands_that_are_named_exist():
    named = [(text, *found) for text in TEXTS for found in NAMED.findall((ROOT / text).read_text())]
    assert len(named) > 20
    for text, module, _, command in named:
        file = HOUSE.joinpath(*module.split("."))
        file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
        assert file.is_file(), f"{text}: python -m benchmarks{module}"
        assert '__name__ == "__main__"' in file.read_text(), f"{text}: {file} does nothing"
        if not module and command:
            assert command in COMMANDS, f"{text}: python -m benchmarks {command}"


def test_every_command_stands_in_the_help(capsys):
    run = pytest.importorskip("benchmarks.run", reason="needs what the benchmarks need")
    with pytest.raises(SystemExit):
        run.parse_arguments(["--help"])
    told = capsys.readouterr().out
    for command, (text, module) in COMMANDS.items():
        assert re.search(rf"python -m benchmarks {command} +{re.escape(text)}$", told, re.MULTILINE)
        assert HOUSE.parent.joinpath(*module.split(".")).with_suffix(".py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command, capsys):
    if command in ("report", "scaling"):
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m benchmarks {command}" in capsys.readouterr().out


WITHOUT = """if True:
    import sys
    sys.modules |= dict.fromkeys(("matplotlib", "pytest_benchmark", "rich", "sklearn"))
    from benchmarks.studies import cuda_bandwidth, host_cost, multi_crop
    from benchmarks.studies import patch_coverage, patched_classes
    found = [cuda_bandwidth.Result("cpp", "a", 1, 1, 0, 0.5, True)]
    print(cuda_bandwidth.side_by_side(found, ["cpp"]))
    names = ("plain", "naive", "fused-rows", "fused", *host_cost.PARTS)
    print(host_cost.table(dict.fromkeys(("extension", "without"), dict(zip(names, range(20))))))
"""


def test_studies_print_without_what_plots_need():
    """The check of a GPU installs the package without dependencies."""
    done = processes.run("-c", WITHOUT, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "| a | 0.500 |" in done.stdout
    assert "| naive masking | 1000000.0 us, 1.00 |" in done.stdout
