"""The ways of checkpointing activations."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import sdkernels  # noqa: F401, registers the ops

ops = torch.ops.sdkernels
MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
OWN = {ops.compact_rows.default, ops.compact_norm.default, ops.scatter_add_rows.default}


def selective(saved: set[Any]) -> Any:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


VARIANTS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective-matmuls": {"use_reentrant": False, "context_fn": selective(MATMULS)},
    "selective-own": {"use_reentrant": False, "context_fn": selective(OWN)},
    "selective-none": {"use_reentrant": False, "context_fn": selective(set())},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
