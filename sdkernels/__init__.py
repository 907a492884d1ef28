"""Per-sample stochastic depth that computes only what it keeps."""

import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from .arguments import PerSample, Shared
    from .building_blocks import (
        compact_layer_norm,
        compact_rms_norm,
        compact_rows,
        scatter_add_rows,
        scatter_rows,
    )
    from .functional import fused_stochastic_depth
    from .layer_dropout import fused_layer_dropout
    from .measure import measure
    from .models import compacted, patch, unpatch
    from .modules import StochasticDepth
    from .packed import Packed
    from .plan import DepthPlan
    from .rows import KeptRows
    from .schedules import linear_decay, uniform
except ImportError:
    # `python -m sdkernels.info` imports this file first, and is there to report what does not load.
    if "sdkernels.info" not in sys.orig_argv:
        raise

try:
    __version__ = version("sdkernels")
except PackageNotFoundError:  # a source tree that was built in place and never installed
    __version__ = "0+unknown"

__all__ = [
    "DepthPlan",
    "KeptRows",
    "Packed",
    "PerSample",
    "Shared",
    "StochasticDepth",
    "compact_layer_norm",
    "compact_rms_norm",
    "compact_rows",
    "compacted",
    "fused_layer_dropout",
    "fused_stochastic_depth",
    "linear_decay",
    "measure",
    "patch",
    "scatter_add_rows",
    "scatter_rows",
    "uniform",
    "unpatch",
]
