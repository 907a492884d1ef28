"""One line into a model of timm, torchvision or transformers: sdkernels.patch(model).

No library is imported before a model of it is patched.
"""

from .layer_dropout import LayerReport
from .patching import patch, unpatch
from .plans import drop_probs, plan_for_step, sample_plan, use
from .report import LeftAlone, PatchedEntry, PatchReport

__all__ = [
    "LayerReport",
    "LeftAlone",
    "PatchReport",
    "PatchedEntry",
    "drop_probs",
    "patch",
    "plan_for_step",
    "sample_plan",
    "unpatch",
    "use",
]
