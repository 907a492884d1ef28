"""Layer dropout per sample: a small language model, whole layers on the kept sequences only.

    python examples/layer_dropout.py

The text is made on the spot: sums in words ("four plus three is seven."), a character a token. One
set of kept sequences serves attention and MLP of a layer, both multiplied by 1 / (1 - p); the rate
rises linearly with depth and falls over training. The rows follow from the number of the step, so
that a stopped run goes on exactly (--checkpoint).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkernels import patch

NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]  # fmt: skip
LETTERS = " ." + "".join(sorted(set("".join(NUMBERS) + "plusis")))
CONTEXT = 48


def make_text(sentences: int, seed: int) -> Tensor:
    """Sums of two numbers below ten, in words, as numbers of letters."""
    generator = random.Random(seed)
    words = []
    for _ in range(sentences):
        a, b = generator.randrange(10), generator.randrange(10)
        words.append(f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}. ")
    return torch.tensor([LETTERS.index(letter) for letter in "".join(words)])


class Attention(nn.Module):
    """Causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """As plain as in any decoder: nothing in it knows of dropped samples."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    def __init__(self, width: int = 48, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), width)
        self.position = nn.Parameter(0.1 * torch.randn(CONTEXT, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, len(LETTERS)))

    def forward(self, letters: Tensor) -> Tensor:
        x = self.letters(letters) + self.position[: letters.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def sequences(text: Tensor, batch: int, step: int) -> Tensor:
    """A batch of pieces of the text, [B, CONTEXT + 1], which follows from the step."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT, (batch, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


def loss_of(model: nn.Module, pieces: Tensor) -> Tensor:
    return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


@torch.no_grad()
def go_on(model: nn.Module, start: str, letters: int = 60) -> str:
    """The text that the model finds likeliest, letter by letter."""
    model.eval()
    text = [LETTERS.index(letter) for letter in start]
    for _ in range(letters):
        text.append(int(model(torch.tensor([text[-CONTEXT:]]))[0, -1].argmax()))
    model.train()
    return "".join(LETTERS[i] for i in text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.5, help="of the last layer, at the start")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--checkpoint", type=Path, help="written at the end, read at the start")
    parser.add_argument("--stop-after", type=int, help="steps of this run")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    text = make_text(4000, seed=0)
    model = LanguageModel(depth=options.depth)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    report = patch(model, rows="block", drop_probs=lambda progress: options.rate * (1 - progress))
    print(report)
    first = 0
    if options.checkpoint and options.checkpoint.exists():
        saved = torch.load(options.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        report.load_state_dict(saved["report"])
        first = saved["step"]

    start, total = time.perf_counter(), 0.0
    last = min(options.steps, first + (options.stop_after or options.steps))
    for step in range(first, last):
        report.progress = step / options.steps
        pieces = sequences(text, options.batch_size, step)
        with report.use(report.plan_for_step(seed=1, step=step, batch=options.batch_size)):
            loss = loss_of(model, pieces)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        total += loss.item()
        if (step + 1) % 50 == 0 or step + 1 == last:
            count = (step + 1) % 50 or 50
            print(
                f"step {step + 1:4d}  loss {total / count:.4f}  last layer dropped with "
                f"{report.drop_probs[-1]:.2f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            total = 0.0
    if options.checkpoint:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "report": report.state_dict(), "step": last}, options.checkpoint)
    print(go_on(model, "two plus "))


if __name__ == "__main__":
    main()
