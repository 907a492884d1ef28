"""What patch() gains for a model of the user's, on the user's machine.

``sdkernels.measure(model, batch)`` and ``python -m sdkernels.measure``. The benchmarks take their
clocks, memory and masks from here.
"""

from .measurement import MeasureError, Measurement, measure

__all__ = ["MeasureError", "Measurement", "measure"]
