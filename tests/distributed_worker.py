"""The processes of test_distributed.py: each runs every check and writes down what came of it.

    python distributed_worker.py WORLD_SIZE FOLDER [RANK]

All are forked from one, which imports what they need. Where that is not safe with torch in it, each
is an interpreter of its own, which is told its rank. A check that fails ends a process, because the
others wait for it in a collective; theirs time out.
"""

import copy
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import libraries
import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import sdkernels
from sdkernels import DepthPlan, KeptRows, Packed, StochasticDepth, fused_stochastic_depth

TIMEOUT = datetime.timedelta(seconds=60)
WIDTH, DEPTH, BATCH, STEPS = 8, 3, 2, 6
SEED = 1000  # rank r draws its rows from SEED + r

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


class Model(nn.Module):
    """A small residual network; `rows`, where given, has one entry for each block."""

    def __init__(self, p: float, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(
            StochasticDepth(
                nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
                p,
                norm=nn.LayerNorm(WIDTH),
                layer_scale=nn.Parameter(torch.full((WIDTH,), 0.5)),
                **options,
            )
            for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, 1)
        self.checkpointed = False

    def forward(self, x: Tensor, rows: list[KeptRows | None] | None = None) -> Tensor:
        x = self.stem(x)
        for block, each in zip(self.blocks, rows or [None] * DEPTH, strict=True):
            if self.checkpointed:
                x = checkpoint(block, x, rows=each, use_reentrant=False)
            else:
                x = block(x, rows=each)
        return self.head(x)


def make_model(p: float = 0.9, **options: Any) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(p, **options)


def batch_of(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(BATCH, 4, generator=generator)


def loss_of(y: Tensor) -> Tensor:
    return (y - 1).square().mean()


def all_rows(p: float, mode: str, forwards: int) -> list[list[list[KeptRows]]]:
    """[forward][block][rank]: the rows that every rank draws, replayed from its seed."""
    generators = [torch.Generator().manual_seed(SEED + r) for r in range(dist.get_world_size())]
    return [
        [
            [KeptRows.sample(BATCH, p, mode=mode, generator=g) for g in generators]
            for _ in range(DEPTH)
        ]
        for _ in range(forwards)
    ]


def joined(rows: list[KeptRows]) -> KeptRows:
    """The rows of all ranks as those of one large batch."""
    batch = rows[0].batch
    index = torch.cat([each.index + rank * batch for rank, each in enumerate(rows)])
    return KeptRows.from_index(index, batch * len(rows), rows[0].scale)


def assert_ranks_disagree(rows: list[list[list[KeptRows]]]) -> None:
    """The checks mean something: ranks kept no row where another one kept some."""
    counts = [[each.k for each in block] for step in rows for block in step]
    for rank in range(dist.get_world_size()):
        assert any(count[rank] == 0 and max(count) > 0 for count in counts)


def single_process(
    p: float = 0.9, mode: str = "row", micro: int = 1
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Gradients and parameters after each step on the batches of all ranks together."""
    rows = all_rows(p, mode, STEPS * micro)
    assert_ranks_disagree(rows)
    model = make_model(p, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for forward in range(step * micro, (step + 1) * micro):
            x = torch.cat([batch_of(forward, rank) for rank in range(dist.get_world_size())])
            loss_of(model(x, [joined(block) for block in rows[forward]])).backward()
        optimizer.step()
        yield [p.grad.clone() for p in model.parameters()], [p.detach() for p in model.parameters()]


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def assert_as_single_process(model: nn.Module, micro: int = 1, **law: Any) -> None:
    """Trains `model` on this rank's batches, and compares each step with the single process."""
    rank = dist.get_rank()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(SEED + rank)
    for step, (gradients, parameters) in enumerate(single_process(micro=micro, **law)):
        optimizer.zero_grad()
        for forward in range(step * micro, (step + 1) * micro):
            last = forward == (step + 1) * micro - 1
            waiting = nullcontext() if last else model.no_sync()
            with waiting:
                loss_of(model(batch_of(forward, rank))).backward()
        for parameter, expected in zip(model.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(whole(parameter.grad), expected)
        optimizer.step()
        for parameter, expected in zip(model.parameters(), parameters, strict=True):
            torch.testing.assert_close(whole(parameter), expected)


# DistributedDataParallel


@check
def ddp_bernoulli() -> None:
    assert_as_single_process(DistributedDataParallel(make_model()))


@check
def ddp_bernoulli_static_graph() -> None:
    model = DistributedDataParallel(make_model(), static_graph=True, gradient_as_bucket_view=True)
    assert_as_single_process(model)


@check
def ddp_batch_mode() -> None:
    model = DistributedDataParallel(make_model(0.5, mode="batch"))
    assert_as_single_process(model, p=0.5, mode="batch")


@check
def ddp_gradient_accumulation_with_no_sync() -> None:
    assert_as_single_process(DistributedDataParallel(make_model()), micro=3)


@check
def ddp_checkpointed() -> None:
    model = make_model()
    model.checkpointed = True
    assert_as_single_process(DistributedDataParallel(model))


@check
def ddp_ranks_that_fall_back_and_ranks_that_compact() -> None:
    model = make_model(0.5, min_saving=0.6)  # one of two rows dropped: all run; both: none
    assert_as_single_process(DistributedDataParallel(model), p=0.5)


@check
def ddp_inplace() -> None:
    assert_as_single_process(DistributedDataParallel(make_model(inplace=True)))


@check
def ddp_with_skipped_branches_is_refused_by_ddp() -> None:
    """What `empty="run"` is the default for: an unused parameter is an error of the next step."""
    model = DistributedDataParallel(make_model(1.0, empty="skip"))
    loss_of(model(batch_of(0, dist.get_rank()))).backward()
    with pytest.raises(RuntimeError, match="finished reduction in the prior iteration"):
        model(batch_of(1, dist.get_rank()))


@check
def ddp_plan_of_a_step() -> None:
    """for_step gives each rank rows of its own, and rank=0 the same to all; any rank knows both."""
    rank, world = dist.get_rank(), dist.get_world_size()
    probs = [0.5] * DEPTH
    for shared in (False, True):
        model, single = DistributedDataParallel(make_model()), make_model()
        for step in range(3):
            number = 0 if shared else None
            plan = DepthPlan.for_step(7, step, BATCH, probs, rank=number)
            loss_of(model(batch_of(step, rank), list(plan))).backward()
            plans = [
                DepthPlan.for_step(7, step, BATCH, probs, rank=0 if shared else r)
                for r in range(world)
            ]
            x = torch.cat([batch_of(step, r) for r in range(world)])
            rows = [joined([each[i] for each in plans]) for i in range(DEPTH)]
            loss_of(single(x, rows)).backward()
        for parameter, expected in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad)


# FSDP2


def sharded(model: Model, **options: Any) -> Model:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


@check
def fsdp2_bernoulli() -> None:
    assert_as_single_process(sharded(make_model()))


@check
def fsdp2_batch_mode() -> None:
    assert_as_single_process(sharded(make_model(0.5, mode="batch")), p=0.5, mode="batch")


@check
def fsdp2_resharded_after_forward_and_checkpointed() -> None:
    model = make_model()
    model.checkpointed = True
    assert_as_single_process(sharded(model, reshard_after_forward=True))


@check
def fsdp2_parts_of_a_block_sharded_on_their_own() -> None:
    """A norm that FSDP has hooked is called as a module, on the kept rows."""
    model = make_model()
    for block in model.blocks:
        fully_shard(block.norm)
        fully_shard(block.branch[0])
    assert_as_single_process(sharded(model))


@check
def fsdp2_mixed_precision() -> None:
    """bfloat16 branches and stream over float32 parameters."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, rank = sharded(make_model(), mp_policy=policy), dist.get_rank()
    torch.manual_seed(SEED + rank)
    (gradients, _), *_ = single_process()
    y = model(batch_of(0, rank))
    assert y.dtype == torch.bfloat16
    loss_of(y.float()).backward()
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        found = whole(parameter.grad)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found, expected, rtol=0.1, atol=0.03 * expected.abs().max().item() + 1e-3
        )


@check
def fsdp2_inplace_is_refused_by_autograd() -> None:
    """The input of a unit is a view that FSDP made, which PyTorch lets nobody write to."""
    model = sharded(make_model(inplace=True))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(batch_of(0, dist.get_rank()))


# Patched models


def assert_patched_as_single_process(
    wrap: Callable[[nn.Module], nn.Module], waits: bool = False, inplace: bool = False
) -> None:
    """A timm ViT, with plans under which ranks keep other rows, or none.

    Gradients of three steps are added up; the first two go without a synchronisation if it waits.
    """
    from zoo import NETS  # takes long to import

    net, rank, world = NETS["timm-vit"], dist.get_rank(), dist.get_world_size()
    model, single = net.model().train(), net.model().train()
    probs = [0.7] * 4
    report = sdkernels.patch(model, drop_probs=probs, inplace=inplace)
    single_report = sdkernels.patch(single, drop_probs=probs)
    wrapped = wrap(model)
    drawn = []
    xs = [net.inputs(BATCH) for _ in range(world)]  # every process makes those of all
    for step in range(3):
        plans = [report.plan_for_step(1, step, BATCH, rank=r) for r in range(world)]
        rows = [list(each) for each in zip(*plans, strict=True)]
        drawn.append(rows)
        waiting = wrapped.no_sync() if waits and step < 2 else nullcontext()
        with report.use(plans[rank]), waiting:
            wrapped(xs[rank]).square().mean().backward()
        with single_report.use([joined(each) for each in rows]):
            single(torch.cat(xs)).square().mean().backward()
    assert_ranks_disagree(drawn)
    for parameter, expected in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), expected.grad)


def ddp_patched_timm_vit() -> None:
    assert_patched_as_single_process(DistributedDataParallel)


def ddp_patched_timm_vit_with_no_sync() -> None:
    assert_patched_as_single_process(DistributedDataParallel, waits=True)


def fsdp2_patched_timm_vit() -> None:
    """In place too: what FSDP hands to a block is not written into."""

    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    for inplace in (False, True):
        assert_patched_as_single_process(wrap, inplace=inplace)


if importlib.util.find_spec("timm") is not None:
    check(ddp_patched_timm_vit)
    check(ddp_patched_timm_vit_with_no_sync)
    check(fsdp2_patched_timm_vit)


# Crops in one tensor, and layers on one set of rows


def mask_of(rows: KeptRows) -> Tensor:
    return ((rows.slot >= 0) * rows.scale).view(-1, 1, 1)


class CropBranch(nn.Module):
    """Linear layers on all tokens; between them the tokens of a sample see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, packed: Packed) -> Tensor:
        parts = packed.split(self.first(packed.values))
        return self.second(packed.join([part.softmax(1) for part in parts]))


class CropModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(
            StochasticDepth(CropBranch(), 0.7, norm=nn.LayerNorm(WIDTH), packed=True, multiple_of=8)
            for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, 1)
        self.checkpointed = False

    def forward(self, crops: list[Tensor], plan: list[list[KeptRows]]) -> Tensor:
        xs = list(map(self.stem, crops))
        for block, rows in zip(self.blocks, plan, strict=True):
            if self.checkpointed:
                xs = checkpoint(block, xs, rows=rows, use_reentrant=False)
            else:
                xs = block(xs, rows=rows)
        return self.loss(xs)

    def masked(self, crops: list[Tensor], plan: list[list[KeptRows]]) -> Tensor:
        """All samples of every crop through every branch, times a mask."""
        xs = list(map(self.stem, crops))
        for block, rows in zip(self.blocks, plan, strict=True):
            outs = [block.branch(Packed.of([block.norm(x)])).view(x.shape) for x in xs]
            xs = [x + mask_of(r) * out for x, r, out in zip(xs, rows, outs, strict=True)]
        return self.loss(xs)

    def loss(self, xs: list[Tensor]) -> Tensor:
        return torch.stack([loss_of(self.head(x)) for x in xs]).sum()


CROPS = [(BATCH, 5), (2 * BATCH, 3)]  # samples of a rank and their tokens


def crops_of(step: int, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(batch, tokens, 4, generator=generator) for batch, tokens in CROPS]


def assert_crops_as_masked(wrap: Callable[[nn.Module], nn.Module], checkpointed: bool) -> None:
    """Gradients of three steps, added up, against masks in a single process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CropModel()
    single = copy.deepcopy(model)
    model.checkpointed = checkpointed
    wrapped = wrap(model)
    drawn = []
    for step in range(3):
        batches = [batch for batch, _ in CROPS]
        plans = [DepthPlan.for_step(7, step, batches, [0.7] * DEPTH, rank=r) for r in range(world)]
        by_crop = [list(zip(*branch, strict=True)) for branch in zip(*plans, strict=True)]
        drawn.append([list(ranks) for branch in by_crop for ranks in branch])
        wrapped(crops_of(step, rank), list(plans[rank])).backward()
        of_ranks = zip(*(crops_of(step, r) for r in range(world)), strict=True)
        joint = [torch.cat(parts) for parts in of_ranks]
        single.masked(joint, [[joined(list(r)) for r in each] for each in by_crop]).backward()
    assert_ranks_disagree(drawn)
    for parameter, expected in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), expected.grad)


@check
def ddp_packed_crops() -> None:
    for checkpointed in (False, True):
        assert_crops_as_masked(DistributedDataParallel, checkpointed)


@check
def fsdp2_packed_crops() -> None:
    for checkpointed in (False, True):
        assert_crops_as_masked(sharded, checkpointed)


@check
def fsdp2_patched_crops_checkpointed() -> None:
    """DINOv3's order: what is patched is checkpointed, then sharded.

    The first rank keeps nothing of one branch, the others nothing of one crop.
    """
    import test_dino

    save = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = [(BATCH, 5, test_dino.C), (2 * BATCH, 3, test_dino.C)]
    kept = [[[], [0, 2, 3]] if r else [[], []] for r in range(world)]
    turned = [[[1], [0, 1]] if r else [[0, 1], [2]] for r in range(world)]
    rows = [
        [
            [
                KeptRows.from_index(torch.tensor(own, dtype=torch.int64), size[0], 2.0)
                for own, size in zip(of_rank, sizes, strict=True)
            ]
            for of_rank in branch
        ]
        for branch in (kept, turned)
    ]
    generator = torch.Generator().manual_seed(1)
    crops = [
        torch.randn(world * size[0], *size[1:], dtype=torch.float64, generator=generator)
        for size in sizes
    ]
    with pytest.MonkeyPatch.context() as patched:
        test_dino.know_styles(patched)
        single = test_dino.made(test_dino.Third)
        model = nn.Sequential(copy.deepcopy(single))
        report = sdkernels.patch(model, strict=True)
        model[0] = checkpoint_wrapper(model[0], context_fn=save)
        fully_shard(model[0])
        fully_shard(model)
        with report.use([branch[rank] for branch in rows]):
            ys = model([x.chunk(world)[rank] for x in crops])
            torch.stack([y.square().mean() for y in ys]).sum().backward()
    of_all = [[joined(list(ranks)) for ranks in zip(*branch, strict=True)] for branch in rows]
    expected = test_dino.masked(single, of_all, crops)
    torch.stack([y.square().mean() for y in expected]).sum().backward()
    for parameter, other in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), other.grad)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep) / keep


class Layer(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop_path1, self.drop_path2 = DropPath(p), DropPath(p)

    def first(self, x: Tensor) -> Tensor:
        return self.mix(self.norm1(x)).softmax(1)

    def second(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.first(x))
        return x + self.drop_path2(self.second(x))


def assert_layers_as_masked(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """`rows="block"` on the ranks, against masks of both branches in a single process."""
    rank, world, p = dist.get_rank(), dist.get_world_size(), 0.7
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(Layer(p) for _ in range(DEPTH)))
    single = copy.deepcopy(model)
    report = sdkernels.patch(model, rows="block", strict=True)
    batches = [
        [torch.randn(BATCH, 5, WIDTH, generator=generator) for _ in range(world)]
        for generator in (torch.Generator().manual_seed(step) for step in range(3))
    ]
    report.check(batches[0][0])
    wrapped = wrap(model)
    drawn = []
    for step, xs in enumerate(batches):
        plans = [report.plan_for_step(1, step, BATCH, rank=r) for r in range(world)]
        rows = [list(each) for each in zip(*plans, strict=True)]
        drawn.append(rows)
        with report.use(plans[rank]):
            wrapped(xs[rank]).square().mean().backward()
        x = torch.cat(xs)
        for layer, each in zip(single, rows, strict=True):
            mask = mask_of(joined(each))
            x = x + mask * layer.first(x)
            x = x + mask * layer.second(x)
        x.square().mean().backward()
    assert_ranks_disagree(drawn)
    for parameter, expected in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), expected.grad)


@check
def ddp_layer_dropout() -> None:
    assert_layers_as_masked(DistributedDataParallel)


@check
def fsdp2_layer_dropout() -> None:
    def wrap(model: nn.Module) -> nn.Module:
        for layer in model:
            fully_shard(layer)
        return fully_shard(model)

    assert_layers_as_masked(wrap)


@check
def fsdp2_layers_are_looked_at() -> None:
    """After they were sharded too: each is put together for that, as for a step."""
    model = nn.Sequential(*(Layer(0.5) for _ in range(DEPTH)))
    report = sdkernels.patch(model, rows="block")
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    assert all(each.holds for each in report.check(torch.randn(BATCH, 5, WIDTH)))


# Rows and ranks


def slots_of_all_ranks(rows: KeptRows | DepthPlan) -> list[list[int]]:
    own = rows.slot.tolist() if isinstance(rows, KeptRows) else [r.slot.tolist() for r in rows]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def all_differ(slots: list[Any]) -> bool:
    return len({repr(each) for each in slots}) == len(slots)


def all_equal(slots: list[Any]) -> bool:
    return all(each == slots[0] for each in slots)


@check
def rows_differ_per_rank_by_default() -> None:
    # Nothing has seeded this process yet: checks_of() has this check first.
    assert all_differ(slots_of_all_ranks(KeptRows.sample(64, 0.5)))
    assert all_differ(slots_of_all_ranks(DepthPlan.for_step(1, 2, 64, [0.5])))
    torch.manual_seed(5 + dist.get_rank())
    assert all_differ(slots_of_all_ranks(KeptRows.sample(64, 0.5)))


@check
def rows_can_be_made_equal() -> None:
    torch.manual_seed(5)
    assert all_equal(slots_of_all_ranks(KeptRows.sample(64, 0.5)))
    torch.manual_seed(5 + dist.get_rank())
    shared = torch.Generator().manual_seed(6)
    assert all_equal(slots_of_all_ranks(KeptRows.sample(64, 0.5, generator=shared)))
    assert all_equal(slots_of_all_ranks(DepthPlan.sample(64, [0.5], generator=shared)))
    assert all_equal(slots_of_all_ranks(DepthPlan.for_step(1, 2, 64, [0.5], rank=0)))
    assert all_differ(slots_of_all_ranks(KeptRows.sample(64, 0.5)))
    x = torch.ones(64, 1)
    y = fused_stochastic_depth(x, torch.neg, 0.5, generator=shared)
    assert all_equal(slots_of_all_ranks(KeptRows.from_mask(y.flatten() != 1)))


@check
def rank_of_a_plan_is_that_of_the_process() -> None:
    rank = dist.get_rank()
    plans = [DepthPlan.for_step(1, 2, 64, [0.5], rank=r) for r in (None, rank, rank + 1)]
    slots = [plan[0].slot.tolist() for plan in plans]
    assert slots[0] == slots[1] != slots[2]


# BatchNorm


@check
def sync_batch_norm_needs_a_gpu() -> None:
    """PyTorch refuses it on the CPU, on every rank, before any collective: nothing hangs."""
    branch = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    x = torch.randn(4, 3, 2, 2)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        fused_stochastic_depth(x, branch, 0.5)
    # In evaluation it is an ordinary BatchNorm.
    fused_stochastic_depth(x, branch.eval(), 0.5, training=False)


def assert_sync_batch_norm(make: Callable[[], nn.Module], convert: Callable[..., Any]) -> None:
    """Statistics of the kept rows of all processes, as of one process with all the batches.

    Processes keep different numbers of rows, and in the second step the last one keeps none. On the
    GPU if there is one (a single one will do), else with PyTorch's ops for it written out.
    """
    from sync_batch_norm import on_the_cpu

    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    batch = 4
    with on_the_cpu() if device.type == "cpu" else nullcontext():
        model, single = convert(make()).double().to(device), make().double().to(device)
        report, single_report = (
            sdkernels.patch(each, drop_probs=0.5) for each in (model.train(), single.train())
        )
        assert any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        generator = torch.Generator().manual_seed(0)
        for step in range(3):
            masks = torch.rand(len(report.drop_probs), world, batch, generator=generator) < 0.6
            masks[:, 0, 0] = True  # somebody keeps one
            masks[:, -1] &= step != 1
            rows = [[KeptRows.from_mask(m, 1.5).to(device) for m in each] for each in masks]
            x = torch.randn(world * batch, 3, 32, 32, generator=generator).double().to(device)
            model.zero_grad()
            single.zero_grad()
            with report.use([each[rank] for each in rows]):
                y = model(x[rank * batch : (rank + 1) * batch])
                y.square().mean().backward()
            whole_rows = [KeptRows.from_mask(each.flatten(), 1.5).to(device) for each in masks]
            with single_report.use(whole_rows):
                expected = single(x)
                expected.square().mean().backward()
            torch.testing.assert_close(y, expected[rank * batch : (rank + 1) * batch])
            for (name, p), e in zip(model.named_parameters(), single.parameters(), strict=True):
                total = torch.zeros_like(p) if p.grad is None else p.grad.clone()
                dist.all_reduce(total)  # DistributedDataParallel refuses SyncBatchNorm on the CPU
                torch.testing.assert_close(total / world, e.grad, rtol=1e-6, atol=1e-8, msg=name)
        buffers = dict(single.named_buffers())
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, buffers[name], msg=name)


def sync_batch_norm_of_the_kept_rows_of_all() -> None:
    """A ResNet, whose branches run on an empty batch."""
    from zoo import NETS

    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    assert_sync_batch_norm(NETS["torchvision-resnet"].model, convert)


def sync_batch_norm_in_attention() -> None:
    """Attention runs a sample of ones where it keeps none, which is not in the statistics."""
    from libraries import load
    from zoo import NETS

    convert = load("timm.layers").convert_sync_batchnorm
    assert_sync_batch_norm(NETS["timm-mobilenet-v4"].model, convert)


if importlib.util.find_spec("torchvision") is not None:
    check(sync_batch_norm_of_the_kept_rows_of_all)
if importlib.util.find_spec("timm") is not None:
    check(sync_batch_norm_in_attention)


@check
def ddp_batch_norm_of_kept_rows() -> None:
    """BatchNorm2d sees the kept rows of its own rank, none of them included."""
    torch.manual_seed(SEED + dist.get_rank())
    branch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = DistributedDataParallel(StochasticDepth(branch, 0.9))
    for step in range(STEPS):
        x = torch.randn(BATCH, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert branch[1].running_mean.isfinite().all()


@check
def compiled_ddp_with_several_buckets_and_batch_sizes() -> None:
    """torch.compile cuts the graph between buckets: only tensors go from one part to the next."""

    def block() -> StochasticDepth:
        branch = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))  # 2 MiB
        return StochasticDepth(branch, 0.4, norm=nn.LayerNorm(256), sampler="fixed")

    torch.manual_seed(0)
    eager = nn.Sequential(block(), block())
    parts = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    model = torch.compile(
        DistributedDataParallel(copy.deepcopy(eager), bucket_cap_mb=1), backend=parts
    )
    eager = DistributedDataParallel(eager)
    for batch in (8, 5, 10):
        x = torch.randn(batch, 256)
        before = parts.frame_count
        for net in (eager, model):
            net.zero_grad()
            torch.manual_seed(SEED + batch + dist.get_rank())
            loss_of(net(x)).backward()
        assert parts.frame_count > before + 1, "one bucket, so nothing was cut"
        for actual, expected in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)


# Of the launch with four processes: what more ranks could change.
MANY_RANKS = (
    "rows_differ_per_rank_by_default",
    "rows_can_be_made_equal",
    "ddp_bernoulli",
    "ddp_batch_mode",
    "fsdp2_bernoulli",
)


def checks_of(world_size: int) -> list[str]:
    names = list(CHECKS) if world_size == 2 else list(MANY_RANKS)
    first = "rows_differ_per_rank_by_default"
    return [first, *(name for name in names if name != first)]


def run_checks(rank: int, world_size: int, folder: Path) -> None:
    store = f"file://{folder.resolve()}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    report = {}
    for name in checks_of(world_size):
        try:
            CHECKS[name]()
            report[name] = "passed"
        except Exception:
            report[name] = traceback.format_exc()
            break
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    if all(outcome == "passed" for outcome in report.values()):
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    world_size, folder, *own_rank = int(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
    if own_rank:
        run_checks(*own_rank, world_size, folder)
        return
    if not processes.FORKS:
        program = [sys.executable, *sys.argv]
        ranks = [subprocess.Popen([*program, str(rank)]) for rank in range(world_size)]
        for process in ranks:
            process.wait()
        return
    if world_size == 2:  # where all checks run
        import test_dino  # noqa: F401

        for name in filter(libraries.is_installed, ("timm", "torchvision")):
            libraries.load(name)
    for rank in range(world_size):
        if os.fork() == 0:
            torch.seed()  # from the system's entropy, as torch does it where it is imported
            run_checks(rank, world_size, folder)
            return
    for _ in range(world_size):
        os.wait()


if __name__ == "__main__":
    main()
