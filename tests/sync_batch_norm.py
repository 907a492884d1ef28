"""SyncBatchNorm on the CPU: PyTorch's exchange between processes, with its CUDA ops written out.

PyTorch refuses the CPU, because these ops exist for GPUs only. What goes over the wire, who takes
part and with how many samples is PyTorch's own code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def _over_samples(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _by_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (x.dim() - 2))


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, _over_samples(x), correction=0)
    return mean, (variance + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    total, share = counts.sum(), (counts / counts.sum())[:, None]
    mean = (share * means).sum(0)
    variance = (share * (invstds**-2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * total / (total - 1), momentum)
    return mean, (variance + eps).rsqrt()


def batch_norm_elemt(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    scale = weight * invstd
    return (x - _by_channel(mean, x)) * _by_channel(scale, x) + _by_channel(bias, x)


def batch_norm_backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    over = _over_samples(x)
    sum_dy, sum_dy_xmu = grad.sum(over), (grad * (x - _by_channel(mean, x))).sum(over)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def batch_norm_backward_elemt(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:
    total = counts.sum()
    centered = x - _by_channel(mean, x)
    inner = grad - _by_channel(sum_dy / total, x)
    inner = inner - centered * _by_channel(invstd**2 * sum_dy_xmu / total, x)
    return inner * _by_channel(invstd * weight, x)


OPS = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    patches = [mock.patch.object(torch, op.__name__, op) for op in OPS]
    patches.append(mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu"))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
