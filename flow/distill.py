"""Distillation of a rectified flow into one step, or a few."""

from collections.abc import Callable

from torch import Tensor

from flow.loss import Distance, flow_matching_loss, l2
from flow.path import LinearPath


def euler_times(t: Tensor, steps: int = 1) -> Tensor:
    """t [B] in [0, 1] rounded down to the times 0, 1/N, ..., (N - 1)/N that N Euler steps look at."""
    if steps < 1 or steps != int(steps):
        raise ValueError(f"steps={steps}: must be a whole number of at least 1")
    return (t * steps).floor().clamp(0, steps - 1) / steps


def distillation_loss(
    net: Callable[..., Tensor],
    path: LinearPath,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    distance: Distance = l2,
    steps: int = 1,
) -> Tensor:
    """Per-sample loss [B] of the pairs (x0, x1) of a flow: distance(net(x_k, t_k, y), x1 - x0), t_k = floor(t steps) / steps.

    With steps = 1 all t_k are 0, and x0 + net(x0, 0, y) learns to be x1, the end of the teacher's flow (Liu et al. 2023,
    arXiv:2209.03003, paragraph "Distillation"). With N steps it learns what N Euler steps look at, and nothing between.
    x0 and x1 [B, ...], t [B] in [0, 1], y as in `flow_matching_loss`.
    """
    return flow_matching_loss(net, path, x0, x1, euler_times(t, steps), y, distance)
