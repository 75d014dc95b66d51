"""The U-Net of diffusion models: residual blocks under group norm, attention at chosen resolutions.

The skeleton is DDPM's (Ho et al. 2020, appendix B). By default time scales and shifts every block and the blocks themselves
resample, as in ADM (Dhariwal & Nichol 2021, arXiv:2105.05233, section 3), but without ADM's attention between the middle
blocks, which `middle_attention` adds. With middle_attention=true, scale_shift_norm=false, resblock_updown=false,
time_frequency=1 and min_time_frequency=1e-4 it is the CIFAR-10 network of torchcfm (configs/cifar10.yaml), which is ADM's code
with those two options off.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import Conditioning
from models.layers import (
    Block,
    ConvResampling,
    check_counts,
    check_dropout,
    group_norm,
    zero_init,
)


class UNet(nn.Module):
    """net(x [B, C, H, W], t [B] in [0, 1], y [B] or None) -> [B, C, H, W]."""

    max_prompt_bytes = None  # knows labels only

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
        time_frequency: float = 1000.0,
        num_classes: int | None = None,
        two_times: bool = False,
        middle_attention: bool = False,
        scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        min_time_frequency: float = 0.1,
    ):
        """image_shape: (C, H, W). width: channels of the first level. channel_mult: multiple of it per level, each level
        half the resolution of the one before. blocks_per_level: residual blocks on the way down; one more on the way up.
        attention_resolutions: heights of the levels with attention, in patches. head_channels: channels of an attention head.
        dropout: share of the features that each residual block sets to 0 in training.
        patch: the first level works on patches of this side as channels, which costs patch^2 times less.
        time_frequency: highest angular frequency of the features of t; lower is smoother in time, for fewer steps.
        num_classes: None for an unconditional network; label num_classes is the null label.
        two_times: t_next is an input, and the prediction is the mean velocity from t to t_next, a flow map.
        middle_attention: attention between the two blocks at the lowest resolution, whether that is named or not.
        scale_shift_norm: time scales and shifts normalized features; false: it is added to them before they are normalized.
        resblock_updown: residual blocks change the resolution; false: single convolutions do.
        min_time_frequency: slowest feature of t in radians.
        """
        super().__init__()
        _check(image_shape, width, channel_mult, blocks_per_level, head_channels, dropout, patch, num_classes)
        channels = image_shape[0] * patch**2
        resolutions = [image_shape[1] // patch // 2**level for level in range(len(channel_mult))]
        with_attention = _check_attention(image_shape, resolutions, width, channel_mult, attention_resolutions, head_channels)
        deepest = width * channel_mult[-1]
        if middle_attention and deepest % head_channels:
            raise ValueError(f"head_channels={head_channels}: must divide the {deepest} channels of the middle, with attention")
        self.num_classes, self.null, self.patch = num_classes, num_classes, patch
        embedding = 4 * width
        self.two_times = two_times
        self.conditioning = Conditioning(embedding, num_classes, two_times, time_frequency, min_time_frequency, features=width)

        def block(c_in: int, c_out: int, attention: bool) -> Block:
            heads = c_out // head_channels if attention else 0
            return Block(c_in, c_out, embedding, dropout, heads, scale_shift=scale_shift_norm)

        def resampling(channels: int, direction: str) -> nn.Module:
            if not resblock_updown:
                return ConvResampling(channels, direction)
            return Block(channels, channels, embedding, dropout, resampling=direction, scale_shift=scale_shift_norm)

        c = width
        self.conv_in = nn.Conv2d(channels, c, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [c]
        for level, mult in enumerate(channel_mult):
            for _ in range(blocks_per_level):
                self.down.append(block(c, width * mult, with_attention[level]))
                c = width * mult
                skips.append(c)
            if level + 1 < len(channel_mult):
                self.down.append(resampling(c, "down"))
                skips.append(c)
        self.middle = nn.ModuleList([block(c, c, middle_attention or with_attention[-1]), block(c, c, False)])
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for _ in range(blocks_per_level + 1):
                self.up.append(block(c + skips.pop(), width * mult, with_attention[level]))
                c = width * mult
            if level > 0:
                self.up.append(resampling(c, "up"))
        self.norm_out = group_norm(c)
        self.conv_out = zero_init(nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor:
        emb = F.silu(self.conditioning(t, y, t_next))  # [B, 4 width]
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.up:
            h = block(h if block.resampling else torch.cat([h, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


def _check(image_shape, width, channel_mult, blocks_per_level, head_channels, dropout, patch, num_classes) -> None:
    check_counts(
        width=width, blocks_per_level=blocks_per_level, head_channels=head_channels, patch=patch, num_classes=num_classes
    )
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
    check_dropout(dropout)


def _check_attention(image_shape, resolutions, width, channel_mult, attention_resolutions, head_channels) -> list[bool]:
    """Whether each level has attention. Raises ValueError for a resolution of no level, and for heads that do not fit."""
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
    return [resolution in attention_resolutions for resolution in resolutions]
