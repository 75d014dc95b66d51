"""The regression loss of flow matching."""

from collections.abc import Callable

from torch import Tensor

from flow.losses.distances import Distance, mse
from flow.path import Path


def flow_matching_loss(
    net: Callable[..., Tensor],
    path: Path,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    distance: Distance = mse,
    prediction: str = "velocity",
) -> Tensor:
    """Per-sample loss [B]: distance(net(x_t, t, y), target), in float32.

    Conditional flow matching (Lipman et al. 2023, arXiv:2210.02747, eq. 9), here with the velocity of `path` as the
    conditional vector field and, by default, the mean square over elements. With prediction "noise" the target is x0, the
    simple loss of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 14) in continuous time; with "data" it is x1. x0 noise and x1
    data [B, ...], t [B] in [0, 1], y labels [B], tokens [B, L] or None. Times above `path.t_max` become it.
    """
    t = path.clip(t)
    target = path.target(x0, x1, t, prediction)
    answer = net(path.interpolate(x0, x1, t), t, y)
    return distance(answer.float(), target)
