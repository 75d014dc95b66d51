"""The U-Net of diffusion models: residual blocks with adaptive group norm, attention at chosen resolutions.

The ADM network (Dhariwal & Nichol 2021, arXiv:2105.05233, section 3) on the skeleton of DDPM (Ho et al. 2020) with the
residual up- and downsampling of DDPM++ (Song et al. 2021, arXiv:2011.13456, appendix H).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """net(x [B, C, H, W], t [B] in [0, 1], y [B] or None) -> [B, C, H, W]."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        head_channels: int = 64,
        dropout: float = 0.0,
        patch: int = 1,
        num_classes: int | None = None,
    ):
        """image_shape: (C, H, W). width: channels of the first level. channel_mult: multiple of it per level, each level
        half the resolution of the one before. attention_resolutions: in pixels of height; each must be that of a level.
        patch: the first level works on patches of this side as channels, which costs patch^2 times less.
        num_classes: None for an unconditional network; label num_classes is the null label.
        """
        super().__init__()
        _check(image_shape, width, channel_mult, blocks_per_level, head_channels, dropout, patch, num_classes)
        channels, height = image_shape[0] * patch**2, image_shape[1] // patch
        resolutions = [height // 2**level for level in range(len(channel_mult))]
        for resolution in attention_resolutions:
            if resolution not in resolutions:
                raise ValueError(
                    f"attention_resolutions={list(attention_resolutions)}: no level has {resolution} pixels; "
                    f"the levels of {image_shape[1]}x{image_shape[2]} images have {', '.join(map(str, resolutions))}"
                )
        for resolution, mult in zip(resolutions, channel_mult, strict=True):
            if resolution in attention_resolutions and width * mult % head_channels:
                raise ValueError(
                    f"head_channels={head_channels}: must divide the {width * mult} channels of the level with attention at "
                    f"{resolution} pixels"
                )
        self.num_classes, self.patch = num_classes, patch
        embedding = 4 * width
        self.frequencies = width
        self.time_mlp = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label_embedding = nn.Embedding(num_classes + 1, embedding) if num_classes is not None else None

        def block(c_in: int, c_out: int, resolution: int, resample: str = "") -> Block:
            heads = c_out // head_channels if resolution in attention_resolutions and not resample else 0
            return Block(c_in, c_out, embedding, dropout, heads, resample)

        c = width
        self.conv_in = nn.Conv2d(channels, c, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [c]
        for level, mult in enumerate(channel_mult):
            for _ in range(blocks_per_level):
                self.down.append(block(c, width * mult, resolutions[level]))
                c = width * mult
                skips.append(c)
            if level + 1 < len(channel_mult):
                self.down.append(block(c, c, resolutions[level], resample="down"))
                skips.append(c)
        self.middle = nn.ModuleList([block(c, c, resolutions[-1]), Block(c, c, embedding, dropout)])
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for _ in range(blocks_per_level + 1):
                self.up.append(block(c + skips.pop(), width * mult, resolutions[level]))
                c = width * mult
            if level > 0:
                self.up.append(block(c, c, resolutions[level], resample="up"))
        self.norm_out = group_norm(c)
        self.conv_out = _zero(nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_mlp(sinusoidal_embedding(t, self.frequencies))  # [B, 4 width]
        if self.label_embedding is not None:
            if y is None:
                raise ValueError("this network is class-conditional: it needs labels y [B]")
            emb = emb + self.label_embedding(y)
        emb = F.silu(emb)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.up:
            h = block(h if block.resample else torch.cat([h, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class Block(nn.Module):
    """Residual block, optionally resampling by 2 and followed by self-attention: [B, c_in, H, W] -> [B, c_out, H', W']."""

    def __init__(self, c_in: int, c_out: int, embedding: int, dropout: float, heads: int = 0, resample: str = ""):
        super().__init__()
        self.resample = resample
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(_resample(F.silu(self.norm1(x)), self.resample))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        h = self.skip(_resample(x, self.resample)) + self.conv2(self.dropout(h))
        return self.attention(h)


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of [B, C, H, W], residual."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v)  # [B, heads, HW, C / heads]
        return x + self.proj(out.transpose(-1, -2).reshape(b, c, h, w))


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Features [B, dim] of t [B] in [0, 1]: cosines and sines of 1000 t at geometric frequencies from 1 to 1e-4.

    The positions of Vaswani et al. 2017 (arXiv:1706.03762, section 3.5) as DDPM uses them for 1000 timesteps.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10_000) / half))
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm over at most 32 groups of at least 4 channels."""
    groups = min(32, channels // 4)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


def _resample(x: Tensor, how: str) -> Tensor:
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if how == "up" else x


def _zero(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def _check(image_shape, width, channel_mult, blocks_per_level, head_channels, dropout, patch, num_classes) -> None:
    counts = {"width": width, "blocks_per_level": blocks_per_level, "head_channels": head_channels, "patch": patch}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
    if not channel_mult or not all(isinstance(m, int) and m >= 1 for m in channel_mult):
        raise ValueError(f"channel_mult={channel_mult!r}: must be a list of whole numbers of at least 1")
    if width % 4:
        raise ValueError(f"width={width}: must be a multiple of 4, for group norm")
    divisor = patch * 2 ** (len(channel_mult) - 1)
    if image_shape[1] % divisor or image_shape[2] % divisor:
        raise ValueError(
            f"channel_mult={list(channel_mult)}, patch={patch}: these levels need an image side divisible by {divisor}, "
            f"the images are {image_shape[1]}x{image_shape[2]}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be in [0, 1)")
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise ValueError(f"num_classes={num_classes!r}: must be a whole number of at least 1, or null")
