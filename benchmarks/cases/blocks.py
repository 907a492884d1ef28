"""One residual block, forward and backward: of a vision transformer, ConvNeXt, Swin or ResNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.measure.workload import DTYPES, Comparison, Workload, gradients, kept_rows, seeded
from benchmarks.providers.networks import (
    Ruled,
    convnext_block,
    frozen_statistics,
    resnet_block,
    seeded_module,
    swin_block,
)
from benchmarks.providers.residuals import (
    RULES,
    Rule,
    backend,
    fused,
    other_backends,
    why_missing,
)
from benchmarks.providers.vit import Block
from sdkernels import KeptRows

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Net:
    """A block, its row, and how many branches it has.

    Args:
        family: vit, convnext, swin or resnet.
        width: channels of the stream.
        size: tokens of a transformer, else the height and the width of the image.
        label: the model that has such a block.
    """

    family: str
    width: int
    size: int
    label: str

    @property
    def name(self) -> str:
        side = f"N{self.size}" if self.family == "vit" else f"{self.size}x{self.size}"
        return f"{self.family}-D{self.width}-{side}"

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of one sample."""
        if self.family == "vit":
            return (self.size, self.width)
        if self.family == "swin":
            return (self.size, self.size, self.width)
        return (self.width, self.size, self.size)

    @property
    def channels_last(self) -> bool:
        return self.family in ("convnext", "resnet")

    @property
    def branches(self) -> int:
        return 2 if self.family in ("vit", "swin") else 1

    def module(self, drop: float) -> nn.Module:
        """In training, with the interface of ``vit.Block``: ``(x, rule, p, rows) -> y``."""
        if self.family == "vit":
            head = 128 if self.width >= 2048 else min(64, self.width // 2)
            return seeded_module(lambda: Block(self.width, self.width // head))
        make = {
            "convnext": partial(convnext_block, self.width),
            "swin": partial(swin_block, self.width, max(self.width // 32, 1), self.size),
            "resnet": partial(resnet_block, self.width),
        }[self.family]
        module = seeded_module(make).train()
        return Ruled(module.to(memory_format=torch.channels_last), drop)

    def randn(self, batch: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(batch, *self.row, generator=generator)
        return x.to(memory_format=torch.channels_last) if self.channels_last else x


VIT_S, VIT_B, VIT_L = (
    Net("vit", 384, 197, "ViT-S"),
    Net("vit", 768, 197, "ViT-B"),
    Net("vit", 1024, 197, "ViT-L"),
)
VIT_TI, VIT_7B = Net("vit", 192, 197, "ViT-Ti"), Net("vit", 4096, 197, "ViT-7B")
VIT_TINY_ROWS = Net("vit", 192, 50, "ViT-Ti/32")
CONVNEXT = Net("convnext", 96, 56, "ConvNeXt-T, stage 1")
CONVNEXT_LATE = Net("convnext", 384, 14, "ConvNeXt-T, stage 3")
SWIN = Net("swin", 96, 56, "Swin-T, stage 1")
SWIN_LATE = Net("swin", 384, 14, "Swin-T, stage 3")
RESNET = Net("resnet", 256, 56, "ResNet-50, stage 1")
RESNET_LATE = Net("resnet", 1024, 14, "ResNet-50, stage 3")


@dataclass(frozen=True)
class BlockCase:
    """Forward and backward of one block; the dense floor is the block on a batch of only k rows."""

    net: Net
    batch: int
    keep: float
    dtype: str = "fp32"

    kind: ClassVar[str] = "block"
    baseline: ClassVar[str] = "naive"
    floor: ClassVar[str | None] = "dense"

    @property
    def name(self) -> str:
        return f"block-{self.net.name}-B{self.batch}-keep{self.keep:g}-{self.dtype}"

    def describe(self) -> dict[str, Any]:
        """What the report has to know about the case, ready for JSON."""
        return {
            "block": self.net.name,
            "batch": self.batch,
            "keep": self.keep,
            "dtype": self.dtype,
            "label": self.net.label,
            "row_elements": math.prod(self.net.row),
            "direction": "fwd+bwd",
            "k": self.kept,
        }

    @property
    def kept(self) -> int:
        """Rows that every branch keeps with the fixed count."""
        return KeptRows.sample(self.batch, 1 - self.keep, sampler="fixed").k

    def rules(self, device: torch.device) -> dict[str, tuple[Rule, bool, Context]]:
        """Of every provider that may run: its rule, whether it draws, and where it runs."""
        rules: dict[str, tuple[Rule, bool, Context]] = {
            name: (rule, draws, nullcontext) for name, (rule, draws) in RULES.items()
        }
        if self.net.family != "vit":
            del rules["fused-inplace"]  # patched blocks decide for themselves
        for name in other_backends(device):
            rules[f"fused-{name}"] = (fused(), False, partial(backend, name, device))
        return rules

    def providers(self, device: torch.device) -> dict[str, str | None]:
        """Every provider, with the reason why it cannot run here; None where it can."""
        reasons: dict[str, str | None] = dict.fromkeys(self.rules(device))
        reasons["xformers"] = why_missing("xformers", device)
        if reasons["xformers"] is None and self.net.family != "vit":
            reasons["xformers"] = "takes rows of two dimensions only"
        if self.dtype == "mixed":
            reasons["dinov3"] = "index_add refuses a stream and a branch of two dtypes"
        for name, missing in other_backends(device).items():
            reasons[f"fused-{name}"] = missing
        return reasons

    def _usable(self, device: torch.device) -> dict[str, tuple[Rule, bool, Context]]:
        reasons = self.providers(device)
        return {n: rule for n, rule in self.rules(device).items() if reasons[n] is None}

    def setting(self, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        """The block, its input and the gradient of its output."""
        generator = seeded()
        block = self.net.module(1 - self.keep).to(device)
        # mixed: weights and branches in bf16 under autocast, the stream in fp32
        dtype = DTYPES["fp32" if self.dtype == "mixed" else self.dtype]
        x = self.net.randn(self.batch, generator).to(device, dtype).requires_grad_()
        grad = self.net.randn(self.batch, generator).to(device, dtype)
        return block.to(dtype), x, grad

    @property
    def _arithmetic(self) -> torch.dtype | None:
        return torch.bfloat16 if self.dtype == "mixed" else None

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.dtype != "mixed":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def rows(self, device: torch.device) -> list[KeptRows]:
        """Another subset for every branch."""
        return [
            kept_rows(self.batch, self.keep, device, seed)
            for seed in range(1, self.net.branches + 1)
        ]

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider, on the same block and input."""
        block, x, grad = self.setting(device)
        rows = self.rows(device)
        drop = [1 - self.keep] * self.net.branches
        parameters = tuple(block.parameters())

        def workload(
            rule: Rule, draws: bool, context: Context, x: Tensor, grad: Tensor
        ) -> Workload:
            given = [None] * len(rows) if draws else rows

            def forward() -> Tensor:
                with self.autocast(device):
                    y: Tensor = block(x, rule, drop, given)
                return y

            def run() -> None:
                torch.autograd.grad(forward(), (x, *parameters), grad)

            return Workload(run, forward, parameters, context)

        k = rows[0].k
        kept_x, kept_grad = x.detach()[:k].clone().requires_grad_(), grad[:k].clone()
        loads = {}
        for name, (rule, draws, context) in self._usable(device).items():
            if name == "dense":
                # All of its k rows; rows of the batch would be refused.
                loads[name] = workload(rule, True, context, kept_x, kept_grad)
            else:
                loads[name] = workload(rule, draws, context, x, grad)
        return loads

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against naive masking with the same kept rows.

        The floors compute something else. ``dense`` is compared where all branches keep the same
        rows at scale 1: there it must equal the kept rows of naive masking. The output of
        ``beside`` must be the stream.
        """
        usable = self._usable(device)
        block, x, grad = self.setting(device)
        rows = self.rows(device)
        drop = [1 - self.keep] * self.net.branches
        inputs = {"x": x, **dict(block.named_parameters())}

        def evaluate(
            rule: Rule,
            rows: list[KeptRows] | list[None],
            inputs: dict[str, Tensor] = inputs,
            grad: Tensor = grad,
        ) -> dict[str, Tensor]:
            with frozen_statistics(block), self.autocast(device):
                y = block(inputs["x"], rule, drop, rows)
            return {"output": y.detach(), **gradients(y, inputs, grad)}

        naive = RULES["naive"][0]
        expected = evaluate(naive, rows)
        for provider, (rule, _, context) in usable.items():
            if provider not in ("naive", "dense", "beside"):
                with context():
                    yield Comparison(provider, evaluate(rule, rows), expected, self._arithmetic)

        # The branches of this floor reach nothing but their own parameters.
        nothing = KeptRows.from_mask(torch.zeros(self.batch, dtype=torch.bool)).to(device)
        output = evaluate(RULES["beside"][0], rows)["output"]
        stream = evaluate(naive, [nothing] * len(rows))["output"]
        yield Comparison("beside", {"output": output}, {"output": stream}, self._arithmetic)
        shared = KeptRows.from_index(rows[0].index, self.batch, scale=1.0)
        # Rows outside are left out of the loss, so that the parameters' gradients come from the
        # kept rows alone.
        kept_grad = torch.zeros_like(grad).index_copy(0, shared.index, grad[shared.index])
        expected = evaluate(naive, [shared] * len(rows), grad=kept_grad)
        for name in ("output", "gradient of x"):
            expected[name] = expected[name][shared.index]
        inputs = inputs | {"x": x.detach()[shared.index].requires_grad_()}
        got = evaluate(RULES["dense"][0], [None] * len(rows), inputs, grad[shared.index])
        yield Comparison("dense", got, expected, self._arithmetic)
