"""A pytest plugin: models come patched out of their library, and outcomes are written down."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sdkernels
from benchmarks.providers.libraries import import_module

LIBRARY = os.environ["PEER_LIBRARY"]
RATE = 0.25  # where a test sets none: so that in training the op runs

# A small model of every family of timm whose blocks patch() knows; the first run by default.
FEW_TIMM_MODELS = frozenset((
    "convnext_atto",
    "mobilenetv3_small_050",
    "resnet10t",
    "vit_tiny_patch16_224",
))  # fmt: skip
TIMM_MODELS = frozenset((
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coatnet_nano_rw_224",
    "convnext_atto",
    "convnextv2_atto",
    "deit3_small_patch16_224",
    "efficientnet_lite0",
    "eva02_tiny_patch14_224",
    "maxvit_rmlp_pico_rw_256",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "resnet10t",
    "resnet26",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_ns_224",
    "vit_relpos_small_patch16_224",
    "vit_tiny_patch16_224",
))  # fmt: skip
# Of tests/test_models.py; what it does beside is to load weights from the network.
TIMM_TESTS = frozenset((
    "test_model_forward",
    "test_model_backward",
    "test_model_forward_features",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_torchscript",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
))  # fmt: skip

# Of those that all models of transformers share, by default: what runs blocks, above all
# in training, or moves models about. Beside them: attention of many kinds, in evaluation.
FEW_TRANSFORMERS_TESTS = frozenset((
    "test_attention_outputs",
    "test_batching_equivalence",
    "test_can_be_initialized_on_meta",
    "test_can_init_all_missing_weights",
    "test_determinism",
    "test_enable_input_require_grads",
    "test_enable_input_require_grads_with_gradient_checkpointing",
    "test_feed_forward_chunking",
    "test_gradient_checkpointing_enable_disable",
    "test_hidden_states_output",
    "test_model_outputs_equivalence",
    "test_retain_grad_hidden_states_attentions",
    "test_save_load",
    "test_torch_compile_for_training",
    "test_torch_save_load",
    "test_training",
    "test_training_gradient_checkpointing",
    "test_training_gradient_checkpointing_use_reentrant_false",
    "test_training_gradient_checkpointing_use_reentrant_true",
))  # fmt: skip
# Expects two forwards in training to give the same: not at the rate that is set here.
NOT_RANDOM = "test_token_distillation_reuses_teacher_wrapper"

outcomes: dict[str, str] = {}


def patched(model: nn.Module) -> nn.Module:
    report = sdkernels.patch(model)
    # torchvision's kind of ResNet has no drop path at all; others have one of rate 0.
    if not any(report.drop_probs):
        sdkernels.patch(model, drop_probs=RATE)
    return model


def _patch_timm() -> None:
    timm = import_module("timm")
    create: Callable[..., nn.Module] = timm.create_model

    @functools.wraps(create)
    def create_patched(*args: Any, **kwargs: Any) -> nn.Module:
        return patched(create(*args, **kwargs))

    for module in (timm, timm.models, import_module("timm.models._factory")):
        module.create_model = create_patched


def _patch_transformers() -> None:
    """Every model ends its constructor with post_init, as do the models in it."""
    pretrained = import_module("transformers").PreTrainedModel
    post_init = pretrained.post_init

    @functools.wraps(post_init)
    def post_init_patched(self: Any) -> None:
        post_init(self)
        patched(self)

    pretrained.post_init = post_init_patched


def pytest_configure() -> None:
    import_module(LIBRARY)  # in a way that goes well with every build of PyTorch
    if os.environ["PEER_PATCHED"]:
        {"timm": _patch_timm, "transformers": _patch_transformers}[LIBRARY]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    everything = bool(os.environ["PEER_ALL"])
    models = TIMM_MODELS if everything else FEW_TIMM_MODELS

    def is_chosen(item: Any) -> bool:
        if LIBRARY == "transformers":
            return everything or item.originalname in FEW_TRANSFORMERS_TESTS
        if item.path.name != "test_models.py":
            return bool(item.originalname != NOT_RANDOM)
        name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        return name in models and item.originalname in TIMM_TESTS

    config.hook.pytest_deselected(items=[item for item in items if not is_chosen(item)])
    items[:] = [item for item in items if is_chosen(item)]


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ["PEER_OUTCOMES"]).write_text(json.dumps(outcomes, indent=1))
