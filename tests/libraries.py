"""Imports torchvision, timm and transformers where they are installed, on any build of PyTorch."""

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_SCHEMAS: list[torch.library.Library] = []  # they last as long as this does


def _complete_torchvision() -> None:
    """Let torchvision be imported where its own ops cannot load.

    The wheels on PyPI are built for CUDA. On a CPU build of PyTorch their extension does not load,
    and importing torchvision fails for two ops that it describes without having them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _SCHEMAS:
        return
    folder = Path(next(iter(spec.submodule_search_locations)))
    for extension in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _SCHEMAS.append(library)


def load(name: str) -> object:
    """A module of one of the libraries; skips the test where the library is missing."""
    library = name.partition(".")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    _complete_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, on being imported
        return importlib.import_module(name)


def installed() -> Iterator[str]:
    for library in ("timm", "torchvision", "transformers"):
        if importlib.util.find_spec(library) is not None:
            yield library
