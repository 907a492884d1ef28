"""DistributedDataParallel with compacted stochastic depth, on one machine or several.

    torchrun --nproc-per-node=2 examples/ddp_digits.py --epochs 10 --checkpoint digits.pt
    torchrun --nproc-per-node=2 examples/ddp_digits.py --epochs 20 --checkpoint digits.pt

The second call goes on where the first one ended: the rows of a step follow from its number and
from the rank, so a checkpoint needs no state of any generator for them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import SmallViT, accuracy, digits
from torch.nn.parallel import DistributedDataParallel

from sdkernels import DepthPlan


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="read if it exists, written every epoch")
    options = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")

    torch.manual_seed(options.seed)
    train_x, train_y, val_x, val_y = (tensor.to(device) for tensor in digits())
    model = SmallViT().to(device)
    # No find_unused_parameters: a branch that keeps no row gives its parameters zero gradients.
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)

    first_epoch = step = ran = drawn = 0
    if options.checkpoint and options.checkpoint.exists():
        state = torch.load(options.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch, step = state["epoch"], state["step"]

    global_batch = options.batch_size * world_size
    for epoch in range(first_epoch, options.epochs):
        shuffle = torch.Generator().manual_seed(options.seed + epoch)
        order = torch.randperm(len(train_x), generator=shuffle).to(device)
        total = torch.zeros((), device=device)
        for start in range(0, len(order) - global_batch + 1, global_batch):
            batch = order[start : start + global_batch][rank::world_size]
            # Other rows on every rank; `rank=0` on all of them would make the rows equal.
            plan = DepthPlan.for_step(
                options.seed, step, len(batch), model.drop_probs, device=device
            )
            loss = F.cross_entropy(replica(train_x[batch], rows=plan), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            step += 1
            ran += sum(rows.k for rows in plan)
            drawn += sum(rows.batch for rows in plan)
        dist.all_reduce(total)
        if rank == 0:
            mean = total.item() / (len(order) // global_batch) / world_size
            right = accuracy(model, val_x, val_y)
            print(f"epoch {epoch + 1:2d}  loss {mean:.4f}  accuracy {right:.3f}", flush=True)
            if options.checkpoint:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "epoch": epoch + 1, "step": step}, options.checkpoint)
    if rank == 0 and drawn:
        print(f"saved {1 - ran / drawn:.0%} of the computation of the branches", flush=True)
    dist.barrier()  # rank 0 has printed: nobody leaves while another one is at work
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
