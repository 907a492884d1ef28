"""Draws the figures of README and docs from recorded runs: ``python docs/figures/draw.py``.

Opaque white with dark ink: the same picture reads on light and dark pages.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RUN = HERE.parents[1] / "benchmarks/results/cpu-epyc-2-cores/standard/results.json.gz"
BLOCK = "vit-D192-N197"
BATCH = 20
# Below this keep, DINOv2's `max(int(B * keep), 1)` keeps another number of samples than the others.
LOWEST_KEEP = 0.25
# provider of the run: name, colour (told apart by colour-blind readers), marker
LINES = {
    "naive": ("masked (torchvision, timm)", "#777777", "s"),
    "dinov2": ("DINO style (gather, index_add)", "#D55E00", "^"),
    "fused": ("sdkernels", "#0072B2", "o"),
}


def sweep() -> list[dict[str, Any]]:
    """The recorded cases of one block at every keep, by falling keep."""
    cases = [
        case
        for case in json.loads(gzip.decompress(RUN.read_bytes()))["cases"]
        if case["name"].startswith(f"block-{BLOCK}-B{BATCH}-keep")
        and case["name"].endswith("-fp32")
        and case["keep"] >= LOWEST_KEEP
    ]
    return sorted(cases, key=lambda case: -case["keep"])


def speed_up() -> Figure:
    """Speed-up of a ViT block over masking, against keep."""
    cases = sweep()
    keeps = [case["keep"] for case in cases]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    ideal = [1 / keep for keep in keeps]
    axes.plot(keeps, ideal, "--", color="black", linewidth=1, label="ideal, 1 / keep")
    for provider, (label, colour, marker) in LINES.items():
        values = [case["providers"][provider]["speedup"] for case in cases]
        axes.plot(keeps, values, color=colour, marker=marker, markersize=5, label=label)
    axes.invert_xaxis()
    axes.set(xlabel="keep: share of the samples that a branch runs on", ylabel="speed-up (x)")
    axes.set_ylim(0.8, 4.2)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    speed_up().savefig(HERE / "speed-up.png", dpi=150)
