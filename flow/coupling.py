"""Which noise x0 belongs to which data x1 in training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flow import prior


class Independent:
    """Fresh noise each time: x0 of position p in the stream of training images is a function of (seed, p)."""

    def __init__(self, seed: int, image_shape: tuple[int, ...]):
        self.seed, self.image_shape = seed, image_shape

    def noise(self, positions: Sequence[int], indices: Sequence[int]) -> Tensor:
        """x0 [b, C, H, W], float32, on the CPU, for b positions and the data set indices of the images there."""
        return prior.noise("train", self.seed, positions, self.image_shape)


class Given:
    """Each image keeps its noise: reflow and distillation (Liu et al. 2023, arXiv:2209.03003, algorithm 1).

    Images 0 .. generated - 1 were made by a flow from the noise (seed, index) of the stream "pairs"; the noise of the
    others, found by inverting real images, is stored.
    """

    def __init__(self, seed: int, generated: int, stored: Tensor | None, image_shape: tuple[int, ...]):
        """stored: [M, C, H, W], the noise of images generated .. generated + M - 1."""
        self.seed, self.generated, self.stored, self.image_shape = seed, generated, stored, image_shape

    def noise(self, positions: Sequence[int], indices: Sequence[int]) -> Tensor:
        """As Independent.noise; the positions do not matter."""
        x0 = torch.empty(len(indices), *self.image_shape)
        made = [row for row, k in enumerate(indices) if k < self.generated]
        x0[made] = prior.noise("pairs", self.seed, [indices[row] for row in made], self.image_shape)
        kept = [row for row, k in enumerate(indices) if k >= self.generated]
        if kept:
            x0[kept] = self.stored[[indices[row] - self.generated for row in kept]].float()
        return x0
