"""One line into a model of any library: sdkernels.patch(model)."""

from .comparing.checking import Checked
from .layer_dropout import LayerReport
from .patching import compacted, patch, unpatch
from .plans import drop_probs, plan_for_step, sample_plan, use
from .registry import register
from .report import LeftAlone, PatchedEntry, PatchReport

__all__ = [
    "Checked",
    "LayerReport",
    "LeftAlone",
    "PatchReport",
    "PatchedEntry",
    "compacted",
    "drop_probs",
    "patch",
    "plan_for_step",
    "register",
    "sample_plan",
    "unpatch",
    "use",
]
