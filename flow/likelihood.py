"""The likelihood of data under a flow: the change of variables along its own trajectories."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flow import solvers

FIRST_STEP = 1e-3  # from the data end; no network is asked about t = 1


def log_likelihood(
    velocity: Callable[[Tensor, float], Tensor],
    x1: Tensor,
    method: str = "dopri5",
    times: list[float] | None = None,
    probes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, int]:
    """(log p(x1) in nats [B], x0 [B, ...], NFE) of the data x1 [B, ...], float64.

    log p(x1) = log N(x0; 0, I) - integral of div v(x_t, t) dt over [0, 1] (Chen et al. 2018, arXiv:1806.07366, eq. 2). The
    divergence is exact without `probes`, at the price of a backward pass for each element of x; with probes [P, B, ...] of
    +1 and -1 it is the mean of e . (dv/dx) e over them (Hutchinson's estimator, as in FFJORD, arXiv:1810.01367, eq. 8),
    unbiased for log p. `times` rise from 0 to 1 and are used backwards by methods that are not adaptive; the first step,
    from t = 1, is one of Euler's with the velocity a little before.
    """
    shape, n = x1.shape, len(x1)
    directions = torch.eye(x1[0].numel(), dtype=x1.dtype, device=x1.device) if probes is None else probes.flatten(2)

    def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Velocity [B, D] and divergence [B]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x.view(shape), t).reshape(n, -1)
            total = torch.zeros(n, dtype=x.dtype, device=x.device)
            for e in directions:
                (product,) = torch.autograd.grad((v * e).sum(), x, retain_graph=True)
                total = total + (product * e).sum(1)
        return v.detach(), total if probes is None else total / len(directions)

    def augmented(state: Tensor, t: float) -> Tensor:
        v, divergence = both(state[:, :-1], t)
        return torch.cat([v, divergence[:, None]], dim=1)

    state = torch.cat([x1.reshape(n, -1), x1.new_zeros(n, 1)], dim=1)
    start = 1 - FIRST_STEP
    state = state - FIRST_STEP * augmented(state, start)
    backwards = [start, *(t for t in reversed(times or []) if 0 < t < start), 0.0]
    solution = solvers.solve(augmented, state, backwards, method, **options)
    x0, integral = solution.x[:, :-1], -solution.x[:, -1]
    log_prior = -0.5 * x0.square().sum(1) - 0.5 * x0.shape[1] * math.log(2 * math.pi)
    return log_prior - integral, x0.view(shape), solution.nfe + 1


def bits_per_dimension(log_p: Tensor, dimensions: int) -> Tensor:
    """Of 8-bit images: log_p [B] in nats of (pixel + u) / 127.5 - 1 with u uniform in [0, 1) (uniform dequantisation,
    Theis et al. 2016, arXiv:1511.01844), whose density bounds the probability of the pixels from below."""
    return -log_p / (dimensions * math.log(2)) + math.log2(127.5)
