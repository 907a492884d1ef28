"""``python -m sdkernels.measure timm:vit_small_patch16_224 --drop-path 0.4 --batch 32``."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
from collections.abc import Sequence

import torch
from torch import nn

from ..models import patch
from .making import Unknown, make_inputs, make_model
from .measurement import MeasureError, measure
from .memory import host_memory_limit, is_out_of_memory

PROGRAM = "python -m sdkernels.measure"
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="What sdkernels.patch() gains for a training step of a model on this machine.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="timm:NAME, torchvision:NAME, transformers:TYPE (as vit), or MODULE:FUNCTION that "
        "returns a model; weights are random",
    )
    parser.add_argument("--drop-path", type=float, default=0.4, help="rate (default 0.4)")
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="that rate in every block, not a schedule that rises to it",
    )
    parser.add_argument("--batch", type=int, default=32, help="samples (default 32)")
    parser.add_argument("--image", type=int, help="size of images (default: the model's own)")
    parser.add_argument("--tokens", type=int, default=128, help="of sequences (default 128)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--amp", choices=tuple(AMP), help="autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--channels-last", action="store_true", help="for convolutional nets")
    parser.add_argument(
        "--sampler", choices=("bernoulli", "fixed"), default="bernoulli", help="(default bernoulli)"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="to time for (default 30)")
    options = parser.parse_args(arguments)
    if not 0 <= options.drop_path <= 1:
        parser.error(f"--drop-path: expected a number from 0 to 1, got {options.drop_path}")
    for name in ("batch", "tokens", "image"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected 1 or more, got {value}")
    if not options.seconds >= 0:  # also refuses NaN
        parser.error(f"--seconds: expected a number from 0, got {options.seconds}")
    try:
        options.device = torch.device(options.device)
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {str(error).splitlines()[0]}")
    return options


def _prepared(options: argparse.Namespace) -> tuple[nn.Module, list[float] | float | None]:
    """The model on its device, and the probabilities that it does not have itself."""
    model, probabilities = make_model(options.model, options.drop_path)
    model = model.train().to(options.device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.uniform:
        branches = len(patch(copy.deepcopy(model), drop_probs=options.drop_path).drop_probs)
        return model, [options.drop_path] * branches
    return model, probabilities


def run(options: argparse.Namespace) -> int:
    """Measures and prints; returns the exit code."""
    doing = "making the model and its inputs"
    try:
        model, probabilities = _prepared(options)
        batch = make_inputs(model, options.batch, options.image, options.tokens, options.device)
        if options.channels_last and isinstance(batch, torch.Tensor):
            batch = batch.contiguous(memory_format=torch.channels_last)
        found = measure(
            model,
            batch,
            drop_probs=probabilities,
            amp=AMP.get(options.amp),
            sampler=options.sampler,
            compile=options.compile,
            budget=options.seconds,
            progress=True,
        )
    except (MeasureError, Unknown) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted, nothing was measured", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{PROGRAM}: memory ran out while {doing}", file=sys.stderr)
        return 1
    print(found)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = parse(arguments)
    on_host = options.device.type == "cpu"
    try:
        with host_memory_limit() if on_host else contextlib.nullcontext():
            code = run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


if __name__ == "__main__":
    sys.exit(main())
