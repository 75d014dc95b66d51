"""The Gaussian prior x0 ~ N(0, I), the t = 0 end of every path."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from flow import rng


def noise(stream: str, seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [n, *shape], float32, on the CPU; row i is a function of (stream, seed, indices[i]) alone.

    Drawn on the CPU so that the same index gives the same noise on every device, for every batch size and number of
    processes. `stream` keeps training and sampling apart.
    """
    rows = [g.standard_normal(shape, dtype=np.float32) for g in rng.generators(stream, seed, positions=indices)]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)
