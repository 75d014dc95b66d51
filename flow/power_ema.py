"""Power-function averages of the weights, and how averages of other widths follow from stored ones (post-hoc EMA).

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv:2312.02696), section 3. The
average at time t weights the parameters theta(tau) of the training by the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 <= tau <= t.

Its width is its relative standard deviation sigma_rel, the standard deviation of tau under p divided by t. The average is
linear in the profile: where a sum of stored profiles is close to the target profile, the same sum of the stored averages is
close to its average. Times are optimizer updates here; only their ratios matter.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

MAX_WIDTH = 12**-0.5  # of gamma = 0, a constant profile; a wider one would give the start of the training the largest weight


class Profile(NamedTuple):
    """The width and time of a stored average."""

    width: float  # sigma_rel, above 0 and below MAX_WIDTH
    time: float  # above 0


@cache  # called at every update
def gamma_of(width: float) -> float:
    """The exponent gamma > 0 of a width: the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    Raises:
        ValueError: for a width that is not above 0 and below MAX_WIDTH.
    """
    if not 0 < width < MAX_WIDTH:
        raise ValueError(f"width {width}: must be above 0 and below {MAX_WIDTH:.4f}")
    square = width**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def share(width: float, t: int) -> float:
    """1 - beta_t: how far the average moves towards the weights after update number t >= 1, 1 - (1 - 1/t)^(gamma + 1).

    The average then weights the parameters after update i by the integral of the profile from i - 1 to i. The first update
    replaces the average, so that the random start is no part of it.
    """
    return 1 - (1 - 1 / t) ** (gamma_of(width) + 1)


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
    """The integrals of p_a(tau) p_b(tau) over tau, float64 [len(a), len(b)].

    With u the later of the two times, s the earlier one and gamma_u the exponent of the later profile it is
    (gamma_a + 1) (gamma_b + 1) / ((gamma_a + gamma_b + 1) u) (s / u)^gamma_u.
    """
    gamma_a, gamma_b = (np.array([gamma_of(p.width) for p in profiles]) for profiles in (a, b))
    time_a, time_b = (np.array([p.time for p in profiles], float) for profiles in (a, b))
    gamma_a, time_a = gamma_a[:, None], time_a[:, None]
    earlier, later = np.minimum(time_a, time_b), np.maximum(time_a, time_b)
    exponent = np.where(time_a > time_b, gamma_a, gamma_b)  # with equal times the ratio is 1
    return (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * later) * (earlier / later) ** exponent


def fit(stored: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """(factors float64 [len(stored)], error): the sum of stored profiles that is closest to the target in the L2 norm.

    The factors add up to 1, which plain least squares leaves open: weights are large against their changes, so that a sum of
    0.99 would shrink them by more than averages differ (measured in docs/averages.md). error: the norm of what the sum of
    profiles misses, relative to that of the target, from 0 to about 1. Give the profiles up to the time of the target.
    """
    n = len(stored)
    system = np.ones((n + 1, n + 1))  # of Lagrange: the normal equations, with the sum of the factors as its constraint
    system[n, n] = 0
    system[:n, :n] = inner_products(stored, stored) * target.time  # about 1
    products = inner_products(stored, [target])[:, 0] * target.time
    factors = np.linalg.lstsq(system, np.append(products, 1), rcond=None)[0][:n]
    norm = inner_products([target], [target])[0, 0] * target.time
    square = factors @ system[:n, :n] @ factors - 2 * factors @ products + norm
    return factors, math.sqrt(max(0.0, square) / norm)
