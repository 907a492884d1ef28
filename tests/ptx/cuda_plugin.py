"""A pytest plugin: the CUDA ops serve the CPU in this process, with kernels run from nvcc's PTX."""

import os

import pytest
import torch

from . import build


def pytest_configure(config: pytest.Config) -> None:
    import sdkernels  # noqa: F401  # defines the ops

    library, ptx = build.cuda_ops(few="SDKERNELS_PTX_FEW" in os.environ)
    torch.ops.load_library(str(library))
    build.load(library, build.Kernels(ptx))


def pytest_unconfigure(config: pytest.Config) -> None:
    build.report()
