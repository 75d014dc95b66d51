"""Time grids fitted to a trained flow: a few scalars that make a method land where the fine solution does.

First a path through the times of a fine trajectory whose local errors add up to the least, found exactly by dynamic
programming without any evaluation of the network; then a descent on the error of the method itself.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

EVALUATIONS_A_STEP = 2  # of the fine trajectory


def reference_trajectory(
    velocity: Callable[[Tensor, float, float], Tensor], x0: Tensor, steps: int
) -> tuple[list[Tensor], list[Tensor]]:
    """States x [B, ...] at 0, 1/M, ..., 1, and velocities at all of them but 1, by M steps of the midpoint rule."""
    states, velocities = [x0], []
    for i in range(steps):
        velocities.append(velocity(states[-1], i / steps, i / steps))
        middle = states[-1] + velocities[-1] / (2 * steps)
        states.append(states[-1] + velocity(middle, (i + 0.5) / steps, (i + 0.5) / steps) / steps)
    return states, velocities


def dynamic_programming_grid(states: Sequence[Tensor], velocities: Sequence[Tensor], steps: int) -> list[float]:
    """The N + 1 times, of those of the trajectory, for which the errors (root mean square) of the single Euler steps have the
    smallest sum.

    The step from t_i to t_j errs by x_i + (t_j - t_i) v_i - x_j.
    """
    m = len(velocities)
    if not 1 <= steps <= m:
        raise ValueError(f"{steps} steps: must be from 1 to the {m} of the fine trajectory")
    flat = torch.stack([x.flatten() for x in states])  # [M + 1, B D]
    error = np.full((m + 1, m + 1), np.inf)
    for i, v in enumerate(velocities):
        later = torch.arange(i + 1, m + 1, device=flat.device, dtype=flat.dtype)
        x_next = flat[i] + ((later - i) / m)[:, None] * v.flatten()
        error[i, i + 1 :] = (x_next - flat[i + 1 :]).square().mean(1).sqrt().cpu().numpy()
    cost = np.full((steps + 1, m + 1), np.inf)
    parent = np.zeros((steps + 1, m + 1), dtype=int)
    cost[0, 0] = 0
    for n in range(1, steps + 1):
        through = cost[n - 1][:, None] + error
        parent[n], cost[n] = through.argmin(0), through.min(0)
    j = m
    times = [1.0]
    for n in range(steps, 0, -1):
        j = parent[n, j]
        times.append(j / m)
    return times[::-1]


def refine_grid(error: Callable[[list[float]], float], times: list[float], evaluations: int) -> list[float]:
    """A grid with no greater error(times), near `times`, after at most so many evaluations of `error`.

    Nelder & Mead's simplex on the logarithms of the steps' ratios, which keep the times in order.
    """
    from scipy.optimize import minimize

    steps = np.diff(times)

    def grid_of(logits: np.ndarray) -> list[float]:
        parts = np.exp(np.concatenate([[0.0], logits]))
        inner = np.cumsum(parts)[:-1] / parts.sum()
        return [0.0, *inner.tolist(), 1.0]

    if len(steps) == 1:
        return times
    best, best_error = list(times), np.inf  # the first vertex of the simplex is this grid

    def objective(logits: np.ndarray) -> float:
        nonlocal best, best_error
        candidate = grid_of(logits)
        value = error(candidate) if all(b - a > 1e-6 for a, b in pairwise(candidate)) else np.inf
        if value < best_error:
            best, best_error = candidate, value
        return value

    start = np.log(steps[1:] / steps[0])
    simplex = np.vstack([start, start + 0.3 * np.eye(len(start))])
    options = {"maxfev": evaluations, "initial_simplex": simplex, "xatol": 1e-3, "fatol": 0.0, "adaptive": True}
    minimize(objective, start, method="Nelder-Mead", options=options)
    return best
