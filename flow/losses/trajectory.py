"""A flow map from the stored paths of a teacher: consistency mid-training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from flow.losses.base import Batch, Eager, Losses
from flow.losses.flow_map import FlowMapLoss
from flow.path import broadcast_over

STENCIL = 5  # states that a velocity is read from


@dataclass(kw_only=True)
class Trajectory(FlowMapLoss):
    """u(x_i, t_i, t_j) regressed on (x_j - x_i) / (t_j - t_i) for states i < j of a path that a teacher's solver took.

    Consistency mid-training for mean flows (Hu et al. 2025, arXiv:2509.24526): with fixed targets it needs
    neither derivatives nor schedules, and prepares a network for `alpha_flow` or `mean_flow`. The samples with t_next = t
    learn the velocity of the path, the derivative of the polynomial through the five states next to x_i. Guidance is that of
    the teacher. The pairs (i, j) are uniform; flow.time_sampler is not used.

    Example:
        >>> times = time_samplers.build("uniform")
        >>> loss = Trajectory(path=LinearPath(), prediction="velocity", time_sampler=times, map_share=0.75)
        >>> loss(net, eager, batch).per_sample.mean().backward()  # with batch.states, of pairs made with --keep_states
    """

    name: ClassVar[str] = "trajectory"
    num_uniforms: ClassVar[int] = 2  # which pair of states, and which samples have two
    needs_states: ClassVar[bool] = True

    map_share: float = 0.75
    weight_power: float = 0.0

    @property
    def uses_time_sampler(self) -> bool:
        return False

    def __call__(self, net: Callable[..., Tensor], eager: Eager, batch: Batch) -> Losses:
        assert batch.x0 is not None and batch.uniforms is not None
        assert batch.states is not None and batch.state_times is not None
        states = torch.cat([batch.x0[:, None], batch.states.float(), batch.x1[:, None]], dim=1)  # [b, K + 2, ...]
        t, weights = times_and_weights(batch.state_times, states.device)
        n, rows = len(t), torch.arange(len(states), device=states.device)
        i, j = torch.triu_indices(n, n, 1, device=states.device)[:, (batch.uniforms[:, 0] * (n * (n - 1) // 2)).long()]
        x = states[rows, i]
        step = broadcast_over(t[j] - t[i], batch.x1)
        velocity = torch.einsum("bk,bk...->b...", weights[i], states)
        is_map = self.have_two_times(batch.uniforms[:, 1], batch.progress)
        target = torch.where(broadcast_over(is_map, x), (states[rows, j] - x) / step, velocity)
        return self.weighted(net(x, t[i], batch.y, torch.where(is_map, t[j], t[i])), target, t[i])


@cache  # the same in each step, and a copy to a GPU would wait for its queued work
def times_and_weights(state_times: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The times [K + 2] of a path with its ends, and their `derivative_weights` [K + 2, K + 2], float32."""
    times = torch.tensor([0.0, *state_times, 1.0], dtype=torch.float64)
    return times.float().to(device), derivative_weights(times).float().to(device)


def derivative_weights(times: Tensor) -> Tensor:
    """D [n, n]: D f is the derivative at each of `times` [n] of the polynomial through the values f there and at its nearest
    neighbors, `STENCIL` in all. Exact for polynomials of degree STENCIL - 1 (finite differences on any grid)."""
    n, size = len(times), min(STENCIL, len(times))
    result = times.new_zeros(n, n)
    for i in range(n):
        start = min(max(i - size // 2, 0), n - size)
        near = slice(start, start + size)
        powers = torch.vander(times[near] - times[i], increasing=True).T  # [power, state]
        slope = times.new_zeros(size)
        slope[1] = 1.0  # of the polynomials 1, h, h^2, ... at h = 0
        result[i, near] = torch.linalg.solve(powers, slope)
    return result
