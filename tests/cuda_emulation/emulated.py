"""A pytest plugin: the emulated CUDA ops serve the CPU in this process."""

import os

import torch

import sdkernels  # noqa: F401  # defines the ops

torch.ops.load_library(os.environ["SDKERNELS_EMULATED"])
