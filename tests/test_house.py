"""Which file stands where, and what it may import: CONTRIBUTING.md and tests/README.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def floors() -> dict[str, list[list[str]]]:
    """Of each folder with floors, its rooms from the top down."""
    found = {}
    for block in re.findall(r"^```text\n(.*?)^```", CONTRIBUTING, re.MULTILINE | re.DOTALL):
        folder, *lines = block.splitlines()
        if folder.endswith("/"):
            found[folder.rstrip("/")] = [line.split() for line in lines]
    return found


FLOORS = floors()


def rooms_of(folder: Path) -> set[str]:
    files = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
    return files | {path.parent.name for path in folder.glob("*/__init__.py")}


def imports_of(path: Path) -> Iterator[str]:
    """Full names of what a file imports while it runs, functions' own imports included."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text())
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_there_are_floors():
    assert {"sdkernels", "sdkernels/backends"} <= FLOORS.keys()


@pytest.mark.parametrize("folder", FLOORS)
def test_every_room_has_its_floor(folder):
    named = [room for floor in FLOORS[folder] for room in floor]
    assert sorted(named) == sorted(rooms_of(ROOT / folder))


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_go_down(folder):
    """A room imports nothing of its own floor or of one above."""
    floor_of = {room: n for n, floor in enumerate(FLOORS[folder]) for room in floor}
    prefix = folder.replace("/", ".") + "."
    wrong = []
    for room, floor in floor_of.items():
        whole = ROOT / folder / room
        for path in sorted(whole.rglob("*.py")) if whole.is_dir() else [whole.with_suffix(".py")]:
            for name in imports_of(path):
                other = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else room
                if other != room and floor_of.get(other, floor + 1) <= floor:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_an_import_that_goes_up_is_found(tmp_path):
    text = "from .arguments import take\nif True:\n    from . import rows\nimport torch.nn\n"
    path = ROOT / "sdkernels/plan.py"
    imitation = tmp_path / "plan.py"
    imitation.write_text(text)

    class InThePackage(type(path)):
        def read_text(self, *arguments, **options):
            return text

    found = set(imports_of(InThePackage(path)))
    assert found == {"sdkernels.arguments.take", "sdkernels.rows", "torch.nn"}


def test_every_room_of_the_map_exists():
    """The first column of CONTRIBUTING's table: files, folders, patterns, several with commas."""
    lines = re.findall(r"^\| (`.*?) \|", CONTRIBUTING, re.MULTILINE)
    assert len(lines) > 30
    missing = []
    for line in lines:
        folder = ""
        for name in re.findall(r"`([^`]+)`", line):
            pattern = name if "/" in name or not folder else f"{folder}/{name}"
            folder = str(Path(pattern).parent) if not pattern.endswith("/") else ""
            folder = "" if folder == "." else folder
            if not any(ROOT.glob(pattern.rstrip("/"))):
                missing.append(pattern)
    assert not missing


def test_every_test_has_its_line():
    """tests/README.md says what each file of tests guards, and names nothing that is not there."""
    text = (ROOT / "tests/README.md").read_text()
    named = re.findall(r"^\| `(test_\w+\.py)` \|", text, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    guarded = re.findall(
        r"`((?:sdkernels|csrc|benchmarks|examples|docs|build_tools|\.ci)/[^`]*)`", text
    )
    assert [name for name in guarded if not any(ROOT.glob(name.rstrip("/")))] == []
