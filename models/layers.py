"""Pieces that networks are made of: residual blocks, attention, dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Residual block, optionally resampling by 2 and followed by self-attention: [B, c_in, H, W] -> [B, c_out, H', W'].

    The embedding of time [B, embedding] scales and shifts the output of the second group norm (the adaptive group norm of
    Dhariwal & Nichol 2021, arXiv:2105.05233); with scale_shift=False it is added before that norm, as in DDPM (Ho et al. 2020).
    """

    def __init__(
        self, c_in: int, c_out: int, embedding: int, dropout: float, heads: int = 0, resampling: str = "",
        scale_shift: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.resampling, self.scale_shift = resampling, scale_shift
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * c_out if scale_shift else c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(resample(F.silu(self.norm1(x)), self.resampling))
        modulation = self.modulation(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        else:
            h = F.silu(self.norm2(h + modulation))
        # A 1x1 convolution and nearest-neighbor upsampling commute; the convolution first is four times cheaper.
        up = self.resampling == "up"
        skip = resample(self.skip(x), "up") if up else self.skip(resample(x, self.resampling))
        h = skip + self.conv2(self.dropout(h))
        return self.attention(h)


class ConvResampling(nn.Module):
    """A convolution that halves the side, or doubles it after nearest-neighbor upsampling: [B, C, H, W] -> [B, C, H', W'].

    The resampling of DDPM (Ho et al. 2020, appendix B); the embedding is not used.
    """

    def __init__(self, channels: int, resampling: str):
        super().__init__()
        self.resampling = resampling
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if resampling == "down" else 1, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(resample(x, "up") if self.resampling == "up" else x)


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of [B, C, H, W], residual."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = tokens(self.qkv(self.norm(x))).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v)  # [B, heads, HW, C / heads]
        return x + self.proj(pixels(out, x))


class CrossAttention(nn.Module):
    """The pixels of [B, C, H, W] attend to states [B, L, c] where mask [B, L] is true; residual."""

    def __init__(self, channels: int, state_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = nn.Linear(state_channels, 2 * channels)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        q = tokens(self.query(self.norm(x))).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(states).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, mask[:, None, None, :])  # [B, heads, HW, C / heads]
        return x + self.proj(pixels(out, x))


SHORT = 256  # tokens: up to so many, torch's attention kernel for CPUs is slower than two matrix products


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q [B, heads, N, D] and k, v [B, heads, L, D], where mask [B, 1, 1, L] is true.

    Torch's fused kernel, but for short sequences on a CPU, where its backward pass is 2 to 6 times slower than matrix products
    (docs/performance.md).
    """
    if q.device.type != "cpu" or k.shape[2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, heads, N, L]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def tokens(x: Tensor) -> Tensor:
    """Pixels as tokens: [B, C, H, W] -> [B, HW, C], contiguous, as the fused kernels of attention require of the last
    dimension; else torch falls back to one that stores all [HW, HW] weights."""
    return x.flatten(2).transpose(1, 2).contiguous()


def pixels(out: Tensor, like: Tensor) -> Tensor:
    """Tokens of heads as pixels: [B, heads, HW, C / heads] -> [B, C, H, W], in the memory layout of `like`."""
    if like.is_contiguous(memory_format=torch.channels_last):
        return out.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, like.shape[2:])
    return out.transpose(-1, -2).reshape(like.shape)


class Dropout(nn.Module):
    """Zeroes elements with probability p in training and divides the others by 1 - p (Srivastava et al. 2014, JMLR 15).

    On a CPU torch draws 64 bits an element on one thread, 6% of a step (docs/performance.md); here four elements share them.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        mask = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * mask.to(x.dtype).div_(1 - self.p)


def check_counts(**counts: int | None) -> None:
    """Raises ValueError for a size that is not a whole number of at least 1; those of the condition may also be None."""
    for name, value in counts.items():
        optional = name in ("num_classes", "max_prompt_bytes")
        if not (optional and value is None) and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name}={value!r}: must be a whole number of at least 1{', or null' if optional else ''}")


def check_dropout(dropout: float) -> None:
    """Raises ValueError for a share of features that is not in [0, 1)."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r}: must be in [0, 1)")


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm over at most 32 groups of at least 4 channels."""
    groups = min(32, channels // 4)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


def resample(x: Tensor, how: str) -> Tensor:
    if how == "down":
        return F.avg_pool2d(x, 2)
    if how == "up" and x.device.type == "cpu" and x.is_contiguous():  # 2 to 4 times as fast as the kernel there
        columns = torch.stack((x, x), dim=-1).flatten(-2)
        return torch.stack((columns, columns), dim=-2).flatten(-3, -2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if how == "up" else x


def zero_init(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module
