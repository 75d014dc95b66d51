"""The input and the output of a metric: samples beside a reference, and what it estimates of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from flow.evaluation.features import FeatureSet, FeatureSpace
from flow.evaluation.memorization import Closest, TrainingSet
from flow.evaluation.neighbors import Neighborhoods
from flow.evaluation.reference import Reference


class Estimate(NamedTuple):
    """A column of a row."""

    value: float
    standard_error: float | None = None  # over samples; None where it is not known


@dataclass
class Comparison:
    """Features of samples and of a reference, for the functions of `metrics.METRICS`."""

    extractor: FeatureSpace
    samples: FeatureSet
    reference: Reference
    labels: np.ndarray | None = None  # int64 [n], the requested classes of the samples
    class_names: Sequence[str] = ()  # of these labels, where somebody knows them
    training: TrainingSet | None = None  # of the weights
    requested: tuple[str, ...] = ()  # the metrics
    closest: Closest | None = None  # what `memorization` found
    neighborhoods: Neighborhoods | None = None  # for all metrics that need them, from the first one
    bar: tqdm = field(default_factory=lambda: tqdm(total=0, disable=True))  # a long metric adds its work to the total

    def matrix(self, layer: str | None = None) -> Tensor:
        """Features [n, d] of the samples; layer None: that of the distances."""
        return self.samples.matrix(layer or self.extractor.layer)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that there are features of."""
        return tuple(self.samples.rows)

    @property
    def space(self) -> str:
        """Name of the feature space for columns, '' for that of FID."""
        name = self.extractor.distance_name
        return "" if name == "FID" else name.removeprefix("FD-")
