"""Stochastic sampling of the same marginals: dx = [v + (g^2 / 2) s] dt + g dW with the score s taken from the velocity.

On the linear path x0 = x - t v is the predicted noise and s = -x0 / (1 - t) (Ma et al. 2024, SiT, arXiv:2401.08740, whose
diffusion coefficients these are but for the last). Increments are functions of (seed, image, step).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

# g^2 as a function of t, before the noise scale. The last step, to t = 1, adds no noise whatever g is there.
DIFFUSIONS: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "sigma": lambda t: 1 - t,
    "linear": lambda t: t,
    "sine": lambda t: math.sin(math.pi * t) ** 2,
    "decreasing": lambda t: 0.25 * (math.cos(math.pi * t) + 1) ** 2,
    "sigma_squared": lambda t: (1 - t) ** 2,
}
SDE = ("euler_maruyama", "stochastic_heun")


def sde(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    grid: Sequence[float],
    method: str,
    noise: Callable[[int], Tensor] | None = None,
    noise_scale: float = 1.0,
    diffusion: str = "sigma",
) -> Tensor:
    """x [B, ...] from grid[0] to grid[-1]; `noise(i)` is standard normal [B, ...], the increment of step i.

    With noise_scale 0 these are euler and heun. The last step to t = 1 is Euler's without noise: it lands on the data
    prediction, so that none is left in the image. Raises ValueError for a negative scale, an unknown diffusion and
    missing noise.
    """
    if noise_scale < 0 or not math.isfinite(noise_scale):
        raise ValueError(f"noise_scale={noise_scale}: must be 0 or more, and finite")
    if diffusion not in DIFFUSIONS:
        raise ValueError(f"{diffusion!r} is no diffusion coefficient; choose one of {', '.join(DIFFUSIONS)}")
    if noise is None:
        raise ValueError(f"{method}: needs noise")

    def g2(t: float) -> float:
        return noise_scale**2 * DIFFUSIONS[diffusion](t)

    def drift(x: Tensor, t: float) -> Tensor:
        v = velocity(x, t)
        return v - g2(t) / 2 * (x - t * v) / (1 - t) if g2(t) else v

    for i, (t, t_next) in enumerate(pairwise(grid)):
        h = t_next - t
        if t_next == 1:
            return x + h * velocity(x, t)
        kick = math.sqrt(g2((t + t_next) / 2) * h) * noise(i) if noise_scale else 0.0
        first = drift(x, t)
        if method == "euler_maruyama":
            x = x + h * first + kick
        else:
            second = drift(x + h * first + kick, t_next)
            x = x + h * 0.5 * first + h * 0.5 * second + kick
    return x
