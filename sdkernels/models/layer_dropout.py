"""patch(model, rows="block"): every layer of a model runs on one set of kept rows."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from ..arguments import PerSample, Shared, unmarked
from ..layer_dropout import fused_layer_dropout
from ..sampling import Rescale
from ..tracing import is_recorded
from .adding import BlockState, Options
from .blocks import inputs_of, make_patched, up_to_date
from .collecting import collected_inside
from .comparing.arguments import is_list_of
from .comparing.aside import aside
from .comparing.checking import MISSING, Checked, look_at_blocks
from .comparing.clones import HOOKS, clone_of, first_of
from .comparing.comparison import TOLERANCES
from .parametrized import give_class
from .parts import Law, drop_law, may_drop, why_it_draws_itself
from .plans import Schedule, given_probabilities
from .proof import mapped
from .registry import class_of_name, obstacle, original_class, unpatch
from .report import LeftAlone, PatchedEntry, PatchReport, refuse_left
from .rewriting import Branch
from .undisturbed import in_evaluation, random_state_kept, seed

__all__ = ["LayerReport", "patch_layers"]

DropProbs = float | Sequence[float] | Schedule

_PACKED = re.compile(r"cu_?seq_?len|seq_?idx|max_length_[qk]|doc(ument)?_ids", re.IGNORECASE)
# What some names say where sizes do not: one row a sample, one row a token.
_OF_SAMPLES = ("attention_mask", "encoder_attention_mask", "position_ids")
_OF_TOKENS = ("cache_position", "position_embeddings", "rope")
_TABLES = "position_embeddings"  # of transformers, from position ids: never one for each head
_CACHES = ("cache", "past_key_value", "past_key_values", "layer_past")
# Submodules whose outputs a layer adds to its stream. Which of these a layer has is not taken on
# trust: `_prove` looks whether it is the identity without them, and linear in each of them.
_PARTS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # behind the branches: Gemma 2, 3
    ("self_attn", "mlp"),
    ("attn", "mlp"),
    ("attention", "mlp"),
    ("self_attn", "feed_forward"),
    ("attention", "feed_forward"),
    ("attn", "crossattention", "mlp"),
)


@dataclass
class Found:
    """What a look at a layer has shown. The replicas of nn.DataParallel share it."""

    parts: tuple[str, ...] | None = None  # whose outputs the layer adds to its stream
    apart: bool = False  # its samples do not depend on each other


@dataclass
class LayerState(BlockState):
    """What patch(rows="block") leaves in a layer, which has one branch: all of it."""

    drop_paths: tuple[str, ...] = ()
    found: Found = field(default_factory=Found)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        made = cast("LayerState", super().__deepcopy__(memo))
        made.found = replace(self.found)
        return made

    @property
    def needs_parts(self) -> bool:
        """Whether what the layer adds to its stream has to be known."""
        return bool(self.drop_paths) or self.options.rescale != "none"

    def law(self, block: Any, branch: int) -> Law | None:
        """How the layer draws now: as its drop paths say, which all say the same."""
        p = self.p[0]
        drops = [block.get_submodule(name) for name in self.drop_paths]
        found = [drop_law(drop) for drop in drops]
        laws = [law for law in found if law is not None]
        if len(laws) != len(drops):
            return None
        pairs = zip(laws, drops, strict=True)
        known = [law for law, drop in pairs if type(drop) is not nn.Identity]
        law = known[0] if known else Law(0.0, "row", True, block.training)
        if p is not None:
            return law._replace(p=p)
        if any(other.p != law.p for other in laws):
            values = ", ".join(f"{other.p:g}" for other in laws)
            raise ValueError(
                f'rows: expected one drop probability for all branches of a block with rows="block"'
                f", and a {type(block).__name__} has {values}; give drop_probs=, or patch it with "
                'rows="branch"'
            )
        return law

    def drop_path(self, block: nn.Module, branch: int) -> nn.Module | None:
        """The one for which there is no law, if there is such a one."""
        drops = [block.get_submodule(name) for name in self.drop_paths]
        return next((drop for drop in drops if drop_law(drop) is None), next(iter(drops), None))

    def why_whole(self, block: nn.Module) -> str | None:
        """As of any block. One whose drop paths have come to disagree refuses to run instead."""
        drop = self.drop_path(block, 0)
        return None if drop is None or drop_law(drop) is not None else why_it_draws_itself(drop)


# The layer on its kept rows


_LOOKING = threading.RLock()
_OF_EVERY_MODULE = tuple(vars(nn.Module()))


class _Scaled:
    """Stands in for a part of a layer in one call of it: what the part returns, times a number.

    Everything else that is asked of it, the part answers.
    """

    _sdkernels_stands_for: tuple[nn.Module, bool, float]

    def __init__(self, part: nn.Module, drops: bool, scale: float) -> None:
        own = self.__dict__
        own["_sdkernels_stands_for"] = part, drops, scale
        for name in _OF_EVERY_MODULE:  # Dynamo reads them here where a graph ends in the layer
            if name in part.__dict__:
                own[name] = part.__dict__[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._sdkernels_scaled(self._sdkernels_stands_for[0], args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._sdkernels_scaled(self._sdkernels_stands_for[0].forward, args, kwargs)

    def _sdkernels_scaled(self, call: Any, args: Any, kwargs: Any) -> Any:
        _, drops, scale = self._sdkernels_stands_for
        # A drop path drops nothing here.
        out = first_of(*args, **kwargs) if drops else call(*args, **kwargs)
        if isinstance(out, tuple):
            return (_times(out[0], scale), *out[1:])
        return _times(out, scale)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:  # what isinstance looks at
        try:
            return type(self._sdkernels_stands_for[0])
        except AttributeError:  # one that Dynamo has made to look at, without __init__
            return _Scaled

    def __getattr__(self, name: str) -> Any:
        if name == "_sdkernels_stands_for":
            raise AttributeError(name)
        return getattr(self._sdkernels_stands_for[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sdkernels_stands_for[0], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._sdkernels_stands_for[0], name)

    # Python looks for these in the class, and a part may be a list of modules.

    def __bool__(self) -> bool:
        return bool(self._sdkernels_stands_for[0])

    def __len__(self) -> int:
        return len(cast("Any", self._sdkernels_stands_for[0]))

    def __iter__(self) -> Any:
        return iter(cast("Any", self._sdkernels_stands_for[0]))

    def __getitem__(self, key: Any) -> Any:
        return cast("Any", self._sdkernels_stands_for[0])[key]


def _times(out: Tensor, scale: float) -> Tensor:
    if scale == 0.0:  # of an infinity too
        return torch.zeros_like(out)
    return out if scale == 1.0 else out * scale


def _run(
    kind: Any, block: nn.Module, scales: Mapping[str, float], drops: bool, kept: Any, given: Any
) -> tuple[Any, Any]:
    """What the layer's own forward returns, and its hidden states.

    Where it multiplies what it adds to its stream, the forward gets a view of the layer, as the
    replicas of nn.DataParallel are, in which something else stands for these parts. Nobody else
    sees it: not another thread, nor a part's own attributes. And a forward that checkpoints some
    of itself has it still when that runs again in the backward.
    """
    args, kwargs = given
    if not scales:
        out = kind.forward(block, kept, *args, **kwargs)
    else:
        view: Any = object.__new__(type(block))
        children: dict[str, Any] = dict(block._modules)
        for name, child in block._modules.items():
            for part, scale in scales.items():
                if child is not None and child is block._modules[part]:  # by whatever name
                    children[name] = _Scaled(child, drops, scale)
        held = _held_by(block, view) | {"_modules": children}
        before = dict(children)
        view.__dict__.update(held)
        try:
            out = kind.forward(view, kept, *args, **kwargs)
        finally:  # what the forward has left
            _repeat(block.__dict__, held, view.__dict__)
            _repeat(block._modules, before, children)
    return out, out[0] if isinstance(out, tuple) and out else out


def _held_by(block: nn.Module, view: nn.Module) -> dict[str, Any]:
    """What a layer holds, for a view of it: its own methods are those of the view."""
    return {
        name: value.__func__.__get__(view)
        if type(value) is MethodType and value.__self__ is block
        else value
        for name, value in block.__dict__.items()
    }


def _repeat(own: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Change a dictionary as a copy of it was changed."""
    for name, value in after.items():
        if name not in before or before[name] is not value:
            own[name] = value._sdkernels_stands_for[0] if type(value) is _Scaled else value
    for name in before:
        if name not in after:
            own.pop(name, None)


def _look(block: Any, kept: Tensor, given: Any) -> None:
    """Refuse what fewer samples would change, before the block is trained so.

    Where its parts are zero it must be its input; of parts that are guessed, the sum must be linear
    in each of them too. And its samples must not depend on each other, which two of them show.

    It is a copy that runs, without hooks, in evaluation mode and with other parameters: what was
    initialised to zero would hide what becomes of it. The block is not touched: another thread may
    be training it.
    """
    state = block._sdkernels
    needed = state.needs_parts and state.found.parts is None
    if is_compiling() or is_recorded(kept):
        if needed:
            raise RuntimeError(
                "rows: expected layers that were looked at before they are compiled; call "
                "report.check(*inputs) first"
            )
        return
    if kept.shape[0] < (1 if needed else 2):
        return
    devices = [kept.device] if kept.device.type == "cuda" else []
    # What records operations (selective checkpointing) must not see these. One thread at a time:
    # the random state and the hooks of all modules are those of the process.
    with _LOOKING, random_state_kept(devices), _disable_current_modes(), torch.no_grad():
        seed(devices)
        precise = torch.float64 if kept.dtype == torch.float64 else torch.float32
        if not _look_in(precise, block, kept, given, needed):
            _look_in(None, block, kept, given, needed)


def _look_in(dtype: torch.dtype | None, block: Any, kept: Tensor, given: Any, needed: bool) -> bool:
    """Look at a layer in this dtype, or its own; whether it runs in it."""
    state, own = block._sdkernels, block._original
    try:
        clone = clone_of(_plain(block), (), dtype)
    except Exception as error:
        raise RuntimeError(
            f"rows: a {own.__name__} cannot be copied for a look at it; call report.check(*inputs) "
            "before its parts are sharded"
        ) from error
    x = kept.detach().nan_to_num(0.0, 1.0, -1.0).clamp(-10.0, 10.0).to(dtype or kept.dtype)
    x = x + 0.3 * torch.randn_like(x)
    if dtype is not None:
        given = mapped(given, lambda _, t: t.to(dtype) if t.is_floating_point() else t)
    own_dtypes = dtype is None
    with aside(clone, x.device, own_dtypes), in_evaluation(clone), torch.no_grad():
        try:
            _run(own, clone, {}, False, x.clone(), given)
        except Exception:  # with weights or kernels of another dtype, perhaps
            if own_dtypes:
                raise
            return False
        if needed:
            state.found.parts = _parts_of(block, clone, x, given)
        if len(x) > 1:
            if _mixes(own, clone, x, given):
                raise RuntimeError(
                    f"rows: the samples of a {own.__name__} depend on each other (a statistic of "
                    "the batch, or a batch that is not the first dimension: batch_first=False), so "
                    "that dropping some would change the others"
                )
            state.found.apart = True
    return True


def _plain(block: Any) -> nn.Module:
    """The layer in its own class and without hooks: what fully_shard makes of it has no copies."""
    plain: nn.Module = object.__new__(type(block))
    plain.__dict__.update(_held_by(block, plain))
    del plain.__dict__["_sdkernels"]
    give_class(plain, block._original)
    for name in HOOKS:
        plain.__dict__[name] = OrderedDict()
    return plain


def _parts_of(block: Any, clone: nn.Module, x: Tensor, given: Any) -> tuple[str, ...]:
    """Those whose outputs a layer adds to its stream."""
    state, own = block._sdkernels, block._original
    for parts in (state.drop_paths,) if state.drop_paths else _PARTS:
        if _holds(own, clone, bool(state.drop_paths), parts, x, given):
            return parts
    if state.drop_paths:
        raise RuntimeError(
            f"rows: expected a block whose output is its input where all of its branches are "
            f"dropped, and a {own.__name__} changes it (a shortcut, a norm behind the sum); patch "
            'it with rows="branch"'
        )
    raise RuntimeError(
        f"rescale: the branches that a {own.__name__} adds were not found, so they cannot be "
        'multiplied by 1 / (1 - p); patch with rescale="none", which drops layers without that'
    )


def _mixes(kind: Any, clone: nn.Module, x: Tensor, given: Any) -> bool:
    """Whether another first sample changes the others."""
    changed = x.clone()
    changed[0] = torch.randn_like(x[0])
    changed[(0, *(size // 2 for size in x.shape[1:]))] = 30.0
    before, after = (_run(kind, clone, {}, False, each, given)[1] for each in (x.clone(), changed))
    if not isinstance(before, Tensor) or before.shape[:1] != x.shape[:1]:
        return False  # it is refused for that
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    before, after = before[1:], after[1:]
    tolerance = TOLERANCES[dtype] * float(before.nan_to_num(0.0, 0.0, 0.0).abs().max())
    # A token that attends to nothing may be no number, and stays none.
    return not torch.allclose(before, after, rtol=0.0, atol=tolerance, equal_nan=True)


def _holds(
    kind: Any, clone: nn.Module, drops: bool, parts: tuple[str, ...], x: Tensor, given: Any
) -> bool:
    if any(clone._modules.get(name) is None for name in parts):
        return False

    def run(scales: Mapping[str, float]) -> Any:
        return _run(kind, clone, scales, drops, x.clone(), given)[1]

    nothing = dict.fromkeys(parts, 0.0)
    out = run(nothing)
    if not isinstance(out, Tensor) or out.shape != x.shape or not torch.equal(out, x):
        return False
    if drops:
        return True
    for name in parts:
        once, twice = (run({**nothing, name: scale}) - x for scale in (1.0, 2.0))
        size = float(once.abs().max()) + float(x.abs().max())
        error = torch.finfo(once.dtype).eps * 8 * size
        if not float((twice - 2 * once).abs().max()) <= error < float(once.abs().max()):
            return False  # not linear; or nothing was added, which shows nothing
    return True


def _inputs(block: Any, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Further inputs with what belongs to samples marked; what would be wrong is refused."""
    kind = type(block).__name__
    names = [*block._sdkernels_names[1:], *(f"argument {i}" for i in range(len(args)))]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    marked: dict[str, Any] = {}
    for name, value in given.items():
        if _PACKED.search(name) and value is not None:
            raise ValueError(
                f"{name}: a {kind} got documents packed into one sequence; the rows that are kept "
                "are whole sequences, so pad documents into rows of a batch instead"
            )
        if name in _CACHES and value is not None:
            length = getattr(value, "get_seq_length", None)
            if length is None or int(length(_index_of(block))):
                raise ValueError(
                    f"{name}: a {kind} in training got a cache of earlier tokens, which is that of "
                    "all samples; train with use_cache=False"
                )
            value = None  # a new one: nobody reads it in training
        elif name == "use_cache":
            value = False
        marked[name] = _marked(value, x, name, block)
    values = list(marked.values())
    return (tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True)))


def _marked(value: Any, x: Tensor, name: str, block: Any) -> Any:
    kind = type(block).__name__
    # Two or three numbers in a tuple are sizes.
    if is_list_of(value, x, fewest=2 if type(value) is list else None):
        raise ValueError(
            f"{name}: a {kind} got as many numbers as there are samples, and it is not known "
            "whether there is one for each; give it a tensor of them"
        )
    if type(value) in (tuple, list):
        return type(value)(_marked(each, x, name, block) for each in value)
    if type(value) is dict:
        return {key: _marked(each, x, name, block) for key, each in value.items()}
    if not isinstance(value, Tensor) or value.is_nested:
        return value
    of_tokens = name in _OF_TOKENS and value.dim() <= 2
    if value.dim() == 0 or value.shape[0] == 1 != x.shape[0] or of_tokens:
        return Shared(value)
    of_samples = value.shape[0] == x.shape[0]
    of_tokens = x.dim() > 2 and value.dim() <= 2 and value.shape[0] == x.shape[1]
    if value.dim() == 3 and ("mask" in name or "bias" in name):  # its first dimension may be heads
        of_tokens = True
    if of_samples and value.dim() == 3 and name != _TABLES and x.shape[0] > 1:
        of_tokens |= x.shape[0] in (x.shape[1], *_heads(block))  # may be its first dimension too
    if name in _OF_SAMPLES:
        of_tokens = False
    if of_samples != of_tokens:
        return PerSample(value) if of_samples else Shared(value)
    why = "it could be both" if of_samples else "its first dimension is neither"
    raise ValueError(
        f"{name}: a {kind} got a tensor of shape {tuple(value.shape)} beside hidden states of "
        f"shape {tuple(x.shape)}, and it is not known whether it has a row for each sample ({why})"
    )


def _index_of(block: nn.Module) -> int:
    """The number of a layer in a cache: others may have put tokens there already."""
    own = (vars(module).get("layer_idx") for module in block.modules())
    return next((index for index in own if index is not None), 0)


def _heads(block: nn.Module) -> set[int]:
    """How many heads its attentions may have."""
    own = (item for module in block.modules() for item in vars(module).items())
    return {value for name, value in own if "head" in name and isinstance(value, int)}


def _split(block: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a layer is given: its input, which may come by its name, and the rest."""
    if args:
        return args[0], (tuple(args[1:]), kwargs)
    first = block._sdkernels_names[0]
    return kwargs[first], ((), {name: value for name, value in kwargs.items() if name != first})


def _compact(block: Any, laws: Sequence[Law], args: Any, kwargs: Any) -> tuple[Any, None]:
    """The layer on the kept rows; a tuple comes back as one."""
    (law,) = laws
    x, rest = _split(block, args, kwargs)
    if not isinstance(x, Tensor) and not is_recorded(x):
        raise TypeError(
            f'rows: expected one tensor where rows="block", and a {type(block).__name__} got a '
            f"{type(x).__name__}"
        )
    kind = collected_inside(block) if law.training else None
    if kind is not None:
        raise ValueError(
            f"rows: the {kind} of a {type(block).__name__} are asked for (output_{kind}=True), "
            "which would be those of the kept rows only; train without them"
        )
    state = block._sdkernels
    found, options = state.found, state.options
    rescale = options.rescale_of(law)
    shape: list[Any] = []

    def layer(kept: Tensor, given: Any, scale: float = 1.0) -> Tensor:
        if not found.apart or (state.needs_parts and found.parts is None):
            _look(block, kept, given)
        scales = dict.fromkeys(found.parts or state.drop_paths, scale)
        out, hidden = _run(block._original, block, scales, bool(state.drop_paths), kept, given)
        shape.append(out)
        if isinstance(out, tuple) and any(each is not None for each in out[1:]):
            raise ValueError(
                f"rows: a {type(block).__name__} returned more than its hidden states (attention "
                "maps, a cache), which would be those of the kept rows only; train without them"
            )
        return cast("Tensor", hidden)

    y = fused_layer_dropout(
        x,
        layer,
        law.p,
        options.mode or law.mode,
        law.training,
        args=(_inputs(block, x, *rest) if law.training else Shared(rest),),
        rows=state.rows[0] if law.training else None,
        sampler=options.sampler,
        rescale=cast("Rescale", rescale),
        empty="ones" if options.empty == "run" else options.empty,
    )
    if shape and isinstance(shape[-1], tuple):
        return (y, *shape[-1][1:]), None
    return y, None


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def layer_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a class of layers that runs on the kept rows in training."""
    if original not in _CLASSES:
        kind: Any = make_patched(original, __name__, _compact, lambda: True)
        if original.__module__.startswith("torch.nn."):
            # torch.fx knows its leaves by this name. Pickle does not find the class there.
            kind.__module__, kind.__reduce_ex__ = original.__module__, _reduced
        _CLASSES[original] = kind
    return up_to_date(_CLASSES[original])


def _reduced(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """What pickle and deepcopy make a layer of."""
    made: Any = object.__reduce_ex__(layer, 2)
    if "_original" in type(layer).__dict__:  # else it was given yet another class
        made = (_unpickled, (layer._original,), *made[2:])
    return made  # type: ignore[no-any-return]


def _unpickled(original: type[nn.Module]) -> nn.Module:
    kind: Any = layer_class(original)
    return kind.__new__(kind)  # type: ignore[no-any-return]


def __getattr__(name: str) -> type[nn.Module]:
    return class_of_name(__name__, name, layer_class)


# Which layers


def _find(model: nn.Module, with_probabilities: bool) -> tuple[list[Any], list[LeftAlone]]:
    """Name, layer and drop paths of each layer to patch, and blocks to leave alone."""
    found: list[tuple[str, Any, tuple[str, ...]]] = []
    left: list[LeftAlone] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        drops = tuple(child for child, each in module.named_children() if may_drop(child, each))
        in_list = with_probabilities and _is_layer_of_list(model, name, module)
        if not drops and not in_list:
            continue
        if not drops and any(may_drop(path, each) for path, each in module.named_modules()):
            continue  # the blocks are further inside
        inside.update(map(id, module.modules()))
        reason = _obstacle(module, drops)
        if reason is None:
            found.append((name, module, drops))
        else:
            left.append(LeftAlone(name, original_class(module), reason))
    return found, left


def _is_layer_of_list(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether it is an entry of a list of layers of one class that have an attention."""
    owner = model.get_submodule(name.rpartition(".")[0]) if name else None
    if not isinstance(owner, (nn.ModuleList, nn.Sequential)):
        return False
    if len({original_class(entry) for entry in owner}) != 1:
        return False
    return any("attention" in original_class(each).__name__.lower() for each in module.modules())


def _obstacle(module: nn.Module, drops: tuple[str, ...]) -> str | None:
    reason = obstacle(module)
    if reason is not None:
        return reason
    if not inputs_of(original_class(module)):
        return "its forward takes no input"
    own = getattr(module, "sample_drop_ratio", 0.0)  # DINOv2, DINOv3
    if isinstance(own, (int, float)) and own > 0.0:
        return f"it drops samples by itself (sample_drop_ratio = {own:g}): set that to 0"
    for name in drops:
        drop = module.get_submodule(name)
        if drop_law(drop) is None and type(drop) is not nn.Identity:
            return why_it_draws_itself(drop)
    return None


def _check_own_layer_drop(model: nn.Module) -> None:
    for name, module in model.named_modules():
        own = getattr(getattr(module, "config", None), "layerdrop", 0.0)
        if isinstance(own, (int, float)) and own > 0.0:
            raise ValueError(
                f"model: {name or 'it'} drops layers for the whole batch itself (config.layerdrop ="
                f" {own}), and samples would be dropped twice; set config.layerdrop = 0.0 first"
            )


def patch_layers(
    model: nn.Module, drop_probs: DropProbs | None, options: Options, strict: bool
) -> LayerReport:
    """patch(rows="block")."""
    found, left = _find(model, drop_probs is not None)
    if strict and left:
        refuse_left(left)
    if not found:
        raise ValueError(
            'model: expected layers to drop with rows="block": blocks with a drop path, or with '
            "drop_probs= the entries of a ModuleList that have an attention; none was found"
        )
    without = [module for _, module, drops in found if not drops]
    if without:
        _check_own_layer_drop(model)
    if without and options.rescale == "eval":
        raise ValueError(
            f'rescale: expected "train" or "none" for a {original_class(without[0]).__name__}, '
            "which has no drop path, got 'eval'"
        )
    given: list[list[float | None]] = [[None] for _ in found]
    if drop_probs is not None:
        first = drop_probs(0.0) if callable(drop_probs) else drop_probs
        given = given_probabilities(first, [1] * len(found), layers=True)
    states = []
    for (_, module, drops), p in zip(found, given, strict=True):
        branch = Branch(drops[0] if drops else None, ("",))
        state = LayerState(options, (branch,), p, drop_paths=drops)
        state.law(module, 0)  # refuses branches of several probabilities
        states.append(state)
    kinds = [layer_class(original_class(module)) for _, module, _ in found]
    unpatch(model)
    for (_, module, _), state, kind in zip(found, states, kinds, strict=True):
        module._sdkernels = state
        give_class(module, kind)
    entries = tuple(
        PatchedEntry(name, module, state.branches)
        for (name, module, _), state in zip(found, states, strict=True)
    )
    report = LayerReport(model, entries, tuple(left))
    if callable(drop_probs):
        report.drop_probs = drop_probs
    return report


class LayerReport(PatchReport):
    """What ``patch(model, rows="block")`` did: a :class:`PatchReport` whose layers have one branch.

    ``drop_probs`` is settable during training: a number (the paper's linear schedule that ends
    there), a list with one entry a layer, or a function of ``progress``, which is set by you.

    Example:
        >>> class Attention(nn.Linear):
        ...     pass
        >>> class Layer(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attention = Attention(4, 4)
        ...
        ...     def forward(self, x):
        ...         return x + self.attention(x)
        >>> from sdkernels import patch
        >>> model = nn.Sequential(Layer(), Layer())
        >>> report = patch(model, rows="block", rescale="none", drop_probs=lambda t: 0.5 * (1 - t))
        >>> report.drop_probs
        [0.25, 0.5]
        >>> report.progress = 0.5
        >>> report.drop_probs
        [0.125, 0.25]
    """

    _schedule: Schedule | None = None
    _progress = 0.0

    @property
    def drop_probs(self) -> list[float]:
        """The drop probability of every layer, as it is now."""
        return super().drop_probs

    @drop_probs.setter
    def drop_probs(self, value: DropProbs) -> None:
        self._set(self._values(value(self.progress) if callable(value) else value))
        self._schedule = value if callable(value) else None

    @property
    def progress(self) -> float:
        """How far training is, from 0 to 1, which a function of `drop_probs` is called with."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        if not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
            raise ValueError(f"progress: expected a number from 0 to 1, got {value!r}")
        if self._schedule is not None:
            self._set(self._values(self._schedule(float(value))))
        self._progress = float(value)

    def source(self, name: str) -> str:
        """No difference: a layer runs its own forward, on the kept rows.

        Raises:
            KeyError: no layer of this name was patched.
        """
        if not any(entry.name == name for entry in self.patched):
            raise KeyError(f"no patched layer has the name {name!r}")
        return ""

    def check(self, *args: Any, **kwargs: Any) -> tuple[Checked, ...]:
        """Look at every layer ahead of the first training step, as compiled models need.

        Args:
            args, kwargs: an input of the model, which runs on it once, in evaluation.

        Returns:
            For each layer whether it was looked at, or need not be.

        Raises:
            RuntimeError: a layer changes its input where all of its branches are dropped, or its
                branches were not found.
        """
        states = [entry.block._sdkernels for entry in self.patched]

        def look(entry: PatchedEntry, args: Any, kwargs: Any) -> None:
            x, rest = _split(entry.block, args, kwargs)
            _look(entry.block, x, unmarked(_inputs(entry.block, x, *rest)))  # without a cache

        look_at_blocks(self.model, self.patched, look, (args, kwargs))
        return tuple(
            Checked(entry.name, True, None, "")
            if state.found.parts is not None or not state.needs_parts
            else Checked(entry.name, False, None, MISSING)
            for entry, state in zip(self.patched, states, strict=True)
        )

    def _values(self, drop_probs: float | Sequence[float]) -> list[list[float | None]]:
        return given_probabilities(drop_probs, [1] * len(self.patched), layers=True)

    def _set(self, values: list[list[float | None]]) -> None:
        for entry, p in zip(self.patched, values, strict=True):
            entry.block._sdkernels.p = p

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on exactly, beside the model, the optimizer and the generator.

        With :meth:`plan_for_step` the rows follow from this, the seed and the number of the step.
        """
        return {"progress": self.progress, "drop_probs": self.drop_probs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; a function of the progress stays in force."""
        values = self._values(list(state["drop_probs"]))
        self.progress = state["progress"]
        self._set(values)
