"""A training step of timm's vision transformer, as it is and patched.

Needs timm; without it the cases are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdkernels
from benchmarks.compiled import CompileCase
from benchmarks.libraries import import_module
from benchmarks.providers import BlockCase, Comparison, HostCase, OpCase, Workload
from sdkernels import DepthPlan, KeptRows, reference
from sdkernels.models import blocks


class Masked(nn.Module):
    """In the place of timm's DropPath: the same, with given rows."""

    def __init__(self, rows: KeptRows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return reference.naive_masking(torch.zeros_like(x), lambda _: x, 0.0, rows=self.rows)


def _index_add(
    x: Tensor, branch: Callable[..., Tensor], p: float, mode: str, training: bool, **options: Any
) -> Tensor:
    used = {name: options[name] for name in ("norm", "layer_scale", "residual", "rows")}
    shared = [arg.value for arg in options["args"]]  # attention's mask, which is None
    return reference.index_add(x, lambda kept: branch(kept, *shared), **used)


@contextmanager
def _with_index_add() -> Iterator[None]:
    """Patched blocks use gather + ``index_add`` in PyTorch in the place of the op."""
    op = blocks.fused_stochastic_depth
    blocks.fused_stochastic_depth = _index_add
    try:
        yield
    finally:
        blocks.fused_stochastic_depth = op


@dataclass(frozen=True)
class ModelCase:
    """Forward, loss and backward of a ViT of timm with layer scale, drop rate `drop` everywhere.

    ``naive`` is the model as timm makes it, ``fused`` the patched one, each drawing its own rows;
    ``index_add`` is patched with PyTorch's ops instead, and gets its rows from a plan. ``dense`` is
    the model without drop path on a batch of only the kept rows.
    """

    width: int = 384
    depth: int = 3
    heads: int = 6
    image: int = 224
    patch: int = 16
    batch: int = 32
    drop: float = 0.4

    kind: ClassVar[str] = "model"
    baseline: ClassVar[str] = "naive"
    floor: ClassVar[str | None] = "dense"
    providers: ClassVar[tuple[str, ...]] = ("naive", "index_add", "fused", "dense")

    @property
    def name(self) -> str:
        return f"model-timm-vit-D{self.width}-L{self.depth}-B{self.batch}-drop{self.drop:g}-fp32"

    @property
    def kept(self) -> int:
        """Rows that every branch keeps with the fixed count."""
        return KeptRows.sample(self.batch, self.drop, sampler="fixed").k

    def describe(self) -> dict[str, Any]:
        """What the report has to know about the case, ready for JSON."""
        return asdict(self) | {"direction": "fwd+bwd", "dtype": "fp32", "k": self.kept}

    def _model(self, device: torch.device) -> nn.Module:
        timm = import_module("timm.models.vision_transformer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = timm.VisionTransformer(
                img_size=self.image,
                patch_size=self.patch,
                embed_dim=self.width,
                depth=self.depth,
                num_heads=self.heads,
                num_classes=10,
                init_values=1.0,  # at 1e-5 the correctness check would hardly see a branch
            )
        drop_path = import_module("timm.layers.drop").DropPath
        self._give_drop_paths(model, lambda: drop_path(self.drop))
        return model.to(device).train()

    def _give_drop_paths(self, model: nn.Module, make: Callable[[], nn.Module]) -> None:
        """To both branches of every block."""
        for block in model.blocks:  # type: ignore[union-attr]
            block.drop_path1, block.drop_path2 = make(), make()

    def _inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator)
        labels = torch.randint(10, (self.batch,), generator=generator)
        return images.to(device), labels.to(device)

    def _plan(self, device: torch.device) -> DepthPlan:
        generator = torch.Generator().manual_seed(1)
        drop = [self.drop] * (2 * self.depth)
        return DepthPlan.sample(
            self.batch, drop, sampler="fixed", generator=generator, device=device
        )

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider, on the same weights and images."""
        images, labels = self._inputs(device)
        plan = self._plan(device)

        def workload(model: nn.Module, forward: Callable[[], Tensor]) -> Workload:
            parameters = tuple(model.parameters())
            return Workload(lambda: torch.autograd.grad(forward(), parameters), forward, parameters)

        naive = self._model(device)
        fused = self._model(device)
        sdkernels.patch(fused, sampler="fixed")
        gathered = self._model(device)
        report = sdkernels.patch(gathered)
        dense = self._model(device)
        self._give_drop_paths(dense, nn.Identity)
        kept = slice(0, self.kept)

        def gathered_loss() -> Tensor:
            with _with_index_add(), report.use(plan):
                return F.cross_entropy(gathered(images), labels)

        return {
            "naive": workload(naive, lambda: F.cross_entropy(naive(images), labels)),
            "index_add": workload(gathered, gathered_loss),
            "fused": workload(fused, lambda: F.cross_entropy(fused(images), labels)),
            "dense": workload(dense, lambda: F.cross_entropy(dense(images[kept]), labels[kept])),
        }

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """The patched models against timm's own with masks of the same rows.

        ``dense`` computes something else: the patched model with all rows kept is compared instead.
        """
        images, labels = self._inputs(device)
        plan = self._plan(device)

        def evaluate(model: nn.Module, batch: slice = slice(None)) -> dict[str, Tensor]:
            logits = model(images[batch])
            names, parameters = zip(*model.named_parameters(), strict=True)
            gradients = torch.autograd.grad(F.cross_entropy(logits, labels[batch]), parameters)
            return {"output": logits.detach(), **dict(zip(names, gradients, strict=True))}

        masked = self._model(device)
        rows = iter(plan)
        self._give_drop_paths(masked, lambda: Masked(next(rows)))
        expected = evaluate(masked)
        patched = self._model(device)
        report = sdkernels.patch(patched)
        with report.use(plan):
            yield Comparison("fused", evaluate(patched), expected)
            with _with_index_add():
                yield Comparison("index_add", evaluate(patched), expected)
        dense = copy.deepcopy(masked)
        self._give_drop_paths(dense, nn.Identity)
        all_rows = KeptRows.from_mask(torch.ones(self.batch, dtype=torch.bool)).to(device)
        with report.use([all_rows] * (2 * self.depth)):
            yield Comparison("dense", evaluate(dense), evaluate(patched))


Case = OpCase | BlockCase | HostCase | ModelCase | CompileCase
