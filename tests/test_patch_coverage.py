"""The script that counts what patch() reaches."""

import pytest
import torch
from libraries import is_installed
from torch import nn

import sdkernels
from benchmarks.studies import patch_coverage
from sdkernels.models.comparing import verified


@pytest.mark.skipif(not is_installed("torchvision"), reason="needs torchvision")
def test_a_library(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(patch_coverage, "FILE", tmp_path / "verified.py")
    (tmp_path / "verified.py").write_text('"""Head."""\n\nVERIFIED: dict = {}\n')
    monkeypatch.setattr(patch_coverage, "VERIFIED", {})
    patch_coverage.main(["--library", "torchvision", "--filter", "convnext_tiny", "--write"])
    text = capsys.readouterr().out
    assert "| 1 | 1 (100.0%) | 0 | 18 | 18 (100.0%) |" in text
    assert "1 of 1 sources equal their originals" in text
    names: dict[str, dict[str, dict[str, str]]] = {}
    exec((tmp_path / "verified.py").read_text(), names)
    path = "torchvision.models.convnext:CNBlock"
    assert list(names["VERIFIED"]) == [path]
    assert names["VERIFIED"][path] == verified.VERIFIED[path]


def test_what_is_left_is_counted():
    class DropPath(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = 0.5

        def forward(self, x):
            mask = torch.rand(len(x), *[1] * (x.dim() - 1)) >= self.p
            return x * mask / (1 - self.p) if self.training else x

    class Block(nn.Module):
        def __init__(self, skip: bool, add: bool) -> None:
            super().__init__()
            self.f, self.drop_path, self.skip, self.add = nn.Linear(2, 2), DropPath(), skip, add

        def forward(self, x):
            if not self.skip:
                return self.f(x)
            if not self.add:
                return torch.cat([x, self.drop_path(self.f(x))])
            return x + self.drop_path(self.f(x))

    model = nn.Sequential(Block(True, True), Block(False, True), Block(True, False))
    counted = patch_coverage.count("net", model, sdkernels.patch(model))
    assert counted is not None
    assert (counted.modules, counted.patched) == (2, 1)  # one is never called
    assert "torch.cat" not in counted.left[0]
    assert "its result is used by [x, self.drop_path(self.f(x))]" in counted.left[0]
