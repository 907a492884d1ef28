"""The study of crops in one tensor: what is compared computes the same, and what it reports."""

import json

import pytest
import torch

from benchmarks.studies import multi_crop
from benchmarks.studies.multi_crop import SIZES, Subject, recipe
from sdkernels import KeptRows

SMALLEST = SIZES[0]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", ["recipe", "packed", "dense"])
def test_what_computes_something_else_is_not_timed(provider, monkeypatch):
    multi_crop.check(SMALLEST)
    right = multi_crop.dense if provider == "dense" else multi_crop.PROVIDERS[provider]

    def wrong(*args):
        out = right(*args)
        return out * 1.001 if provider == "dense" else [y * 1.001 for y in out]

    if provider == "dense":
        monkeypatch.setattr(multi_crop, "dense", wrong)
    else:
        monkeypatch.setitem(multi_crop.PROVIDERS, provider, wrong)
    with pytest.raises(SystemExit, match=f"'{provider}' differs in its output 0"):
        multi_crop.check(SMALLEST)


def test_all_draw_the_same_number_of_samples(monkeypatch):
    """DINOv3's rule rounds down, the op to the nearest: in these sizes they agree."""
    for size in SIZES:
        for batch, _, _ in size.shapes():
            rows = KeptRows.sample(batch, multi_crop.DROP, sampler="fixed")
            assert rows.k == int(batch * (1 - multi_crop.DROP))
            assert rows.scale == pytest.approx(batch / rows.k)
    drawn = []
    draw = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n: drawn.append(n) or draw(n))
    subject = Subject(SMALLEST)
    recipe(subject.block, subject.xs, None)
    assert drawn == [10, 40, 10, 40]


def test_calls_are_counted_without_views_and_allocations():
    with multi_crop.Calls() as calls:
        x = torch.zeros(2, 3)
        y = torch.empty_like(x).t()
        torch.add(y.view(3, 2), 1)
        y.detach()[0].add_(1)
    assert calls.names == ["aten::zeros", "aten::add.Tensor", "aten::add_.Tensor"]


def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(multi_crop, "SIZES", (SMALLEST,))
    assert multi_crop.main(["--turns", "1", "--threads", "1", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "multi-crop.json").read_text())
    (figures,) = written["sizes"]
    names = {*multi_crop.PROVIDERS, "dense"}
    assert all(figures[key].keys() == names for key in ("calls", "saved_bytes", "seconds"))
    assert figures["kept"] == [6, 24]
    calls, saved = figures["calls"], figures["saved_bytes"]
    # Fewer calls than a crop at a time, and than what concatenates.
    assert calls["dense"] < calls["packed"] < calls["list"] < calls["masked"]
    assert calls["packed"] < calls["recipe"]
    assert saved["packed"] < saved["recipe"] < saved["masked"]
    text = (tmp_path / "multi-crop.md").read_text()
    assert text.count("| calls alone |") == len(names)
    assert text in capsys.readouterr().out
