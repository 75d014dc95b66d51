"""Prompts for networks: UTF-8 bytes through a small transformer that is trained with the flow. No downloaded language model."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 0  # also the null condition: the empty prompt is all padding
LAYERS, HEADS = 2, 4


def encode(prompts: Sequence[str], limit: int) -> Tensor:
    """Tokens int64 [N, limit]: each byte of the UTF-8 text plus 1, then padding.

    Raises ValueError for a prompt of more than `limit` bytes.
    """
    tokens = torch.full((len(prompts), limit), PADDING)
    for row, prompt in zip(tokens, prompts, strict=True):
        data = prompt.encode("utf-8")
        if len(data) > limit:
            raise ValueError(f"prompt {prompt!r}: has {len(data)} bytes, this network reads at most {limit} (max_prompt_bytes)")
        row[: len(data)] = torch.tensor(list(data), dtype=torch.int64) + 1
    return tokens


class EncodedText(NamedTuple):
    """Features of prompts."""

    states: Tensor  # [B, 1 + L, width]
    mask: Tensor  # bool [B, 1 + L], true where there is something to attend to


class TextEncoder(nn.Module):
    """Tokens int64 [B, L] -> `EncodedText`.

    A convolution over seven bytes, which recognizes words at any position, then a pre-norm transformer (Xiong et al. 2020,
    arXiv:2002.04745). State 0 belongs to a start token before every prompt: the summary of the text, and the only unmasked
    state of an empty one.
    """

    def __init__(self, limit: int, width: int):
        super().__init__()
        self.bytes = nn.Embedding(257, width)
        self.local = nn.Conv1d(width, width, 7, padding=3)
        self.positions = nn.Parameter(0.02 * torch.randn(limit, width))
        self.start = nn.Parameter(0.02 * torch.randn(width))
        layers = [encoder_layer(width) for _ in range(LAYERS)]
        self.layers = nn.TransformerEncoder(layers[0], LAYERS, nn.LayerNorm(width), enable_nested_tensor=False)
        self.layers.layers = nn.ModuleList(layers)  # torch would start all of them with the same weights

    def forward(self, tokens: Tensor) -> EncodedText:
        h = self.bytes(tokens)
        h = h + F.gelu(self.local(h.transpose(1, 2))).transpose(1, 2) + self.positions
        h = torch.cat([self.start.expand(len(h), 1, -1), h], dim=1)
        mask = torch.cat([torch.ones_like(tokens[:, :1], dtype=torch.bool), tokens != PADDING], dim=1)
        return EncodedText(self.layers(h, src_key_padding_mask=~mask), mask)


def encoder_layer(width: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(width, HEADS, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
