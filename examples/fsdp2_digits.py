"""FSDP2 (fully_shard) with compacted stochastic depth.

torchrun --nproc-per-node=2 examples/fsdp2_digits.py --epochs 10 --bf16
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import SmallViT, accuracy, digits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    options = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda" if on_gpu else "cpu")
    mesh = init_device_mesh(device.type, (world_size,))

    torch.manual_seed(options.seed)
    train_x, train_y, val_x, val_y = (tensor.to(device) for tensor in digits())
    model = SmallViT().to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if options.bf16 else None)
    # A branch with its norm and layer scale is one unit. Every rank runs every branch, on an empty
    # batch if it keeps no row, so that all of them take part in gathering the parameters.
    for branch in model.branches:
        fully_shard(branch, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)

    # The weights are made. From here on each rank draws its own rows, and the same in every run.
    torch.manual_seed(options.seed + 1 + rank)
    global_batch = options.batch_size * world_size
    for epoch in range(options.epochs):
        shuffle = torch.Generator().manual_seed(options.seed + epoch)
        order = torch.randperm(len(train_x), generator=shuffle).to(device)
        total = torch.zeros((), device=device)
        for start in range(0, len(order) - global_batch + 1, global_batch):
            batch = order[start : start + global_batch][rank::world_size]
            loss = F.cross_entropy(model(train_x[batch]).float(), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        right = accuracy(model, val_x, val_y)  # every rank takes part
        if rank == 0:
            mean = total.item() / (len(order) // global_batch) / world_size
            print(f"epoch {epoch + 1:2d}  loss {mean:.4f}  accuracy {right:.3f}", flush=True)
    if rank == 0:
        share = sum(model.drop_probs) / len(model.drop_probs)
        print(f"saved {share:.0%} of the computation of the branches, on average", flush=True)
    dist.barrier()  # rank 0 has printed: nobody leaves while another one is at work
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
