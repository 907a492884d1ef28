"""The tools around the code say the same as what they are copied from."""

import re
from pathlib import Path

import pytest

from build_tools import metadata

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("tool", ["ruff", "clang-format"])
def test_pre_commit_has_the_versions_of_make_lint(tool):
    pinned = re.findall(rf"^{tool}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(rf"/\S*{tool}\S*\n +rev: v(\S+)$", text, re.MULTILINE) == pinned


def test_the_citation_has_the_version():
    assert f"\nversion: {metadata.VERSION}\n" in (ROOT / "CITATION.cff").read_text()


def test_citation_and_package_name_the_same_authors():
    (name,) = re.findall(
        r'^authors = \[\{ name = "(.*)" \}\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert f"\nauthors:\n  - name: {name}\nreferences:" in (ROOT / "CITATION.cff").read_text()


def test_templates_are_yaml():
    yaml = pytest.importorskip("yaml")
    files = [
        *(ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"),
        ROOT / ".pre-commit-config.yaml",
        ROOT / "CITATION.cff",
    ]
    assert len(files) == 4
    for file in files:
        assert yaml.safe_load(file.read_text())
