"""The U-Net of DDPM's drawing: torchcfm's CIFAR-10 network, and its parameters counted layer by layer."""

import torch
from small_networks import SMALL, attention_heights

import models
from configs import loading
from models.unet import UNet


def test_the_network_of_cifar10_is_that_of_torchcfm():
    """35,746,307 parameters and six attentions, as torchcfm 1.0.7 counts in its UNetModelWrapper of this recipe."""
    config = loading.load("configs/cifar10.yaml")
    with torch.device("meta"):  # shapes only
        net = models.build(config.model.name, (3, 32, 32), config.model.args)
    assert isinstance(net, UNet)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    small = models.build("unet", (3, 32, 32), config.model.args | {"width": 32, "head_channels": 16})
    assert attention_heights(small, (3, 32, 32)) == [16, 16, 4, 16, 16, 16]


def conv(c_in: int, c_out: int, side: int = 3) -> int:
    return (side**2 * c_in + 1) * c_out


def residual(c_in: int, c_out: int, emb: int) -> int:
    """Parameters of a residual block to which time is added: two norms, two convolutions, a projection of time, the skip."""
    skip = conv(c_in, c_out, 1) if c_in != c_out else 0
    return 2 * c_in + conv(c_in, c_out) + (emb + 1) * c_out + 2 * c_out + conv(c_out, c_out) + skip


def test_parameter_count_of_ddpm_unet():
    """Layer by layer for two levels of 8 and 16 channels, one block each, attention in the middle only."""
    args = SMALL["unet"] | {"width": 8, "attention_resolutions": [], "middle_attention": True, "scale_shift_norm": False}
    net = models.build("unet", (3, 8, 8), args | {"resblock_updown": False})
    emb = 32
    time = (8 + 1) * emb + (emb + 1) * emb
    down = conv(3, 8) + residual(8, 8, emb) + conv(8, 8) + residual(8, 16, emb)
    middle = 2 * residual(16, 16, emb) + 2 * 16 + conv(16, 48, 1) + conv(16, 16, 1)
    up = residual(16 + 16, 16, emb) + residual(16 + 8, 16, emb) + conv(16, 16)  # skips: 16, and 8 from the downsampling
    up += residual(16 + 8, 8, emb) + residual(8 + 8, 8, emb)
    assert sum(p.numel() for p in net.parameters()) == time + down + middle + up + 2 * 8 + conv(8, 3)
