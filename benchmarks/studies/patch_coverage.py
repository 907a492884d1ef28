"""How much of three libraries patch() reaches: ``python -m benchmarks patch-coverage``.

Every architecture with a drop path is made on the meta device, with a drop rate of 0.2, and
patched. The table counts architectures and drop path modules, those that the forward never calls
left out (blocks without a skip connection hold one all the same), and says what is left and why.

With ``--check`` each class and source that was written is also compared with its original, in the
smallest architecture that has it, on real inputs; ``--write`` puts those that are equal into
``sdkernels/models/comparing/verified.py``.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sdkernels
from benchmarks.measure import command, memory
from benchmarks.providers.libraries import LIBRARIES, import_module, is_installed
from benchmarks.providers.zoo import TINY, nets
from benchmarks.report.table import markdown
from sdkernels.models.comparing import verified
from sdkernels.models.comparing.verified import VERIFIED
from sdkernels.models.parts import drop_law, is_drop_path

RATE = 0.2
SMALL = 96  # height and width of images for models that take any
UNSEEN = "it did not run on these inputs"
UNUSED = "its forward does not call its drop path"
FILE = Path(verified.__file__)
# Images and videos of torchvision's models that do not take any.
TORCHVISION_SHAPES = {"maxvit": (3, 224, 224), "mvit": (3, 16, 224, 224), "swin3d": (3, 4, 64, 64)}
# Of transformers, what would not fit a machine's memory twice, or names a word that it lacks.
OTHERWISE: dict[str, dict[str, Any]] = {
    "florence2": {"image_token_id": 4},
    "seggpt": {"image_size": (64, 32)},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4},
}


class Architecture(NamedTuple):
    """A model, on whatever device is the default one, and what to feed it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any] | Tensor]  # by name, where there are several


# What was written, as class and mark, with the number of parameters of the smallest that has it.
Smallest = dict[tuple[type[nn.Module], str], tuple[int, Architecture]]


def timm_architectures() -> Iterator[Architecture]:
    timm: Any = import_module("timm")

    def image(model: Any, name: str) -> Tensor:
        channels, height, width = model.pretrained_cfg["input_size"]
        if not model.pretrained_cfg.get("fixed_input_size") and "vit" not in name:
            height = width = 256 if "halo" in name else SMALL  # in whole blocks of its attention
        return torch.randn(2, channels, height, width)

    for name in timm.list_models():
        make = partial(timm.create_model, name, drop_path_rate=RATE)
        yield Architecture(name, make, partial(image, name=name))


def torchvision_architectures() -> Iterator[Architecture]:
    models: Any = import_module("torchvision.models")

    def make(name: str) -> nn.Module:
        hint = models.get_model_builder(name).__annotations__.get("weights_backbone", "")
        options = {"weights_backbone": None} if "backbone" in hint else {}
        model: nn.Module = models.get_model(name, weights=None, **options)
        for module in model.modules():
            if type(module).__name__ == "StochasticDepth":
                module.p = RATE  # type: ignore[assignment]
        return model

    def image(model: nn.Module, name: str) -> Tensor:
        own = (shape for prefix, shape in TORCHVISION_SHAPES.items() if name.startswith(prefix))
        return torch.randn(2, *next(own, (3, SMALL, SMALL)))

    for name in models.list_models():
        if not name.startswith("quantized_"):
            yield Architecture(name, partial(make, name), partial(image, name=name))


def _with_drop_path(config: Any) -> bool:
    """Set every drop rate of a configuration; whether there is one."""
    found = False
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            found |= _with_drop_path(value)
        elif any(word in key for word in ("drop_path", "droppath", "stochastic_depth")):
            if type(value) in (int, float):
                vars(config)[key] = RATE
                found = True
            elif isinstance(value, list) and value and isinstance(value[0], float):
                vars(config)[key] = [RATE] * len(value)
                found = True
    return found


def transformers_architectures() -> Iterator[Architecture]:
    transformers: Any = import_module("transformers")
    auto: Any = import_module("transformers.models.auto.modeling_auto")

    def model_of(kind: Any) -> Any:
        """The class for a configuration; None where this version has none."""
        for mapping in (auto.MODEL_MAPPING, auto.MODEL_FOR_BACKBONE_MAPPING):
            with suppress(KeyError, ValueError):  # not there, or not in this version
                chosen = mapping[kind]
                return chosen[0] if isinstance(chosen, (list, tuple)) else chosen
        return None

    def images(config: Any, *frames: int) -> Tensor:
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return torch.randn(2, *frames, getattr(config, "num_channels", 3), height, width)

    def text(length: int) -> Tensor:
        return torch.randint(5, 90, (2, length))

    def inputs(model: nn.Module, config: Any) -> dict[str, Any]:
        kind = config.model_type
        if kind == "clap":
            sound = {"input_features": torch.randn(2, 1, 1001, 64)}
            return sound | {"input_ids": text(8), "is_longer": torch.zeros(2, 1, dtype=torch.bool)}
        if kind == "florence2":  # a word of each sentence for a place of the image, and its mean
            words = torch.full((2, 50), config.image_token_id)
            return {"pixel_values": images(config), "input_ids": words}
        if kind.endswith("grounding-dino"):
            return {"pixel_values": images(config), "input_ids": text(8)}
        if kind == "rf_detr":  # in its windows, and with more places than queries
            return {"pixel_values": torch.randn(2, 3, 392, 392)}
        if kind == "seggpt":  # the upper half of what it joins
            height, width = config.image_size
            names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
            return {name: torch.randn(2, 3, height // 2, width) for name in names}
        if kind == "timesformer":
            return {"pixel_values": images(config, config.num_frames)}
        if kind == "vjepa2":
            size = config.crop_size
            return {"pixel_values_videos": torch.randn(2, config.frames_per_clip, 3, size, size)}
        if kind == "xclip":
            vision = config.vision_config
            return {"pixel_values": images(vision, vision.num_frames), "input_ids": text(77)}
        return {"pixel_values": images(config)}

    for kind in sorted(transformers.CONFIG_MAPPING.values(), key=lambda kind: str(kind.model_type)):
        chosen = model_of(kind)
        try:
            config = kind(**OTHERWISE.get(kind.model_type, {}))
        except Exception:  # one that has no defaults
            continue
        if chosen is not None and _with_drop_path(config):
            make = partial(chosen, config)
            yield Architecture(kind.model_type, make, partial(inputs, config=config))


SOURCES = {
    "timm": timm_architectures,
    "torchvision": torchvision_architectures,
    "transformers": transformers_architectures,
}


class Counted(NamedTuple):
    name: str
    modules: int
    patched: int
    left: list[str]


def count(name: str, model: nn.Module, report: sdkernels.models.PatchReport) -> Counted | None:
    """None where nothing drops."""
    drops = {id(m) for m in model.modules() if is_drop_path(m) and _may_drop(m)}
    reached = set[int]().union(*(_drop_paths(e.block, e.branches) for e in report.patched))
    left, unused, reasons = set[int](), set[int](), set[str]()
    for entry in report.left:
        block: Any = model.get_submodule(entry.name)
        own = {id(m) for m in block.children() if is_drop_path(m)}
        state = getattr(block, "_sdkernels", None)
        if entry.reason.startswith(UNUSED):
            unused |= own - reached
            continue
        reasons.add(f"{entry.kind.__module__}.{entry.kind.__name__}: {entry.reason}")
        if state is not None:  # a part of the block is patched
            own = _drop_paths(block, [e for e in state.rewriting.left if e.reason == entry.reason])
        left |= own
    counted = drops - unused
    if not counted:
        return None
    return Counted(name, len(counted), len((reached - left) & counted), sorted(reasons))


def _may_drop(drop_path: nn.Module) -> bool:
    law = drop_law(drop_path)
    return law is None or law.p > 0


def _drop_paths(block: nn.Module, branches: Sequence[Any]) -> set[int]:
    """The drop path modules of branches that have one."""
    found = [attrgetter(each.drop)(block) for each in branches if each.drop]
    return {id(each) for each in found if isinstance(each, nn.Module)}


def survey(library: str, pattern: str) -> tuple[list[Counted], Smallest]:
    """Every architecture, and for each source that was written the smallest that has it."""
    found: list[Counted] = []
    smallest: Smallest = {}
    for each in SOURCES[library]():
        if pattern not in each.name:
            continue
        try:
            with torch.device("meta"):
                model = each.make()
        except Exception as error:
            if not isinstance(error, (TypeError, RuntimeError, ValueError)):
                print(f"{each.name} was not made: {error!r}"[:200], file=sys.stderr)
            continue
        counted = count(each.name, model, sdkernels.patch(model))
        if counted is None:
            continue
        found.append(counted)
        size = sum(p.numel() for p in model.parameters())
        for key in written_for(model):
            if key not in smallest or size < smallest[key][0]:
                smallest[key] = (size, each)
    return found, smallest


def written_for(model: nn.Module) -> Iterator[Any]:
    """The classes of a patched model with the marks of what was written for them."""
    for module in model.modules():
        state = getattr(module, "_sdkernels", None)
        if state is not None and state.rewriting.source:
            yield state.rewriting.original, state.rewriting.mark


def zoo(library: str) -> Smallest:
    """What is written for the small models of the tests, of which each is quickly compared."""
    found: Smallest = {}
    for name, net in nets(TINY).items():
        if name.partition("-")[0] == library:
            model = net.model()
            sdkernels.patch(model, drop_probs=net.drop_probs)
            each = Architecture(name, net.model, lambda model, net=net: net.inputs(4))
            found.update(dict.fromkeys(written_for(model), (0, each)))
    return found


def check(smallest: Smallest) -> dict[Any, str]:
    """Why a source was not found equal to its original; empty where it was."""
    found: dict[Any, str] = {}
    wanted: dict[str, tuple[Architecture, list[Any]]] = {}
    for key, (_, each) in smallest.items():
        wanted.setdefault(each.name, (each, []))[1].append(key)
    for name, (each, keys) in wanted.items():
        try:
            with memory.host_memory_limit(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = each.make()
                report = sdkernels.patch(model, check="always")
                x = each.inputs(model)
                checked = report.check(**x) if isinstance(x, dict) else report.check(x)
        except Exception as error:  # too large for this machine's memory, too
            for key in keys:
                found.setdefault(key, f"{name} did not run: {error!r}"[:200])
            continue
        for entry, result in zip(report.patched, checked, strict=True):
            rewriting = entry.block._sdkernels.rewriting
            key = (rewriting.original, rewriting.mark)
            reason = "" if result.holds else result.reason
            # One model in which it differs is enough, and so is one in which it ran.
            if found.get(key, UNSEEN) == UNSEEN or reason not in ("", UNSEEN):
                found[key] = reason
        print(f"checked {name}", file=sys.stderr, flush=True)
    return found


def table(surveyed: dict[str, list[Counted]]) -> str:
    rows = []
    for library, found in surveyed.items():
        modules, patched = sum(e.modules for e in found), sum(e.patched for e in found)
        whole = sum(each.patched == each.modules for each in found)
        partly = sum(0 < each.patched < each.modules for each in found)
        shares = (f"{whole} ({whole / len(found):.1%})", f"{patched} ({patched / modules:.1%})")
        name = f"{library} {version(library)}"
        rows.append([name, len(found), shares[0], partly, modules, shares[1]])
    head = ["library", "architectures", "wholly patched", "partly", "drop path modules", "patched"]
    return markdown(head, rows)


def reasons(found: list[Counted]) -> str:
    """Why something is left, and where: the most frequent first."""
    names: dict[str, list[str]] = defaultdict(list)
    for each in found:
        for reason in each.left:
            names[reason].append(each.name)
    return "\n".join(
        f"- {reason} [{len(of)}: {', '.join(of[:3])}{', ...' if len(of) > 3 else ''}]"
        for reason, of in sorted(names.items(), key=lambda item: -len(item[1]))
    )


def write(equal: Iterable[Any]) -> None:
    """Put what was found equal into the package's table, beside the versions that are there."""
    entries = {path: dict(marks) for path, marks in VERIFIED.items()}
    for kind, mark in equal:
        path = f"{kind.__module__}:{kind.__qualname__}"
        library = version(kind.__module__.partition(".")[0])
        entries.setdefault(path, {})[mark] = library
    head = FILE.read_text().partition("VERIFIED: ")[0]
    body = json.dumps({path: entries[path] for path in sorted(entries)}, indent=4)
    FILE.write_text(f"{head}VERIFIED: dict[str, dict[str, str]] = {body}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser("patch-coverage", __doc__)
    parser.add_argument("--library", choices=SOURCES, action="append")
    parser.add_argument("--filter", default="", help="architectures whose names have this part")
    parser.add_argument("--zoo", action="store_true", help="the tests' small models only")
    parser.add_argument("--check", action="store_true", help="compare with the originals")
    parser.add_argument("--write", action="store_true", help="keep what was found equal")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    surveyed: dict[str, list[Counted]] = {}
    details: list[str] = []
    equal: list[Any] = []
    for library in filter(is_installed, options.library or LIBRARIES):
        if options.zoo:
            smallest = zoo(library)
        else:
            found, smallest = survey(library, options.filter)
            if not found:
                continue
            surveyed[library] = found
            details.append(f"{library}:\n{reasons(found)}")
        if options.check or options.write:
            results = check(smallest)
            right = [key for key, reason in results.items() if not reason]
            details.append(f"{len(right)} of {len(results)} sources equal their originals")
            for (kind, _), reason in results.items():
                if reason:
                    details.append(f"- {kind.__module__}.{kind.__name__}: {reason}")
            equal += right
    if options.write:
        write(equal)
    print("\n".join([table(surveyed), "", *details]))
    return 0
