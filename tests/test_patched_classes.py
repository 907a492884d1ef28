"""The benchmark of patched classes: what it covers, what it refuses, and one tiny run."""

import json
from typing import Any

import pytest
import torch
from libraries import LIBRARIES, is_installed

from benchmarks.providers.zoo import TINY, nets
from benchmarks.studies import patched_classes
from sdkernels.models import adding
from sdkernels.models.comparing import proving
from sdkernels.models.proof import Proof

pytestmark = pytest.mark.skipif(
    not all(map(is_installed, LIBRARIES)), reason=f"needs {', '.join(LIBRARIES)}"
)
NETS = nets(TINY)


def test_every_known_class_has_a_line_of_its_own():
    lines = list(patched_classes.subjects(NETS))
    alone = {
        f"{k.__module__}:{k.__name__}" for s in lines if len(s.classes) == 1 for k in s.classes
    }
    every = {k for s in lines for k in s.classes}
    known = {f"{k.__module__}:{k.__name__}" for k in every}
    assert alone == known
    assert len({(line.name, line.classes) for line in lines}) == len(lines)


def test_a_run(tmp_path, capsys):
    """Of a model with two classes: a line for both, and one for each."""
    arguments = ["--sizes", "tiny", "--turns", "2", "--filter", "timm-cait", "--out", str(tmp_path)]
    patched_classes.main(arguments)
    written = json.loads((tmp_path / "patched-classes.json").read_text())
    both, first, second = written["lines"]
    assert [len(line["classes"]) for line in written["lines"]] == [2, 1, 1]
    assert both["seconds"].keys() == {"naive", "index_add", "fused", "dense"}
    assert all(len(each) == 2 for each in both["seconds"].values())
    assert "dense" not in first["seconds"]
    # What each class can save adds up to what both can.
    assert first["share_of_branches"] + second["share_of_branches"] == pytest.approx(
        both["share_of_branches"]
    )
    assert 1 < second["ideal_speedup"] < first["ideal_speedup"] < both["ideal_speedup"] < 1 / 0.6
    assert both["memory"] < 0.75
    text = (tmp_path / "patched-classes.md").read_text()
    assert text in capsys.readouterr().out
    assert "| timm-cait | LayerScaleBlock, LayerScaleBlockClassAttn |" in text


def test_a_class_that_is_not_faster_is_named():
    line: dict[str, Any] = {
        "name": "net", "classes": ["a.B"], "faster": False, "speedup": 0.9, "speedup_low": 0.8,
        "speedup_high": 1.1, "ideal_speedup": 1.02, "share_of_branches": 0.05, "memory": 0.9,
        "median": {"naive": 1.0, "fused": 1.1}, "spread": {"naive": 0.1, "fused": 0.1},
    }  # fmt: skip
    text = patched_classes.verdict([line, line | {"faster": True}])
    assert text.startswith("Not faster (lower quartile at most 1), 1 of 2 lines:")
    assert "- net, B: 0.90; its branches are 5% of the step's operations, so that 1.02 is" in text
    assert patched_classes.verdict([line | {"faster": True}]).startswith("All 1 lines are faster")


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-resnet", "transformers-dinov3"])
def test_a_wrong_provider_ends_the_run(name, monkeypatch):
    (subject,) = patched_classes.subjects({name: NETS[name]})
    x = subject.net.inputs(10, torch.float32)
    patched_classes.check(subject, x)
    op = adding.fused_stochastic_depth

    def wrong(*args: Any, **options: Any) -> Any:
        return op(*args, **options) * 1.01

    # What the comparison would find and keep from running is to reach the benchmark.
    monkeypatch.setattr(proving, "prove", lambda *args: Proof(True, of_samples=None))
    monkeypatch.setattr(adding, "fused_stochastic_depth", wrong)
    with pytest.raises(SystemExit, match=rf"{name} .*: 'fused' differs in its output"):
        patched_classes.check(subject, x)


def test_an_unknown_model_lists_those_there_are(capsys):
    with pytest.raises(SystemExit):
        patched_classes.main(["--filter", "nothing"])
    assert "no model matches 'nothing', there are timm-vit, " in capsys.readouterr().err
