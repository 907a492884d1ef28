"""README, docs/ and examples/: links lead somewhere, code runs, no public name is missing."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import libraries
import pytest

import sdkernels
from sdkernels import models

ROOT = Path(__file__).parents[1]
MEASURE = importlib.import_module("sdkernels.measure")  # the name is that of a function too
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_every_public_name_is_on_the_api_page():
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    expected = [f"sdkernels.{name}" for name in sdkernels.__all__ if name != "measure"]
    expected += [f"sdkernels.measure.{name}" for name in MEASURE.__all__]
    expected += [
        f"sdkernels.models.{name}" for name in models.__all__ if name not in sdkernels.__all__
    ]
    assert sorted(shown) == sorted(expected)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).is_file(), link


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in PAGES if p.parent.name == "docs")]
)
def test_links_to_headings(page):
    for path, anchor in re.findall(r"\]\(([^)#\s:]+\.md)#([^)]*)\)", (ROOT / page).read_text()):
        text = ((ROOT / page).parent / path).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
        assert anchor in slugs


def test_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    found = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    written = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    assert {page for page in found if not page.startswith("repository/")} == written


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_code_runs(page, capsys, monkeypatch):
    timm = libraries.load("timm")
    create = timm.create_model
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **k: create(name, **small, **k))
    blocks = code(page)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert "2 blocks patched" in capsys.readouterr().out
    assert names["y"].shape == (8, 197, 384)


def test_the_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", ["README.md", "docs/guides/patch.md"])
@pytest.mark.parametrize(
    ("name", "shown", "rate"),
    [("vit_small_patch16_224", "ViT-S", 0.1), ("vit_small_patch16_224", "ViT-S", 0.4),
     ("swin_tiny_patch4_window7_224", "Swin-T", 0.2)],
)  # fmt: skip
def test_savings(page, name, shown, rate):
    timm = libraries.load("timm")
    saving = load("docs/figures/saving.py")
    assert (name, rate) in saving.NETS
    share = saving.expected_saving(timm.create_model(name, drop_path_rate=rate))
    assert f"{shown} | {rate} | {100 * share:.1f} % |" in (ROOT / page).read_text()


def test_the_figure_shows_the_recorded_run():
    pytest.importorskip("matplotlib")
    draw = load("docs/figures/draw.py")
    cases = draw.sweep()
    assert [case["keep"] for case in cases] == [1.0, 0.95, 0.9, 0.75, 0.5, 0.25]
    lines = {line.get_label(): line for line in draw.speed_up().axes[0].lines}
    for provider, (label, *_) in draw.LINES.items():
        expected = [case["providers"][provider]["speedup"] for case in cases]
        assert list(lines[label].get_ydata()) == expected


def test_links_out_of_docs_lead_to_copies():
    links = load("docs/links.py")
    page = "guides/gates.md"
    source = links.in_repository(page)
    assert source == "docs/guides/gates.md"
    assert links.target("../../examples/gates.py", source) == "examples/gates.py"
    assert links.in_site("examples/gates.py") == "repository/examples/gates.py"
    assert links.in_site("docs/paper.md") == "paper.md"
    assert links.target("https://example.org/a.md", source) is None
    assert links.target("missing.md", source) is None
    assert links.target("../../../elsewhere.md", source) is None
    file = type("File", (), {"src_uri": page})
    text = "[a](../../examples/gates.py) [b](../paper.md#x)\n```\n[c](../../LICENSE)\n```\n"
    assert links.on_page_markdown(text, type("Page", (), {"file": file})) == (
        "[a](../repository/examples/gates.py) [b](../paper.md#x)\n```\n[c](../../LICENSE)\n```\n"
    )


def test_examples_are_on_their_page():
    page = (ROOT / "docs/examples.md").read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert f"](../examples/{script.name})" in page
