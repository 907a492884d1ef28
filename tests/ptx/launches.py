"""Counts what a branch starts and allocates on a GPU, from the CUDA ops run on the CPU.

    python -m tests.ptx.launches [FILE]

writes the table. Our kernels are counted by the stand-in for the CUDA runtime, what PyTorch does
beside them by its profiler.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import build

F32, BF16 = torch.float32, torch.bfloat16
NAMES = {F32: "f32", BF16: "bf16"}
BATCH, TOKENS, WIDTH, P = 8, 64, 64, 0.5


@dataclass
class Count:
    """One branch, forward and backward, without what is the branch's own."""

    rule: str
    dtype: str
    layer_scale: bool
    launches: int
    allocations: int
    copies: int  # from the host

    @property
    def line(self) -> str:
        scale = "yes" if self.layer_scale else "no"
        numbers = self.launches, self.allocations, self.copies
        return f"| {' | '.join(map(str, (self.rule, self.dtype, scale, *numbers)))} |"


def starts_something(name: str) -> bool:
    """Whether an op of ATen's runs a kernel: not those that make tensors, or views of some."""
    if not name.startswith("aten::") or name.startswith(("aten::empty", "aten::resize")):
        return False
    # These return what they are given, or call what does the work.
    if name in ("aten::to", "aten::contiguous", "aten::result_type"):
        return False
    schemas = torch._C._jit_get_schemas_for_operator(name)
    aliases = [r.alias_info for schema in schemas for r in schema.returns]
    return not any(alias is not None and not alias.is_write for alias in aliases)


def profiled(run: Callable[[], object]) -> tuple[int, int]:
    """PyTorch's ops that start a kernel, counted where they call no other such op; allocations."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        run()

    def starters(events: Iterable[Any]) -> int:
        inside = ((event, starters(event.cpu_children)) for event in events)
        return sum(count or starts_something(event.name) for event, count in inside)

    events = profiler.events() or []
    assert profiler.profiler is not None
    raw = profiler.profiler.kineto_results.events()
    # Numbers are tensors of their own on a CPU only.
    allocations = sum(event.name() == "[memory]" and event.nbytes() > 8 for event in raw)
    return starters(event for event in events if event.cpu_parent is None), allocations


def copies(draw: Callable[[], object]) -> int:
    """From the host to a device, which has no memory here, while rows are drawn for it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        draw()
    return sum(event.name == "aten::_to_copy" for event in profiler.events() or [])


def counted(machine: ctypes.CDLL, dtypes: Iterable[torch.dtype]) -> list[Count]:
    import sdkernels
    from benchmarks.providers import residuals
    from sdkernels import DepthPlan, KeptRows

    plan = DepthPlan.sample(BATCH, [P], sampler="fixed")
    fused = partial(sdkernels.fused_stochastic_depth, sampler="fixed")
    rules: dict[str, tuple[Callable[..., Tensor], int]] = {
        "`x + f(norm(x))`": (residuals.dense, 0),
        "naive masking": (residuals.naive, 0),
        "DINOv2's": (residuals.dinov2, 0),
        "DINOv3's": (residuals.dinov3, 0),
        "fused, rows drawn in the call": (
            fused,
            copies(lambda: KeptRows.sample(BATCH, P, sampler="fixed", device="meta")),
        ),
        "fused, rows of a plan": (partial(fused, rows=plan[0]), 0),
    }
    found = []
    for dtype in dtypes:
        for has_layer_scale in (False, True):
            for name, (rule, from_host) in rules.items():
                torch.manual_seed(0)
                x = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
                norm = nn.LayerNorm(WIDTH, dtype=dtype)
                gamma = nn.Parameter(torch.ones(WIDTH, dtype=dtype)) if has_layer_scale else None
                grad = torch.randn_like(x)

                def step(
                    rule: Callable[..., Tensor] = rule,
                    x: Tensor = x,
                    norm: nn.Module = norm,
                    gamma: Tensor | None = gamma,
                    grad: Tensor = grad,
                ) -> None:
                    rule(x, lambda rows: rows, P, norm=norm, layer_scale=gamma).backward(grad)

                before = machine.ptx_launches()
                launches, allocations = profiled(step)
                launches += machine.ptx_launches() - before
                found.append(
                    Count(name, NAMES[dtype], has_layer_scale, launches, allocations, from_host)
                )
    return found


HEAD = """# Launches and allocations of a branch

What `x + layer_scale * f(norm(x))` starts on a GPU in one forward and backward, without what is
`f`'s own: LayerNorm with weight and bias, half of the rows dropped, everything of one dtype.
Counted by `python -m tests.ptx.launches` without a GPU: the CUDA ops run on CPU tensors, their
kernels from the PTX that nvcc makes, and each launch is seen. A call of PyTorch's own counts as
one launch, though some start several (`randperm`, the backward of indexing, that of LayerNorm): of
the other rules the numbers are lower bounds. Copies are those from the host; a plan makes one for
all branches of a step.

| | dtype | layer scale | launches | allocations | copies |
| --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    if sys.argv[1:2] == ["--json"]:
        few = sys.argv[2] == "few"
        library, ptx = build.cuda_ops(few)
        import sdkernels  # noqa: F401  # defines the ops

        torch.ops.load_library(str(library))
        build.load(library, build.Kernels(ptx))
        dtypes = [F32] if few else [F32, BF16]
        print(json.dumps([asdict(c) for c in counted(build.load_machine(), dtypes)]))
        return
    command = [sys.executable, "-m", "tests.ptx.launches", "--json", "all"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=build.ROOT)
    lines = [Count(**c).line for c in json.loads(result.stdout)]
    target = Path(sys.argv[1] if sys.argv[1:] else build.ROOT / "docs/gpu-launches.md")
    target.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
