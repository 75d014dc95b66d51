"""DDPM as a special case: the VP path, a network that predicts noise, and these steps back.

Training with flow.path=vp and flow.prediction=noise is the simple loss of Ho et al. 2020 (arXiv:2006.11239, eq. 14) in
continuous time, with their linear beta schedule; flow.path=cosine has the schedule of Nichol & Dhariwal 2021
(arXiv:2102.09672, eq. 17) with s = 0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from flow.solvers.runge_kutta import StageVelocity


def ancestral(
    velocity: StageVelocity,
    x: Tensor,
    time_grid: Sequence[float],
    noise: Callable[[int], Tensor],
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """x [B, ...] from time_grid[0] on, at each further time, on the linear path by steps of Song et al. 2021 (DDIM,
    arXiv:2010.02502, eq. 12), with the noise of DDPM's posterior, times `eta`.

    `noise(i)` is standard normal [B, ...], that of step i. Without it, at eta = 0, this is DDIM, and Euler's method on the
    linear path: with x0 and x1 held, both go straight on. Raises ValueError for an eta out of range.
    """
    if eta < 0 or not math.isfinite(eta):
        raise ValueError(f"eta={eta}: must be 0 or more, and finite")
    for i, (t, t_next) in enumerate(pairwise(time_grid)):
        v = velocity(x, t)
        if t_next == 1 or eta == 0:
            x = x + (t_next - t) * v
            yield x
            continue
        x0, x1 = x - t * v, x + (1 - t) * v
        # signal and noise of the variance-preserving path at the same ratio; x there is x here over `scale`
        scale, scale_next = math.hypot(t, 1 - t), math.hypot(t_next, 1 - t_next)
        alpha, sigma, alpha_next, sigma_next = t / scale, (1 - t) / scale, t_next / scale_next, (1 - t_next) / scale_next
        sigma_up = eta * sigma_next / sigma * math.sqrt(max(0.0, 1 - (alpha / alpha_next) ** 2))
        sigma_up = min(sigma_up, sigma_next)
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        x = scale_next * (alpha_next * x1 + sigma_down * x0 + sigma_up * noise(i))
        yield x
