"""Blocks and models of timm and torchvision whose residual additions follow any rule.

:func:`sdkernels.patch` finds the additions; a rule of ``residuals.py`` then takes the op's place in
the patched blocks. So every provider runs the same modules, as the libraries wrote them, and
differs in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import sdkernels
from benchmarks.providers.libraries import import_module, is_installed
from benchmarks.providers.residuals import Rows, Rule
from sdkernels.models import adding

HAS_LIBRARIES = is_installed("timm") and is_installed("torchvision")


@contextmanager
def in_place_of_the_op(rule: Rule) -> Iterator[None]:
    """Patched blocks add by this rule."""
    op = adding.fused_stochastic_depth
    adding.fused_stochastic_depth = rule
    try:
        yield
    finally:
        adding.fused_stochastic_depth = op


class Ruled(nn.Module):
    """A module of a library with the residual rule left open: the interface of ``vit.Block``.

    Args:
        module: a block or a model, in which at least one block is known to ``patch``.
        drop: the drop probability of every branch.
    """

    def __init__(self, module: nn.Module, drop: float) -> None:
        super().__init__()
        self.module = module
        self.branches = len(sdkernels.patch(module, drop_probs=0.0).drop_probs)
        self.report = sdkernels.patch(module, drop_probs=[drop] * self.branches)

    def forward(
        self, x: Tensor, rule: Rule, p: Sequence[float] = (), rows: Rows = (None,)
    ) -> Tensor:
        """``p`` was given to the constructor; ``rows`` are all given, or all drawn by the rule."""
        given = None not in rows
        with in_place_of_the_op(rule), self.report.use(rows) if given else nullcontext():
            return self.module(x)


def seeded_module(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The same weights for the same seed, and the generator left as it was. Layer scale is 1: at
    the 1e-5 that models start from, a comparison would not see a branch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] in ("gamma", "layer_scale"):
                nn.init.ones_(parameter)
        return module


def torchvision_model(name: str, **options: Any) -> nn.Module:
    return import_module("torchvision.models").get_model(name, weights=None, **options)
