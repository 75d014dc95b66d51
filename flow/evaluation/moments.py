"""Mean and covariance of features, in float64, a few rows at a time."""

from collections.abc import Iterator

import numpy as np

ROWS = 4096  # in float64 at a time


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and unbiased covariance [d, d] in float64 of features [n, d], n at least 2."""
    n, d = features.shape
    mu = features.mean(0, dtype=np.float64)
    outer = np.zeros((d, d))
    for x in centered_rows(features, mu):
        outer += x.T @ x
    return mu, outer / (n - 1)


def centered_rows(features: np.ndarray, mu: np.ndarray) -> Iterator[np.ndarray]:
    """features [n, d] less mu [d], float64, at most `ROWS` of them at a time."""
    for first in range(0, len(features), ROWS):
        yield features[first : first + ROWS].astype(np.float64) - mu
