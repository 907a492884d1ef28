"""Every shape that is timed and every provider that is compared.

Three kinds of cases: ``op`` (one building block against its PyTorch equivalent and a plain copy),
``block`` (a ViT block against naive masking, gather + ``index_add`` and the dense floor) and
``host`` (what one call costs on a tensor so small that only the call is left). A new provider is
one more entry in a table below; a new shape one more case in ``presets.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdkernels
from benchmarks.vit import Block, Residual, dense
from sdkernels import KeptRows, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Workload:
    """What is timed for one provider of one case."""

    run: Callable[[], object]
    forward: Callable[[], Tensor] | None = None  # measured for memory where given
    parameters: tuple[Tensor, ...] = ()  # their storages are not activations


@dataclass(frozen=True)
class Comparison:
    """Values and gradients of one provider beside what they have to equal, by name."""

    provider: str
    got: dict[str, Tensor]
    expected: dict[str, Tensor]


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _kept_rows(batch: int, keep: float, device: torch.device, seed: int) -> KeptRows:
    """A fixed count, so that the dense floor has a batch of exactly that size."""
    return KeptRows.sample(batch, 1 - keep, sampler="fixed", generator=_seeded(seed), device=device)


def _gradients(output: Tensor, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(output, list(inputs.values()), grad)
    return {f"gradient of {name}": g for name, g in zip(inputs, grads, strict=True)}


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class OpInputs:
    """Everything an op may take; B rows in ``x``, k in ``out``."""

    x: Tensor  # [B, N, D]
    out: Tensor  # [k, N, D]
    norm: nn.LayerNorm  # of D channels; its parameters serve the RMS norm too
    layer_scale: Tensor  # [D]
    rows: KeptRows

    @property
    def weight(self) -> Tensor:
        return self.norm.weight

    @property
    def bias(self) -> Tensor:
        return self.norm.bias

    @property
    def width(self) -> tuple[int]:
        return (self.x.shape[-1],)


@dataclass(frozen=True)
class Op:
    """One building block: its providers, its differentiable inputs, and the rows it has to move.

    Traffic is (multiples of B, multiples of k), reads and writes together, after the budgets in the
    design; what a provider moves beyond that counts against it.
    """

    providers: dict[str, Callable[[OpInputs], Tensor]]
    inputs: tuple[str, ...]
    traffic: dict[str, tuple[int, int]]


OPS: dict[str, Op] = {
    "compact": Op(
        providers={
            "fused": lambda t: sdkernels.compact_rows(t.x, t.rows),
            "torch": lambda t: t.x.index_select(0, t.rows.index),
        },
        inputs=("x",),
        traffic={"fwd": (0, 2), "bwd": (1, 1)},
    ),
    "compact_layer_norm": Op(
        providers={
            "fused": lambda t: sdkernels.compact_layer_norm(t.x, t.rows, t.width, t.weight, t.bias),
            "torch": lambda t: F.layer_norm(
                t.x.index_select(0, t.rows.index), t.width, t.weight, t.bias
            ),
        },
        inputs=("x", "weight", "bias"),
        traffic={"fwd": (0, 2), "bwd": (1, 2)},
    ),
    "compact_rms_norm": Op(
        providers={
            "fused": lambda t: sdkernels.compact_rms_norm(t.x, t.rows, t.width, t.weight, 1e-6),
            "torch": lambda t: F.rms_norm(
                t.x.index_select(0, t.rows.index), t.width, t.weight, 1e-6
            ),
        },
        inputs=("x", "weight"),
        traffic={"fwd": (0, 2), "bwd": (1, 2)},
    ),
    # The gradient of x is the incoming gradient itself, so the backward moves only the kept rows.
    "scatter_add": Op(
        providers={
            "fused": lambda t: sdkernels.scatter_add_rows(t.x, t.out, t.rows),
            "torch": lambda t: torch.index_add(t.x, 0, t.rows.index, t.out, alpha=t.rows.scale),
        },
        inputs=("x", "out"),
        traffic={"fwd": (2, 1), "bwd": (0, 2)},
    ),
    "scatter_add_layer_scale": Op(
        providers={
            "fused": lambda t: sdkernels.scatter_add_rows(t.x, t.out, t.rows, t.layer_scale),
            "torch": lambda t: torch.index_add(
                t.x, 0, t.rows.index, t.out * t.layer_scale, alpha=t.rows.scale
            ),
        },
        inputs=("x", "out", "layer_scale"),
        traffic={"fwd": (2, 1), "bwd": (0, 3)},
    ),
    # All that stochastic depth puts around a branch, with nothing in between; its backward adds the
    # stream's gradient in the same pass.
    "residual_layer_norm": Op(
        providers={
            "fused": lambda t: sdkernels.fused_stochastic_depth(
                t.x, _identity, 0.5, norm=t.norm, layer_scale=t.layer_scale, rows=t.rows
            ),
            "torch": lambda t: reference.index_add(
                t.x, _identity, norm=t.norm, layer_scale=t.layer_scale, rows=t.rows
            ),
        },
        inputs=("x", "weight", "bias", "layer_scale"),
        traffic={"fwd": (2, 3), "bwd": (2, 5)},
    ),
}


@dataclass(frozen=True)
class OpCase:
    """One op, one direction, one dtype; beside it the plain copy (``clone``) of the same tensor.

    A backward pass is reached through the autograd engine, whose call costs as much as moving a
    megabyte or two. ``empty`` times that call alone (the backward of a view); bandwidths are taken
    net of it.
    """

    op: str
    direction: str  # "fwd" or "bwd"
    dtype: str
    shape: tuple[int, int, int] = (64, 197, 384)
    k: int = 32

    kind: ClassVar[str] = "op"
    baseline: ClassVar[str] = "torch"
    floor: ClassVar[str | None] = None

    @property
    def name(self) -> str:
        shape = "x".join(str(n) for n in self.shape)
        return f"op-{self.op}-{self.direction}-{self.dtype}-{shape}-k{self.k}"

    @property
    def providers(self) -> tuple[str, ...]:
        return (*OPS[self.op].providers, "copy", *(("empty",) if self.direction == "bwd" else ()))

    def describe(self) -> dict[str, Any]:
        """What the report has to know about the case, ready for JSON."""
        itemsize = DTYPES[self.dtype].itemsize
        row = self.shape[1] * self.shape[2] * itemsize
        of_batch, of_kept = OPS[self.op].traffic[self.direction]
        return asdict(self) | {
            "traffic_bytes": (of_batch * self.shape[0] + of_kept * self.k) * row,
            "copy_bytes": 2 * self.shape[0] * row,
        }

    def _inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[OpInputs, Tensor]:
        """Inputs, and a gradient for the output (for B or for k rows, as the op has it).

        In another ``dtype`` than the case's own they are the same numbers.
        """
        generator = _seeded()

        def randn(*size: int) -> Tensor:
            values = torch.randn(size, generator=generator).to(DTYPES[self.dtype])
            return values.to(device, dtype)

        batch, tokens, width = self.shape
        norm = nn.LayerNorm(width, device=device, dtype=dtype)
        with torch.no_grad():
            norm.weight.copy_(randn(width))
            norm.bias.copy_(randn(width))
        inputs = OpInputs(
            x=randn(*self.shape).requires_grad_(),
            out=randn(self.k, tokens, width).requires_grad_(),
            norm=norm,
            layer_scale=randn(width).requires_grad_(),
            rows=_kept_rows(batch, self.k / batch, device, seed=1),
        )
        return inputs, randn(self.k if self.op.startswith("compact") else batch, tokens, width)

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider, on shared inputs."""
        inputs, grad = self._inputs(device, DTYPES[self.dtype])
        wanted = [getattr(inputs, name) for name in OPS[self.op].inputs]

        def forward(function: Callable[[OpInputs], Tensor]) -> Workload:
            return Workload(lambda: function(inputs))

        def backward(function: Callable[[OpInputs], Tensor]) -> Workload:
            output = function(inputs)
            return Workload(lambda: torch.autograd.grad(output, wanted, grad, retain_graph=True))

        build = forward if self.direction == "fwd" else backward
        loads = {name: build(function) for name, function in OPS[self.op].providers.items()}
        loads["copy"] = Workload(lambda: inputs.x.clone())
        if self.direction == "bwd":
            source = inputs.out if grad.shape == inputs.out.shape else inputs.x
            view = source.view_as(source)
            loads["empty"] = Workload(
                lambda: torch.autograd.grad(view, source, grad, retain_graph=True)
            )
        return loads

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against the PyTorch equivalent in float64.

        PyTorch's own bfloat16 is no reference: on CPU, its LayerNorm sums the gradients of weight
        and bias in bfloat16 and misses them by a tenth. It is timed as it is.
        """
        op = OPS[self.op]

        def evaluate(
            function: Callable[[OpInputs], Tensor], dtype: torch.dtype
        ) -> dict[str, Tensor]:
            inputs, grad = self._inputs(device, dtype)
            output = function(inputs)
            wanted = {name: getattr(inputs, name) for name in op.inputs}
            return {"output": output.detach(), **_gradients(output, wanted, grad)}

        own = DTYPES[self.dtype]
        exact = evaluate(op.providers["torch"], torch.float64)
        expected = {name: tensor.to(own) for name, tensor in exact.items()}
        for provider, function in op.providers.items():
            if provider != "torch":
                yield Comparison(provider, evaluate(function, own), expected)


def _index_add(x: Tensor, branch: Callable[..., Tensor], p: float, **options: Any) -> Tensor:
    return reference.index_add(x, branch, **options)  # p is in the rows


BLOCK_PROVIDERS: dict[str, Residual] = {
    "naive": reference.naive_masking,
    "index_add": _index_add,
    "fused": sdkernels.fused_stochastic_depth,
    "dense": dense,
}


@dataclass(frozen=True)
class BlockCase:
    """Forward and backward of a pre-norm ViT block with layer scale.

    The dense floor is the plain block on a batch of only k rows.
    """

    width: int
    tokens: int
    batch: int
    keep: float
    head_width: int = 64
    dtype: str = "fp32"

    kind: ClassVar[str] = "block"
    baseline: ClassVar[str] = "naive"
    floor: ClassVar[str | None] = "dense"

    @property
    def name(self) -> str:
        return (
            f"block-vit-D{self.width}-N{self.tokens}-B{self.batch}-keep{self.keep:g}-{self.dtype}"
        )

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(BLOCK_PROVIDERS)

    def describe(self) -> dict[str, Any]:
        """What the report has to know about the case, ready for JSON."""
        return asdict(self) | {"direction": "fwd+bwd", "k": round(self.batch * self.keep)}

    def _block(self, device: torch.device) -> tuple[Block, Tensor, Tensor]:
        """The block, its input and the gradient of its output.

        Layer scale is 1: at the 1e-5 that models start from, the correctness check would hardly see
        the branch.
        """
        generator = _seeded()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            block = Block(self.width, self.width // self.head_width)
        size = (self.batch, self.tokens, self.width)
        x = torch.randn(size, generator=generator).to(device, DTYPES[self.dtype]).requires_grad_()
        grad = torch.randn(size, generator=generator).to(device, DTYPES[self.dtype])
        return block.to(device, DTYPES[self.dtype]), x, grad

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider: the same block, and the same rows kept by each branch."""
        block, x, grad = self._block(device)
        rows = [_kept_rows(self.batch, self.keep, device, seed) for seed in (1, 2)]
        drop = [1 - self.keep] * 2
        parameters = tuple(block.parameters())

        def workload(residual: Residual, x: Tensor, grad: Tensor) -> Workload:
            def forward() -> Tensor:
                return block(x, residual, drop, rows)

            def run() -> None:
                torch.autograd.grad(forward(), (x, *parameters), grad)

            return Workload(run, forward, parameters)

        k = rows[0].k
        kept_x, kept_grad = x.detach()[:k].clone().requires_grad_(), grad[:k].clone()
        return {
            provider: workload(
                residual, *((kept_x, kept_grad) if provider == "dense" else (x, grad))
            )
            for provider, residual in BLOCK_PROVIDERS.items()
        }

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against naive masking with the same kept rows.

        The dense floor computes something else when the two branches keep different rows. It is
        compared where both keep the same rows at scale 1: there it must equal the kept rows of
        naive masking.
        """
        block, x, grad = self._block(device)
        rows = [_kept_rows(self.batch, self.keep, device, seed) for seed in (1, 2)]
        inputs = {"x": x, **dict(block.named_parameters())}

        def evaluate(
            residual: Residual, rows: list[KeptRows], inputs: dict[str, Tensor], grad: Tensor
        ) -> dict[str, Tensor]:
            output = block(inputs["x"], residual, [1 - self.keep] * 2, rows)
            return {"output": output.detach(), **_gradients(output, inputs, grad)}

        naive = BLOCK_PROVIDERS["naive"]
        expected = evaluate(naive, rows, inputs, grad)
        for provider, residual in BLOCK_PROVIDERS.items():
            if provider not in ("naive", "dense"):
                yield Comparison(provider, evaluate(residual, rows, inputs, grad), expected)

        shared = KeptRows.from_index(rows[0].index, self.batch, scale=1.0)
        # Rows outside are left out of the loss, so that the parameters' gradients come from the
        # kept rows alone.
        kept_grad = torch.zeros_like(grad).index_copy(0, shared.index, grad[shared.index])
        expected = evaluate(naive, [shared, shared], inputs, kept_grad)
        for name in ("output", "gradient of x"):
            expected[name] = expected[name][shared.index]
        inputs = inputs | {"x": x.detach()[shared.index].requires_grad_()}
        yield Comparison(
            "dense",
            evaluate(BLOCK_PROVIDERS["dense"], [shared, shared], inputs, grad[shared.index]),
            expected,
        )


HostFunction = Callable[[Tensor, float, KeptRows], Tensor]

# "-rows" runs on kept rows drawn beforehand; the others draw in every call, as peers' naive masking
# always does.
HOST_PROVIDERS: dict[str, HostFunction] = {
    "plain": lambda x, p, rows: x + _identity(x),
    "naive": lambda x, p, rows: reference.naive_masking(x, _identity, p),
    "index_add-rows": lambda x, p, rows: reference.index_add(x, _identity, rows=rows),
    "fused-rows": lambda x, p, rows: sdkernels.fused_stochastic_depth(x, _identity, p, rows=rows),
    "fused": lambda x, p, rows: sdkernels.fused_stochastic_depth(x, _identity, p),
}


@dataclass(frozen=True)
class HostCase:
    """Forward and backward on a tensor so small that only the cost of the calls is left.

    What counts is the extra over ``plain``, which is ``x + branch(x)`` with the identity for a
    branch.
    """

    shape: tuple[int, ...] = (8, 4, 16)
    keep: float = 0.5

    kind: ClassVar[str] = "host"
    baseline: ClassVar[str] = "naive"
    floor: ClassVar[str | None] = "plain"

    @property
    def name(self) -> str:
        return "host-identity-" + "x".join(str(n) for n in self.shape)

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(HOST_PROVIDERS)

    def describe(self) -> dict[str, Any]:
        """What the report has to know about the case, ready for JSON."""
        return asdict(self) | {"direction": "fwd+bwd", "dtype": "fp32"}

    def _inputs(self, device: torch.device) -> tuple[Tensor, Tensor, KeptRows]:
        generator = _seeded()
        x = torch.randn(self.shape, generator=generator).to(device).requires_grad_()
        grad = torch.randn(self.shape, generator=generator).to(device)
        return x, grad, _kept_rows(self.shape[0], self.keep, device, seed=1)

    def workloads(self, device: torch.device) -> dict[str, Workload]:
        """One workload per provider, on shared inputs."""
        x, grad, rows = self._inputs(device)

        def workload(function: HostFunction) -> Workload:
            return Workload(lambda: torch.autograd.grad(function(x, 1 - self.keep, rows), x, grad))

        return {provider: workload(function) for provider, function in HOST_PROVIDERS.items()}

    def comparisons(self, device: torch.device) -> Iterator[Comparison]:
        """Each provider against naive masking with the same kept rows.

        A provider that draws its own rows shows in its output which ones it kept, and naive masking
        repeats them.
        """
        x, grad, rows = self._inputs(device)

        def evaluate(output: Tensor) -> dict[str, Tensor]:
            return {"output": output.detach(), **_gradients(output, {"x": x}, grad)}

        def naive(rows: KeptRows) -> dict[str, Tensor]:
            return evaluate(reference.naive_masking(x, _identity, 1 - self.keep, rows=rows))

        for provider, function in HOST_PROVIDERS.items():
            if provider == "plain":
                continue
            got = evaluate(function(x, 1 - self.keep, rows))
            if provider.endswith("-rows"):
                yield Comparison(provider, got, naive(rows))
            else:
                mask = (got["output"] != x).flatten(1).any(1)
                yield Comparison(
                    provider, got, naive(KeptRows.from_mask(mask, scale=1 / self.keep))
                )
