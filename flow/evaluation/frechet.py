"""The Frechet distance of two Gaussians, and its limit for infinitely many samples."""

import numpy as np

from flow.evaluation.intervals import block_of, influence_of_samples
from flow.evaluation.moments import Moments

PARTS = (1, 2, 3, 4, 5)  # the samples are cut into so many subsets: 15 distances in all
IMAGES_A_FEATURE = 2  # that the smallest subset needs, below which the distance is not linear in 1 / n


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    tr (sigma_a sigma_b)^(1/2) is the sum of the singular values of sigma_a^(1/2) sigma_b^(1/2): symmetric decompositions
    only, and exact to rounding for singular covariances, where eigenvalues of the product lose half the digits.
    """
    shared = np.linalg.svd(a.root @ b.root, compute_uv=False).sum()
    distance = np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * shared
    return max(0.0, float(distance))  # rounding may leave -1e-12 of equal ones


def too_few_images_message(n: int, name: str, dimension: int) -> str:
    """What to say where n <= dimension."""
    return (
        f"{n} images ({name}) are too few for a Frechet distance of {dimension} features: with n <= {dimension} the covariance "
        "is singular and the distance far too large; take more, better 10,000"
    )


def can_extrapolate(n: int, dimension: int) -> bool:
    """Whether the smallest subset of n samples has enough images a feature."""
    return n // PARTS[-1] >= IMAGES_A_FEATURE * dimension


def extrapolated_distance(features: np.ndarray, samples: Moments, reference: Moments) -> tuple[float, float] | None:
    """The Frechet distance of infinitely many samples to a reference, and its standard error, from features [n, d] and their
    moments.

    The distance of n samples exceeds that of infinitely many by about c / n with a c of its own for each network, so a line
    in 1 / n through the distances of subsets meets 1 / n = 0 at the limit (Chong & Forsyth 2020, arXiv:1911.07023). There,
    subsets of 15 sizes are drawn at random; here the features are cut into 1 to 5 disjoint subsets (`block_of`), so that
    every size uses all samples and nothing is random.

    What a subset's samples move its distance by to first order, the mean of the influence function over them, is known and
    subtracted before the fit; over the subsets of a size it sums to zero. What is left scatters as 1 / size, so the fit
    weighs by the square of the size. The variance of the limit is that of the mean influence (`frechet_standard_error`) plus
    that of the fit's intercept. None where the smallest subset has fewer than two images a feature.
    """
    n, d = features.shape
    influence = influence_of_samples(features, samples, reference)
    if not can_extrapolate(n, d) or influence is None:
        return None
    sizes, distances = [], []
    for count in PARTS:
        block = block_of(np.arange(n), count)
        for k in range(count):
            subset = features[block == k]
            sizes.append(len(subset))
            distances.append(frechet_distance(Moments.of(subset), reference) - influence[block == k].mean())
    size = np.array(sizes, dtype=np.float64)
    design = np.stack([size, np.ones_like(size)], axis=1)  # (1, 1 / size) times the root of the weight
    target = size * np.array(distances)
    coefficients, *_ = np.linalg.lstsq(design, target, rcond=None)
    residuals = target - design @ coefficients
    variance = residuals @ residuals / (len(size) - 2) * np.linalg.inv(design.T @ design)[0, 0]
    return float(coefficients[0]), float(np.sqrt(influence.var() / n + variance))
