"""Models and inputs for the command line, by name."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn

from .libraries import LIBRARIES, import_module

__all__ = ["Unknown", "make_inputs", "make_model"]


class Unknown(ValueError):
    """No model of this name, or none that can be made; one sentence."""


def make_model(name: str, drop_path: float) -> tuple[nn.Module, float | None]:
    """A model with random weights, and what to give patch() as `drop_probs` where it has none.

    Args:
        name: "timm:NAME", "torchvision:NAME", "transformers:TYPE" (of a configuration, as "vit"),
            or "module:function" for a function of one's own that returns a model.
        drop_path: the rate of the last block.

    Raises:
        Unknown: the library is not installed or has no such model.
    """
    library, _, own = name.partition(":")
    if not (library and own):
        raise Unknown(
            f"MODEL: expected {', '.join(LIBRARIES)} or a module and a name after a colon, as "
            f"timm:vit_small_patch16_224, got {name!r}"
        )
    try:
        if library == "timm":
            return _timm(own, drop_path), None
        if library == "torchvision":
            return _torchvision(own, drop_path)
        if library == "transformers":
            return _transformers(own, drop_path)
        return _function(library, own), drop_path
    except ImportError as error:
        raise Unknown(f"MODEL: {library} cannot be imported ({error})") from None


def _timm(name: str, drop_path: float) -> nn.Module:
    timm: Any = import_module("timm")
    if not timm.is_model(name):
        raise Unknown(f"MODEL: timm has no model {name!r}{_like(timm.list_models(), name)}")
    model: nn.Module = timm.create_model(name, drop_path_rate=drop_path)
    return model


def _torchvision(name: str, drop_path: float) -> tuple[nn.Module, float | None]:
    models: Any = import_module("torchvision.models")
    if name not in models.list_models():
        raise Unknown(
            f"MODEL: torchvision has no model {name!r}{_like(models.list_models(), name)}"
        )
    has_own = any(word in name for word in ("swin", "convnext", "efficientnet", "maxvit"))
    made: nn.Module
    if has_own:
        made = models.get_model(name, weights=None, stochastic_depth_prob=drop_path)
        return made, None
    made = models.get_model(name, weights=None)
    return made, drop_path


def _transformers(name: str, drop_path: float) -> tuple[nn.Module, float | None]:
    transformers: Any = import_module("transformers")
    try:
        config = transformers.AutoConfig.for_model(name)
    except ValueError:
        raise Unknown(f"MODEL: transformers has no model type {name!r}") from None
    own = next((n for n in ("drop_path_rate", "drop_path") if hasattr(config, n)), None)
    if own is not None:
        setattr(config, own, drop_path)
    model: nn.Module = transformers.AutoModel.from_config(config)
    return model, None if own is not None else drop_path


def _function(module: str, name: str) -> nn.Module:
    made = getattr(importlib.import_module(module), name, None)
    if not callable(made):
        raise Unknown(f"MODEL: {module} has no function {name!r}")
    model = made()
    if not isinstance(model, nn.Module):
        raise Unknown(f"MODEL: expected an nn.Module of {module}.{name}(), got {type(model)}")
    return model


def _like(names: list[str], wanted: str) -> str:
    import difflib

    found = difflib.get_close_matches(wanted, names, 3)
    return f"; there is {', '.join(found)}" if found else ""


def make_inputs(
    model: nn.Module, batch: int, image: int | None, tokens: int, device: torch.device
) -> Any:
    """Random images of the model's own size, or random tokens.

    Args:
        image: another size of images.
        tokens: of a model of sequences.
    """
    config: Any = getattr(model, "config", None)
    given = getattr(model, "main_input_name", "")
    if given == "input_ids":
        return {given: torch.randint(config.vocab_size, (batch, tokens), device=device)}
    own: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    channels, height, width = (own or {}).get("input_size", (3, 224, 224))
    if own is None and isinstance(getattr(config, "image_size", None), int):
        channels, height, width = config.num_channels, config.image_size, config.image_size
    if image is not None:
        height = width = image
    images = torch.randn(batch, channels, height, width, device=device)
    takes_images = "pixel_values" in inspect.signature(model.forward).parameters
    return {"pixel_values": images} if takes_images else images
