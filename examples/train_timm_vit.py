"""A timm ViT on handwritten digits, with stochastic depth that computes only what it keeps.

    python examples/train_timm_vit.py --epochs 30

Plain timm training but for the lines marked "sdkernels". One of them is needed; the others make the
rows a function of the step's number, whatever else draws random numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from digits import accuracy, digits

import sdkernels  # sdkernels

try:
    import timm
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
except RuntimeError as error:  # timm imports torchvision
    if "torchvision::" not in str(error):
        raise
    raise SystemExit(
        f"{error}: this torchvision was built for another build of PyTorch (PyPI's is for CUDA, "
        f"this is torch {torch.__version__}); install the one that belongs to it: pip install "
        "--force-reinstall --no-deps torchvision --index-url https://download.pytorch.org/whl/cpu"
    ) from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--drop-path", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    train_x, train_y, val_x, val_y = (tensor.to(device) for tensor in digits())
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=96,
        depth=6,
        num_heads=4,
        class_token=False,
        global_pool="avg",
        drop_path_rate=options.drop_path,
    ).to(device)
    # Larger than timm's 0.02: a mean over the tokens sees no order, and this is a short training.
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    report = sdkernels.patch(model)  # sdkernels: the one line that is needed
    print(report)  # sdkernels (optional)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    steps = options.epochs * -(-len(train_x) // options.batch_size)
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 10, t_in_epochs=False)

    step, start = 0, time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        losses = []
        order = torch.randperm(len(train_x), device=device)
        for batch in order.split(options.batch_size):
            schedule.step_update(step)
            # The rows of all branches, in one copy to the device. Without a plan, each branch
            # draws its own from PyTorch's generator.
            plan = report.plan_for_step(options.seed, step, len(batch))  # sdkernels (optional)
            with report.use(plan):  # sdkernels (optional)
                loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            step += 1
        mean, right = torch.stack(losses).mean(), accuracy(model, val_x, val_y)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch:2d}  loss {mean:.4f}  accuracy {right:.3f}  {seconds:.1f} s")


if __name__ == "__main__":
    main()
