"""What a metric sees: samples beside a reference."""

from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from flow.evaluation.features import Extractor, FeatureSet
from flow.evaluation.reference import Reference


@dataclass
class Comparison:
    """Features of samples and of a reference, for the functions of `metrics.METRICS`."""

    extractor: Extractor
    samples: FeatureSet
    reference: Reference
    labels: np.ndarray | None = None  # int64 [n], the requested classes of the samples
    standard_errors: dict[str, float] = field(default_factory=dict)  # by column, of the metrics that know theirs
    bar: tqdm = field(default_factory=lambda: tqdm(total=0, disable=True))  # a long metric adds its work to the total

    @property
    def space(self) -> str:
        """Name of the feature space for columns, '' for that of FID."""
        name = self.extractor.distance_name
        return "" if name == "FID" else name.removeprefix("FD-")
