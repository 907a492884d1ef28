"""What the package above works with: the differentiable functions, the sampler, the choice.

``_C.pyi`` says what they take. The extension has both; where there is none, ``autograd.py``,
``packed.py`` and ``sampler.py`` stand in. While a graph is being traced, ``compiled.py`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import autograd, compiled, extension, packed, sampler
from .choice import BackendChoice, backend_table

if TYPE_CHECKING:
    from .. import _C as eager
    from .. import _C as host
    from .. import _C as packed_kernels
else:
    eager = extension.module or autograd
    host = extension.module or sampler
    packed_kernels = extension.module or packed

__all__ = [
    "BackendChoice",
    "backend_table",
    "compiled",
    "host",
    "is_compiling",
    "kernels",
    "packed_kernels",
]


def kernels() -> Any:
    """The differentiable functions: the extension's, or those of PyTorch code.

    A graph that is being traced and forward-mode AD, of which C++ has none, get expressions that
    PyTorch fuses and derives by itself.
    """
    return compiled if is_compiling() or forward_ad._current_level >= 0 else eager
