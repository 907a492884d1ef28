"""Blocks of other packages, where they are installed: patched, and equal to their originals."""

import importlib
from collections.abc import Callable
from typing import Any

import libraries
import pytest
import torch
from libraries import is_installed
from torch import nn

import sdkernels


def load(name: str) -> Any:
    if is_installed("torchvision"):  # which others import, and cannot without what this does
        libraries.load("torchvision")
    pytest.importorskip(name.partition(".")[0])
    return importlib.import_module(name)


def monai_swin() -> nn.Module:
    block: nn.Module = load("monai.networks.nets.swin_unetr").SwinTransformerBlock(
        12, 2, (2, 2, 2), (1, 1, 1), drop_path=0.3
    )
    return block


def nnunet_block() -> nn.Module:
    block: nn.Module = load("dynamic_network_architectures.building_blocks.residual").BasicBlockD(
        nn.Conv2d, 4, 8, 3, 2, norm_op=nn.InstanceNorm2d, norm_op_kwargs={}, nonlin=nn.ReLU,
        stochastic_depth_p=0.3,
    )  # fmt: skip
    return block


def vit_pytorch_cct() -> nn.Module:
    cct = load("vit_pytorch.cct")
    block: nn.Module = cct.TransformerEncoderLayer(8, 2, 16, drop_path_rate=0.3)
    return block


def hiera_block() -> nn.Module:
    block: nn.Module = load("hiera.hiera").HieraBlock(8, 8, 2, drop_path=0.3)
    return block


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "monai": (monai_swin, (torch.randn(2, 4, 4, 4, 12), None)),
    "nnunet": (nnunet_block, (torch.randn(2, 4, 8, 8),)),
    "vit-pytorch": (vit_pytorch_cct, (torch.randn(2, 5, 8),)),
    "hiera": (hiera_block, (torch.randn(2, 8, 8),)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "inputs"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_other_packages(make, inputs):
    model = make().double()
    inputs = [x if x is None else x.double() for x in inputs]
    report = sdkernels.patch(model)
    assert not report.left
    assert [entry.name for entry in report.patched] == [""]
    assert set(report.drop_probs) == {0.3}
    (checked,) = report.check(*inputs)
    assert checked.holds, checked.reason
    assert checked.difference is not None
    assert checked.difference < 1e-10
