"""Marks for tests that hold for one backend only."""

import pytest

from sdkernels.backends import extension

# Without the extension the same tests run with PyTorch code and autograd functions in Python, which
# make temporaries, and whose sums depend on the number of threads as PyTorch's do.
native = pytest.mark.skipif(extension.module is None, reason="there is no extension")
