"""A training step (forward, loss, backward) of a model of timm or torchvision, as it is and
patched.

Needs both libraries; without them the cases are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import workload
from benchmarks.measure.workload import Case, Comparison, Workload, seeded
from benchmarks.providers.libraries import import_module
from benchmarks.providers.networks import Ruled, seeded_module, torchvision_model
from benchmarks.providers.residuals import Rule, beside, dense, dinov2, fused, naive, skipped
from sdkernels import DepthPlan, KeptRows
from sdkernels.measure.comparing import without_batch_effects
from sdkernels.measure.masking import give_drop_paths

CLASSES = 10

# name: (the rule, whether the rows come from a plan drawn beforehand)
PROVIDERS: dict[str, tuple[Rule | None, bool]] = {
    "naive": (None, False),  # the library's own drop path, unpatched
    "dinov2": (dinov2, False),
    "fused": (fused(sampler="fixed"), False),
    "fused-plan": (fused(), True),
    "fused-bernoulli": (fused(), False),
    "beside": (beside, True),
    "undropped": (dense, False),
    "skeleton": (skipped, False),
}


@dataclass(frozen=True)
class ModelCase(Case):
    """A model with the same drop rate in every branch.

    The floor is ``beside``: the stream of all rows, and every branch for as many rows as it keeps.
    The ideal is computed from ``undropped`` (no drop path) and ``skeleton`` (no branches): what is
    not in a branch is paid for in full, a branch for its kept rows. It takes a branch's time for
    proportional to its rows; the floor does not.

    Args:
        library: timm or torchvision.
        model: its name there.
        label: what people call it.
        depth: blocks, where the model is shortened; only for timm's vision transformers.
    """

    library: str
    model: str
    label: str
    image: int = 224
    batch: int = 20
    drop: float = 0.4
    dtype: str = "fp32"  # or "amp": autocast to bf16
    depth: int | None = None

    kind, baseline, floor = "model", "naive", "beside"

    @property
    def name(self) -> str:
        depth = f"-L{self.depth}" if self.depth else ""
        size = f"-{self.image}px" if self.image != 224 else ""
        return (
            f"model-{self.library}-{self.model}{depth}{size}-B{self.batch}-drop{self.drop:g}"
            f"-{self.dtype}"
        )

    def providers(self, device: torch.device) -> dict[str, str | None]:
        return dict.fromkeys(PROVIDERS)

    def describe(self) -> dict[str, Any]:
        told = asdict(self) | {"model": f"{self.library}-{self.model}"}
        del told["library"]
        k = KeptRows.sample(self.batch, self.drop, sampler="fixed").k  # of every branch
        return told | {"k": k, "direction": "fwd+bwd"}

    def make(self) -> nn.Module:
        """The model as its library makes it, in training, without dropout."""
        options: dict[str, Any] = {}
        if self.library == "timm" and self.model.startswith("vit"):
            options = {"init_values": 1.0, "img_size": self.image}
            options |= {"depth": self.depth} if self.depth else {}
        elif self.library == "timm" and self.model.startswith("convnext"):
            options = {"ls_init_value": 1.0}
        build = import_module("timm").create_model if self.library == "timm" else torchvision_model
        model = seeded_module(partial(build, self.model, num_classes=CLASSES, **options))
        return model.train().to(memory_format=torch.channels_last)

    def _with_drop_path(self, patched: Ruled, device: torch.device) -> nn.Module | None:
        """The library's own model with its drop path at the case's rate; None if it has none, as
        torchvision's ResNet."""
        entries = patched.report.patched
        if any(branch.drop is None for entry in entries for branch in entry.branches):
            return None
        if self.library == "torchvision":
            path = import_module("torchvision.ops").StochasticDepth(self.drop, "row")
        else:
            path = import_module("timm.layers.drop").DropPath(self.drop)
        return give_drop_paths(self.make(), entries, lambda _: copy.deepcopy(path)).to(device)

    def _inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = seeded()
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator)
        labels = torch.randint(CLASSES, (self.batch,), generator=generator)
        return images.to(device, memory_format=torch.channels_last), labels.to(device)

    def _plan(self, branches: int, device: torch.device) -> list[KeptRows]:
        drop, law = [self.drop] * branches, {"sampler": "fixed", "generator": seeded(1)}
        return list(DepthPlan.sample(self.batch, drop, device=device, **law))

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider, on the same weights and images.

        One patched copy serves every provider but the library's own.
        """
        images, labels = self._inputs(device)
        patched = Ruled(self.make(), self.drop).to(device)
        plan = self._plan(patched.branches, device)
        own = self._with_drop_path(patched, device)

        def load(name: str, rule: Rule | None, from_plan: bool) -> Workload:
            model: nn.Module = patched if own is None or rule is not None else own
            parameters = tuple(model.parameters())
            given = (rule or naive, (), plan if from_plan else [None]) if model is patched else ()

            def forward() -> Tensor:
                with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "amp"):
                    return F.cross_entropy(model(images, *given).float(), labels)

            def run() -> None:
                torch.autograd.grad(forward(), parameters, allow_unused=name == "skeleton")

            return Workload(run, forward, parameters)

        return {name: load(name, *how) for name, how in PROVIDERS.items()}

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """The patched model under every rule against naive masking with the same rows, and the
        library's own evaluation.

        In float64 and on a few images: what errors of rounding a net of fifty layers amplifies is
        none of the provider's. Three compute something else. ``undropped`` is compared with naive
        masking where all rows are kept, ``skeleton`` where none is; and so is the output of
        ``beside``, whose branches reach nothing but their own parameters.
        """
        convolutional = self.model.startswith(("convnext", "resnet"))
        image = 64 if convolutional else self.image  # the others are built for one size
        small = replace(self, batch=min(self.batch, 3), image=image)
        images, labels = small._inputs(device)
        images = images.double()
        patched = without_batch_effects(Ruled(self.make(), self.drop).to(device).double())
        plan = small._plan(patched.branches, device)
        inputs = dict(patched.named_parameters())

        def evaluate(rule: Rule, rows: list[Any]) -> dict[str, Tensor]:
            logits = patched(images, rule, rows=rows)
            loss = F.cross_entropy(logits, labels)
            found = workload.values(loss, inputs, torch.ones_like(loss))
            return found | {"output": logits.detach()}

        expected = evaluate(naive, plan)
        yield Comparison("dinov2", evaluate(dinov2, plan), expected)
        yield Comparison("fused", evaluate(fused(), plan), expected)
        kept = workload.everything(small.batch, device)
        expected = evaluate(naive, [kept] * patched.branches)
        yield Comparison("undropped", evaluate(dense, [None]), expected)
        kept = workload.nothing(small.batch, device)
        expected = evaluate(naive, [kept] * patched.branches)
        yield Comparison("skeleton", evaluate(skipped, [None]), expected)
        output = evaluate(beside, plan)["output"]
        yield Comparison("beside", {"output": output}, {"output": expected["output"]})

        own = self.make().to(device).double().eval()
        patched.eval()
        with torch.no_grad():
            yield Comparison("naive", {"output": patched.module(images)}, {"output": own(images)})
