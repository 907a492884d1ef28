"""StochasticDepth: fused_stochastic_depth as a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .building_blocks import Activation, check_tensor
from .empty import Empty
from .functional import X, check_branch, check_norm, fused_stochastic_depth
from .options import checked_options
from .rows import KeptRows
from .sampling import Mode, Rescale, Sampler
from .tracing import refuse_script

__all__ = ["StochasticDepth"]


class StochasticDepth(nn.Module):
    """A residual branch with stochastic depth: ``x + drop_path(layer_scale * branch(norm(x)))``.

    In training the branch runs on the kept rows only; in evaluation the plain expression is
    computed.

    Args:
        branch: maps [k, ...] to [k, ...], row by row.
        p: drop probability; may be changed between calls (``module.p = 0.2``).
        mode: "row" or "batch".
        norm: nn.LayerNorm or nn.RMSNorm on the branch's input, fused with the compaction.
        layer_scale: factor on the branch's output; an nn.Parameter is trained, a tensor becomes a
            buffer.
        sampler, rescale, empty, inplace, min_saving, activation, packed, multiple_of: as in
            :func:`sdkernels.fused_stochastic_depth`.

    Raises:
        TypeError, ValueError: as :func:`sdkernels.fused_stochastic_depth`.

    Example:
        >>> block = StochasticDepth(nn.Linear(4, 4), p=0.5, norm=nn.LayerNorm(4))
        >>> block(torch.zeros(8, 4)).shape
        torch.Size([8, 4])
        >>> block.extra_repr()
        "p=0.5, mode='row', sampler='bernoulli', rescale='train', empty='run', inplace=False"
    """

    layer_scale: Tensor | None

    def __init__(
        self,
        branch: nn.Module | Callable[..., Any],
        p: float,
        mode: Mode = "row",
        *,
        norm: nn.LayerNorm | nn.RMSNorm | None = None,
        layer_scale: Tensor | None = None,
        sampler: Sampler = "bernoulli",
        rescale: Rescale = "train",
        empty: Empty = "run",
        inplace: bool = False,
        min_saving: float | Literal["auto"] = 0.0,
        activation: Activation | None = None,
        packed: bool = False,
        multiple_of: int = 1,
    ) -> None:
        super().__init__()
        check_branch(branch)
        check_norm(norm)
        law, sums = (p, mode, True, sampler, rescale), (inplace, min_saving, activation)
        options = checked_options(*law, empty, *sums, packed, multiple_of)
        self.norm = norm
        self.branch = branch
        if layer_scale is not None:
            check_tensor(layer_scale, "layer_scale")
        if isinstance(layer_scale, nn.Parameter) or layer_scale is None:
            self.register_parameter("layer_scale", layer_scale)
        else:
            self.register_buffer("layer_scale", layer_scale)
        self.p = options.p
        self.mode = mode
        self.sampler = sampler
        self.rescale = rescale
        self.empty = empty
        self.inplace = inplace
        self.min_saving = options.min_saving
        self.activation = activation
        self.packed = packed
        self.multiple_of = multiple_of

    def forward(
        self,
        x: X,
        *args: Any,
        residual: X | None = None,
        rows: KeptRows | Sequence[KeptRows] | None = None,
        generator: torch.Generator | None = None,
    ) -> X:
        """Args as in :func:`sdkernels.fused_stochastic_depth`; `args` go on to the branch."""
        return fused_stochastic_depth(
            x,
            self.branch,
            self.p,
            self.mode,
            self.training,
            args=args,
            norm=self.norm,
            layer_scale=self.layer_scale,
            residual=residual,
            rows=rows,
            sampler=self.sampler,
            rescale=self.rescale,
            generator=generator,
            empty=self.empty,
            inplace=self.inplace,
            min_saving=self.min_saving,
            activation=self.activation,
            packed=self.packed,
            multiple_of=self.multiple_of,
        )

    if TYPE_CHECKING:  # what nn.Module says of it is Any

        def __call__(
            self,
            x: X,
            *args: Any,
            residual: X | None = None,
            rows: KeptRows | Sequence[KeptRows] | None = None,
            generator: torch.Generator | None = None,
        ) -> X: ...

    def __prepare_scriptable__(self) -> Any:
        refuse_script("StochasticDepth", "script the branch")

    def extra_repr(self) -> str:
        text = (
            f"p={self.p}, mode={self.mode!r}, sampler={self.sampler!r}, rescale={self.rescale!r}, "
            f"empty={self.empty!r}, inplace={self.inplace}"
        )
        if self.min_saving:
            text += f", min_saving={self.min_saving!r}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return f"{text}, packed=True, multiple_of={self.multiple_of}" if self.packed else text
