"""A small U-Net for 28x28 images that trains on a laptop: two resolutions, additive skips, labels or prompts or neither."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models import text_encoder
from models.conditioning import Conditioning
from models.layers import (
    Block,
    CrossAttention,
    check_counts,
    check_dropout,
    group_norm,
    zero_init,
)
from models.text_encoder import EncodedText, TextEncoder


class MiniUNet(nn.Module):
    """net(x [B, C, H, W], t [B] in [0, 1], y) -> [B, C, H, W]; y: labels [B], tokens [B, max_prompt_bytes] or None."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int = 64,
        blocks_per_level: int = 1,
        head_channels: int = 32,
        patch: int = 2,
        time_frequency: float = 1000.0,
        num_classes: int | None = None,
        max_prompt_bytes: int | None = None,
        two_times: bool = False,
        dropout: float = 0.0,
    ):
        """image_shape: (C, H, W), sides divisible by 2 patch. width: channels at the first resolution, where a pixel is a
        patch of this side; twice as many at the second, half the resolution, which has self-attention.
        blocks_per_level: residual blocks of each resolution. head_channels: channels of an attention head.
        time_frequency: highest angular frequency of the features of t; lower is smoother in time, for fewer steps.
        num_classes: for labels; label num_classes is the null label. max_prompt_bytes: for prompts of at most so many bytes,
        read by cross-attention; the empty prompt is the null condition. At most one of the two.
        two_times: t_next is an input, and the prediction is the mean velocity from t to t_next, a flow map.
        dropout: share of the features that each block sets to 0 in training.
        """
        super().__init__()
        _check(image_shape, width, blocks_per_level, head_channels, patch, num_classes, max_prompt_bytes, dropout)
        self.num_classes, self.max_prompt_bytes, self.patch = num_classes, max_prompt_bytes, patch
        self.null = text_encoder.PADDING if max_prompt_bytes else num_classes
        channels, emb, deep = image_shape[0] * patch**2, 4 * width, 2 * width
        self.two_times = two_times
        self.conditioning = Conditioning(emb, num_classes, two_times, time_frequency, features=width)
        if max_prompt_bytes:
            self.text_encoder = TextEncoder(max_prompt_bytes, deep)
            self.text_summary = nn.Linear(deep, emb)
            self.text_attention = CrossAttention(deep, deep, deep // head_channels)

        def blocks(c: int, heads: int = 0) -> nn.ModuleList:
            return nn.ModuleList(Block(c, c, emb, dropout, heads) for _ in range(blocks_per_level))

        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.before = blocks(width)
        self.down = Block(width, deep, emb, dropout, resampling="down")
        self.middle = blocks(deep, deep // head_channels)
        self.up = Block(deep, width, emb, dropout, resampling="up")
        self.after = blocks(width)
        self.norm_out = group_norm(width)
        self.conv_out = zero_init(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | EncodedText | None = None, t_next: Tensor | None = None) -> Tensor:
        """y: also what `encode_condition` returns."""
        emb = self.conditioning(t, y, t_next)  # [B, 4 width]
        if self.max_prompt_bytes:
            if y is None:
                raise ValueError("this network reads prompts: it needs tokens y [B, max_prompt_bytes]")
            states, mask = y if isinstance(y, EncodedText) else self.text_encoder(y)
            emb = emb + self.text_summary(states[:, 0])
        emb = F.silu(emb)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for block in self.before:
            h = block(h, emb)
        skip = h
        h = self.down(h, emb)
        if self.max_prompt_bytes:
            h = self.text_attention(h, states, mask)
        for block in self.middle:
            h = block(h, emb)
        h = self.up(h, emb) + skip
        for block in self.after:
            h = block(h, emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Tokens int64 [N, max_prompt_bytes] of N prompts. Raises ValueError for one that is longer than max_prompt_bytes."""
        return text_encoder.encode(prompts, self.max_prompt_bytes)

    def encode_condition(self, y: Tensor) -> Tensor | EncodedText:
        """The features of the tokens y, which `forward` takes in their place; labels as they are."""
        return self.text_encoder(y) if self.max_prompt_bytes else y


def _check(image_shape, width, blocks_per_level, head_channels, patch, num_classes, max_prompt_bytes, dropout) -> None:
    check_counts(
        width=width, blocks_per_level=blocks_per_level, head_channels=head_channels, patch=patch, num_classes=num_classes,
        max_prompt_bytes=max_prompt_bytes,
    )  # fmt: skip
    check_dropout(dropout)
    if width % 4:
        raise ValueError(f"width={width}: must be a multiple of 4, for group norm")
    if 2 * width % head_channels:
        raise ValueError(f"head_channels={head_channels}: must divide 2 width = {2 * width}")
    if num_classes and max_prompt_bytes:
        raise ValueError(
            f"num_classes={num_classes}, max_prompt_bytes={max_prompt_bytes}: labels or prompts, not both; set one to null"
        )
    if image_shape[1] % (2 * patch) or image_shape[2] % (2 * patch):
        raise ValueError(
            f"patch={patch}: needs an image side divisible by {2 * patch}, the images are {image_shape[1]}x{image_shape[2]}"
        )
