"""patch(model, rows="block"): every layer of a model runs on one set of kept rows."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from ..arguments import PerSample, Shared
from ..layer_dropout import fused_layer_dropout
from ..rows import KeptRows
from ..sampling import Rescale
from ..schedules import check_probability, linear_decay
from ..tracing import is_recorded
from .adding import BlockState, Options
from .blocks import PatchedBlock, say_what_is_left_out
from .comparing.checking import Checked
from .parts import Law, drop_law, looks_like_drop_path, why_it_draws_itself
from .report import LeftAlone, PatchedEntry, PatchReport, _flops, refuse_left

__all__ = ["LayerReport", "patch_layers"]

Schedule = Callable[[float], "float | Sequence[float]"]
DropProbs = float | Sequence[float] | Schedule

_DROPS = re.compile(r"drop_?path|stochastic_?(depth|drop)|drop_?connect", re.IGNORECASE)
_PACKED = re.compile(r"cu_?seq_?len|seq_?idx|max_length_[qk]|doc(ument)?_ids", re.IGNORECASE)
# What some names say where sizes do not: one row a sample, one row a token.
_OF_SAMPLES = ("attention_mask", "encoder_attention_mask", "position_ids")
_OF_TOKENS = ("cache_position", "position_embeddings", "rope")
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


@dataclass(frozen=True)
class Layer:
    """The one branch of a layer, for reports and plans."""

    drop: None = None
    p: None = None
    parts: tuple[str, ...] = ("",)


class LayerState(BlockState):
    """What patch(rows="block") leaves in a layer, under the name ``_sdkernels``."""

    def __init__(self, options: Options, p: float | None, drops: tuple[str, ...]) -> None:
        self.options = options
        self.p = [p]  # None: what the drop paths say
        self.drop_paths = drops
        self.parts: tuple[str, ...] | None = drops or None  # None: not looked for
        self.proven = False
        self.looks = False  # while `report.check` runs
        self.__post_init__()

    def __post_init__(self) -> None:
        self.branches: Any = (Layer(),)
        self.rewriting = None
        super().__post_init__()
        self.looks = False

    def __getstate__(self) -> dict[str, Any]:
        names = ("options", "p", "drop_paths", "parts", "proven")
        return {name: self.__dict__[name] for name in names}

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        made = object.__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def law(self, block: Any, branch: int) -> Law | None:
        """How the layer draws now: as its drop paths say, which all say the same."""
        p = self.p[0]
        if not self.drop_paths:
            return Law(p or 0.0, "row", True, block.training)
        drops = [block.get_submodule(name) for name in self.drop_paths]
        laws = [drop_law(drop) for drop in drops]
        known = [
            law for law, drop in zip(laws, drops, strict=True) if type(drop) is not nn.Identity
        ]
        if None in laws:
            return None
        law = known[0] if known else Law(0.0, "row", True, block.training)
        assert law is not None
        if p is not None:
            return law._replace(p=p)
        if any(other is not None and other.p != law.p for other in laws):
            values = ", ".join(f"{other.p:g}" for other in laws if other is not None)
            raise ValueError(
                f'rows: expected one drop probability for all branches of a block with rows="block"'
                f", and a {type(block).__name__} has {values}; give drop_probs=, or patch it with "
                'rows="branch"'
            )
        return law

    def drop_path(self, block: nn.Module, branch: int) -> nn.Module | None:
        return block.get_submodule(self.drop_paths[0]) if self.drop_paths else None

    def why_whole(self, block: nn.Module) -> str | None:
        for name in self.drop_paths:
            drop = block.get_submodule(name)
            if drop_law(drop) is None:
                return why_it_draws_itself(drop)
        return None


# The layer on its kept rows


class _Scaled:
    """Stands in for the forward of a module: its output times a number."""

    def __init__(self, forward: Callable[..., Any] | None, scale: float) -> None:
        self.forward = forward  # None for a drop path, whose output is its input
        self.scale = scale

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = args[0] if self.forward is None else self.forward(*args, **kwargs)
        if isinstance(out, tuple):
            return (self.scaled(out[0]), *out[1:])
        return self.scaled(out)

    def scaled(self, out: Tensor) -> Tensor:
        if self.scale == 0.0:  # of an infinity too
            return torch.zeros_like(out)
        return out if self.scale == 1.0 else out * self.scale


@contextmanager
def _scaling(block: Any, state: LayerState, scales: Mapping[str, float]) -> Iterator[None]:
    """Multiply what the block adds to its stream; its drop paths drop nothing meanwhile."""
    modules = [block.get_submodule(name) for name in scales]
    # What a user or another library has put in the place of a module's forward.
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module, (name, scale) in zip(modules, scales.items(), strict=True):
            own = None if name in state.drop_paths else module.forward
            module.__dict__["forward"] = _Scaled(own, scale)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own


def _call(block: Any, forward: Callable[..., Any], kept: Tensor, given: Any) -> Any:
    args, kwargs = given
    return forward(block, kept, *args, **kwargs)


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) and out else out


def _prove(block: Any, state: LayerState, forward: Any, kept: Tensor, given: Any) -> None:
    """Look whether the block is its input where its parts are zero, before it is trained so.

    Of parts that are guessed, also whether the sum is linear in each of them. In evaluation mode
    and without gradients: no statistics, no random numbers.
    """
    modules = [module for module in block.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        # What records operations (selective checkpointing) must not see these.
        with torch.no_grad(), _disable_current_modes():
            for parts in (state.drop_paths,) if state.drop_paths else _PARTS:
                if _holds(block, state, forward, kept, given, parts):
                    state.parts, state.proven = parts, True
                    return
    finally:
        for module in modules:
            module.training = True
    kind = type(block).__name__
    if state.drop_paths:
        raise RuntimeError(
            f"rows: expected a block whose output is its input where all of its branches are "
            f"dropped, and a {kind} changes it (a shortcut, a norm behind the sum); patch it with "
            'rows="branch"'
        )
    raise RuntimeError(
        f"rescale: the branches that a {kind} adds were not found, so they cannot be multiplied by "
        '1 / (1 - p); patch with rescale="none", which drops layers without that'
    )


def _holds(
    block: Any, state: LayerState, forward: Any, kept: Tensor, given: Any, parts: tuple[str, ...]
) -> bool:
    try:
        for name in parts:
            block.get_submodule(name)
    except AttributeError:
        return False

    def run(scales: Mapping[str, float]) -> Tensor:
        with _scaling(block, state, scales):
            out: Tensor = _first(_call(block, forward, kept.clone(), given))
        return out

    nothing = dict.fromkeys(parts, 0.0)
    out = run(nothing)
    if not isinstance(out, Tensor) or out.shape != kept.shape or not _same(out, kept):
        return False
    if state.drop_paths:
        return True
    for name in parts:
        once, twice = (run({**nothing, name: scale}) - kept for scale in (1.0, 2.0))
        size = float(once.abs().max()) + float(kept.abs().max())
        error = torch.finfo(once.dtype).eps * 64 * size
        if not float((twice - 2 * once).abs().max()) <= error:
            return False
    return True


def _same(out: Tensor, kept: Tensor) -> bool:
    return bool(((out == kept) | (kept != kept)).all())


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
            if length is None or int(length(getattr(block, "layer_idx", None) or 0)):
                raise ValueError(
                    f"{name}: a {kind} in training got a cache of earlier tokens, which is that of "
                    "all samples; train with use_cache=False"
                )
            value = None  # a new one: nobody reads it in training
        elif name == "use_cache":
            value = False
        marked[name] = _marked(value, x, name, kind)
    values = list(marked.values())
    return (tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True)))


def _marked(value: Any, x: Tensor, name: str, kind: str) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_marked(each, x, name, kind) for each in value)
    if type(value) is dict:
        return {key: _marked(each, x, name, kind) for key, each in value.items()}
    if not isinstance(value, Tensor) or value.is_nested:
        return value
    of_tokens = name in _OF_TOKENS and value.dim() <= 2
    if value.dim() == 0 or value.shape[0] == 1 != x.shape[0] or of_tokens:
        return Shared(value)
    of_samples = value.shape[0] == x.shape[0]
    of_tokens = x.dim() > 2 and value.dim() <= 2 and value.shape[0] == x.shape[1]
    if value.dim() == 3 and ("mask" in name or "bias" in name):  # its first dimension may be heads
        of_tokens = True
    if name in _OF_SAMPLES:
        of_tokens = False
    if of_samples != of_tokens:
        return PerSample(value) if of_samples else Shared(value)
    why = "it could be both" if of_samples else "its first dimension is neither"
    raise ValueError(
        f"{name}: a {kind} got a tensor of shape {tuple(value.shape)} beside hidden states of "
        f"shape {tuple(x.shape)}, and it is not known whether it has a row for each sample ({why})"
    )


def _run(block: Any, state: LayerState, forward: Any, law: Law, args: Any, kwargs: Any) -> Any:
    """The layer on the kept rows; a tuple comes back as one."""
    name = block._sdkernels_names[0]
    x, (rest, named) = args[0] if args else kwargs[name], _without(name, args, kwargs)
    if not isinstance(x, Tensor):
        raise TypeError(
            f'rows: expected one tensor where rows="block", and a {type(block).__name__} got a '
            f"{type(x).__name__}"
        )
    options = state.options
    rescale = options.rescale_of(law)
    needs_parts = bool(state.drop_paths) or rescale != "none"
    shape: list[Any] = []

    def layer(kept: Tensor, given: Any, scale: float = 1.0) -> Tensor:
        if needs_parts and not state.proven and (is_compiling() or kept.shape[0]):
            if is_compiling():
                raise RuntimeError(
                    "rows: expected layers that were looked at before they are compiled; call "
                    "report.check(*inputs) first"
                )
            _prove(block, state, forward, kept, given)
        parts = state.parts or ()
        with _scaling(block, state, dict.fromkeys(parts, scale)):
            out = _call(block, forward, kept, given)
        shape.append(out)
        first = _first(out)
        if isinstance(out, tuple) and any(each is not None for each in out[1:]):
            raise ValueError(
                f"rows: a {type(block).__name__} returned more than its hidden states (attention "
                "maps, a cache), which would be those of the kept rows only; train without them"
            )
        return cast("Tensor", first)

    y = fused_layer_dropout(
        x,
        layer,
        law.p,
        options.mode or law.mode,
        law.training,
        args=(_inputs(block, x, rest, named) if law.training else Shared((tuple(rest), named)),),
        rows=cast("KeptRows | None", state.rows[0]) if law.training else None,
        sampler=options.sampler,
        rescale=cast("Rescale", rescale),
        empty="ones" if options.empty == "run" else options.empty,
    )
    if shape and isinstance(shape[-1], tuple):
        return (y, *shape[-1][1:])
    return y


def _without(name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a layer is given beside its input, which may come by its name."""
    return tuple(args[1:]), {key: value for key, value in kwargs.items() if key != name}


# The class of a patched layer


class PatchedLayer(PatchedBlock):
    """Base of the classes that patch(rows="block") gives to layers."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self._original,), self.__dict__

    if TYPE_CHECKING:
        _sdkernels_names: tuple[str, ...]


def _rebuilt(original: type[nn.Module]) -> Any:
    """A copied or unpickled layer, before its attributes are set."""
    kind: Any = layer_class(original)
    return kind.__new__(kind)


_CLASSES: dict[Any, type[nn.Module]] = {}


def layer_class(original: Any) -> type[nn.Module]:
    """A subclass of a class of layers that runs on the kept rows in training."""
    if original not in _CLASSES:
        _CLASSES[original] = _made(original)
    return _CLASSES[original]


def _made(original: Any) -> type[nn.Module]:
    own_forward = original.forward
    code = getattr(own_forward, "__wrapped__", own_forward)
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__

    names = code.__code__.co_varnames[1 : code.__code__.co_argcount]

    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self._sdkernels
        if state.looks:
            x, given = args[0] if args else kwargs[names[0]], _without(names[0], args, kwargs)
            _prove(self, state, own_forward, x, given)
        law = state.law(self, 0)
        bound = state.rows[0] is not None
        if law is None:
            if bound:
                raise RuntimeError(
                    f"plan: a {original.__name__} draws its own rows: {state.why_whole(self)}"
                )
            return own_forward(self, *args, **kwargs)
        scaled_later = state.options.rescale == "eval" and not law.training
        runs = (law.p > 0.0 and (law.training or scaled_later)) or (bound and law.training)
        # A drop path may have another probability of its own.
        overridden = state.p[0] == 0.0 and law.training and bool(state.drop_paths)
        if not (runs or overridden):
            return own_forward(self, *args, **kwargs)
        if not is_compiling() and is_recorded(args, [*kwargs.values()]):
            if law.training:
                say_what_is_left_out(self)
            return own_forward(self, *args, **kwargs)
        if is_compiling() or not self.training:
            return _run(self, state, own_forward, law, args, kwargs)
        if torch._C._current_graph_task_id() != -1:  # a checkpoint's second run
            state.check_recomputation()
            return _run(self, state, own_forward, law, args, kwargs)
        y = _run(self, state, own_forward, law, args, kwargs)
        state.remember(y)
        return y

    members = {
        "forward": forward,
        "_original": original,
        "_sdkernels_names": names,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (PatchedLayer, original), members)


# Which layers


def _find(model: nn.Module, with_probabilities: bool) -> tuple[list[Any], list[LeftAlone]]:
    """Name, layer and drop paths of each layer to patch, and blocks to leave alone."""
    found: list[tuple[str, Any, tuple[str, ...]]] = []
    left: list[LeftAlone] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        drops = tuple(child for child, each in module.named_children() if _drops(child, each))
        in_list = with_probabilities and _is_layer_of_list(model, name, module)
        if not drops and not in_list:
            continue
        if not drops and any(_drops(path, each) for path, each in module.named_modules()):
            continue  # the blocks are further inside
        inside.update(map(id, module.modules()))
        reason = _obstacle(module, drops)
        if reason is None:
            found.append((name, module, drops))
        else:
            left.append(LeftAlone(name, _original(module), reason))
    return found, left


def _drops(name: str, module: nn.Module) -> bool:
    """Whether it is a drop path, or what a model has in place of one of p = 0."""
    if type(module) is nn.Identity:
        return bool(_DROPS.search(name.rpartition(".")[2]))
    return looks_like_drop_path(module)


def _is_layer_of_list(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether it is an entry of a list of layers of one class that have an attention."""
    owner = model.get_submodule(name.rpartition(".")[0]) if name else None
    if not isinstance(owner, (nn.ModuleList, nn.Sequential)):
        return False
    if len({_original(entry) for entry in owner}) != 1:
        return False
    return any("attention" in _original(each).__name__.lower() for each in module.modules())


def _original(module: nn.Module) -> type[nn.Module]:
    kind: Any = type(module)
    return kind._original if issubclass(kind, PatchedBlock) else kind  # type: ignore[no-any-return]


def _obstacle(module: nn.Module, drops: tuple[str, ...]) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it was compiled: compile after patch"
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
    model: nn.Module,
    *,
    drop_probs: DropProbs | None,
    options: Options,
    strict: bool,
    release: Callable[[nn.Module], Any],
) -> LayerReport:
    """patch(rows="block"); `release` undoes what an earlier patch did."""
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
            f'rescale: expected "train" or "none" for a {_original(without[0]).__name__}, which '
            "has no drop path, got 'eval'"
        )
    probabilities = None if drop_probs is None else _values(drop_probs, 0.0, len(found))
    states = []
    for number, (_, module, drops) in enumerate(found):
        p = None if probabilities is None else probabilities[number]
        state = LayerState(options, p, drops)
        state.law(module, 0)  # refuses branches of several probabilities
        states.append(state)
    release(model)
    for (_, module, _), state in zip(found, states, strict=True):
        module._sdkernels = state
        module.__class__ = layer_class(type(module))
    entries = tuple(
        PatchedEntry(name, module, (cast("Any", Layer()),)) for name, module, _ in found
    )
    report = LayerReport(model, entries, tuple(left))
    if callable(drop_probs):
        report.drop_probs = drop_probs
    return report


def _values(drop_probs: Any, progress: float, layers: int) -> list[float]:
    """The drop probability of every layer."""
    if callable(drop_probs):
        drop_probs = drop_probs(progress)
    if isinstance(drop_probs, Real):
        return linear_decay(layers, check_probability(drop_probs, "drop_probs"))
    if isinstance(drop_probs, str) or not isinstance(drop_probs, Sequence):
        raise TypeError(
            "drop_probs: expected a number, a sequence of drop probabilities or a function of the "
            f"progress, got {type(drop_probs).__name__}"
        )
    if len(drop_probs) != layers:
        raise ValueError(
            f"drop_probs: expected {layers} entries, one for each layer, got {len(drop_probs)}"
        )
    return [check_probability(p, "drop_probs") for p in drop_probs]


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

    @property
    def _schedule(self) -> dict[str, Any]:
        found: dict[str, Any] = self.__dict__.setdefault("_state", {"progress": 0.0, "of": None})
        return found

    @property
    def drop_probs(self) -> list[float]:
        """The drop probability of every layer, as it is now."""
        return [float(e.block._sdkernels.law(e.block, 0).p) for e in self.patched]

    @drop_probs.setter
    def drop_probs(self, value: DropProbs) -> None:
        values = _values(value, self.progress, len(self.patched))
        self._schedule["of"] = value if callable(value) else None
        self._set(values)

    @property
    def progress(self) -> float:
        """How far training is, from 0 to 1, which a function of `drop_probs` is called with."""
        progress: float = self._schedule["progress"]
        return progress

    @progress.setter
    def progress(self, value: float) -> None:
        if not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
            raise ValueError(f"progress: expected a number from 0 to 1, got {value!r}")
        schedule = self._schedule["of"]
        values = None if schedule is None else _values(schedule, float(value), len(self.patched))
        self._schedule["progress"] = float(value)
        if values is not None:
            self._set(values)

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
        looked = [s for s in states if s.drop_paths or s.options.rescale != "none"]
        modules = [module for module in self.model.modules() if module.training]
        for state in looked:
            state.looks = True
        self.model.eval()
        try:
            with torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            for state in looked:
                state.looks = False
            for module in modules:
                module.training = True
        return tuple(
            Checked(entry.name, True, None, "")
            if state not in looked or state.proven
            else Checked(entry.name, False, None, "it did not run on these inputs")
            for entry, state in zip(self.patched, states, strict=True)
        )

    def _set(self, values: list[float]) -> None:
        for entry, p in zip(self.patched, values, strict=True):
            entry.block._sdkernels.p = [p]

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on exactly, beside the model, the optimizer and the generator.

        With :meth:`plan_for_step` the rows follow from this, the seed and the number of the step.
        """
        return {"progress": self.progress, "drop_probs": self.drop_probs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; a function of the progress stays in force."""
        values = _values(list(state["drop_probs"]), 0.0, len(self.patched))
        self.progress = state["progress"]
        self._set(values)

    def expected_saving(self, *args: Any, **kwargs: Any) -> float:
        """As :meth:`PatchReport.expected_saving`: a layer that is dropped costs nothing."""
        counts = _flops(self.model, args, kwargs) if args or kwargs else None

        def size(module: nn.Module) -> float:
            if counts is None:
                return float(sum(p.numel() for p in module.parameters()))
            return float(counts.get(id(module), 0))

        total = size(self.model)
        saved = sum(p * size(e.block) for e, p in zip(self.patched, self.drop_probs, strict=True))
        return saved / total if total else 0.0
