"""Models of timm, torchvision and transformers that together have every supported block.

The tests go through them in a tiny size, the benchmark of patched classes in a wide one.
"""

from dataclasses import replace

from benchmarks.providers.zoo.net import Net, output_of
from benchmarks.providers.zoo.sizes import TINY, WIDE, Sizes
from benchmarks.providers.zoo.timm_nets import maxxvit, timm_nets, timm_vit
from benchmarks.providers.zoo.torchvision_nets import torchvision_nets
from benchmarks.providers.zoo.transformers_nets import transformers_nets

__all__ = ["TINY", "WIDE", "Net", "Sizes", "maxxvit", "nets", "output_of", "timm_vit"]


def nets(sizes: Sizes) -> dict[str, Net]:
    """All the models in one size. A library is imported when a model of it is made."""
    made = timm_nets(sizes) | torchvision_nets(sizes) | transformers_nets(sizes)
    return {name: replace(net, image=sizes.image) for name, net in made.items()}
