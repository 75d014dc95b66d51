"""DDPM as a special case: the VP path, a network that predicts noise, and these steps back.

Training with flow.path=vp and flow.prediction=noise is the simple loss of Ho et al. 2020 (arXiv:2006.11239, eq. 14) in
continuous time, with their linear beta schedule; flow.path=cosine has the schedule of Nichol & Dhariwal 2021
(arXiv:2102.09672, eq. 17) with s = 0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor


def ddim_or_ancestral(
    velocity: Callable[[Tensor, float, float], Tensor],
    x: Tensor,
    time_grid: Sequence[float],
    method: str,
    noise: Callable[[int], Tensor] | None = None,
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """x [B, ...] from time_grid[0] on, at each further time, on the linear path by steps of Song et al. 2021 (DDIM,
    arXiv:2010.02502, eq. 12).

    `ancestral` adds the noise of DDPM's posterior, times `eta`; `noise(i)` is its standard normal [B, ...] of step i. `ddim`
    adds none, and is Euler's method on the linear path: with x0 and x1 held, both go straight on.
    """
    if eta < 0 or not math.isfinite(eta):
        raise ValueError(f"eta={eta}: must be 0 or more, and finite")
    for i, (t, t_next) in enumerate(pairwise(time_grid)):
        v = velocity(x, t, t_next)
        x0, x1 = x - t * v, x + (1 - t) * v
        if method == "ddim" or t_next == 1 or eta == 0:
            x = x + (t_next - t) * v
            yield x
            continue
        if noise is None:
            raise ValueError(f"{method}: needs noise")
        # signal and noise of the variance-preserving path at the same ratio; x there is x here over `scale`
        scale, scale_next = math.hypot(t, 1 - t), math.hypot(t_next, 1 - t_next)
        alpha, sigma, alpha_next, sigma_next = t / scale, (1 - t) / scale, t_next / scale_next, (1 - t_next) / scale_next
        sigma_up = eta * sigma_next / sigma * math.sqrt(max(0.0, 1 - (alpha / alpha_next) ** 2))
        sigma_up = min(sigma_up, sigma_next)
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        x = scale_next * (alpha_next * x1 + sigma_down * x0 + sigma_up * noise(i))
        yield x
