"""The models of ``patched_classes.py``: which blocks drop, and by what.

Drop path of the library, or masks of given rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import sdkernels
from benchmarks.providers.libraries import import_module, is_installed
from benchmarks.providers.zoo import Net
from sdkernels import KeptRows
from sdkernels.measure import masking
from sdkernels.models import PatchedEntry, PatchReport
from sdkernels.models.parts import looks_like_drop_path
from sdkernels.models.registry import original_class

DROP = 0.4


@dataclass(frozen=True)
class Subject:
    """A model of the zoo, and the classes of its blocks that drop."""

    name: str
    net: Net
    classes: frozenset[type[nn.Module]]
    whole: bool  # all of them

    @property
    def label(self) -> str:
        return ", ".join(sorted(kind.__name__ for kind in self.classes))

    def drops(self, entry: PatchedEntry) -> bool:
        return original_class(entry.block) in self.classes

    def drop_probs(self, report: PatchReport) -> list[float]:
        return [DROP * self.drops(entry) for entry in report.patched for _ in entry.branches]


def subjects(zoo: dict[str, Net]) -> Iterator[Subject]:
    """The models that together have every class, and the classes of those that have several."""
    seen: set[type[nn.Module]] = set()
    alone: set[type[nn.Module]] = set()
    for name, net in zoo.items():
        if not is_installed(name.partition("-")[0]):
            continue
        report = sdkernels.patch(net.model(torch.float32), drop_probs=DROP)
        classes = frozenset(original_class(entry.block) for entry in report.patched)
        if classes <= seen:
            continue
        yield Subject(name, net, classes, True)
        seen |= classes
        if len(classes) == 1:
            alone |= classes
            continue
        for kind in sorted(classes - alone, key=lambda kind: kind.__name__):
            yield Subject(name, net, frozenset((kind,)), False)
        alone |= classes


def drop_path_of(model: nn.Module) -> nn.Module:
    """A drop path module of the model's library, with a drop probability of DROP."""
    own = next((m for m in model.modules() if looks_like_drop_path(m)), None)
    if own is None:  # torchvision's ResNet
        made: nn.Module = import_module("torchvision.ops").StochasticDepth(DROP, "row")
        return made
    drop = copy.deepcopy(own)
    setattr(drop, "p" if hasattr(drop, "p") else "drop_prob", DROP)
    return drop


def give_drop_paths(
    model: nn.Module, subject: Subject, make: Callable[[int], nn.Module | None]
) -> nn.Module:
    """`make(i)` for branch i of the classes that drop, nothing for the others and where it is
    None."""
    entries = sdkernels.patch(copy.deepcopy(model), drop_probs=DROP).patched
    drops = [subject.drops(entry) for entry in entries for _ in entry.branches]
    return masking.give_drop_paths(
        model, entries, lambda number: make(number) if drops[number] else None
    )


def masked(model: nn.Module, subject: Subject, plan: Sequence[KeptRows]) -> nn.Module:
    """The model with masks of these rows."""
    entries = sdkernels.patch(copy.deepcopy(model), drop_probs=DROP).patched
    of_branch = masking.together(entries, plan)
    return give_drop_paths(model, subject, lambda number: masking.Masked(of_branch[number]))
