"""Modules of torchvision, timm and transformers, for the tests of what is installed."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.providers.libraries import LIBRARIES, import_module, is_installed

__all__ = ["LIBRARIES", "is_installed", "load"]


def load(name: str) -> Any:
    """A module of one of the libraries; skips the test where the library is missing."""
    library = name.partition(".")[0]
    if not is_installed(library):
        pytest.skip(f"{library} is not installed")
    return import_module(name)
