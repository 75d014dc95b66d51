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
    indices = list(indices)
    x0 = np.empty((len(indices), *shape), dtype=np.float32)
    for row, g in zip(x0, rng.generators(stream, seed, positions=indices), strict=True):
        g.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(x0)
