"""Which noise x0 belongs to which data x1 in training."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flow import registry
from flow.noise import gaussian_noise


class Coupling(Protocol):
    def sample_x0(self, sample_ids: Sequence[int], indices: Sequence[int], x1: Tensor, y: Tensor | None) -> Tensor:
        """x0 [b, C, H, W], float32, for b samples with these ids in the training stream and data set indices, images and labels there; on any device."""


class IndependentCoupling:
    """Fresh noise each time: x0 of sample p in the stream of training images is a function of (seed, p)."""

    def __init__(self, seed: int, image_shape: tuple[int, ...], rows: int):
        self.seed, self.image_shape = seed, image_shape

    def sample_x0(self, sample_ids: Sequence[int], indices: Sequence[int], x1: Tensor, y: Tensor | None) -> Tensor:
        return gaussian_noise("train", self.seed, sample_ids, self.image_shape)


class OTCoupling:
    """Noise and images of a batch paired so that the squared distances add up to the least (Pooladian et al. 2023,
    arXiv:2304.14772; Tong et al. 2024, arXiv:2302.00482): minibatch optimal transport with an exact assignment.

    Within blocks of consecutive rows, so that the pairs are the same for any number of processes, and, where labels are
    given, within a class, as pairs across classes would make the noise tell the class and guidance fail.
    """

    def __init__(self, seed: int, image_shape: tuple[int, ...], rows: int, block: int = 64):
        """rows: of the batch that a process takes at once. block: how many of them are paired at once; must divide them,
        else ValueError."""
        if block != int(block) or block < 2:
            raise ValueError(f"block={block}: must be a whole number of at least 2")
        if rows % block:
            raise ValueError(f"block={block}: must divide the {rows} rows that a process takes at once")
        self.independent, self.block = IndependentCoupling(seed, image_shape, rows), block

    def sample_x0(self, sample_ids: Sequence[int], indices: Sequence[int], x1: Tensor, y: Tensor | None) -> Tensor:
        """As Coupling.sample_x0, for a multiple of `block` samples."""
        from scipy.optimize import linear_sum_assignment

        x0 = self.independent.sample_x0(sample_ids, indices, x1, y)
        a, b = x0.flatten(1), x1.flatten(1).cpu().float()
        groups = torch.arange(len(b)) // self.block
        if y is not None:
            groups = groups * (int(y.max()) + 1) + y.cpu()
        paired = torch.empty_like(x0)
        for group in groups.unique():
            rows = (groups == group).nonzero()[:, 0]
            ours, theirs = linear_sum_assignment(torch.cdist(a[rows], b[rows]).square().numpy())
            paired[rows[theirs]] = x0[rows[ours]]
        return paired


class PairedCoupling:
    """Each image keeps its noise: reflow and distillation (Liu et al. 2023, arXiv:2209.03003, algorithm 1).

    Images 0 .. generated - 1 were made by a flow from the noise (seed, index) of the stream "pairs"; the noise of the
    others, found by inverting real images, is stored.
    """

    def __init__(self, seed: int, generated: int, stored: Tensor | None, image_shape: tuple[int, ...]):
        """stored: [M, C, H, W], the noise of images generated .. generated + M - 1."""
        self.seed, self.generated, self.stored, self.image_shape = seed, generated, stored, image_shape

    def sample_x0(self, sample_ids: Sequence[int], indices: Sequence[int], x1: Tensor, y: Tensor | None) -> Tensor:
        """As Coupling.sample_x0; only the indices matter."""
        x0 = torch.empty(len(indices), *self.image_shape)
        made = [row for row, k in enumerate(indices) if k < self.generated]
        x0[made] = gaussian_noise("pairs", self.seed, [indices[row] for row in made], self.image_shape)
        kept = [row for row, k in enumerate(indices) if k >= self.generated]
        if kept and self.stored is not None:
            x0[kept] = self.stored[[indices[row] - self.generated for row in kept]].float()
        return x0


def build(name: str, seed: int, image_shape: tuple[int, ...], rows: int, args: dict[str, Any]) -> Coupling:
    """The coupling `name` of new noise, for processes that take so many rows of a batch at once.

    Raises ValueError for an unknown name or argument and for a value out of range.
    """
    known: dict[str, Callable[..., Coupling]] = {"independent": IndependentCoupling, "ot": OTCoupling}
    return registry.pick("coupling", known, name, args)(seed, image_shape, rows)
