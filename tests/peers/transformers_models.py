"""The tests that transformers runs on every model, on models whose blocks patch() knows.

Run from among its tests (``run.py`` puts the file there): the mixin is part of its distribution.
"""

import unittest
from typing import Any

import torch
from transformers import (
    BeitConfig,
    BeitModel,
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SwinConfig,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
)
from transformers.testing_utils import torch_device

from .test_modeling_common import ModelTesterMixin

IMAGE = 32
VIT = {
    "image_size": IMAGE,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
SWIN = {
    "image_size": IMAGE,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 2,
}
CONVNEXT = {"num_stages": 2, "hidden_sizes": [10, 20], "depths": [2, 2]}


class Inputs:
    """What the mixin asks of a model's own tests."""

    is_training = True
    batch_size = 3
    num_channels = 3

    def __init__(self, parent: unittest.TestCase, config: Any) -> None:
        self.parent = parent
        self.config = config
        self.image_size = IMAGE
        self.hidden_size = getattr(config, "hidden_size", None)
        self.num_hidden_layers = len(getattr(config, "depths", "12"))
        self.num_attention_heads = getattr(config, "num_attention_heads", None)
        tokens = 1 + getattr(config, "num_register_tokens", 0)
        self.seq_length = (IMAGE // getattr(config, "patch_size", 1)) ** 2 + tokens

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.config, {"pixel_values": torch.randn(shape, device=torch_device)}


class Common(ModelTesterMixin):
    test_resize_embeddings = False
    test_torch_exportable = False
    options: dict[str, Any]
    config_class: Any

    def setUp(self) -> None:
        self.model_tester = Inputs(self, self.config_class(drop_path_rate=0.5, **self.options))


class Dinov2Test(Common, unittest.TestCase):
    all_model_classes = (Dinov2Model,)
    config_class, options = Dinov2Config, VIT


class DINOv3Test(Common, unittest.TestCase):
    all_model_classes = (DINOv3ViTModel,)
    config_class, options = DINOv3ViTConfig, VIT


class BeitTest(Common, unittest.TestCase):
    all_model_classes = (BeitModel,)
    config_class, options = BeitConfig, VIT


class Data2VecTest(Common, unittest.TestCase):
    all_model_classes = (Data2VecVisionModel,)
    config_class, options = Data2VecVisionConfig, VIT


class SwinTest(Common, unittest.TestCase):
    all_model_classes = (SwinModel,)
    config_class, options = SwinConfig, SWIN


class Swinv2Test(Common, unittest.TestCase):
    all_model_classes = (Swinv2Model,)
    config_class, options = Swinv2Config, SWIN


class ConvNextTest(Common, unittest.TestCase):
    all_model_classes = (ConvNextModel,)
    has_attentions = False
    config_class, options = ConvNextConfig, CONVNEXT


class ConvNextV2Test(Common, unittest.TestCase):
    all_model_classes = (ConvNextV2Model,)
    has_attentions = False
    config_class, options = ConvNextV2Config, CONVNEXT
