"""The libraries whose models are compared."""

from sdkernels.measure.libraries import LIBRARIES, import_module, is_installed

__all__ = ["LIBRARIES", "import_module", "is_installed"]
