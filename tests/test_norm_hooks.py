"""A norm that is more than its parameters (hooks, a forward of its own) is called, not fused."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from sdkernels import KeptRows, fused_stochastic_depth


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def replace_forward(norm):
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)


def become_subclass(norm):
    kind = type(norm)
    norm.__class__ = type("Twice", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


CHANGES = {
    "forward_hook": lambda norm: norm.register_forward_hook(lambda _, args, out: 2 * out),
    "forward_pre_hook": lambda norm: norm.register_forward_pre_hook(lambda _, args: args[0] ** 2),
    "backward_hook": lambda norm: norm.register_full_backward_hook(
        lambda _, grads, __: (2 * grads[0],)
    ),
    "backward_pre_hook": lambda norm: norm.register_full_backward_pre_hook(
        lambda _, grads: (2 * grads[0],)
    ),
    "parametrization": lambda norm: parametrize.register_parametrization(norm, "weight", Twice()),
    "subclass": become_subclass,
    "forward": replace_forward,  # as libraries do that move weights or log calls
    "global_hook": lambda _: register_module_forward_hook(
        lambda module, args, out: (
            2 * out if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else None
        )
    ),
}


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_of_the_norm_take_effect(change, kind):
    torch.manual_seed(0)
    x = torch.randn(4, 3, requires_grad=True)
    rows = KeptRows.from_index(torch.tensor([0, 2]), 4, scale=2.0)
    norm = kind(3)

    def run():
        y = fused_stochastic_depth(x, torch.sin, 0.5, norm=norm, rows=rows)
        out = torch.sin(norm(x))
        expected = x + (rows.slot >= 0)[:, None] * rows.scale * out
        return [(each, *torch.autograd.grad(each.square().sum(), x)) for each in (y, expected)]

    before, _ = run()
    attached = change(norm)
    try:
        after, expected = run()
    finally:
        if isinstance(attached, RemovableHandle):
            attached.remove()
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(after[1], before[1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_hooks_see_the_rows_that_run(training):
    norm, seen = nn.LayerNorm(3), []
    norm.register_forward_hook(lambda _, args, out: seen.append((len(args[0]), len(out))))
    rows = KeptRows.from_index(torch.tensor([0, 2]), 4)
    fused_stochastic_depth(torch.ones(4, 3), torch.sin, 0.5, "row", training, norm=norm, rows=rows)
    assert seen == [(2, 2) if training else (4, 4)]
