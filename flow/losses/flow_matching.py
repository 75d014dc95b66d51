"""Conditional flow matching: regression on the velocity of the path, or on the data or the noise."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flow.losses import distances
from flow.losses.base import Batch, Eager, FlowLoss, Losses
from flow.path import Path


class FlowMatching(FlowLoss):
    """distance(net(x_t, t, y), target) with x_t = alpha(t) x1 + sigma(t) x0, in float32.

    Conditional flow matching (Lipman et al. 2023, arXiv:2210.02747, eq. 9) with the velocity of the path as the conditional
    vector field. With prediction "noise" the target is x0, the simple loss of DDPM (Ho et al. 2020, arXiv:2006.11239,
    eq. 14) in continuous time; with "data" it is x1.

    Example:
        >>> loss = FlowMatching(LinearPath(), "velocity", time_samplers.build("uniform"))
        >>> loss(net, eager, batch).per_sample.mean().backward()
    """

    name = "flow_matching"

    def __init__(
        self,
        path: Path,
        prediction: str,
        time_sampler: Callable[[Tensor], Tensor],
        distance: str = "mse",
        distance_args: dict[str, Any] | None = None,
    ):
        """distance: a key of `distances.DISTANCES`, with its arguments."""
        self.path, self.prediction, self.time_sampler = path, prediction, time_sampler
        self.distance = distances.build(distance, distance_args or {})

    def times(self, u: Tensor) -> Tensor:
        """The times [b] at which the network is trained, float32, of uniforms u [b]; at most `path.t_max`."""
        return self.path.clip(self.time_sampler(u).float())

    def __call__(self, net: Callable[..., Any], eager: Eager, batch: Batch) -> Losses:
        assert batch.x0 is not None and batch.u is not None
        t = self.times(batch.u[:, 0])
        prediction = net(self.path.interpolate(batch.x0, batch.x1, t), t, batch.y)
        target = self.path.target(batch.x0, batch.x1, t, self.prediction)
        return Losses(self.distance(prediction.float(), target), t)
