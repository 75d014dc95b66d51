"""The inputs of a network besides x as one embedding: the time, the length of a step, the label."""

import math

import torch
from torch import Tensor, nn

from models.layers import zero_init


class Conditioning(nn.Module):
    """t [B] in [0, 1], labels y [B] and t_next [B] -> an embedding [B, size]: the sum of those of time, step and label."""

    def __init__(
        self,
        size: int,
        num_classes: int | None = None,
        two_times: bool = False,
        time_frequency: float = 1000.0,
        min_time_frequency: float = 0.1,
        features: int | None = None,
    ):
        """num_classes: None for no labels; label num_classes is the null label. two_times: t_next is an input.
        time_frequency, min_time_frequency: highest and lowest angular frequency of the features of t.
        features: number of features of t that an MLP reads, even; None: `size` features and no MLP.

        Raises ValueError for frequencies out of range and an odd number of features.
        """
        super().__init__()
        if (features or size) % 2:
            raise ValueError(f"{features or size} features of the time: must be even, a cosine and a sine for each frequency")
        _check_frequencies(time_frequency, min_time_frequency)
        self.time_frequency, self.min_time_frequency = time_frequency, min_time_frequency
        self.features = features or size
        mlp = () if features is None else (nn.Linear(features, size), nn.SiLU(), nn.Linear(size, size))
        self.time_mlp = nn.Sequential(*mlp)
        self.step_embedding = StepEmbedding(self.features, size, time_frequency, min_time_frequency) if two_times else None
        self.label_embedding = nn.Embedding(num_classes + 1, size) if num_classes is not None else None

    def forward(self, t: Tensor, y: Tensor | None, t_next: Tensor | None = None) -> Tensor:
        """Raises ValueError where labels are missing."""
        time, label = self.parts(t, y, t_next)
        return time if label is None else time + label

    def parts(self, t: Tensor, y: Tensor | None, t_next: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The embedding [B, size] of the times and that of the label, None without labels; as `forward`."""
        time = self.time_mlp(sinusoidal_embedding(t, self.features, self.time_frequency, self.min_time_frequency))
        if self.step_embedding is not None:
            time = time + self.step_embedding(t, t_next)
        if self.label_embedding is None:
            return time, None
        if y is None:
            raise ValueError("this network is class-conditional: it needs labels y [B]")
        return time, self.label_embedding(y)


class StepEmbedding(nn.Module):
    """The length of a step, t_next - t [B], as an embedding [B, size]; zero at the start of training.

    It is in the graph of every pass, with t_next = None too (a step of length 0), so that DDP always finds its gradient.
    """

    def __init__(self, features: int, size: int, time_frequency: float, min_time_frequency: float):
        super().__init__()
        self.features, self.time_frequency, self.min_time_frequency = features, time_frequency, min_time_frequency
        self.linear = zero_init(nn.Linear(features, size))

    def forward(self, t: Tensor, t_next: Tensor | None) -> Tensor:
        length = torch.zeros_like(t) if t_next is None else t_next - t
        return self.linear(sinusoidal_embedding(length, self.features, self.time_frequency, self.min_time_frequency))


def sinusoidal_embedding(t: Tensor, dim: int, fastest: float, slowest: float) -> Tensor:
    """Features [B, dim] of t [B] in [0, 1]: cosines and sines of t times geometric frequencies, from `fastest` down towards
    `slowest` radians.

    The positions of Vaswani et al. 2017 (arXiv:1706.03762, section 3.5); DDPM's, for 1000 timesteps, are fastest = 1000.
    A flow is only as smooth in time as these features: solvers reach their order on steps well below 1 / fastest.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(fastest / slowest) / half))
    angles = fastest * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _check_frequencies(fastest: float, slowest: float) -> None:
    if not isinstance(slowest, int | float) or not 0 < slowest < math.inf:
        raise ValueError(f"min_time_frequency={slowest!r}: must be a finite number above 0, in radians")
    if not isinstance(fastest, int | float) or not slowest < fastest < math.inf:
        raise ValueError(f"time_frequency={fastest!r}: must be a number above {slowest:g}, in radians")
