"""The operator namespace, in one place.

A copy of the package that is loaded beside another one needs a namespace of its own: a kernel of
Hugging Face's hub replaces this file.
"""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "sdkernels"

# Every call of one of our ops goes through it: ``ops.compact_rows(x, index)``.
ops: Any = getattr(torch.ops, NAMESPACE)


def qualified(op: str) -> str:
    """The op's name as ``torch.library`` registers it."""
    return f"{NAMESPACE}::{op}"
