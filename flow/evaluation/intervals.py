"""How far a metric would move with another draw of the samples: standard errors, the reference being fixed."""

import numpy as np
from scipy.special import stdtrit

from flow.evaluation.moments import Moments, centered_rows

NORMAL_95 = 1.96  # standard errors on each side of a 95% interval
JACKKNIFE_BLOCKS = 10  # for recall and coverage, whose jackknife errors are too large by more than Student's t would add
GOLDEN = (5**0.5 - 1) / 2


def block_of(indices: np.ndarray, count: int) -> np.ndarray:
    """The block, 0 to count - 1, that each image [n] belongs to, a function of its index alone.

    The fractional part of index x golden ratio, cut into equal parts: blocks of consecutive indices have nearly equal sizes,
    and neither classes in turn nor classes one after another (a sorted folder) fall into blocks of their own.
    """
    return (count * (indices * GOLDEN % 1)).astype(np.int64)


def share_standard_error(share: float, n: int) -> float:
    """Standard error of a share of n samples, which is above 0 also for a share of 0 or 1.

    That of the share with two more hits and two more misses (Agresti & Coull 1998, doi:10.1080/00031305.1998.10480550).
    """
    adjusted = (share * n + 2) / (n + 4)
    return float(np.sqrt(adjusted * (1 - adjusted) / (n + 4)))


def mean_standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of independent values [n]; None for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def mean_interval(values: np.ndarray) -> float | None:
    """Half of the 95% interval of the mean of independent values [n], by Student's t; None for a single one."""
    error = mean_standard_error(values)
    return None if error is None else student_t(len(values)) * error


def student_t(n: int) -> float:
    """Standard errors on each side of a 95% interval of the mean of n independent values."""
    return float(stdtrit(n - 1, 0.975))


def jackknife_standard_error(left_out: np.ndarray) -> float:
    """Standard error of a statistic from its values [J] with each of J blocks of the samples left out in turn.

    The root of (J - 1) / J times the sum of squared deviations from their mean. Where the statistic is not a mean it is too
    large rather than too small (Efron & Stein 1981, doi:10.1214/aos/1176345462).
    """
    return float(np.sqrt((len(left_out) - 1) * left_out.var()))


def frechet_influence(samples: Moments, reference: Moments) -> tuple[np.ndarray, np.ndarray] | None:
    """(a [d], B [d, d]) of the influence function of the Frechet distance to a reference with mean mu and covariance sigma.

    At samples with mean m and covariance S the distance moves with a sample x by

        psi(x) = a^T (x - m) + (x - m)^T B (x - m) + const,    a = 2 (m - mu),    B = I - T,
        T = sigma^(1/2) (sigma^(1/2) S sigma^(1/2))^(-1/2) sigma^(1/2);

    B is the derivative of the distance by S, as T is the optimal map between the two Gaussians. None for features that are
    all the same, where there is no derivative.
    """
    root = reference.root
    values, vectors = np.linalg.eigh(root @ samples.sigma @ root)
    smallest = values[-1] * 1e-12  # below it: features that never change, which take no part
    if smallest <= 0:
        return None
    inverse_roots = np.where(values > smallest, values.clip(smallest) ** -0.5, 0)
    optimal_map = root @ ((vectors * inverse_roots) @ vectors.T) @ root
    return 2 * (samples.mu - reference.mu), np.eye(len(root)) - optimal_map


def influence_of_samples(features: np.ndarray, samples: Moments, reference: Moments) -> np.ndarray | None:
    """psi [n] of `frechet_influence`, with mean 0, of features [n, d] and their moments.

    None where the distance has no derivative: for n <= d, where S is singular, and for features that are all the same.
    """
    n, d = features.shape
    if n <= d:
        return None
    derivative = frechet_influence(samples, reference)
    if derivative is None:
        return None
    a, b = derivative
    psi = np.concatenate([x @ a + ((x @ b) * x).sum(1) for x in centered_rows(features, samples.mu)])
    return psi - psi.mean()


def frechet_standard_error(features: np.ndarray, samples: Moments, reference: Moments) -> float | None:
    """Standard error of the Frechet distance of features [n, d], whose moments are `samples`, to a reference.

    The delta method: the standard deviation over the samples of the influence function, divided by the root of n. It
    estimates the spread of the distance of n samples about its mean E[FD_n] at this n, not about its limit for many samples.
    Where the samples have the reference's own distribution it is about 1.5 times too wide. None as in `influence_of_samples`.
    """
    psi = influence_of_samples(features, samples, reference)
    return None if psi is None else float(psi.std() / np.sqrt(len(psi)))
