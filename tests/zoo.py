"""The zoo in its tiny size. A test whose model is of a library that is missing is skipped."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from libraries import LIBRARIES
from torch import nn

from benchmarks.providers import zoo
from benchmarks.providers.zoo import TINY, Net, output_of

__all__ = ["NETS", "Net", "maxxvit", "output_of", "timm_vit"]


def skipping(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        try:
            return make()
        except ModuleNotFoundError as error:
            if error.name not in LIBRARIES:
                raise
            pytest.skip(f"{error.name} is not installed")

    return made


def timm_vit(**options: Any) -> Callable[[], nn.Module]:
    return skipping(partial(zoo.timm_vit, TINY, **options))


def maxxvit(**options: Any) -> Callable[[], nn.Module]:
    return skipping(partial(zoo.maxxvit, TINY, **options))


NETS = {name: replace(net, make=skipping(net.make)) for name, net in zoo.nets(TINY).items()}
