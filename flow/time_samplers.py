"""The distribution of t in training, stratified over the global batch."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flow import registry
from flow.noise import generator


def uniform(u: Tensor) -> Tensor:
    """t ~ U(0, 1)."""
    return u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """logit(t) ~ N(mean, std^2): more weight on the middle of the path, with mean > 0 towards the data at t = 1.

    Esser et al. 2024 (arXiv:2403.03206, eq. 19), whose t runs the other way: their z_t = (1 - t) x0 + t noise has the data
    at t = 0. Their location m is mean = -m here, as logit(1 - t) = -logit(t); their scale s is std.
    """
    if std <= 0:
        raise ValueError(f"std={std}: must be greater than 0")
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def u_shaped(u: Tensor, a: float = 4.0) -> Tensor:
    """Density proportional to exp(a t) + exp(a (1 - t)): more weight on both ends, where the loss of reflow is largest.

    Lee, Lin & Fanti 2024 (arXiv:2405.20320), in the form and with the a = 4 of the authors' code.
    """
    if not 0 < a <= 100:
        raise ValueError(f"a={a}: must be greater than 0 and at most 100")
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(a / 2)) / a


def exponential(u: Tensor, a: float = 10.0) -> Tensor:
    """Density proportional to a^(1 - t): a > 1 puts more weight on the noise, where reflow has most to learn.

    Kim et al. 2024 (Simple ReFlow, arXiv:2410.07815), whose time runs the other way, with their a = 10.
    """
    if not 0 < a <= 1e6 or a == 1:
        raise ValueError(f"a={a}: must be greater than 0, at most 1e6, and not 1")
    return 1 - torch.log1p((1 - u) * (a - 1)) / math.log(a)


def edm_skewed(u: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """t = 1 / (1 + sigma) with log sigma ~ N(mean, std^2), weighted towards the data.

    EDM's distribution of noise levels (Karras et al. 2022, arXiv:2206.00364, table 1) on the linear path.
    """
    if std <= 0:
        raise ValueError(f"std={std}: must be greater than 0")
    return torch.sigmoid(std * torch.special.ndtri(u) - mean)  # log sigma falls with u, so that t rises


TIME_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform, "logit_normal": logit_normal, "u_shaped": u_shaped, "exponential": exponential,
    "edm_skewed": edm_skewed,
}  # fmt: skip


def build(name: str, /, **args: float) -> Callable[[Tensor], Tensor]:
    """The inverse distribution function of the time sampler: u in (0, 1) -> t in [0, 1].

    Raises ValueError for an unknown name or argument and for a value out of range.
    """
    inverse = registry.pick("time sampler", TIME_SAMPLERS, name, args)
    inverse(torch.tensor([0.5], dtype=torch.float64))  # checks the values
    return inverse


def stratified(seed: int, step: int, n: int, count: int = 1) -> Tensor:
    """`count` uniforms in (0, 1) for each of n samples, float64 [n, count]; a function of (seed, step).

    Each column has one number in each interval [i/n, (i+1)/n), in random order: the distribution of t stays exact for each
    sample, and the variance of the batch mean falls.
    """
    g = generator("time", seed, step)
    u = np.stack([(g.permutation(n) + g.random(n)) / n for _ in range(count)], axis=1) if count else np.empty((n, 0))
    tiny = 1e-7  # u = 0 would send an unbounded distribution to infinity
    return torch.from_numpy(u).clamp_(tiny, 1 - tiny)
