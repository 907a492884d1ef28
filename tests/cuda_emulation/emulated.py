"""A pytest plugin: the emulated CUDA ops serve the CPU in this process."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    import sdkernels  # noqa: F401  # defines the ops

    torch.ops.load_library(os.environ["SDKERNELS_EMULATED"])
