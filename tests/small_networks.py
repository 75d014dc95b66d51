"""Networks small enough for tests, whose output is not zero, and what is to be seen of them."""

import torch
from torch import nn

import models
from models.layers import Attention

SMALL = {
    "unet": {"width": 16, "channel_mult": [1, 2], "blocks_per_level": 1, "attention_resolutions": [4], "head_channels": 16},
    "mini_unet": {"width": 16, "head_channels": 16, "patch": 1},
    "dit": {"width": 16, "depth": 1, "heads": 2},
    "mlp": {"width": 16, "depth": 2},
}


def build(name: str, **args) -> torch.nn.Module:
    """A small network whose output is not zero."""
    torch.manual_seed(0)
    net = models.build(name, (1, 8, 8), {**SMALL[name], "num_classes": 3, **args})
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def inputs(n: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=g), torch.rand(n, generator=g), torch.arange(n) % 4


def attention_heights(net: nn.Module, shape: tuple[int, int, int]) -> list[int]:
    """The height of the image at each attention layer that the forward pass goes through."""
    heights: list[int] = []
    for module in net.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda m, inputs, out: heights.append(inputs[0].shape[2]))
    net(torch.zeros(1, *shape), torch.zeros(1))
    return heights
