"""Imports torchvision, timm and transformers where they are installed, on any build of PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch

__all__ = ["LIBRARIES", "import_module", "is_installed"]

LIBRARIES = ("timm", "torchvision", "transformers")
_SCHEMAS: list[torch.library.Library] = []  # they last as long as this does


def is_installed(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


def _complete_torchvision() -> None:
    """Let torchvision be imported where its own ops cannot load.

    The wheels on PyPI are built for CUDA. On a CPU build of PyTorch their extension does not load,
    and importing torchvision fails for two ops that it describes without having them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or _SCHEMAS:
        return
    for extension in Path(next(iter(spec.submodule_search_locations))).glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _SCHEMAS.append(library)


def import_module(name: str) -> Any:
    """A module of one of the libraries, without the warnings of importing it."""
    _complete_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
