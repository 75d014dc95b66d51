"""The regression losses of flow matching: a distance between velocities, per sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from flow import registry
from flow.path import Path

Distance = Callable[[Tensor, Tensor], Tensor]


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean of the squared differences: [B, ...], [B, ...] -> [B]."""
    return (a - b).square().flatten(1).mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean of the absolute differences: [B, ...], [B, ...] -> [B]."""
    return (a - b).abs().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.00054) -> Tensor:
    """sqrt(|a - b|^2 / d + c^2) - c with d elements a sample: [B, ...], [B, ...] -> [B].

    The metric sqrt(|a - b|^2 + c_d^2) - c_d with c_d = 0.00054 sqrt(d) of Song & Dhariwal 2023 (arXiv:2310.14189), over
    sqrt(d): root mean square for errors far above c, l2 / (2 c) far below, so an outlier pulls less than with l2. For
    reflow Lee, Lin & Fanti 2024 (arXiv:2405.20320) have c_d = 0.00054 d, here c = 0.00054 sqrt(d).
    """
    if c <= 0:
        raise ValueError(f"c={c}: must be greater than 0")
    return (l2(a, b) + c**2).sqrt() - c


DISTANCES: dict[str, Callable[..., Tensor]] = {"l2": l2, "l1": l1, "pseudo_huber": pseudo_huber}


def distance(name: str, /, **args: float) -> Distance:
    """The distance of that name. Raises ValueError for an unknown name or argument and for a value out of range."""
    chosen = registry.pick("distance", DISTANCES, name, args)
    chosen(torch.zeros(1, 1), torch.zeros(1, 1))  # checks the values
    return chosen


def flow_matching_loss(
    net: Callable[..., Tensor],
    path: Path,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    distance: Distance = l2,
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
