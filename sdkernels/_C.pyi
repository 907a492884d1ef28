from collections.abc import Sequence

import torch
from torch import Tensor

def compact(
    x: Tensor, index: Tensor, slot: Tensor, with_stream: bool, inplace: bool, relu: bool
) -> tuple[Tensor, Tensor]: ...
def compact_norm(
    x: Tensor,
    index: Tensor,
    slot: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    with_stream: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]: ...
def scatter_add(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    inplace: bool,
    relu: bool,
) -> Tensor: ...
def open_rows(
    x: Tensor, index: Tensor, slot: Tensor, inplace: bool
) -> tuple[Tensor, Tensor, bool]: ...
def scatter(
    residual: Tensor, out: Tensor, index: Tensor, slot: Tensor, opened: bool, inplace: bool
) -> Tensor: ...
def open_packed(
    xs: Sequence[Tensor],
    index: Sequence[Tensor],
    slot: Sequence[Tensor],
    normalizes: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    padding: int,
    with_stream: Sequence[bool],
    inplace: bool,
) -> tuple[Tensor, list[Tensor]]: ...
def close_packed(
    streams: Sequence[Tensor],
    out: Tensor,
    index: Sequence[Tensor],
    slot: Sequence[Tensor],
    scales: Sequence[float],
    layer_scale: Tensor | None,
    weights: Sequence[Tensor | None],
    inplace: bool,
) -> list[Tensor]: ...
def check_inplace(x: Tensor) -> None: ...
def check_scatter_add(
    residual: Tensor,
    out: Tensor,
    index: Tensor,
    slot: Tensor,
    layer_scale: Tensor | None,
    row_weight: Tensor | None,
) -> None: ...

class Draw:
    def __init__(self, keep: float, count: int, whole_batch: bool) -> None: ...

class StepKey:
    def __init__(self, seed: int, step: int, rank: int) -> None: ...

def sample_rows(
    batch: int, draw: Draw, generator: torch.Generator | None, device: torch.device | None
) -> tuple[Tensor, Tensor]: ...
def sample_plan(
    batches: Sequence[int],
    draws: Sequence[Draw],
    generator: torch.Generator | None,
    step: StepKey | None,
    pin_memory: bool,
) -> tuple[Tensor, list[int]]: ...
def build_config() -> dict[str, str]: ...
