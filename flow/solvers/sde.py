"""Stochastic sampling of the same marginals: dx = [v + (g^2 / 2) s] dt + g dW with the score s taken from the velocity.

On the linear path x0 = x - t v is the predicted noise and s = -x0 / (1 - t). This is the SDE of Ma et al. 2024 (SiT,
arXiv:2401.08740) with g^2 for their diffusion coefficient w. Increments are functions of (seed, image, step).

The authors' code (willisma/SiT, transport/path.py and integrators.py) adds sqrt(2 D) dW, so its D is g^2 / 2: a form there
with its norm n is the coefficient of that shape here with noise_scale = sqrt(2 n), except "decreasing", where n is a factor of
the cosine: there noise_scale = sqrt(2) for n = 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from flow.solvers.runge_kutta import StageVelocity

# g^2 as a function of t, before the factor noise_scale^2, with SiT's name for the form where it has one. In SiT's code t runs
# as here, with the data at 1. The last step, to t = 1, adds no noise whatever g is there.
DIFFUSION_COEFFICIENTS: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,  # "constant"
    "sigma": lambda t: 1 - t,  # "sigma", and "linear", which on the linear path is the same
    "increasing": lambda t: t,  # ours
    "sine": lambda t: math.sin(math.pi * t) ** 2,  # "increasing-decreasing"
    "decreasing": lambda t: 0.25 * (math.cos(math.pi * t) + 1) ** 2,  # "decreasing"
    "sigma_squared": lambda t: (1 - t) ** 2,  # ours
}
OPTIONS = ("noise", "noise_scale", "diffusion")


def _integrate(
    correct: bool,
    velocity: StageVelocity,
    x: Tensor,
    time_grid: Sequence[float],
    noise: Callable[[int], Tensor],
    noise_scale: float = 1.0,
    diffusion: str = "sigma",
) -> Iterator[Tensor]:
    """x [B, ...] from time_grid[0] on, at each further time. `correct`: by a drift at the end of each step, as Heun does.

    `noise(i)` is standard normal [B, ...], the increment of step i.

    The noise added in a step h has at most half the standard deviation of the noise in x at its end:
    g^2 h <= ((1 - t_next) / 2)^2. Coefficients that do not vanish at the data would otherwise leave noise in the image. The
    more steps, the fewer times are affected.
    With noise_scale 0 these are euler and heun. The last step to t = 1 is Euler's without noise: it lands on the data
    prediction, so that none is left in the image. Raises ValueError for a scale out of range and an unknown diffusion.
    """
    if not 0 <= noise_scale <= 100:
        raise ValueError(f"noise_scale={noise_scale}: must be 0 or more, and at most 100")
    if diffusion not in DIFFUSION_COEFFICIENTS:
        raise ValueError(f"unknown diffusion coefficient {diffusion!r}; choose from {', '.join(DIFFUSION_COEFFICIENTS)}")

    def drift(x: Tensor, t: float, g2: float) -> Tensor:
        v = velocity(x, t)
        return v - g2 / 2 * (x - t * v) / (1 - t) if g2 else v

    for i, (t, t_next) in enumerate(pairwise(time_grid)):
        h = t_next - t
        if t_next == 1:
            yield x + h * velocity(x, t)
            return
        # g^2 at the start, in the middle and at the end of the step
        g2_requested = [noise_scale**2 * DIFFUSION_COEFFICIENTS[diffusion](u) for u in (t, (t + t_next) / 2, t_next)]
        g2, g2_middle, g2_next = (min(value, (1 - t_next) ** 2 / (4 * h)) for value in g2_requested)
        dW = math.sqrt(g2_middle * h) * noise(i) if noise_scale else 0.0
        d_1 = drift(x, t, g2)
        if correct:
            d_2 = drift(x + h * d_1 + dW, t_next, g2_next)
            x = x + h * 0.5 * d_1 + h * 0.5 * d_2 + dW
        else:
            x = x + h * d_1 + dW
        yield x


def euler_maruyama(velocity: StageVelocity, x: Tensor, time_grid: Sequence[float], **options: Any) -> Iterator[Tensor]:
    """The drift at the start of each step: strong order 1, as the noise is additive. Options and errors as in `_integrate`."""
    return _integrate(False, velocity, x, time_grid, **options)


def stochastic_heun(velocity: StageVelocity, x: Tensor, time_grid: Sequence[float], **options: Any) -> Iterator[Tensor]:
    """The mean of the drifts at both ends of each step. Options and errors as in `_integrate`."""
    return _integrate(True, velocity, x, time_grid, **options)
