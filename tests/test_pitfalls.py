"""docs/pitfalls.md, point by point."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdkernels import KeptRows, PerSample, StochasticDepth, fused_stochastic_depth
from sdkernels.reference import naive_masking
from sdkernels.sampling import fixed_count

PAGE = (Path(__file__).parents[1] / "docs" / "pitfalls.md").read_text()
ROWS = KeptRows.from_index(torch.tensor([0, 2]), 4, 2.0)


def code(containing: str) -> str:
    """A block of code of the page."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return found


def run_with_rows(x: Tensor, branch: Any, entry: Any, rows: KeptRows = ROWS) -> Tensor:
    return fused_stochastic_depth(x, branch, 0.5, rows=rows, args=(entry,))


# Dimensions


def test_a_batch_in_the_second_dimension():
    mask, x = torch.randn(3, 4, 5), torch.randn(4, 3, 5)

    def branch(kept: Tensor, mask: Tensor) -> Tensor:
        return kept * mask.transpose(0, 1)

    entry = eval(code("# [tokens, B, C]"), {"PerSample": PerSample, "mask": mask})
    expected = naive_masking(x, branch, 0.5, args=(mask,), rows=ROWS)
    torch.testing.assert_close(run_with_rows(x, branch, entry), expected)
    with pytest.raises(ValueError, match=r"^args\[0\]: expected 4 rows"):
        run_with_rows(x, branch, mask)
    # As the stream, tokens would be dropped instead of samples: a plan of the batch does not fit.
    with pytest.raises(ValueError, match=r"^rows: made for a batch of 4 rows, but x has 3"):
        fused_stochastic_depth(x.transpose(0, 1), torch.sin, 0.5, rows=ROWS)


def test_heads_folded_into_the_batch():
    heads = 3
    mask, x = torch.randn(4 * heads, 5, 5), torch.randn(4, 5, 6)

    def branch(kept: Tensor, mask: Tensor) -> Tensor:
        q = kept.unflatten(2, (heads, 2)).transpose(1, 2).flatten(0, 1)
        out = (q @ q.transpose(1, 2) + mask).softmax(-1) @ q
        return out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)

    names = {"PerSample": PerSample, "mask": mask, "heads": heads}
    expected = naive_masking(x, branch, 0.5, args=(mask,), rows=ROWS)
    torch.testing.assert_close(run_with_rows(x, branch, eval(code("heads"), names)), expected)


def test_packed_rows():
    """Whole samples are kept by rows made from a decision for each of them."""
    sample_of_point = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    keep = torch.tensor([True, False, True, False])
    x = torch.randn(7, 3)
    rows = KeptRows.from_mask(keep[sample_of_point], 2.0)
    y = fused_stochastic_depth(x, torch.sin, 0.5, rows=rows)
    torch.testing.assert_close(y, x + 2 * x.sin() * keep[sample_of_point, None])
    # The op's own draw is of points: some of a sample and not others.
    torch.manual_seed(0)
    changed = (fused_stochastic_depth(x, torch.ones_like, 0.5) != x).any(1)
    assert len(set(changed[3:6].tolist())) == 2


# What belongs to a sample


def test_a_list_with_one_entry_a_sample():
    captions, seen = ["a", "bb", "ccc", "dddd"], []

    def branch(kept: Tensor, captions: list[str]) -> Tensor:
        seen.append(captions)
        return kept

    x = torch.ones(4, 2)
    run_with_rows(x, branch, eval(code("captions"), {"PerSample": PerSample, "captions": captions}))
    run_with_rows(x, branch, captions)
    assert seen == [["a", "ccc"], captions]


@pytest.mark.parametrize("kind", ["closure", "module"])
def test_closures_and_module_state_keep_the_numbering_of_the_batch(kind):
    x, scale = torch.randn(4, 3), torch.rand(4, 1)
    holder = nn.Module()
    holder.scale = scale

    def of_closure(kept: Tensor) -> Tensor:
        return kept * scale[: len(kept)]  # for 4 rows: those of the batch

    def of_module(kept: Tensor) -> Tensor:
        return kept * holder.scale[: len(kept)]

    branch = of_closure if kind == "closure" else of_module
    wrong = fused_stochastic_depth(x, branch, 0.5, rows=ROWS)
    expected = naive_masking(x, branch, 0.5, rows=ROWS)
    assert not torch.allclose(wrong, expected)
    right = run_with_rows(x, torch.mul, scale)
    torch.testing.assert_close(right, expected)


# No rows


def test_a_fixed_count_of_two():
    assert fixed_count(2, 0.2) == 2
    with pytest.raises(ValueError, match=r'^sampler: "fixed" .*mode="batch"'):
        fused_stochastic_depth(torch.ones(2, 2), torch.sin, 0.2, "batch", sampler="fixed")


def test_a_checkpoint_inside_of_the_branch():
    """Around the op, it leaves statistics alone; what it hides in the branch runs unseen."""
    nothing = KeptRows.from_index(torch.empty(0, dtype=torch.int64), 4)
    for empty in ("run", "ones"):
        norm = nn.BatchNorm1d(3)
        x = torch.randn(4, 3, requires_grad=True)

        def inside(kept: Tensor, norm: nn.Module = norm) -> Tensor:
            return checkpoint(norm, kept, use_reentrant=False)

        block = StochasticDepth(norm, 0.5, empty=empty)
        checkpoint(block, x, rows=nothing, use_reentrant=False).sum().backward()
        assert norm.num_batches_tracked == 0
        y = fused_stochastic_depth(x, inside, 0.5, rows=nothing, empty=empty)
        if empty == "ones":
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                y.sum().backward()
        else:
            y.sum().backward()
            assert norm.num_batches_tracked == 1


# Random numbers


def gradients(
    module: StochasticDepth, x: Tensor, preserve: bool, rows: KeptRows | None = None
) -> list[Tensor]:
    y = checkpoint(module, x, rows=rows, use_reentrant=False, preserve_rng_state=preserve)
    kept = (y != x).any(1)
    torch.manual_seed(99)
    return [kept, *torch.autograd.grad(y.sum(), [*module.parameters()])]


def test_checkpoints_that_do_not_restore_the_generator():
    module = StochasticDepth(nn.Linear(3, 3), 0.5, sampler="fixed")
    x = torch.randn(16, 3)
    for preserve, rows in ((True, None), (False, KeptRows.sample(16, 0.5)), (False, None)):
        torch.manual_seed(1)
        kept, weight, _ = gradients(module, x, preserve, rows)
        scale = 2.0 if rows is None else rows.scale
        expected = (scale * x[kept]).sum(0).expand(3, 3)
        assert torch.allclose(weight, expected, atol=1e-5) == (preserve or rows is not None)
    # With another number of rows PyTorch notices.
    module.sampler = "bernoulli"
    torch.manual_seed(1)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        gradients(module, x, False)


def dino_block(x: Tensor, branch: Any, p: float) -> Tensor:
    """drop_add_residual_stochastic_depth of DINOv2, written anew."""
    batch = x.shape[0]
    count = max(int(batch * (1 - p)), 1)
    kept = torch.randperm(batch)[:count]
    out = branch(x[kept]).flatten(1)
    return torch.index_add(x.flatten(1), 0, kept, out, alpha=batch / count).view_as(x)


@pytest.mark.parametrize("batch", [1, 5, 10, 32])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.8, 0.9])
def test_the_rows_of_dino(batch, p):
    names: dict[str, Any] = {"torch": torch, "KeptRows": KeptRows}
    exec(code("dino_rows"), names)
    x, layer = torch.randn(batch, 3, 4), nn.Linear(4, 4)
    torch.manual_seed(7)
    expected = dino_block(x, layer, p)
    torch.manual_seed(7)
    y = fused_stochastic_depth(x, layer, p, rows=names["dino_rows"](batch, p))
    torch.testing.assert_close(y, expected)


def test_how_often_the_counts_differ():
    """As the page says: about a third."""
    counts = [
        (max(int(batch * (1 - p)), 1), fixed_count(batch, p))
        for batch in range(1, 33)
        for p in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    differ = sum(a != b for a, b in counts)
    assert 0.25 < differ / len(counts) < 0.45


# Hooks


def gradients_by_hooks(module: StochasticDepth, x: Tensor, rows: KeptRows) -> Tensor:
    """A layer's gradient for every row that it sees, as Opacus computes it."""
    layer: Any = module.branch
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda m, args, out: seen.update(inputs=args[0].detach())),
        layer.register_full_backward_hook(lambda m, d_in, d_out: seen.update(d_out=d_out[0])),
    ]
    module(x, rows=rows).square().sum().backward()
    for handle in handles:
        handle.remove()
    return torch.einsum("bo,bi->boi", seen["d_out"], seen["inputs"])


def test_gradients_by_hooks():
    module = StochasticDepth(nn.Linear(3, 3), 0.5)
    x = torch.randn(4, 3, requires_grad=True)
    expected = []
    for b in range(4):
        y = naive_masking(x, module.branch, 0.5, rows=ROWS)[b]
        expected.append(torch.autograd.grad(y.square().sum(), module.branch.weight)[0])
    compacted = gradients_by_hooks(module, x, ROWS)
    torch.testing.assert_close(compacted, torch.stack([expected[0], expected[2]]))
    module.min_saving = 1.0
    torch.testing.assert_close(gradients_by_hooks(module, x, ROWS), torch.stack(expected))
