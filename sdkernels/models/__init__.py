"""One line into a model of timm, torchvision or transformers: sdkernels.patch(model).

No library is imported before a model of it is patched.
"""

from sdkernels.models.patching import drop_probs, patch, unpatch, use
from sdkernels.models.report import LeftAlone, PatchedEntry, PatchReport

__all__ = ["LeftAlone", "PatchReport", "PatchedEntry", "drop_probs", "patch", "unpatch", "use"]
