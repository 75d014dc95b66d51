"""Fresh source samples."""

from collections.abc import Sequence

from torch import Tensor

from flow.couplings.base import Coupling
from flow.source import Source


class IndependentCoupling(Coupling):
    """A fresh sample each time: x0 of sample p in the stream of training images is a function of (seed, p)."""

    def __init__(self, source: Source, seed: int, image_shape: tuple[int, ...]):
        self.source, self.seed, self.image_shape = source, seed, image_shape

    def sample_x0(self, sample_ids: Sequence[int], indices: Sequence[int], x1: Tensor, y: Tensor | None) -> Tensor:
        """As Coupling.sample_x0; only the positions matter."""
        return self.source.draw("train", self.seed, sample_ids, self.image_shape)
