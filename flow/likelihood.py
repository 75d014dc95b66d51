"""The flow solved backwards: log-likelihood of data, and the noise that an image comes from."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flow import solvers
from flow.noise import generator
from flow.solvers import ADAPTIVE, Velocity
from flow.solvers.time_grids import END_EPS
from flow.source import GAUSSIAN, Source

T_MAX = 0.98  # the marginal there still shows the noise, which is mixed into the image


def check_density_known(source: Source) -> None:
    """Raises ValueError for a source whose density is not known."""
    if source.name != GAUSSIAN:
        raise ValueError(f"flow.source.name={source.name}: its density is not known, so the flow gives no likelihood")


def log_likelihood(
    velocity: Velocity,
    x1: Tensor,
    method: str = "dopri5",
    times: list[float] | None = None,
    eps: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, int]:
    """(log p(x1) in nats [B], x0 [B, ...], NFE) of the data x1 [B, ...], float64.

    log p(x1) = log N(x0; 0, I) - integral of div v(x_t, t) dt over [0, 1] (Chen et al. 2018, arXiv:1806.07366, theorem 1). The
    divergence is exact without `eps`, at the price of a backward pass for each element of x; with eps [P, B, ...] of
    +1 and -1, `random_directions`, it is the mean of e . (dv/dx) e over them (Hutchinson's estimator, as in FFJORD,
    arXiv:1810.01367, eq. 8), unbiased for log p. `times` rise from 0 to 1 and are used backwards by methods that are not
    adaptive. The first step, from t = 1 to 1 - END_EPS, is a midpoint rule whose midpoint comes from the velocity at its end.

    The result carries no gradient. Raises ValueError for an x1 that requires one, and for a method that needs times and has
    none.
    """
    if times is None and method not in ADAPTIVE:
        raise ValueError(f"method={method}: needs times; use one of {', '.join(ADAPTIVE)}, or give times to flow.likelihood")
    if x1.requires_grad and torch.is_grad_enabled():
        raise ValueError("x1 requires a gradient, and log_likelihood gives none: pass x1.detach()")
    shape = x1.shape
    n = len(x1)
    basis = torch.eye(x1[0].numel(), dtype=x1.dtype, device=x1.device) if eps is None else eps.flatten(2)

    def velocity_and_divergence(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Velocity [B, D] and divergence [B]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x.view(shape), t, t).reshape(n, -1)
            total = torch.zeros(n, dtype=x.dtype, device=x.device)
            for e in basis:
                (product,) = torch.autograd.grad((v * e).sum(), x, retain_graph=True)
                total = total + (product * e).sum(1)
        return v.detach(), total if eps is None else total / len(basis)

    def augmented(state: Tensor, t: float, t_next: float) -> Tensor:
        v, divergence = velocity_and_divergence(state[:, :-1], t)
        return torch.cat([v, divergence[:, None]], dim=1)

    state = torch.cat([x1.reshape(n, -1), x1.new_zeros(n, 1)], dim=1)
    start = 1 - END_EPS
    middle = state - END_EPS / 2 * augmented(state, start, start)
    state = state - END_EPS * augmented(middle, 1 - END_EPS / 2, 1 - END_EPS / 2)
    backwards = [start, *(t for t in reversed(times or []) if 0 < t < start), 0.0]
    solution = solvers.solve(augmented, state, backwards, method, **options)
    x0 = solution.x[:, :-1]
    integral = -solution.x[:, -1]
    log_prior = -0.5 * x0.square().sum(1) - 0.5 * x0.shape[1] * math.log(2 * math.pi)
    return log_prior - integral, x0.view(shape), solution.nfe + 2


def random_directions(seed: int, indices: Iterable[int], shape: tuple[int, ...], count: int) -> Tensor:
    """Directions of +1 and -1 for Hutchinson's estimator, float64 [count, n, *shape], on the CPU.

    Those of sample i are a function of (seed, indices[i]); the first ones stay the same where there are more.
    """
    signs = [generator("hutchinson", seed, k).integers(2, size=(count, *shape)) for k in indices]
    return torch.from_numpy(np.stack(signs, axis=1) * 2.0 - 1)


def dequantize(pixels: Tensor, u: Tensor) -> Tensor:
    """Images (k + u - 1/2) / 127.5 - 1 of pixels k [B, ...] in 0 to 255 and u [B, ...], uniform in [0, 1), in float64.

    Level k owns the bin from k - 1/2 to k + 1/2, of width one and centered on the value k / 127.5 - 1 that networks are
    trained on, which is also what rounding makes k of in sampling. So do levels 0 and 255, whose bins reach half a level
    beyond [-1, 1]. Sampling also clips to them what lies farther out; that mass is not part of their bins.
    """
    return (pixels.double() + u - 0.5) / 127.5 - 1


def bits_per_dimension(log_p: Tensor, dimensions: int) -> Tensor:
    """Bits per dimension [B] of 8-bit images from log_p [B] in nats, the log-density of `dequantize(pixels, u)`.

    Its mean over u bounds from below the log of the mean density over the bins, which is the log-probability of the pixels
    (uniform dequantization, Theis et al. 2016, arXiv:1511.01844): the bits are an upper bound. A flow that was trained on the
    levels themselves, without dequantization, has its density in peaks at the levels, of width END_EPS where the integral
    starts; the sharper they are, the larger the bound. So bits compare networks that were trained on dequantized pixels.
    """
    return -log_p / (dimensions * math.log(2)) + math.log2(127.5)


def invert(velocity: Velocity, x1: Tensor, noise: Tensor | None, steps: int, method: str) -> Tensor:
    """x0 [B, ...] of the images x1 [B, ...]: the flow solved from t = 0.98 back to 0 in `steps` steps.

    It starts at x_t = t x1 + (1 - t) noise with standard normal noise [B, ...], a sample of the flow's own marginal at
    that time. A clean image is no such sample; the noise found for it would have too small a variance. Without noise, for a
    flow between two data sets, it starts at x1 and t = 1 - END_EPS.
    """
    start, x = (1 - END_EPS, x1) if noise is None else (T_MAX, T_MAX * x1 + (1 - T_MAX) * noise)
    times = [start * (1 - i / steps) for i in range(steps + 1)]
    return solvers.solve(velocity, x, times, method).x
