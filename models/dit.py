"""The diffusion transformer: patches as tokens, time and label by adaptive layer norm and, on request, by cross-attention.

DiT (Peebles & Xie 2023, arXiv:2212.09748, section 3: adaLN-zero) with rotary position embedding (Su et al. 2021,
arXiv:2104.09864) over rows and columns, or with fixed sines and cosines; both with base 100 in place
of 10000, as a side has tens of tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import Conditioning
from models.layers import Dropout, attention, check_counts, check_dropout, zero_init

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, depth, heads


class DiT(nn.Module):
    """net(x [B, C, H, W], t [B] in [0, 1], y [B] or None) -> [B, C, H, W]."""

    max_prompt_bytes = None  # knows labels only

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        size: str = "S",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        patch: int = 2,
        positions: str = "rope",
        dropout: float = 0.0,
        time_frequency: float = 1000.0,
        num_classes: int | None = None,
        cross_attention: bool = False,
        qk_norm: bool = False,
        two_times: bool = False,
    ):
        """image_shape: (C, H, W), sides divisible by patch. size: S, B, L or XL, the paper's width, depth and heads; each can
        be given on its own. width: of a token, divisible by 4 heads. depth: blocks. patch: side of a token in pixels.
        positions: "rope" turns queries and keys, so that tokens know where others are; "sine" adds features of row and column
        to a token, so that it knows where it is.
        dropout: share of the hidden features of each MLP that is set to 0 in training.
        time_frequency: highest angular frequency of the features of t; lower is smoother in time, for fewer steps.
        num_classes: None for an unconditional network; label num_classes is the null label. The embedding of the label is
        added to that of the time. cross_attention: tokens also attend to label and time, each as it needs.
        qk_norm: root mean square norm of queries and keys (Esser et al. 2024, arXiv:2403.03206), against attention that
        grows without bound in long training at low precision.
        two_times: t_next is an input, and the prediction is the mean velocity from t to t_next, a flow map.
        """
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size={size!r}: must be one of {', '.join(SIZES)}")
        width, depth, heads = (p if g is None else g for g, p in zip((width, depth, heads), SIZES[size], strict=True))
        _check(image_shape, width, depth, heads, patch, positions, dropout, num_classes, cross_attention)
        self.num_classes, self.null, self.patch = num_classes, num_classes, patch
        channels = image_shape[0] * patch**2
        self.embed = nn.Linear(channels, width)
        self.two_times = two_times
        self.conditioning = Conditioning(width, num_classes, two_times, time_frequency, features=width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, dropout, cross_attention, qk_norm) for _ in range(depth))
        self.cross_attention = cross_attention
        self.modulation = zero_init(nn.Linear(width, 2 * width))
        self.unembed = zero_init(nn.Linear(width, channels))
        self.skip = zero_init(nn.Linear(width, 1))  # the last layer norm removes the noise level of a token
        rows, columns = image_shape[1] // patch, image_shape[2] // patch
        rope = positions == "rope"
        rotation = features(angles(rows, columns, width // heads)) if rope else None
        self.register_buffer("rotation", rotation, persistent=False)
        self.register_buffer("position_features", None if rope else features(angles(rows, columns, width)), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor:
        time, label = self.conditioning.parts(t, y, t_next)  # [B, width]
        context = torch.stack([label, time], dim=1) if self.cross_attention else None  # [B, 2, width]
        emb = F.silu(time if label is None else time + label)
        h = self.embed(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2))  # [B, tokens, width]
        if self.position_features is not None:
            h = h + self.position_features
        for block in self.blocks:
            h = block(h, emb, self.rotation, context)
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=2)
        h = self.unembed(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        h = h.transpose(1, 2).unflatten(2, (x.shape[2] // self.patch, x.shape[3] // self.patch))
        return F.pixel_shuffle(h, self.patch) + self.skip(emb)[:, :, None, None] * x


class DiTBlock(nn.Module):
    """Tokens [B, L, width] -> the same: self-attention, cross-attention to context [B, M, width] if any, MLP."""

    def __init__(self, width: int, heads: int, dropout: float, cross_attention: bool, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qk_scale = nn.Parameter(torch.ones(2, width // heads)) if qk_norm else None
        self.modulation = zero_init(nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if cross_attention:
            self.query = nn.Linear(width, width)
            self.key_value = nn.Linear(width, 2 * width)
            self.cross_proj = zero_init(nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, emb: Tensor, rotation: Tensor | None, context: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(emb)[:, None].chunk(6, dim=2)
        a = F.layer_norm(h, h.shape[-1:]) * (1 + scale_a) + shift_a
        q, k, v = (self._split(part) for part in self.qkv(a).chunk(3, dim=2))
        if self.qk_scale is not None:
            q, k = (F.rms_norm(p, p.shape[-1:]) * scale.to(p.dtype) for p, scale in zip((q, k), self.qk_scale, strict=True))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        a = attention(q, k, v)
        h = h + gate_a * self.proj(a.transpose(1, 2).flatten(2))
        if context is not None:
            k, v = (self._split(part) for part in self.key_value(context).chunk(2, dim=2))
            a = attention(self._split(self.query(F.layer_norm(h, h.shape[-1:]))), k, v)
            h = h + self.cross_proj(a.transpose(1, 2).flatten(2))
        return h + gate_m * self.mlp(F.layer_norm(h, h.shape[-1:]) * (1 + scale_m) + shift_m)

    def _split(self, h: Tensor) -> Tensor:
        return h.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, width / heads]


def angles(rows: int, columns: int, dim: int) -> Tensor:
    """[rows * columns, dim / 2]: the first half grows with the row of a token, the second with its column."""
    frequencies = 100.0 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies], dim=1)


def features(angle: Tensor) -> Tensor:
    """Cosines and sines [L, dim] of angles [L, dim / 2]."""
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, heads, L, dim], its pairs (i, i + dim / 2) turned by angles whose cosines and sines are `rotation` [L, dim]."""
    a, b = x.chunk(2, dim=3)
    cos, sin = rotation.to(x.dtype).chunk(2, dim=1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3)


def _check(image_shape, width, depth, heads, patch, positions, dropout, num_classes, cross_attention) -> None:
    check_counts(width=width, depth=depth, heads=heads, patch=patch, num_classes=num_classes)
    if width % (4 * heads):
        raise ValueError(f"width={width}: must be divisible by 4 heads = {4 * heads}, for the features of row and column")
    if image_shape[1] % patch or image_shape[2] % patch:
        raise ValueError(f"patch={patch}: must divide the image side, the images are {image_shape[1]}x{image_shape[2]}")
    if positions not in ("rope", "sine"):
        raise ValueError(f"positions={positions!r}: must be rope or sine")
    check_dropout(dropout)
    if cross_attention and num_classes is None:
        raise ValueError("cross_attention=True: needs labels to attend to; set num_classes")
