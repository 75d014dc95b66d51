"""What samples are compared with: features of real images, cached by content, or statistics from an npz file."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flow.evaluation.features import Extractor, FeatureSet
from flow.evaluation.points import PointSpace


@dataclass
class Reference:
    """Mean [d] and unbiased covariance [d, d] in float64; features [n, d], or None where only statistics are known."""

    name: str
    identity: str  # hash of content and extractor, for tables
    mu: np.ndarray
    sigma: np.ndarray
    features: Tensor | None
    log_density: Callable[[Tensor], Tensor] | None = None  # exact, in nats, of points whose density has a formula


def from_npz(path: Path, extractor: Extractor, dimension: int) -> Reference:
    """Statistics `mu` and `sigma`, as most projects publish them. Raises ValueError where they are not there or are not
    those of `dimension` features."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = np.asarray(file["mu"], np.float64), np.asarray(file["sigma"], np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--reference {path}: not an npz file with mu and sigma ({error})") from None
    if mu.shape != (dimension,) or sigma.shape != (dimension, dimension):
        raise ValueError(
            f"--reference {path}: mu {mu.shape} and sigma {sigma.shape} are not statistics of the {dimension} features of "
            f"{extractor.name} layer {extractor.layer}"
        )
    return Reference(path.name, hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()[:16], mu, sigma, None)


def from_features(name: str, identity: str, features: FeatureSet, layer: str) -> Reference:
    return Reference(name, identity, features.mu, features.sigma, features.matrix(layer))


def identity_of(fingerprint: str, extractor: Extractor | PointSpace) -> str:
    """Changes with the images, the extractor, its layer and its weights."""
    key = f"{fingerprint} {extractor.name} {extractor.layer} {extractor.weights_hash}"
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def load_cached(path: Path, layer: str) -> FeatureSet | None:
    """Features that `save_cached` wrote, or None where the file is absent or damaged."""
    try:
        features = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    found = FeatureSet()
    found.add(layer, range(len(features)), {layer: torch.from_numpy(features)})
    return found


def save_cached(path: Path, features: FeatureSet, layer: str) -> None:
    """`path` ends in .npy; the caller makes the writing atomic."""
    np.save(path, features.matrix(layer).numpy())
