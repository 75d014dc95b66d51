"""Time grids: the N + 1 times of an N-step solution, from t = 0 (noise) to t = 1 (data)."""

import math
from collections.abc import Callable

from flow import registry

# At t = 1 the velocity is undefined, as x no longer depends on x0. Adaptive methods and the likelihood, which have no grid that
# fixes the last step, stop (start) at this distance from it; one open step covers the rest.
END_EPS = 1e-3
SHIFT = 3.0  # of `shift`, that of Stable Diffusion 3 at 1024x1024 pixels
RHO, SIGMA_MIN, SIGMA_MAX = 7.0, 0.002, 80.0  # of `edm`


def uniform(steps: int) -> list[float]:
    """0, 1/N, ..., 1."""
    return [i / steps for i in range(steps + 1)]


def cosine(steps: int) -> list[float]:
    """Dense at both ends."""
    return [(1 - math.cos(math.pi * u)) / 2 for u in uniform(steps)]


def shift(steps: int) -> list[float]:
    """Dense at the noise: t / (t + SHIFT (1 - t)), for many pixels (Esser et al. 2024, arXiv:2403.03206)."""
    return [u / (u + SHIFT * (1 - u)) for u in uniform(steps)]


def edm(steps: int) -> list[float]:
    """Uniform in sigma^(1 / rho) with sigma = (1 - t) / t, then the data (Karras et al. 2022, arXiv:2206.00364, eq. 5).

    On the linear path (1 - t) / t is the ratio of noise to data; a network of another path is evaluated at the same ratios.
    The first time is 0, where the noise is, in place of 1 / (1 + SIGMA_MAX) = 0.012.
    """
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    sigmas = [(high + u * (low - high)) ** RHO for u in uniform(max(1, steps - 1))]
    return [0.0, *(1 / (1 + sigma) for sigma in sigmas[1:steps]), 1.0]


def quadratic_noise(steps: int) -> list[float]:
    """t = u^2: dense at the noise."""
    return [u * u for u in uniform(steps)]


def quadratic_data(steps: int) -> list[float]:
    """t = 1 - (1 - u)^2: dense at the data."""
    return [u * (2 - u) for u in uniform(steps)]


GRIDS: dict[str, Callable[[int], list[float]]] = {
    f.__name__: f for f in (uniform, cosine, shift, edm, quadratic_noise, quadratic_data)
}


def build(name: str, steps: int) -> list[float]:
    """The times 0 = t_0 < ... < t_N = 1. Raises ValueError for an unknown name and for steps that are no whole number of
    at least 1."""
    grid = registry.pick("time grid", GRIDS, name, {})
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}: must be a whole number of at least 1")
    return grid(steps)
