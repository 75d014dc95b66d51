"""Networks small enough for tests, whose output is not zero."""

import torch

import models

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
