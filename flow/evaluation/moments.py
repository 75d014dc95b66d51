"""Mean and covariance of features, in float64, a few rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROWS = 4096  # in float64 at a time


@dataclass(eq=False)
class Moments:
    """Mean mu [d] and covariance sigma [d, d], float64."""

    mu: np.ndarray
    sigma: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """The moments of features [n, d], n at least 2; the covariance is the unbiased one."""
        n, d = features.shape
        mu = features.mean(0, dtype=np.float64)
        outer = np.zeros((d, d))
        for x in centered_rows(features, mu):
            outer += x.T @ x
        return cls(mu, outer / (n - 1))

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of sigma [d, d], which takes seconds for 2,048 features."""
        values, vectors = np.linalg.eigh((self.sigma + self.sigma.T) / 2)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def centered_rows(features: np.ndarray, mu: np.ndarray) -> Iterator[np.ndarray]:
    """features [n, d] less mu [d], float64, at most `ROWS` of them at a time."""
    for first in range(0, len(features), ROWS):
        yield features[first : first + ROWS].astype(np.float64) - mu
