"""Matched pairs of two data sets."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flow.couplings.base import Coupling
from flow.source import DataSource, Source


class AlignedCoupling(Coupling):
    """Each image starts at the sample of the source with the same index, as in matched pairs of photos: a data-dependent
    coupling (Albergo et al. 2023, arXiv:2310.03725).

    x0 is a function of the image, so the flow learns one image for each sample of the source.
    """

    one_start = True

    def __init__(self, source: Source, image_shape: tuple[int, ...], data: Any):
        """data: the data set. Raises ValueError where the source does not have a sample for each image, under its name."""
        if not isinstance(source, DataSource):
            raise ValueError(f"needs a data set as flow.source.name, with one sample for each image; is {source.name}")
        self.starts, self.image_shape = source.training, image_shape
        samples = self.starts.samples
        if len(samples) != len(data):
            raise ValueError(f"flow.source.name={source.name} has {len(samples):,} samples for {len(data):,} images")
        if reason := samples.mismatch(data):
            raise ValueError(reason)

    def sample_x0(self, sample_ids: Sequence[int], indices: Sequence[int], x1: Tensor, y: Tensor | None) -> Tensor:
        """As Coupling.sample_x0; only the indices matter."""
        return self.starts.draw("train", 0, indices, self.image_shape)
