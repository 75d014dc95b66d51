"""Sampling with fresh noise between jumps to the data, for flow maps."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor


def renoised_jumps(
    velocity: Callable[[Tensor, float, float], Tensor],
    x: Tensor,
    time_grid: Sequence[float],
    noise: Callable[[int], Tensor],
) -> Iterator[Tensor]:
    """x [B, ...] from time_grid[0] on, at each further time: to the data at t = 1 by one jump, then back to the time by noise.

    Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1) on the linear path. `noise(i)` is the
    standard normal [B, ...] of step i.
    """
    for i, (t, t_next) in enumerate(pairwise(time_grid)):
        x1 = x + (1 - t) * velocity(x, t, 1.0)
        x = x1 if t_next == 1 else t_next * x1 + (1 - t_next) * noise(i)
        yield x
