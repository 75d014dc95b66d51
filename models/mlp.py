"""A multilayer perceptron for points: what two-dimensional flows need and no more."""

import math

import torch
from torch import Tensor, nn

from models.blocks import check_time_frequency, sinusoidal_embedding, zero

TIME_FEATURES = 32
OCTAVES = 5  # of the features of place: sharp edges are hard to learn from coordinates alone


class MLP(nn.Module):
    """net(x [B, ...], t [B] in [0, 1], y [B] or None) -> [B, ...]."""

    prompt_bytes = None  # knows labels only

    def __init__(
        self,
        image_shape: tuple[int, ...],
        width: int = 256,
        depth: int = 4,
        time_frequency: float = 30.0,
        num_classes: int | None = None,
    ):
        """image_shape: of a point, e.g. (2,). width, depth: of the hidden layers. time_frequency: fastest feature of t in
        radians. num_classes: None for an unconditional network; label num_classes is the null label.
        """
        super().__init__()
        check_time_frequency(time_frequency)
        for name, value in {"width": width, "depth": depth}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
        if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
            raise ValueError(f"num_classes={num_classes!r}: must be a whole number of at least 1, or null")
        self.num_classes, self.null, self.time_frequency = num_classes, num_classes, time_frequency
        size = math.prod(image_shape)
        self.first = nn.Linear((1 + 2 * OCTAVES) * size + TIME_FEATURES, width)
        self.label_embedding = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        hidden = [layer for _ in range(depth - 1) for layer in (nn.SiLU(), nn.Linear(width, width))]
        self.rest = nn.Sequential(*hidden, nn.SiLU(), zero(nn.Linear(width, size)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        place = x.flatten(1)
        waves = [wave(2**k * place) for k in range(OCTAVES) for wave in (torch.sin, torch.cos)]
        time = sinusoidal_embedding(t, TIME_FEATURES, self.time_frequency)
        h = self.first(torch.cat([place, *waves, time], dim=1))
        if self.label_embedding is not None:
            if y is None:
                raise ValueError("this network is class-conditional: it needs labels y [B]")
            h = h + self.label_embedding(y)
        return self.rest(h).view_as(x)
