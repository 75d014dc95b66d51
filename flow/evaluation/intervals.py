"""How far a metric would move with another draw of the samples."""

import numpy as np

NORMAL_95 = 1.96  # standard errors on each side of a 95 % interval


def frechet_standard_error(features: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> float | None:
    """Standard error of the Frechet distance of features [n, d] to the mean mu [d] and covariance sigma [d, d].

    The delta method: the standard deviation over samples x of the influence function of the distance at the samples' own
    mean m and covariance S,

        psi(x) = 2 (m - mu)^T (x - m) + (x - m)^T (I - T) (x - m) + const,
        T = sigma^(1/2) (sigma^(1/2) S sigma^(1/2))^(-1/2) sigma^(1/2),

    divided by the root of n; I - T is the derivative of the distance by S, as T is the optimal map between the two
    Gaussians. It estimates the spread of the distance of n samples about its mean at this n, not about its limit for many
    samples. Where the samples have the reference's own distribution it is about 1.5 times too wide.

    None where the distance has no derivative: for n <= d, where S is singular, and for features that are all the same.
    """
    n, d = features.shape
    if n <= d:
        return None
    x = features.astype(np.float64)
    m = x.mean(0)
    x -= m
    root = symmetric_root(sigma)
    values, vectors = np.linalg.eigh(root @ (x.T @ x / (n - 1)) @ root)
    smallest = values[-1] * 1e-12  # below it: features that never change, which take no part
    if smallest <= 0:
        return None
    inverse_roots = np.where(values > smallest, values.clip(smallest) ** -0.5, 0)
    optimal_map = root @ ((vectors * inverse_roots) @ vectors.T) @ root
    influence = 2 * x @ (m - mu) + ((x @ (np.eye(d) - optimal_map)) * x).sum(1)
    return float(influence.std() / np.sqrt(n))


def symmetric_root(sigma: np.ndarray) -> np.ndarray:
    """Symmetric square root of a covariance matrix [d, d]."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
