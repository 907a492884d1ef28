"""Keeps Dynamo out of functions that stand in for the extension's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_eval_frame = torch._C._dynamo.eval_frame
_skip = _eval_frame._FrameAction.SKIP
_SKIP_ALL = _eval_frame._FrameExecStrategy(_skip, _skip)


def untraced(function: Function) -> Function:
    """Have Dynamo pass over the function, and over all that it calls, where it is called.

    Where a graph breaks, Dynamo looks at every Python frame until the next graph, and would compile
    these one by one. This costs nothing in a call, and does not load the compiler as
    ``torch.compiler.disable`` does.
    """
    _eval_frame.set_code_exec_strategy(function.__code__, _SKIP_ALL)
    return function
