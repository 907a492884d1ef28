"""Crops of two sizes through one ViT block: ``python -m benchmarks multi-crop``.

Five images, two global and eight local crops of each, drop rate 0.4, forward and backward in
float32. Compared are

- ``masked``: every crop by itself, all of its samples, times a mask: the baseline;
- ``list``: the op with a list, whose branch runs once a crop;
- ``recipe``: DINOv3's block from its description: ``randperm`` and an index for each crop, the kept
  tokens concatenated for the norm, the linear layers and the MLP, attention crop by crop, and
  ``index_add`` with the factor B / k;
- ``packed``: the op with ``packed=True``; ``packed-16`` rounds the tokens up to a multiple of 16;
- ``dense``: the block without stochastic depth on tokens that are packed from its start to its end,
  as many as are kept: the floor.

All of them draw a fixed count, which is the same number of samples for all, in every call. Before
any clock starts, outputs and gradients with the same rows are compared in float64 with masking
(``dense`` where both branches keep the same rows at scale 1). They take turns, one call each;
ratios are medians of ratios within a turn. Calls are counted by what reaches PyTorch's dispatcher
below autograd and computes or moves something: no views, no allocations. The smallest size takes as
long as its calls do: its time is host time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure.ending import out_folder
from benchmarks.measure.environment import environment, environment_line
from benchmarks.measure.memory import keep_freed_memory, saved_activation_bytes
from benchmarks.report.table import markdown, printed, seconds, window
from sdkernels import KeptRows, Packed, fused_stochastic_depth
from sdkernels.measure.comparing import Differs, compare
from sdkernels.measure.turns import quartiles, time_in_turns

DROP = 0.4
GLOBAL, LOCAL = 2, 8  # crops of an image


@dataclass(frozen=True)
class Size:
    """A block and its crops; the tokens include those that stand for no patch."""

    name: str
    width: int
    heads: int
    global_tokens: int
    local_tokens: int
    images: int = 5

    def shapes(self) -> list[tuple[int, int, int]]:
        return [
            (GLOBAL * self.images, self.global_tokens, self.width),
            (LOCAL * self.images, self.local_tokens, self.width),
        ]


SIZES = (
    Size("calls alone", width=8, heads=2, global_tokens=3, local_tokens=2),
    Size("ViT-Ti, 64 and 32 pixels", width=192, heads=3, global_tokens=17, local_tokens=5),
    Size("ViT-S, 224 and 96 pixels", width=384, heads=6, global_tokens=197, local_tokens=37),
    Size("ViT-S, DINOv3's tokens", width=384, heads=6, global_tokens=261, local_tokens=54),
)

Rows = list[list[KeptRows]]  # of both branches, a list each with those of every crop


class Block(nn.Module):
    """A pre-norm block with layer scale, whose linear layers take tokens of any leading shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale1 = nn.Parameter(torch.full((width,), 0.5))
        self.scale2 = nn.Parameter(torch.full((width,), 0.5))

    def attend(self, qkv: Tensor) -> Tensor:
        """[B, N, 3 * width] -> [B, N, width]."""
        split = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(*split.unbind(0)).transpose(1, 2).flatten(2)

    def attention(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self.qkv(x)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))

    def packed_attention(self, packed: Packed) -> Tensor:
        qkv = self.qkv(packed.values).unflatten(-1, (3, self.heads, -1))
        return self.proj(packed.attention(*qkv.unbind(1)).flatten(1))

    def packed_mlp(self, packed: Packed) -> Tensor:
        return self.mlp(packed.values)


def masked(block: Block, xs: list[Tensor], rows: Rows | None) -> list[Tensor]:
    out = []
    for crop, x in enumerate(xs):
        for branch, norm, scale, index in (
            (block.attention, block.norm1, block.scale1, 0),
            (block.mlp, block.norm2, block.scale2, 1),
        ):
            own = rows[index][crop] if rows else KeptRows.sample(len(x), DROP, sampler="fixed")
            mask = ((own.slot >= 0).to(x.dtype) * own.scale).view(-1, 1, 1)
            x = x + branch(norm(x)) * scale * mask
        out.append(x)
    return out


def op_on_list(block: Block, xs: list[Tensor], rows: Rows | None) -> list[Tensor]:
    def each(branch: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        return lambda kept: [branch(x) for x in kept]

    return _op(block, xs, rows, each(block.attention), each(block.mlp))


def op_packed(
    block: Block, xs: list[Tensor], rows: Rows | None, multiple_of: int = 1
) -> list[Tensor]:
    packed = {"packed": True, "multiple_of": multiple_of}
    return _op(block, xs, rows, block.packed_attention, block.packed_mlp, **packed)


def _op(
    block: Block,
    xs: list[Tensor],
    rows: Rows | None,
    attention: Callable[..., Any],
    mlp: Callable[..., Any],
    **options: Any,
) -> list[Tensor]:
    first, second = rows or (None, None)
    common = {"sampler": "fixed", **options}
    norm1, norm2, scale1, scale2 = block.norm1, block.norm2, block.scale1, block.scale2
    xs = fused_stochastic_depth(
        xs, attention, DROP, norm=norm1, layer_scale=scale1, rows=first, **common
    )
    return fused_stochastic_depth(
        xs, mlp, DROP, norm=norm2, layer_scale=scale2, rows=second, **common
    )


def recipe(block: Block, xs: list[Tensor], rows: Rows | None) -> list[Tensor]:
    """As DINOv3 describes its blocks: flat tokens wherever they are treated one by one."""

    def drawn(branch: int) -> tuple[list[Tensor], list[float]]:
        if rows is not None:
            return [r.index for r in rows[branch]], [r.scale for r in rows[branch]]
        counts = [max(int(len(x) * (1 - DROP)), 1) for x in xs]
        index = [torch.randperm(len(x))[:k] for x, k in zip(xs, counts, strict=True)]
        return index, [len(x) / k for x, k in zip(xs, counts, strict=True)]

    def added(outs: list[Tensor], scale: Tensor) -> list[Tensor]:
        return [
            torch.index_add(x, 0, i, out * scale, alpha=alpha)
            for x, i, out, alpha in zip(xs, index, outs, alphas, strict=True)
        ]

    index, alphas = drawn(0)
    flat, shapes = _flat([x[i] for x, i in zip(xs, index, strict=True)])
    # The norm's result goes to the attention as a list, which makes it flat for qkv once more.
    flat, _ = _flat(_unflat(block.norm1(flat), shapes))
    flat, _ = _flat([block.attend(part) for part in _unflat(block.qkv(flat), shapes)])
    xs = added(_unflat(block.proj(flat), shapes), block.scale1)
    index, alphas = drawn(1)
    flat, shapes = _flat([x[i] for x, i in zip(xs, index, strict=True)])
    flat, _ = _flat(_unflat(block.norm2(flat), shapes))
    return added(_unflat(block.mlp(flat), shapes), block.scale2)


def _flat(parts: list[Tensor]) -> tuple[Tensor, list[torch.Size]]:
    return torch.cat([part.flatten(0, 1) for part in parts]), [part.shape[:2] for part in parts]


def _unflat(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def dense(block: Block, tokens: Tensor, kept: list[Tensor]) -> Tensor:
    """`tokens`: those of all of `kept`, flat, and so they stay."""
    packed = Packed(tokens, [tuple(x.shape[:2]) for x in kept])
    tokens = tokens + block.packed_attention(packed.with_values(block.norm1(tokens))) * block.scale1
    return tokens + block.mlp(block.norm2(tokens)) * block.scale2


PROVIDERS: dict[str, Callable[[Block, list[Tensor], Rows | None], list[Tensor]]] = {
    "masked": masked,
    "list": op_on_list,
    "recipe": recipe,
    "packed": op_packed,
    "packed-16": lambda block, xs, rows: op_packed(block, xs, rows, 16),
}


class Subject:
    """A block and crops of one size."""

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.block = Block(size.width, size.heads).to(dtype)
        self.xs = [
            torch.randn(shape, generator=generator).to(dtype).requires_grad_()
            for shape in size.shapes()
        ]
        self.grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in self.xs]
        self.kept = [
            KeptRows.sample(len(x), DROP, sampler="fixed", generator=generator).index
            for x in self.xs
        ]
        picked = [x.detach()[index] for x, index in zip(self.xs, self.kept, strict=True)]
        self.some = [x.requires_grad_() for x in picked]
        self.tokens = _flat(picked)[0].detach().requires_grad_()
        self.token_grads = _flat(
            [grad[index] for grad, index in zip(self.grads, self.kept, strict=True)]
        )[0]

    def forward(self, provider: str, rows: Rows | None = None) -> list[Tensor]:
        if provider == "dense":
            return [dense(self.block, self.tokens, self.some)]
        return PROVIDERS[provider](self.block, self.xs, rows)

    def backward(self, provider: str, ys: list[Tensor]) -> tuple[Tensor, ...]:
        parameters = list(self.block.parameters())
        if provider == "dense":
            return torch.autograd.grad(ys, [self.tokens, *parameters], [self.token_grads])
        return torch.autograd.grad(ys, [*self.xs, *parameters], self.grads)

    def step(self, provider: str) -> Callable[[], object]:
        return lambda: self.backward(provider, self.forward(provider))

    def found(self, provider: str, rows: Rows) -> dict[str, Tensor | None]:
        """Outputs and gradients by name."""
        ys = self.forward(provider, rows)
        gradients = self.backward(provider, ys)
        named: dict[str, Tensor | None] = {f"output {n}": y.detach() for n, y in enumerate(ys)}
        return named | {f"gradient {n}": gradient for n, gradient in enumerate(gradients)}


def check(size: Size) -> None:
    """Ends the program if a provider computes something else than masks of the same rows."""
    subject = Subject(size, torch.float64)
    generator = torch.Generator().manual_seed(1)
    batches = [len(x) for x in subject.xs]
    rows = [
        [KeptRows.sample(b, DROP, sampler="fixed", generator=generator) for b in batches]
        for _ in range(2)
    ]
    same = [KeptRows.from_index(i, b) for i, b in zip(subject.kept, batches, strict=True)]
    expected = subject.found("masked", rows)
    of_kept = subject.found("masked", [same, same])
    # The rows that no branch keeps give no parameter a gradient, so only theirs are left out.
    for key in ("output", "gradient"):
        parts = [of_kept.pop(f"{key} {n}") for n in range(2)]
        picked = [part[i] for part, i in zip(parts, subject.kept, strict=True)]  # type: ignore[index]
        of_kept[f"{key} 0"] = _flat(picked)[0]
    count = len(list(subject.block.parameters()))
    of_kept |= {f"gradient {n + 1}": of_kept.pop(f"gradient {n + 2}") for n in range(count)}
    for provider in (*PROVIDERS, "dense"):
        try:
            if provider == "dense":
                compare(subject.found(provider, rows), of_kept)
            else:
                compare(subject.found(provider, rows), expected)
        except Differs as error:
            sys.exit(f"{size.name}: {provider!r} differs in its {error}")


class Calls(TorchDispatchMode):
    """Counts what computes or moves something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = bool(returns) and all(
            r.alias_info is not None and not r.alias_info.is_write for r in returns
        )
        if not (is_view or "empty" in func.name() or func is torch.ops.aten.detach.default):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def measure(size: Size, turns: int) -> dict[str, Any]:
    """The figures of one size, ready for JSON."""
    check(size)
    subject = Subject(size)
    names = [*PROVIDERS, "dense"]
    parameters = list(subject.block.parameters())
    calls, saved = {}, {}
    for name in names:
        subject.step(name)()  # what is made once is made
        with Calls() as seen:
            subject.step(name)()
        calls[name] = len(seen.names)
        saved[name] = saved_activation_bytes(lambda name=name: subject.forward(name), parameters)  # type: ignore[misc]
    steps = {name: subject.step(name) for name in names}
    timed = time_in_turns(steps, torch.device("cpu"), turns, warm_up=2).seconds
    return {
        **asdict(size),
        "shapes": size.shapes(),
        "kept": [len(index) for index in subject.kept],
        "calls": calls,
        "saved_bytes": saved,
        "seconds": timed,
    }


COLUMNS = (
    "block and crops", "provider", "calls", "step", "quartiles", "/ masked", "/ recipe", "/ dense",
    "saved activations",
)  # fmt: skip


def rows_of(figures: dict[str, Any]) -> list[list[str]]:
    """The table's lines for one size."""
    times, saved = figures["seconds"], figures["saved_bytes"]

    def over(name: str, other: str) -> str:
        pairs = zip(times[name], times[other], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.3f}"

    lines = []
    for name in times:
        low, middle, high = quartiles(times[name])
        lines.append(
            [
                figures["name"],
                name,
                str(figures["calls"][name]),
                seconds(middle),
                f"{seconds(low)} to {seconds(high)}",
                *(over(name, other) for other in ("masked", "recipe", "dense")),
                f"{saved[name] / 2**20:.3g} MiB, {saved[name] / saved['masked']:.0%}",
            ]
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks multi-crop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=15, help="of the largest size (default 15)")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="so many, the small first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default out)")
    options = parser.parse_args(arguments)
    folder = out_folder(options.out)
    torch.set_num_threads(options.threads)
    env = environment(torch.device("cpu")) | {"keeps_memory": keep_freed_memory()}
    lines = []
    for size in SIZES[: options.sizes]:
        # A call of the small ones is soon over.
        turns = options.turns * (1 if size.global_tokens > 100 else 20)
        lines.append(measure(size, turns))
        print(f"{size.name}: measured", flush=True)
    record = {"schema": 1, "drop": DROP, "environment": env, "sizes": lines}
    text = "\n\n".join(
        [
            f"One block, forward and backward, float32, drop rate {DROP}, five images, {GLOBAL} "
            f"global and {LOCAL} local crops of each.",
            environment_line(env),
            markdown(COLUMNS, [row for figures in lines for row in rows_of(figures)]),
        ]
    )
    print(f"\n{printed(text, window())}")
    (folder / "multi-crop.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "multi-crop.md").write_text(text + "\n")
    return 0
