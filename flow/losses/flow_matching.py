"""Conditional flow matching: regression on the velocity of the path, or on the data or the noise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flow.losses import distances
from flow.losses.base import Batch, Eager, FlowLoss, Losses
from flow.path import Path


@dataclass(kw_only=True)
class FlowMatching(FlowLoss):
    """distance(net(x_t, t, y), target) with x_t = alpha(t) x1 + sigma(t) x0, in float32.

    Conditional flow matching (Lipman et al. 2023, arXiv:2210.02747, eq. 9) with the velocity of the path as the conditional
    vector field. With prediction "noise" the target is x0, the simple loss of DDPM (Ho et al. 2020, arXiv:2006.11239,
    eq. 14) in continuous time; with "data" it is x1. With weight_power the distance d of a sample gets the weight
    1 / (d + c)^p without gradient; p = 1 is the loss normalization of Simple ReFlow (Kim et al. 2024, arXiv:2410.07815).

    Example:
        >>> loss = losses.build("flow_matching", LinearPath(), "velocity", time_samplers.build("uniform"), {})
        >>> loss(net, eager, batch).per_sample.mean().backward()
    """

    name: ClassVar[str] = "flow_matching"
    capturable: ClassVar[bool] = True

    path: Path
    prediction: str
    time_sampler: Callable[[Tensor], Tensor]
    distance: str = "mse"  # a key of `distances.DISTANCES`
    distance_args: dict[str, Any] | None = None
    weight_power: float = 0.0  # p; 0 is off
    weight_offset: float = 1e-6  # c

    def __post_init__(self) -> None:
        self.check("weight_power", self.weight_power >= 0, "0 or more")
        self.check("weight_offset", self.weight_offset > 0, "more than 0")
        self.distance_between = distances.build(self.distance, self.distance_args or {})

    def times(self, u: Tensor) -> Tensor:
        """The times [b] at which the network is trained, float32, of uniforms u [b]."""
        return self.time_sampler(u).float()

    def __call__(self, net: Callable[..., Any], eager: Eager, batch: Batch) -> Losses:
        assert batch.x0 is not None and batch.uniforms is not None
        t = self.times(batch.uniforms[:, 0])
        prediction = net(self.path.interpolate(batch.x0, batch.x1, t), t, batch.y)
        target = self.path.target(batch.x0, batch.x1, t, self.prediction)
        d = self.distance_between(prediction.float(), target)
        if not self.weight_power:
            return Losses(d, t)
        return Losses(d / (d.detach() + self.weight_offset) ** self.weight_power, t, {"unweighted": d})
