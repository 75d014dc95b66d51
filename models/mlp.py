"""A multilayer perceptron for points: what two-dimensional flows need and no more."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import Conditioning
from models.layers import check_counts, zero_init

TIME_FEATURES = 32


class MLP(nn.Module):
    """net(x [B, ...], t [B] in [0, 1], y [B] or None) -> [B, ...].

    Time scales and shifts every layer (FiLM, Perez et al. 2018, arXiv:1709.07871): the field is smooth at early times and has
    edges at late ones, which a network that reads time as one more input learns far more slowly.
    """

    max_prompt_bytes = None  # knows labels only

    def __init__(
        self,
        image_shape: tuple[int, ...],
        width: int = 128,
        depth: int = 4,
        num_frequencies: int = 5,
        time_frequency: float = 30.0,
        num_classes: int | None = None,
        two_times: bool = False,
    ):
        """image_shape: of a point, e.g. (2,). width, depth: of the hidden layers.
        num_frequencies: of the sines and cosines of the position that the network also reads: sharp edges need them, a smooth
        density is smoother without. time_frequency: highest angular frequency of the features of t.
        num_classes: None for an unconditional network; label num_classes is the null label.
        two_times: t_next is an input, and the prediction is the mean velocity from t to t_next, a flow map.
        """
        super().__init__()
        check_counts(width=width, depth=depth, num_classes=num_classes)
        if not isinstance(num_frequencies, int) or not 0 <= num_frequencies <= 20:
            raise ValueError(f"num_frequencies={num_frequencies!r}: must be a whole number from 0 to 20")
        self.num_classes, self.null = num_classes, num_classes
        self.num_frequencies = num_frequencies
        size = math.prod(image_shape)
        sizes = [(1 + 2 * num_frequencies) * size, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.modulation = nn.Linear(TIME_FEATURES, 2 * width * depth)  # of all layers at once
        self.two_times = two_times
        self.conditioning = Conditioning(TIME_FEATURES, num_classes, two_times, time_frequency)
        self.last = zero_init(nn.Linear(width, size))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, t_next: Tensor | None = None) -> Tensor:
        positions = x.flatten(1)
        fourier_features = [f(2**k * positions) for k in range(self.num_frequencies) for f in (torch.sin, torch.cos)]
        condition = self.conditioning(t, y, t_next)
        h = torch.cat([positions, *fourier_features], dim=1)
        scales, shifts = self.modulation(condition).unflatten(1, (2, len(self.layers), -1)).unbind(1)  # [B, depth, width]
        for i, layer in enumerate(self.layers):
            h = F.silu(torch.addcmul(shifts[:, i], layer(h), 1 + scales[:, i]))
        return self.last(h).view_as(x)
