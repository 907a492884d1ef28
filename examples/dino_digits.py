"""A small DINO on handwritten digits: a student and a teacher, eight crops of an image, p = 0.4.

    python examples/dino_digits.py
    python examples/dino_digits.py --compile
    torchrun --nproc-per-node=2 examples/dino_digits.py --compile  # sharded with FSDP2

Two global and six local crops of every image go through the student, all of them in one tensor of
tokens, of which each branch gets the kept samples'. The teacher, a moving average of the student,
sees the global ones. The student's blocks are wrapped as DINOv3's are: selective checkpointing,
which keeps the matrix products and attention, then torch.compile, then fully_shard. No label is
trained on: after each epoch the labels of training images with the nearest features vote for those
of held out ones.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sdkernels import DepthPlan, KeptRows, Packed, fused_stochastic_depth

GLOBAL, LOCAL = 2, 6  # crops of an image
GLOBAL_SIZE, LOCAL_SIZE, PATCH = 12, 8, 4  # pixels; the digits have 8, and are enlarged
PROTOTYPES = 64
# The teacher's is well below what its scores differ by from image to image before it has learned
# anything (0.1): a warm one says nearly the same of all images, and the student learns just that.
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.02
aten = torch.ops.aten
SAVED = [
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]


class Block(nn.Module):
    """A pre-norm block on a list of crops [B, N, width], whose tokens its branches get packed."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        # Below 1, so that at first a dropped branch is a small change.
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.3)) for _ in range(2))

    def attention(self, packed: Packed) -> Tensor:
        qkv = self.qkv(packed.values).unflatten(-1, (3, self.heads, -1))  # [T, 3, heads, D]
        return self.proj(packed.attention(*qkv.unbind(1)).flatten(1))

    def feed_forward(self, packed: Packed) -> Tensor:
        return self.mlp(packed.values)

    def forward(self, xs: list[Tensor], rows: Sequence[list[KeptRows]] | None) -> list[Tensor]:
        """`rows`: of both branches, a list each with the rows of every crop size."""
        for i, (branch, norm, layer_scale) in enumerate(
            (
                (self.attention, self.norm1, self.scale1),
                (self.feed_forward, self.norm2, self.scale2),
            )
        ):
            xs = fused_stochastic_depth(
                xs,
                branch,
                self.p,
                training=self.training,
                norm=norm,
                layer_scale=layer_scale,
                rows=None if rows is None else rows[i],
                packed=True,
            )
        return xs


class Checkpointed(nn.Module):
    """A block of which the backward computes anew all but the results of the ops in SAVED."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.contexts = partial(create_selective_checkpoint_contexts, SAVED)

    def forward(self, *inputs: object) -> list[Tensor]:
        return checkpoint(self.block, *inputs, use_reentrant=False, context_fn=self.contexts)


class Encoder(nn.Module):
    """Lists of crops [B, 1, s, s] to the features [B, width] of all of them, one after the other.

    And to the scores [B, PROTOTYPES] on which student and teacher have to agree.
    """

    def __init__(self, width: int, depth: int, p: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=PATCH, stride=PATCH)
        nn.init.normal_(self.patches.weight, std=0.4)
        side = GLOBAL_SIZE // PATCH
        self.position = nn.Parameter(0.5 * torch.randn(1, width, side, side))
        self.blocks = nn.ModuleList(Block(width, 4, p) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = Head(width)

    def tokens(self, crops: Tensor) -> Tensor:
        x = self.patches(crops)
        position = self.position
        if position.shape[2:] != x.shape[2:]:
            position = F.interpolate(position, x.shape[2:], mode="bilinear", antialias=True)
        return (x + position).flatten(2).mT.contiguous()

    def forward(
        self, crops: list[Tensor], plan: Sequence[list[KeptRows]] | None = None
    ) -> tuple[Tensor, Tensor]:
        xs = [self.tokens(crop) for crop in crops]
        for i, block in enumerate(self.blocks):
            xs = block(xs, None if plan is None else [plan[2 * i], plan[2 * i + 1]])
        features = self.norm(torch.cat([x.mean(1) for x in xs]))
        return features, self.head(features)


class Head(nn.Module):
    """Cosines of a projection with every prototype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width // 2)
        )
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, width // 2))

    def forward(self, features: Tensor) -> Tensor:
        projected = F.normalize(self.projection(features), dim=-1)
        return F.linear(projected, F.normalize(self.prototypes, dim=-1))


def crop(images: Tensor, count: int, size: int, scale: tuple[float, float]) -> Tensor:
    """`count` crops of every image [B, 1, 8, 8], resized: [count * B, 1, size, size].

    Of a share of its area in `scale`, slightly turned; with another contrast, and noise.
    """
    batch = count * len(images)
    side = torch.empty(batch).uniform_(*scale).sqrt()
    shift = (2 * torch.rand(batch, 2) - 1) * (1 - side)[:, None]
    angle = 0.2 * (2 * torch.rand(batch) - 1)
    cos, sin = side * angle.cos(), side * angle.sin()
    turn = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(turn.to(images), [batch, 1, size, size], align_corners=False)
    repeated = images.repeat(count, 1, 1, 1)
    views = F.grid_sample(repeated, grid, padding_mode="border", align_corners=False)
    contrast = torch.empty(batch, 1, 1, 1).uniform_(0.7, 1.3).to(images)
    return contrast * views + 0.1 * torch.randn_like(views)


@torch.no_grad()
def centred(scores: Tensor) -> Tensor:
    """The teacher's distributions, [B, PROTOTYPES]: by Sinkhorn and Knopp, as DINOv3 centres them.

    Sharpened, and then made such that each prototype gets the same share of the images of all
    processes.
    """
    shares = ((scores - 1) / TEACHER_TEMPERATURE).exp()
    for _ in range(3):
        of_prototype = shares.sum(0, keepdim=True)
        if dist.is_initialized():
            dist.all_reduce(of_prototype)
        shares = shares / of_prototype
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def loss_of(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy of each crop with each global crop of the teacher but itself.

    Args:
        student: [(GLOBAL + LOCAL) * B, PROTOTYPES] scores, crop after crop.
        teacher: [GLOBAL * B, PROTOTYPES] distributions.
    """
    targets = teacher.chunk(GLOBAL)
    logs = (student / STUDENT_TEMPERATURE).log_softmax(-1).chunk(GLOBAL + LOCAL)
    terms = [
        -(target * log).sum(-1).mean()
        for i, target in enumerate(targets)
        for j, log in enumerate(logs)
        if i != j
    ]
    return torch.stack(terms).mean()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher: momentum times itself, the rest the student. Shards are averaged where they are."""
    for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
        own.lerp_(other, 1 - momentum)


@torch.no_grad()
def neighbours(model: Encoder, train: Sequence[Tensor], held_out: Sequence[Tensor]) -> float:
    """Share of held out images whose ten most similar training images vote for their label."""
    was_training = model.training
    model.eval()
    features = []
    for images, _ in (train, held_out):
        large = F.interpolate(images, GLOBAL_SIZE, mode="bilinear")
        features.append(F.normalize(model([large])[0], dim=-1))
    model.train(was_training)
    similar = (features[1] @ features[0].mT).topk(10)
    votes = torch.zeros(len(held_out[0]), 10).to(similar.values)
    votes.scatter_add_(1, train[1][similar.indices], (similar.values / 0.07).exp())
    return (votes.argmax(1) == held_out[1]).double().mean().item()


def in_memory_of_their_own(rows: KeptRows) -> KeptRows:
    """Those of a plan are parts of one tensor. A graph of symbolic sizes depends on where they
    begin, so that every block and every step would have one of its own."""
    return replace(rows, index=rows.index.clone(), slot=rows.slot.clone())


def wrap(model: Encoder, checkpointed: bool, compiled: bool, sharded: bool) -> None:
    """In this order: what is compiled knows what it saves, and what is sharded is compiled."""
    for i, block in enumerate(model.blocks):
        if checkpointed:
            block = model.blocks[i] = Checkpointed(block)
        if compiled:
            block.compile(fullgraph=True, dynamic=True)
        if sharded:
            fully_shard(block)
    if sharded:
        # No backward would shard the teacher's parameters again.
        fully_shard(model, reshard_after_forward=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--drop-path", type=float, default=0.4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)

    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    on_gpu = torch.cuda.is_available()
    sharded = world_size > 1
    if sharded:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    train_x, train_y, val_x, val_y = (tensor.to(device) for tensor in digits())
    mean, deviation = train_x.mean(), train_x.std()
    train_x, val_x = (train_x - mean) / deviation, (val_x - mean) / deviation
    student = Encoder(options.width, options.depth, options.drop_path).to(device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    drop_probs = [options.drop_path] * (2 * options.depth)
    wrap(student, checkpointed=True, compiled=options.compile, sharded=sharded)
    wrap(teacher, checkpointed=False, compiled=False, sharded=sharded)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, weight_decay=0.04)

    def report(epoch: int, text: str) -> None:
        right = neighbours(teacher, (train_x, train_y), (val_x, val_y))  # every rank takes part
        if rank == 0:
            print(f"epoch {epoch:2d}  {text}k-NN accuracy {right:.3f}", flush=True)

    report(0, "")
    global_batch = options.batch_size * world_size
    steps = options.epochs * (len(train_x) // global_batch)
    step = ran = total = 0
    torch.manual_seed(1 + rank)
    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        shuffle = torch.Generator().manual_seed(epoch)
        losses = []
        for batch in torch.randperm(len(train_x), generator=shuffle).split(global_batch):
            if len(batch) < global_batch:
                break
            progress, warm = step / steps, min(1.0, 5 * step / steps)  # a fifth to warm up
            falling = 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress - 0.2) / 0.8)
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * warm * falling
            images = train_x[batch[rank::world_size]]
            large = crop(images, GLOBAL, GLOBAL_SIZE, (0.7, 1.0))
            small = crop(images, LOCAL, LOCAL_SIZE, (0.3, 0.6))
            # sdkernels: one plan for all blocks and both sizes
            plan = list(DepthPlan.sample([len(large), len(small)], drop_probs, device=device))
            if options.compile:
                plan = [[in_memory_of_their_own(rows) for rows in branch] for branch in plan]
            with torch.no_grad():
                targets = centred(teacher([large])[1])
            loss = loss_of(student([large, small], plan)[1], targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            optimizer.step()
            follow(teacher, student, 1 - 0.02 * (0.5 + 0.5 * math.cos(math.pi * progress)))
            losses.append(loss.detach())
            step += 1
            for branch in plan:
                for rows, x in zip(branch, (large, small), strict=True):
                    tokens = (x.shape[-1] // PATCH) ** 2  # a sample weighs its tokens
                    ran, total = ran + rows.k * tokens, total + rows.batch * tokens
        report(epoch, f"loss {torch.stack(losses).mean():.4f}  ")
    if rank == 0:
        saved, seconds = 1 - ran / total, time.perf_counter() - start
        print(f"saved {saved:.0%} of the computation of the branches; {seconds:.1f} s", flush=True)
    if sharded:
        dist.barrier()  # rank 0 has printed: nobody leaves while another one is at work
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors are so small that several would wait for each other
    main()
