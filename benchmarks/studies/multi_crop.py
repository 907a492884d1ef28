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

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import command
from benchmarks.measure.memory import keep_freed_memory, saved_activation_bytes
from benchmarks.providers.networks import seeded_module
from benchmarks.providers.residuals import naive
from benchmarks.providers.vit import Attention, Block
from benchmarks.report.table import by_column, seconds
from benchmarks.studies.study import Study
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


def draw(batch: int, generator: torch.Generator | None = None) -> KeptRows:
    return KeptRows.sample(batch, DROP, sampler="fixed", generator=generator)


def masked(block: Block, xs: list[Tensor], rows: Rows | None) -> list[Tensor]:
    ys = []
    for crop, x in enumerate(xs):
        own = [draw(len(x)) if rows is None else rows[branch][crop] for branch in range(2)]
        ys.append(block(x, naive, (DROP, DROP), own))
    return ys


def op(block: Block, xs: list[Tensor], rows: Rows | None, **packing: Any) -> list[Tensor]:
    """With a list; ``packing`` are the options that make one tensor of it."""

    def rule(xs: Any, branch: Callable[[Tensor], Tensor], p: float, **given: Any) -> Any:
        def each(kept: list[Tensor]) -> list[Tensor]:
            return [branch(x) for x in kept]

        call: Any = partial(on_tokens, branch) if packing else each
        return fused_stochastic_depth(xs, call, p, sampler="fixed", **packing, **given)

    return block(xs, rule, (DROP, DROP), rows or (None, None))  # type: ignore[no-any-return]


def on_tokens(branch: Any, packed: Packed) -> Tensor:
    """Attention or MLP of the tokens of all crops."""
    if not isinstance(branch, Attention):
        return branch(packed.values)  # type: ignore[no-any-return]
    qkv = branch.qkv(packed.values).unflatten(-1, (3, branch.heads, -1))
    return branch.proj(packed.attention(*qkv.unbind(1)).flatten(1))


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

    def attend(qkv: Tensor) -> Tensor:
        split = qkv.unflatten(-1, (3, block.attention.heads, -1)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(*split.unbind(0)).transpose(1, 2).flatten(2)

    index, alphas = drawn(0)
    flat, shapes = _flat([x[i] for x, i in zip(xs, index, strict=True)])
    # The norm's result goes to the attention as a list, which makes it flat for qkv once more.
    flat, _ = _flat(_unflat(block.norm1(flat), shapes))
    flat, _ = _flat([attend(part) for part in _unflat(block.attention.qkv(flat), shapes)])
    xs = added(_unflat(block.attention.proj(flat), shapes), block.scale1)
    index, alphas = drawn(1)
    flat, shapes = _flat([x[i] for x, i in zip(xs, index, strict=True)])
    flat, _ = _flat(_unflat(block.norm2(flat), shapes))
    return added(_unflat(block.mlp(flat), shapes), block.scale2)


def _flat(parts: list[Tensor]) -> tuple[Tensor, list[torch.Size]]:
    return torch.cat([part.flatten(0, 1) for part in parts]), [part.shape[:2] for part in parts]


def _unflat(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def dense(block: Block, tokens: Tensor, shapes: list[torch.Size]) -> Tensor:
    """`tokens`: of kept samples of these shapes, flat, and so they stay."""
    packed = Packed(tokens, shapes)
    out = on_tokens(block.attention, packed.with_values(block.norm1(tokens)))
    tokens = tokens + out * block.scale1
    return tokens + block.mlp(block.norm2(tokens)) * block.scale2


PROVIDERS: dict[str, Callable[[Block, list[Tensor], Rows | None], list[Tensor]]] = {
    "masked": masked,
    "list": op,
    "recipe": recipe,
    "packed": partial(op, packed=True),
    "packed-16": partial(op, packed=True, multiple_of=16),
}


class Subject:
    """A block and crops of one size."""

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        block = seeded_module(lambda: Block(size.width, size.heads, layer_scale=0.5)).to(dtype)
        self.block, self.parameters = block, dict(block.named_parameters())
        self.xs, self.grads = (
            [torch.randn(shape, generator=generator).to(dtype) for shape in size.shapes()]
            for _ in range(2)
        )
        self.kept = [draw(len(x), generator).index for x in self.xs]
        # What `dense` is given: the tokens of the kept samples.
        self.tokens, self.shapes = _flat(self.pick(self.xs))
        self.token_grads, _ = _flat(self.pick(self.grads))
        for x in (self.tokens, *self.xs):
            x.requires_grad_()

    def pick(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Of the kept samples."""
        return [part[index] for part, index in zip(parts, self.kept, strict=True)]

    def forward(self, provider: str, rows: Rows | None = None) -> list[Tensor]:
        if provider == "dense":
            return [dense(self.block, self.tokens, self.shapes)]
        return PROVIDERS[provider](self.block, self.xs, rows)

    def backward(self, provider: str, ys: list[Tensor]) -> tuple[Tensor, ...]:
        xs, grads = self.xs, self.grads
        if provider == "dense":
            xs, grads = [self.tokens], [self.token_grads]
        return torch.autograd.grad(ys, [*xs, *self.parameters.values()], grads)

    def step(self, provider: str) -> Callable[[], object]:
        return lambda: self.backward(provider, self.forward(provider))

    def found(self, provider: str, rows: Rows) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        ys = self.forward(provider, rows)
        names = [f"gradient of input {n}" for n in range(len(ys))]
        names += [f"gradient of {name}" for name in self.parameters]
        gradients = dict(zip(names, self.backward(provider, ys), strict=True))
        return {f"output {n}": y.detach() for n, y in enumerate(ys)} | gradients


def check(size: Size) -> None:
    """Ends the program if a provider computes something else than masks of the same rows."""
    subject = Subject(size, torch.float64)
    generator = torch.Generator().manual_seed(1)
    batches = [len(x) for x in subject.xs]
    rows = [[draw(batch, generator) for batch in batches] for _ in range(2)]
    same = [KeptRows.from_index(i, b) for i, b in zip(subject.kept, batches, strict=True)]
    of_all = subject.found("masked", [same, same])
    # The rows that no branch keeps give no parameter a gradient, so only theirs are left out.
    for key in ("output", "gradient of input"):
        of_all[f"{key} 0"] = _flat(subject.pick([of_all[f"{key} 0"], of_all.pop(f"{key} 1")]))[0]
    expected = dict.fromkeys(PROVIDERS, subject.found("masked", rows)) | {"dense": of_all}
    for provider, wanted in expected.items():
        try:
            compare(subject.found(provider, rows), wanted)
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
    steps = {name: subject.step(name) for name in (*PROVIDERS, "dense")}
    calls, saved = {}, {}
    for name, step in steps.items():
        step()  # what is made once is made
        with Calls() as seen:
            step()
        calls[name] = len(seen.names)
        forward = partial(subject.forward, name)
        saved[name] = saved_activation_bytes(forward, subject.parameters.values())
    print(f"{size.name}: checked", flush=True)
    return {
        **asdict(size),
        "shapes": size.shapes(),
        "kept": [len(index) for index in subject.kept],
        "calls": calls,
        "saved_bytes": saved,
        "seconds": time_in_turns(steps, torch.device("cpu"), turns, warm_up=2).seconds,
    }


Line = tuple[dict[str, Any], str]  # a size's figures, and a provider


def _over(other: str, line: Line) -> str:
    times, provider = line[0]["seconds"], line[1]
    return f"{median(a / b for a, b in zip(times[provider], times[other], strict=True)):.3f}"


def _quartiles(line: Line) -> str:
    low, _, high = quartiles(line[0]["seconds"][line[1]])
    return f"{seconds(low)} to {seconds(high)}"


def _saved(line: Line) -> str:
    saved = line[0]["saved_bytes"]
    return f"{saved[line[1]] / 2**20:.3g} MiB, {saved[line[1]] / saved['masked']:.0%}"


COLUMNS: dict[str, Callable[[Line], object]] = {
    "block and crops": lambda line: line[0]["name"],
    "provider": lambda line: line[1],
    "calls": lambda line: line[0]["calls"][line[1]],
    "step": lambda line: seconds(median(line[0]["seconds"][line[1]])),
    "quartiles": _quartiles,
    **{f"/ {other}": partial(_over, other) for other in ("masked", "recipe", "dense")},
    "saved activations": _saved,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table; returns the exit code."""
    parser = command.parser("multi-crop", __doc__, out=Path("out"))
    parser.add_argument("--turns", type=int, default=15, help="of the largest size (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    study = Study("multi-crop", arguments, options.out)
    study.record["environment"]["keeps_memory"] = keep_freed_memory()
    # A call of the small ones is soon over.
    sizes = [measure(s, options.turns * (1 if s.global_tokens > 100 else 20)) for s in SIZES]
    text = (
        f"One block, forward and backward, float32, drop rate {DROP}, five images, {GLOBAL} global "
        f"and {LOCAL} local crops of each."
    )
    table = by_column([(figures, name) for figures in sizes for name in figures["calls"]], COLUMNS)
    study.publish("Crops in one tensor", [text, table], schema=1, drop=DROP, sizes=sizes)
    return 0
