"""One residual block, forward and backward: of a vision transformer, ConvNeXt, Swin or ResNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import workload
from benchmarks.measure.workload import DTYPES, Case, Comparison, Context, Workload, first_rows
from benchmarks.providers import residuals
from benchmarks.providers.libraries import import_module
from benchmarks.providers.networks import Ruled, seeded_module
from benchmarks.providers.residuals import RULES, Rows, Rule, fused, other_backends, why_missing
from benchmarks.providers.vit import Block
from sdkernels import KeptRows
from sdkernels.measure.comparing import without_batch_effects

# Of a provider: its rule, whether it is timed without rows, where it runs, why it cannot.
Rules = dict[str, tuple[Rule, bool, Context, str | None]]


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
    def branches(self) -> int:
        return 2 if self.family in ("vit", "swin") else 1

    def module(self, drop: float) -> nn.Module:
        """In training, with the interface of ``vit.Block``: ``(x, rule, p, rows) -> y``."""
        if self.family == "vit":
            head = 128 if self.width >= 2048 else min(64, self.width // 2)
            return seeded_module(lambda: Block(self.width, self.width // head))
        module = seeded_module(self._of_library).train()
        return Ruled(module.to(memory_format=torch.channels_last), drop)

    def _of_library(self) -> nn.Module:
        if self.family == "convnext":
            return import_module("timm.models.convnext").ConvNeXtBlock(
                self.width, ls_init_value=1.0
            )
        if self.family == "swin":
            timm = import_module("timm.models.swin_transformer")
            heads, shift = max(self.width // 32, 1), 3 if self.size > 7 else 0
            return timm.SwinTransformerBlock(
                self.width, (self.size, self.size), heads, window_size=7, shift_size=shift
            )
        # A quarter of the channels inside.
        return import_module("torchvision.models.resnet").Bottleneck(self.width, self.width // 4)

    def randn(self, batch: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(batch, *self.row, generator=generator)
        is_image = self.family in ("convnext", "resnet")
        return x.to(memory_format=torch.channels_last) if is_image else x


VIT_TI, VIT_7B = Net("vit", 192, 197, "ViT-Ti"), Net("vit", 4096, 197, "ViT-7B")
VIT_S, VIT_B = Net("vit", 384, 197, "ViT-S"), Net("vit", 768, 197, "ViT-B")
VIT_L = Net("vit", 1024, 197, "ViT-L")
VIT_TINY_ROWS = Net("vit", 192, 50, "ViT-Ti/32")
CONVNEXT = Net("convnext", 96, 56, "ConvNeXt-T, stage 1")
CONVNEXT_LATE = Net("convnext", 384, 14, "ConvNeXt-T, stage 3")
SWIN = Net("swin", 96, 56, "Swin-T, stage 1")
SWIN_LATE = Net("swin", 384, 14, "Swin-T, stage 3")
RESNET = Net("resnet", 256, 56, "ResNet-50, stage 1")
RESNET_LATE = Net("resnet", 1024, 14, "ResNet-50, stage 3")


@dataclass(frozen=True)
class BlockCase(Case):
    """Forward and backward of one block; the dense floor is the block on a batch of only k rows."""

    net: Net
    batch: int
    keep: float
    dtype: str = "fp32"  # "mixed": weights and stream in fp32, branches in bf16 under autocast

    kind, baseline, floor = "block", "naive", "dense"

    @property
    def name(self) -> str:
        return f"block-{self.net.name}-B{self.batch}-keep{self.keep:g}-{self.dtype}"

    @property
    def kept(self) -> int:
        """Rows that every branch keeps with the fixed count."""
        return KeptRows.sample(self.batch, 1 - self.keep, sampler="fixed").k

    def describe(self) -> dict[str, Any]:
        told = {"block": self.net.name, "batch": self.batch, "keep": self.keep, "dtype": self.dtype}
        told |= {"label": self.net.label, "row_elements": math.prod(self.net.row)}
        return told | {"direction": "fwd+bwd", "k": self.kept}

    def rules(self, device: torch.device) -> Rules:
        reasons: dict[str, str | None] = {"xformers": why_missing("xformers", device)}
        if reasons["xformers"] is None and self.net.family != "vit":
            reasons["xformers"] = "takes rows of two dimensions only"
        if self.dtype == "mixed":
            reasons["dinov3"] = "index_add refuses a stream and a branch of two dtypes"
        rules: Rules = {name: (*how, nullcontext, reasons.get(name)) for name, how in RULES.items()}
        if self.net.family != "vit":
            del rules["fused-inplace"]  # patched blocks decide for themselves
        for name, missing in other_backends(device).items():
            context = partial(residuals.backend, name, device)
            rules[f"fused-{name}"] = (fused(), False, context, missing)
        return rules

    def providers(self, device: torch.device) -> dict[str, str | None]:
        return {name: missing for name, (*_, missing) in self.rules(device).items()}

    def setting(self, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        """The block, its input and the gradient of its output."""
        generator = workload.seeded()
        block = self.net.module(1 - self.keep).to(device)
        dtype = DTYPES["fp32" if self.dtype == "mixed" else self.dtype]
        x = self.net.randn(self.batch, generator).to(device, dtype).requires_grad_()
        grad = self.net.randn(self.batch, generator).to(device, dtype)
        return block.to(dtype), x, grad

    def rows(self, device: torch.device) -> list[KeptRows]:
        """Another subset for every branch."""
        seeds = range(1, self.net.branches + 1)
        return [workload.kept_rows(self.batch, self.keep, device, seed) for seed in seeds]

    def output(self, block: nn.Module, x: Tensor, rule: Rule, rows: Rows) -> Tensor:
        """One forward pass; branches without rows draw theirs."""
        mixed = self.dtype == "mixed"
        with torch.autocast(x.device.type, dtype=torch.bfloat16) if mixed else nullcontext():
            return block(x, rule, [1 - self.keep] * self.net.branches, rows)

    def given(self, device: torch.device) -> Callable[[], Rows]:
        """What a provider that is given its rows gets in a step."""
        rows = self.rows(device)
        return lambda: rows

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        block, x, grad = self.setting(device)
        few = first_rows(self.kept, x, grad)
        given, none = self.given(device), [None] * self.net.branches
        parameters = tuple(block.parameters())

        def load(name: str, rule: Rule, draws: bool, context: Context, _: None) -> Workload:
            leaf, d_y = few if name == "dense" else (x, grad)
            rows: Callable[[], Rows] = (lambda: none) if draws else given
            wanted = (leaf, *parameters)
            return workload.step(
                lambda: self.output(block, leaf, rule, rows()), wanted, d_y, parameters, context
            )

        rules = self.rules(device)
        return {name: load(name, *rules[name]) for name in self.usable(device)}

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against naive masking with the same kept rows; the floors, which compute
        something else, where they are the same."""
        block, x, grad = self.setting(device)
        without_batch_effects(block)
        rows, count = self.rows(device), self.net.branches
        arithmetic = torch.bfloat16 if self.dtype == "mixed" else None

        def evaluate(
            rule: Rule, rows: Rows, x: Tensor = x, grad: Tensor = grad
        ) -> dict[str, Tensor]:
            inputs = {"x": x, **dict(block.named_parameters())}
            return workload.values(self.output(block, x, rule, rows), inputs, grad)

        naive, rules = residuals.naive, self.rules(device)
        expected = evaluate(naive, rows)
        for name in self.usable(device):
            rule, _, context, _ = rules[name]
            if name not in ("naive", "dense", "beside"):
                with context():
                    yield Comparison(name, evaluate(rule, rows), expected, arithmetic)

        if "beside" in rules:
            # Its branches reach nothing but their own parameters: it passes the stream.
            got = {"output": evaluate(residuals.beside, rows)["output"]}
            stream = evaluate(naive, [workload.nothing(self.batch, device)] * count)["output"]
            yield Comparison("beside", got, {"output": stream}, arithmetic)

        # All branches keep the same rows, at scale 1. Those outside are left out of the loss, so
        # that the parameters' gradients come from the kept rows alone.
        shared = KeptRows.from_index(rows[0].index, self.batch, scale=1.0)
        kept_grad = torch.zeros_like(grad).index_copy(0, shared.index, grad[shared.index])
        expected = evaluate(naive, [shared] * count, grad=kept_grad)
        for tensor in ("output", "gradient of x"):
            expected[tensor] = expected[tensor][shared.index]
        kept_x = x.detach()[shared.index].requires_grad_()
        got = evaluate(residuals.dense, [None] * count, kept_x, grad[shared.index])
        yield Comparison("dense", got, expected, arithmetic)


@dataclass(frozen=True)
class BreakEvenCase(BlockCase):
    """A block of which few rows are dropped, all of them given."""

    kind, floor = "break_even", None

    @property
    def name(self) -> str:
        return f"break_even-{self.net.name}-B{self.batch}-dropped{self.batch - self.kept}"

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"dropped": (self.batch - self.kept) / self.batch}

    def rules(self, device: torch.device) -> Rules:
        """With compaction, with the branch on every row, and naive masking."""
        rules = {"naive": residuals.naive}
        rules |= {"whole": fused(min_saving=1.0), "compact": fused(min_saving=0.0)}
        return {name: (rule, False, nullcontext, None) for name, rule in rules.items()}
