"""A training step of every class that patch() knows: ``python -m benchmarks patched-classes``.

Models of timm, torchvision and transformers (``providers/zoo``) with a drop rate of 0.4 in every
block: forward, loss and backward of the model as it is (``naive``: the library's own drop path),
patched (``fused``, fixed count), patched with gather and ``index_add`` of PyTorch in the place of
the op (``index_add``), and without drop path on a batch of only the kept rows (``dense``: as if
stem and head were dropped too). A model with blocks of several classes has one more line for each
class that no line has had for itself: only blocks of that class drop there.

Before any clock starts, outputs and all gradients of ``fused`` and ``index_add`` are compared with
masks of the same rows. All providers take turns, one call each.
"""

from __future__ import annotations

import copy
import fnmatch
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import sdkernels
from benchmarks.measure import command
from benchmarks.measure.workload import Workload
from benchmarks.providers.libraries import LIBRARIES, import_module, is_installed
from benchmarks.providers.networks import in_place_of_the_op
from benchmarks.providers.residuals import dinov3
from benchmarks.providers.zoo import TINY, WIDE, Net, nets, output_of
from benchmarks.report.figures import quartile_spread
from benchmarks.report.table import by_column
from benchmarks.studies.study import Study
from sdkernels import KeptRows
from sdkernels.measure import masking
from sdkernels.measure.comparing import Differs, compare, without_batch_effects
from sdkernels.measure.memory import saved_activation_bytes
from sdkernels.measure.turns import quartiles, time_in_turns
from sdkernels.models import PatchReport
from sdkernels.models.parts import looks_like_drop_path
from sdkernels.models.registry import original_class

BATCH = 20
DROP = 0.4


@dataclass(frozen=True)
class Subject:
    """A model of the zoo, and the classes of its blocks that drop."""

    name: str
    net: Net
    classes: frozenset[type[nn.Module]]
    whole: bool  # all of them

    def drop_probs(self, report: PatchReport) -> list[float]:
        """Of all branches."""
        return [
            DROP * (original_class(entry.block) in self.classes)
            for entry in report.patched
            for _ in entry.branches
        ]

    def model(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return self.net.model(dtype).to(device).train()

    def patched(self, model: nn.Module) -> PatchReport:
        """With a fixed count."""
        probs = self.drop_probs(sdkernels.patch(model, drop_probs=DROP))
        return sdkernels.patch(model, drop_probs=probs, sampler="fixed")

    def dropping_by(self, model: nn.Module, drop: nn.Module | None) -> nn.Module:
        """The model with copies of ``drop`` (None: nothing) where branches drop."""
        report = sdkernels.patch(copy.deepcopy(model), drop_probs=DROP)
        drops = self.drop_probs(report)
        return masking.give_drop_paths(
            model, report.patched, lambda branch: copy.deepcopy(drop) if drops[branch] else None
        )


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
        if len(classes) > 1:
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


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Output and gradients of a step."""
    torch.manual_seed(0)  # DINOv3's shifts its positions by chance
    y = output_of(model(x))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)
    named = {f"gradient of parameter {number}": grad for number, grad in enumerate(found)}
    return {"output": y.detach(), **named}


def check(subject: Subject, x: Tensor) -> None:
    """Ends the program if a provider computes something else than masks of the same rows."""
    # In float64: in float32 a sum that is near 0 may pass a ReLU in one and not in the other.
    # Batch statistics are of the kept rows, by design.
    x = x.double()
    plain = without_batch_effects(subject.model(torch.float64, x.device))
    patched = copy.deepcopy(plain)
    report = subject.patched(patched)
    plan = report.plan(len(x), generator=torch.Generator().manual_seed(1))
    by_masks = masking.masked(plain, report.patched, list(plan), masking.Masked)
    expected = gradients(by_masks, x)
    with report.use(plan):
        found = {"fused": gradients(patched, x)}
        with in_place_of_the_op(dinov3):
            found["index_add"] = gradients(patched, x)
    for provider, tensors in found.items():
        try:
            compare(tensors, expected)
        except Differs as error:
            classes = ", ".join(sorted(kind.__name__ for kind in subject.classes))
            sys.exit(f"{subject.name} ({classes}): {provider!r} differs in its {error}")


def step(
    model: nn.Module, x: Tensor, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Workload:
    """Forward, within a context, loss and backward."""
    parameters = tuple(p for p in model.parameters() if p.requires_grad)

    def forward() -> Tensor:
        with context():
            return output_of(model(x)).square().mean()

    def run() -> object:
        return torch.autograd.grad(forward(), parameters, allow_unused=True)

    return Workload(run, forward, parameters)


def providers(subject: Subject, x: Tensor) -> tuple[dict[str, Workload], PatchReport]:
    naive, fused, gathered, kept = (subject.model(torch.float32, x.device) for _ in range(4))
    subject.dropping_by(naive, drop_path_of(naive))
    report, other = subject.patched(fused), subject.patched(gathered)
    for each in (report, other):
        each.check(x)  # before gather and index_add stand in for the op
    plan = other.plan(len(x))

    @contextmanager
    def by_index_add() -> Iterator[None]:
        with in_place_of_the_op(dinov3), other.use(plan):
            yield

    steps = {
        "naive": step(naive, x),
        "index_add": step(gathered, x, by_index_add),
        "fused": step(fused, x),
    }
    if subject.whole:
        k = KeptRows.sample(len(x), DROP, sampler="fixed").k
        steps["dense"] = step(subject.dropping_by(kept, None), x[:k].clone())
    return steps, report


def measure(subject: Subject, turns: int, device: torch.device) -> dict[str, Any]:
    """A line of the table, ready for JSON."""
    torch.manual_seed(0)
    x = subject.net.inputs(BATCH, torch.float32).to(device)
    check(subject, x)
    steps, report = providers(subject, x)
    saved = {
        name: saved_activation_bytes(steps[name].forward, steps[name].parameters)
        for name in ("naive", "fused")
    }
    calls = {name: each.run for name, each in steps.items()}
    seconds = time_in_turns(calls, device, turns).seconds
    pairs = zip(seconds["naive"], seconds["fused"], strict=True)
    low, speedup, high = quartiles([naive / fused for naive, fused in pairs])
    saving = report.expected_saving(x[:1])
    return {
        "name": subject.name,
        "classes": sorted(f"{kind.__module__}.{kind.__name__}" for kind in subject.classes),
        "whole": subject.whole,
        "batch_norm": subject.net.batch_norm,
        "seconds": seconds,
        "median": {name: median(each) for name, each in seconds.items()},
        "spread": {name: quartile_spread(each) for name, each in seconds.items()},
        "speedup": speedup,  # medians and quartiles of naive / fused, turn by turn
        "speedup_low": low,
        "speedup_high": high,
        "ideal_speedup": 1 / (1 - saving),
        "share_of_branches": saving / DROP,
        "saved_activations": saved,
        "memory": saved["fused"] / saved["naive"],
        "faster": low > 1.0,
    }


Line = dict[str, Any]


def _classes(line: Line) -> str:
    return ", ".join(kind.rpartition(".")[2] for kind in line["classes"])


def _time(name: str, line: Line) -> str:
    if name not in line["median"]:
        return "-"
    return f"{line['median'][name] * 1e3:.0f} ms ± {line['spread'][name]:.0%}"


COLUMNS: dict[str, Callable[[Line], str]] = {
    "model": lambda line: line["name"],
    "classes that drop": _classes,
    **{name: partial(_time, name) for name in ("naive", "index_add", "fused")},
    "dense on k": partial(_time, "dense"),
    "naive / fused": lambda line: f"{line['speedup']:.2f}",
    "quartiles": lambda line: f"{line['speedup_low']:.2f} to {line['speedup_high']:.2f}",
    "ideal by operations": lambda line: f"{line['ideal_speedup']:.2f}",
    "saved activations": lambda line: f"{line['memory']:.0%}",
}


def verdict(lines: Sequence[Line]) -> str:
    """Which classes are not faster, and how much of a step their branches are."""
    slow = [line for line in lines if not line["faster"]]
    if not slow:
        return f"All {len(lines)} lines are faster patched (lower quartile above 1)."
    text = [f"Not faster (lower quartile at most 1), {len(slow)} of {len(lines)} lines:"]
    for line in slow:
        text.append(
            f"- {line['name']}, {_classes(line)}: {line['speedup']:.2f}; its branches are "
            f"{line['share_of_branches']:.0%} of the step's operations, so that "
            f"{line['ideal_speedup']:.2f} is the most there is to gain"
        )
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table; returns the exit code."""
    parser = command.parser("patched-classes", __doc__, out=Path("out"))
    parser.add_argument("--filter", default="*", help="shell pattern of the models' names")
    parser.add_argument("--turns", type=int, default=5, help="calls of each provider (default 5)")
    parser.add_argument("--sizes", choices=("wide", "tiny"), default="wide")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    missing = [library for library in LIBRARIES if not is_installed(library)]
    zoo = nets(WIDE if options.sizes == "wide" else TINY)
    study = Study("patched-classes", arguments, options.out, device)
    lines = []
    for subject in subjects({n: zoo[n] for n in fnmatch.filter(zoo, options.filter)}):
        lines.append(measure(subject, options.turns, device))
        print("  ".join(cell(lines[-1]) for cell in COLUMNS.values()), flush=True)
    if not lines:
        parser.error(f"--filter: no model matches {options.filter!r}, there are {', '.join(zoo)}")
    sections = [
        f"Training step, float32, batch {BATCH}, drop rate {DROP} in every block.",
        *([f"Not installed: {', '.join(missing)}."] if missing else []),
        by_column(lines, COLUMNS),
        verdict(lines),
    ]
    study.publish("Every class that patch() knows", sections, schema=1, drop=DROP, lines=lines)
    return 0
