"""Distillation of a rectified flow into one step, or a few."""

from collections.abc import Callable

import torch
from torch import Tensor

from flow.losses.distances import Distance, mse
from flow.losses.flow_matching import flow_matching_loss
from flow.path import Path


def discretize_times(t: Tensor, steps: int = 1, flow_share: float = 0.0) -> Tensor:
    """t [B] in [0, 1] rounded down to the times 0, 1/N, ..., (N - 1)/N that N Euler steps look at.

    Of uniform t, those below `flow_share` are spread over all times instead.
    """
    if steps < 1 or steps != int(steps):
        raise ValueError(f"steps={steps}: must be a whole number of at least 1")
    if not 0 <= flow_share < 1:
        raise ValueError(f"flow_share={flow_share}: must be 0 or more and less than 1")
    rest = (t - flow_share) / (1 - flow_share)
    rounded = (rest * steps).floor().clamp(0, steps - 1) / steps
    return torch.where(t < flow_share, t / flow_share, rounded) if flow_share else rounded


def distillation_loss(
    net: Callable[..., Tensor],
    path: Path,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    distance: Distance = mse,
    prediction: str = "velocity",
    steps: int = 1,
    flow_share: float = 0.0,
) -> Tensor:
    """Per-sample loss [B] of the pairs (x0, x1) of a flow: distance(net(x_k, t_k, y), x1 - x0), t_k = floor(t steps) / steps.

    With steps = 1 all t_k are 0, and x0 + net(x0, 0, y) learns to be x1, the end of the teacher's flow (Liu et al. 2023,
    arXiv:2209.03003, paragraph "Distillation"). With N steps it learns what N Euler steps look at, and forgets what lies
    between, unless a share of uniform t goes to flow matching at all times. x0 and x1 [B, ...], t [B] in [0, 1], y as in
    `flow_matching_loss`. Prediction "noise" has nothing to learn at t_k = 0; `objective` refuses it. Raises ValueError for
    steps or a share out of range.
    """
    return flow_matching_loss(net, path, x0, x1, discretize_times(t, steps, flow_share), y, distance, prediction)
