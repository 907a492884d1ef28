"""Checks the installed package where there is nothing of the source tree: `python -W error FILE`.

Training steps of a network against naive masking with the same rows, in float64, and the doctests
of the public functions. Ends with the version of torch and what serves. `--extension` fails where
the compiled extension is not what serves.
"""

import doctest
import importlib
import sys
import warnings
from pathlib import Path

warnings.simplefilter("error")

import torch  # noqa: E402

import sdkernels  # noqa: E402
from sdkernels.backends import extension  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("functional", "modules", "rows", "plan", "schedules", "building_blocks")
DROP_PROBS = sdkernels.linear_decay(4, 0.5)


def step(x, plan, branches, norm, fused):
    """The result and all gradients of a step of a network."""
    for p, rows, branch in zip(DROP_PROBS, plan, branches, strict=True):
        if fused:
            x = sdkernels.fused_stochastic_depth(x, branch, p, norm=norm, rows=rows)
        else:
            kept = (rows.slot >= 0).to(x.dtype)[:, None, None]
            x = x + kept * rows.scale * branch(norm(x))
    parameters = [p for module in (*branches, norm) for p in module.parameters()]
    return [x.detach(), *torch.autograd.grad(x.square().mean(), parameters)]


def main() -> None:
    folder = Path(sdkernels.__file__).parent
    if folder == ROOT / "sdkernels" and "--in-place" not in sys.argv:
        sys.exit(f"sdkernels is the source tree's, {folder}")
    if "--extension" in sys.argv and extension.module is None:
        sys.exit(f"the extension is not used: {extension.absence}")
    torch.manual_seed(0)
    branches = [torch.nn.Linear(96, 96, dtype=torch.float64) for _ in DROP_PROBS]
    norm = torch.nn.LayerNorm(96, dtype=torch.float64)
    for sampler in ("bernoulli", "fixed"):
        plan = sdkernels.DepthPlan.sample(33, DROP_PROBS, sampler=sampler)
        x = torch.randn(33, 50, 96, dtype=torch.float64)
        ours = step(x, plan, branches, norm, fused=True)
        assert not torch.equal(ours[0], x)
        torch.testing.assert_close(ours, step(x, plan, branches, norm, fused=False))
    tested = [doctest.testmod(importlib.import_module(f"sdkernels.{name}")) for name in MODULES]
    assert sum(each.failed for each in tested) == 0 < sum(each.attempted for each in tested)
    served = "PyTorch code" if extension.module is None else "the extension"
    print(torch.__version__, served)


if __name__ == "__main__":
    main()
