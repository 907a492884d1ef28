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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import sdkernels
from benchmarks.measure import command
from benchmarks.measure.ending import out_folder
from benchmarks.measure.environment import environment
from benchmarks.measure.store import write_json
from benchmarks.providers.libraries import LIBRARIES, is_installed
from benchmarks.providers.networks import in_place_of_the_op
from benchmarks.providers.residuals import dinov3
from benchmarks.providers.zoo import TINY, WIDE, Net, nets, output_of
from benchmarks.report.figures import quartile_spread
from benchmarks.report.table import by_column, document, printed, window
from benchmarks.studies.patched_subjects import (
    DROP,
    Subject,
    drop_path_of,
    give_drop_paths,
    masked,
    subjects,
)
from sdkernels import KeptRows
from sdkernels.measure.comparing import Differs, compare
from sdkernels.measure.memory import saved_activation_bytes
from sdkernels.measure.turns import quartiles, time_in_turns
from sdkernels.models import PatchReport

BATCH = 20


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Output and gradients of a step."""
    torch.manual_seed(5)  # relative position MLPs have dropout
    y = output_of(model(x))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)
    named = {f"gradient of parameter {number}": grad for number, grad in enumerate(found)}
    return {"output": y.detach(), **named}


def patch(model: nn.Module, subject: Subject) -> PatchReport:
    """Of the classes that drop, with a fixed count."""
    probs = subject.drop_probs(sdkernels.patch(model, drop_probs=DROP))
    return sdkernels.patch(model, drop_probs=probs, sampler="fixed")


def check(subject: Subject, x: Tensor) -> None:
    """Ends the program if a provider computes something else than masks of the same rows."""

    def model() -> nn.Module:
        # In float64: in float32 a sum that is near 0 may pass a ReLU in one and not in the other.
        made = subject.net.model(torch.float64).to(x.device).train()
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # batch statistics are of the kept rows, by design
        return made

    x = x.double()
    patched = model()
    report = patch(patched, subject)
    plan = report.plan(len(x), generator=torch.Generator().manual_seed(1))
    expected = gradients(masked(model(), subject, list(plan)), x)
    with report.use(plan):
        found = {"fused": gradients(patched, x)}
        with in_place_of_the_op(dinov3):
            found["index_add"] = gradients(patched, x)
    for provider, tensors in found.items():
        try:
            compare(tensors, expected)
        except Differs as error:
            sys.exit(f"{subject.name} ({subject.label}): {provider!r} differs in its {error}")


@dataclass(frozen=True)
class Step:
    """Forward, loss and backward of a model.

    Args:
        context: entered around the forward pass.
    """

    model: nn.Module
    x: Tensor
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def forward(self) -> Tensor:
        with self.context():
            return output_of(self.model(self.x)).square().mean()

    def parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self) -> None:
        torch.autograd.grad(self.forward(), self.parameters(), allow_unused=True)


def providers(subject: Subject, x: Tensor) -> tuple[dict[str, Step], PatchReport]:
    def model() -> nn.Module:
        return subject.net.model(torch.float32).to(x.device).train()

    naive, fused, gathered = model(), model(), model()
    drop = drop_path_of(naive)
    give_drop_paths(naive, subject, lambda _: copy.deepcopy(drop))
    report, other = patch(fused, subject), patch(gathered, subject)
    for each in (report, other):
        each.check(x)  # before gather and index_add stand in for the op
    plan = other.plan(len(x))

    @contextmanager
    def by_index_add() -> Iterator[None]:
        with in_place_of_the_op(dinov3), other.use(plan):
            yield

    steps = {
        "naive": Step(naive, x),
        "index_add": Step(gathered, x, by_index_add),
        "fused": Step(fused, x),
    }
    if subject.whole:
        k = KeptRows.sample(len(x), DROP, sampler="fixed").k
        steps["dense"] = Step(give_drop_paths(model(), subject, lambda _: None), x[:k].clone())
    return steps, report


def measure(subject: Subject, batch: int, turns: int, device: torch.device) -> dict[str, Any]:
    """A line of the table, ready for JSON."""
    torch.manual_seed(0)
    x = subject.net.inputs(batch, torch.float32).to(device)
    check(subject, x)
    steps, report = providers(subject, x)
    saved = {
        name: saved_activation_bytes(steps[name].forward, steps[name].parameters())
        for name in ("naive", "fused")
    }
    seconds = time_in_turns(steps, device, turns).seconds
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


def _time(name: str) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        if name not in line["median"]:
            return "-"
        return f"{line['median'][name] * 1e3:.0f} ms ± {line['spread'][name]:.0%}"

    return cell


COLUMNS: dict[str, Callable[[Line], str]] = {
    "model": lambda line: line["name"],
    "classes that drop": _classes,
    "naive": _time("naive"),
    "index_add": _time("index_add"),
    "fused": _time("fused"),
    "dense on k": _time("dense"),
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


def run(
    zoo: dict[str, Net], pattern: str, batch: int, turns: int, device: torch.device
) -> list[Line]:
    """Measures every subject whose name matches, and prints its line."""
    chosen = {name: net for name, net in zoo.items() if fnmatch.fnmatch(name, pattern)}
    lines = []
    for subject in subjects(chosen):
        lines.append(measure(subject, batch, turns, device))
        print("  ".join(cell(lines[-1]) for cell in COLUMNS.values()), flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table; returns the exit code."""
    parser = command.parser("patched-classes", __doc__, out=Path("out"))
    parser.add_argument("--filter", default="*", help="shell pattern of the models' names")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"samples (default {BATCH})")
    parser.add_argument("--turns", type=int, default=5, help="calls of each provider (default 5)")
    parser.add_argument("--sizes", choices=("wide", "tiny"), default="wide")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args(arguments)
    called = command.command_line("patched-classes", arguments)
    device = torch.device(options.device)
    env, start = environment(device), time.perf_counter()
    missing = [library for library in LIBRARIES if not is_installed(library)]
    zoo = nets(WIDE if options.sizes == "wide" else TINY)
    out_folder(options.out)
    lines = run(zoo, options.filter, options.batch, options.turns, device)
    if not lines:
        parser.error(f"--filter: no model matches {options.filter!r}, there are {', '.join(zoo)}")
    data = {
        "schema": 1,
        "drop": DROP,
        "command": called,
        "seconds": time.perf_counter() - start,
        "environment": env,
        "lines": lines,
    }
    sections = [
        f"Training step, float32, batch {options.batch}, drop rate {DROP} in every block.",
        *([f"Not installed: {', '.join(missing)}."] if missing else []),
        by_column(lines, COLUMNS),
        verdict(lines),
    ]
    text = document("Every class that patch() knows", data, sections)
    print(f"\n{printed(text, window())}")
    write_json(options.out / "patched-classes.json", data)
    (options.out / "patched-classes.md").write_text(text)
    return 0
