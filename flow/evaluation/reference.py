"""What samples are compared with: features of real images, cached by content, or statistics from an npz file."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from configs.errors import first_line
from flow.evaluation.features import Extractor, FeatureSet
from flow.evaluation.metrics_2d import PointExtractor
from flow.evaluation.moments import Moments

TOLERANCE = 1e-5  # of a covariance that was stored in float32, relative to its largest entry or eigenvalue


@dataclass
class Reference:
    """Moments of the features; the features [n, d] themselves, or None where only statistics are known."""

    name: str
    identity: str  # hash of content and extractor, for tables
    moments: Moments
    features: Tensor | None
    feature_set: FeatureSet | None = None  # the features with those of further layers
    labels: np.ndarray | None = None  # int64 [n], where their classes are those of the samples
    class_names: tuple[str, ...] = ()
    neighbors: Tensor | None = None  # `neighbors.nearest_neighbors` of the features, from the first row that asks for them


def same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two data sets have the same classes, by their names; MNIST's "3 - three" is "3"."""
    return [name.partition(" - ")[0] for name in names] == [name.partition(" - ")[0] for name in others]


def from_npz(path: Path, extractor: Extractor | PointExtractor, dimension: int) -> Reference:
    """Statistics `mu` and `sigma`, as most projects publish them. Raises ValueError where they are not there, damaged, not
    finite, not those of `dimension` features, or no covariance."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in ("mu", "sigma")]
        for name, array in zip(("mu", "sigma"), arrays, strict=True):
            if array.dtype.kind not in "fiu":
                raise ValueError(f"{name} holds {array.dtype}, not real numbers")
        mu, sigma = (array.astype(np.float64) for array in arrays)
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for a damaged file
        raise ValueError(f"--reference {path}: not an npz file with mu and sigma ({first_line(error)})") from None
    if mu.shape != (dimension,) or sigma.shape != (dimension, dimension):
        raise ValueError(
            f"--reference {path}: mu {mu.shape} and sigma {sigma.shape} are not statistics of the {dimension} features of "
            f"{extractor.name} layer {extractor.layer}"
        )
    check_statistics(mu, sigma, f"--reference {path}")
    return Reference(path.name, hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()[:16], Moments(mu, sigma), None)


def check_statistics(mu: np.ndarray, sigma: np.ndarray, owner: str) -> None:
    """Raises ValueError that names `owner` for a mean [d] or covariance [d, d] that is not finite, and for a covariance that is
    not symmetric and positive semidefinite up to rounding."""
    for name, values in (("mu", mu), ("sigma", sigma)):
        if not np.isfinite(values).all():
            raise ValueError(f"{owner}: {name} holds values that are not finite (NaN or infinite)")
    if np.abs(sigma - sigma.T).max() > TOLERANCE * np.abs(sigma).max():
        raise ValueError(f"{owner}: sigma is not symmetric, so it is no covariance")
    eigenvalues = np.linalg.eigvalsh((sigma + sigma.T) / 2)
    if eigenvalues[0] < -TOLERANCE * max(eigenvalues[-1], 0):
        raise ValueError(f"{owner}: sigma has the eigenvalue {eigenvalues[0]:.3g}; a covariance has none below 0")


def from_features(name: str, identity: str, features: FeatureSet | None, layer: str) -> Reference:
    """features None: a process that computes no metrics. Raises ValueError for features that are not finite and for fewer than
    two images."""
    if features is None:
        return Reference(name, identity, Moments(np.empty(0), np.empty((0, 0))), None)
    if features.n < 2:
        raise ValueError(f"{name} holds {features.n} image; a reference needs at least 2")
    features.check_finite(name)
    return Reference(name, identity, features.moments, features.matrix(layer), features)
