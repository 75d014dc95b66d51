"""What the losses of flow maps share: two times, the weight of a sample, guidance inside the target."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flow.losses.base import Batch, Eager, FlowLoss, Losses
from flow.losses.distances import mse
from flow.path import LinearPath, Path, broadcast_over


@dataclass(kw_only=True)
class FlowMapLoss(FlowLoss):
    """Base of the losses that train u(x, t, t_next), the mean velocity from t to t_next: x + (t_next - t) u is the flow map.

    A `map_share` of the samples has t < t_next, both from the time sampler, sorted; the others have t_next = t and learn the
    velocity (Geng et al. 2025, arXiv:2505.13447, section 4.3; its time runs the other way: their t and r are 1 - t and
    1 - t_next here). The squared error e of a sample, the mean over its elements, gets the weight 1 / (e + c)^p without
    gradient. In the paper e is the sum over the elements and c = 1e-3, which is 1e-6 for the mean over a thousand. In
    alpha-Flow e is of the order of alpha^2 for samples with two times, and a larger c would take them out of the training.
    """

    num_uniforms: ClassVar[int] = 3  # two times, and which samples have two
    needs_two_times: ClassVar[bool] = True

    path: Path
    prediction: str
    time_sampler: Callable[[Tensor], Tensor]
    map_share: float = 0.5  # in [0, 1]
    map_start: float = 0.0  # share of the training that learns the velocity alone, before any sample has two times; in [0, 1)
    weight_power: float = 1.0  # p; 0 is the plain squared error
    weight_offset: float = 1e-6  # c

    def __post_init__(self) -> None:
        if not isinstance(self.path, LinearPath) or self.prediction != "velocity":
            raise ValueError(f"{self.name}: a flow map needs flow.path=linear and flow.prediction=velocity")
        self.check("map_share", 0 <= self.map_share <= 1, "between 0 and 1")
        self.check("map_start", 0 <= self.map_start < 1, "0 or more and less than 1")
        self.check("weight_power", self.weight_power >= 0, "0 or more")
        self.check("weight_offset", self.weight_offset > 0, "more than 0")

    @property
    def mean_map_share(self) -> float:
        """The share of samples with two times over the whole training."""
        return self.map_share * (1 - self.map_start)

    def have_two_times(self, u: Tensor, progress: float) -> Tensor:
        """Which samples have t < t_next, bool [b], of uniforms u [b] at this share of the training."""
        return u < (self.map_share if progress >= self.map_start else 0.0)

    def times(self, u: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """(t, t_next) float32 [b], t <= t_next, of uniforms u [b, 3] at this share of the training."""
        t, t_next = self.time_sampler(u[:, :2]).float().sort(dim=1).values.unbind(1)
        return t, torch.where(self.have_two_times(u[:, 2], progress), t_next, t)

    def weighted(self, prediction: Tensor, target: Tensor, t: Tensor, alpha: Tensor | float = 1.0) -> Losses:
        """e / alpha with e [b] the squared error, weighted by (alpha^2 / (e + c))^p; unweighted as the term `mse`.

        alpha: that of alpha-Flow, [b] or a number. For p = 1 the loss is alpha e / (e + c), without a gradient of e + c.
        """
        e = mse(prediction.float(), target)
        weight = (alpha**2 / (e.detach() + self.weight_offset)) ** self.weight_power
        return Losses(weight * e / alpha, t, {"mse": e})


@dataclass(kw_only=True)
class GuidedFlowMapLoss(FlowMapLoss):
    """Base of the losses whose targets come from the network, which can learn the guided velocity in place of v."""

    guidance_scale: float = 1.0  # w of the guided velocity that is learned; 1 is off
    guidance_mix: float = 0.0  # kappa in [0, 1), see `guided`

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("guidance_scale", self.guidance_scale > 0, "more than 0; 1 is off")
        self.check("guidance_mix", 0 <= self.guidance_mix < 1, "0 or more and less than 1")

    @property
    def guidance_passes(self) -> int:
        """Passes through the network that `guided` takes."""
        return (self.guidance_scale != 1) + (self.guidance_mix > 0)

    def guided(self, eager: Eager, x: Tensor, t: Tensor, y: Tensor | None, v: Tensor) -> Tensor:
        """The velocity [b, ...] in place of v = x1 - x0 whose mean over v is the guided one.

        w (1 - kappa) v + kappa u_c + (1 - kappa - w (1 - kappa)) u_u with the network's velocities with and without the
        condition, u_c = u(x, t, t, y) and u_u (MeanFlow, arXiv:2505.13447, section 4.2 and appendix; its omega is
        w (1 - kappa), and w the effective scale). kappa > 0 takes part of v from the network, which has less variance. A
        velocity whose factor is 0, as that of u_u at w = 1, is not computed.
        Samples whose condition was dropped keep v.
        """
        if self.guidance_scale == 1 and self.guidance_mix == 0:
            return v
        assert y is not None and eager.null is not None, "`check_loss` refuses networks without a condition"
        kappa = self.guidance_mix
        omega = self.guidance_scale * (1 - kappa)
        target = omega * v
        if self.guidance_scale != 1:
            target = target + (1 - kappa - omega) * eager.as_trained(x, t, torch.full_like(y, eager.null), t)
        if kappa:
            target = target + kappa * eager.as_trained(x, t, y, t)
        dropped = (y == eager.null).view(len(y), -1).all(1)
        return torch.where(broadcast_over(dropped, v), v, target)


def x_and_velocity(path: Path, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
    """The point x_t [b, ...] of each pair, and its velocity x1 - x0."""
    assert batch.x0 is not None
    return path.interpolate(batch.x0, batch.x1, t), path.velocity(batch.x0, batch.x1, t)


def jump(x: Tensor, t: Tensor, t_next: Tensor, u: Tensor) -> Tensor:
    """x + (t_next - t) u: where a mean velocity u [b, ...] leads from t to t_next [b]."""
    return x + broadcast_over(t_next - t, x) * u
