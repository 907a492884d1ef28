"""Marks for tests that hold for one backend only."""

import pytest

from sdkernels.backends import ops

# The native kernels look at the values of the rows and at overlapping memory before they write.
# PyTorch code stays inside of its tensors without that, and a device would have to be waited for.
native = pytest.mark.skipif(
    any(choice.device == "cpu" and choice.backend != "cpp" for choice in ops.backend_table()),
    reason="the native kernels do not serve the CPU",
)
