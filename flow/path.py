"""Probability paths between the noise (t = 0) and the data (t = 1), and what a network may predict along them.

Every path here is x_t = alpha(t) x1 + sigma(t) x0. Up to a change of time and of scale all are equivalent to the linear path:
with r = alpha / (alpha + sigma), the point x_t / (alpha + sigma) lies at r x1 + (1 - r) x0. Solvers therefore work on the
linear path alone (`flow/guidance.py` takes a network of any path there), where the velocity x1 - x0 has no poles.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flow import registry

PREDICTIONS = ("velocity", "data", "noise")  # what networks learn; `convert` also knows the score


class Path(ABC):
    """x_t = alpha(t) x1 + sigma(t) x0 with alpha rising to 1 and sigma falling to 0 at t = 1. Times [B] in [0, 1]."""

    t_max = 1.0  # networks are trained and evaluated at times up to this one

    def clip(self, t: Tensor) -> Tensor:
        """The times [B] at which a network is trained for t [B] in [0, 1]: later ones become t_max."""
        return t.clamp(max=self.t_max)

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives at the times t, each of its shape."""

    @abstractmethod
    def t_from_linear(self, r: float) -> float:
        """The time at which alpha / (alpha + sigma) is r in [0, 1]; 0 where the path begins above r."""

    def t_to_linear(self, t: float) -> float:
        """r = alpha / (alpha + sigma) at t: the time of the same mixture on the linear path."""
        alpha, sigma, *_ = self.coefficients(torch.tensor(t, dtype=torch.float64))
        return (alpha / (alpha + sigma)).item()

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x_t [B, ...] for x0, x1 [B, ...] and t [B]."""
        alpha, sigma, *_ = self._broadcast_coefficients(x1, t)
        return alpha * x1 + sigma * x0

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt [B, ...] of the pair."""
        *_, alpha_dot, sigma_dot = self._broadcast_coefficients(x1, t)
        return alpha_dot * x1 + sigma_dot * x0

    def target(self, x0: Tensor, x1: Tensor, t: Tensor, prediction: str) -> Tensor:
        """What a network with this prediction learns of the pair: x0, x1 or the velocity, [B, ...]."""
        return {"data": x1, "noise": x0}[prediction] if prediction != "velocity" else self.velocity(x0, x1, t)

    def predict_x0_x1(self, x: Tensor, t: Tensor, value: Tensor, given: str) -> tuple[Tensor, Tensor]:
        """(x0, x1) of the point x [B, ...] at the times t [B] where `given` (velocity, data, noise or score) is `value`.

        Divides by sigma for data (0 at t = 1), by alpha for noise and score (0 at t = 0 of the linear and the cosine path).
        Raises ValueError for an unknown name.
        """
        alpha, sigma, alpha_dot, sigma_dot = self._broadcast_coefficients(x, t)
        if given == "velocity":
            det = alpha * sigma_dot - alpha_dot * sigma
            return (alpha * value - alpha_dot * x) / det, (sigma_dot * x - sigma * value) / det
        if given == "data":
            return (x - alpha * value) / sigma, value
        if given in ("noise", "score"):
            x0 = value if given == "noise" else -sigma * value
            return x0, (x - sigma * x0) / alpha
        raise ValueError(f"{given!r}: must be one of {', '.join((*PREDICTIONS, 'score'))}")

    def convert(self, x: Tensor, t: Tensor, value: Tensor, given: str, wanted: str) -> Tensor:
        """From one of velocity, data, noise, score to another, at the point x [B, ...] and times t [B] in (0, 1).

        The score is that of the marginal, -E[x0 | x_t] / sigma, when `value` is a conditional mean.
        """
        x0, x1 = self.predict_x0_x1(x, t, value, given)
        if wanted == "score":
            return -x0 / self._broadcast_coefficients(x, t)[1]
        if wanted not in PREDICTIONS:
            raise ValueError(f"{wanted!r}: must be one of {', '.join((*PREDICTIONS, 'score'))}")
        return self.target(x0, x1, t, wanted)

    def _broadcast_coefficients(self, x: Tensor, t: Tensor) -> list[Tensor]:
        """The coefficients, ready to multiply x [B, ...]."""
        return [broadcast_over(c.to(x.dtype), x) for c in self.coefficients(t)]


def broadcast_over(values: Tensor, like: Tensor) -> Tensor:
    """values [b], ready to multiply `like` [b, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


class LinearPath(Path):
    """alpha = t, sigma = 1 - t: rectified flow (Liu et al. 2023, arXiv:2209.03003, eq. 1) and the optimal-transport
    conditional path with sigma_min = 0 (Lipman et al. 2023, arXiv:2210.02747, eq. 20)."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return t, 1 - t, one, -one

    def t_from_linear(self, r: float) -> float:
        return r

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        return x1 - x0  # as in the base class, without the two products


class CosinePath(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): the trigonometric path of Albergo & Vanden-Eijnden 2023
    (arXiv:2209.15571)."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sin, cos = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
        return sin, cos, math.pi / 2 * cos, -math.pi / 2 * sin

    def t_from_linear(self, r: float) -> float:
        return 2 / math.pi * math.atan2(r, 1 - r)


class VPPath(Path):
    """The variance-preserving path: DDPM's linear beta in continuous time (Song et al. 2021, arXiv:2011.13456, appendix C),
    run backwards. With s = 1 - t, log alpha = -(beta_1 - beta_0) s^2 / 4 - beta_0 s / 2 and sigma^2 = 1 - alpha^2.

    The velocity has a pole at the data end: sigma_dot is about -sqrt(beta_0 / (4 s)), -650 at the largest float32 below 1.
    As in the training of the authors' code (yang-song/score_sde_pytorch, losses.py), s is at least 1e-5, where sigma is
    0.001 and sigma_dot -50.
    """

    BETA_0, BETA_1 = 0.1, 20.0
    t_max = 1 - 1e-5

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s = 1 - t
        log_alpha = -(self.BETA_1 - self.BETA_0) / 4 * s**2 - self.BETA_0 / 2 * s
        alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
        alpha_dot = alpha * (self.BETA_0 + (self.BETA_1 - self.BETA_0) * s) / 2
        return alpha, sigma, alpha_dot, -alpha * alpha_dot / sigma

    def t_from_linear(self, r: float) -> float:
        if r <= 0:
            return 0.0
        log_alpha = -0.5 * math.log1p(((1 - r) / r) ** 2)
        slope = (self.BETA_1 - self.BETA_0) / 2
        s = (math.sqrt(self.BETA_0**2 / 4 - 2 * slope * log_alpha) - self.BETA_0 / 2) / slope
        return max(0.0, 1 - s)


PATHS: dict[str, type[Path]] = {"linear": LinearPath, "cosine": CosinePath, "vp": VPPath}


def build(name: str) -> Path:
    """The path of that name. Raises ValueError for an unknown one, naming what exists."""
    return registry.pick("path", PATHS, name, {})()
