"""Multistep methods: one evaluation a step, earlier ones are reused.

Adams-Bashforth extrapolates the velocity, DPM-Solver++ and UniPC the data prediction in lambda = log(t / (1 - t)), half the
log signal-to-noise ratio of the linear path. No method evaluates t = 1. As lambda is infinite at t = 0 and t = 1, the latter
two take an Euler step from t = 0 and to t = 1, which is their own first-order step.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from flow.solvers.runge_kutta import StageVelocity, step

# order, and the method of the first steps, of one order less
ADAMS_BASHFORTH = {"ab2": (2, "euler"), "ab3": (3, "heun"), "ab4": (4, "heun3")}


def adams_bashforth(order: int, start: str, velocity: StageVelocity, x: Tensor, time_grid: Sequence[float]) -> Iterator[Tensor]:
    """Explicit Adams methods on any time grid (Hairer, Norsett & Wanner 1993, Solving ODEs I, section III.1 and III.5)."""
    history: list[tuple[float, Tensor]] = []
    for i, (t, t_next) in enumerate(pairwise(time_grid)):
        if i < order - 1:  # Runge-Kutta; its first stage is the velocity at x
            stages: list[Tensor] = []

            def recorded(x: Tensor, t: float, stages: list[Tensor] = stages) -> Tensor:
                stages.append(velocity(x, t))
                return stages[-1]

            x = step(start, recorded, x, t, t_next)
            history.append((t, stages[0]))
        else:
            history = [*history[-(order - 1) :], (t, velocity(x, t))]
            for weight, (_, v) in zip(_weights([time for time, _ in history], t, t_next), history, strict=True):
                x = x + weight * v
        yield x


def dpm_solver_2m(velocity: StageVelocity, x: Tensor, time_grid: Sequence[float]) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2)."""
    prev: tuple[float, Tensor] | None = None  # lambda and data prediction of the last point
    for t, t_next in pairwise(time_grid):
        v = velocity(x, t)
        x1_pred = x + (1 - t) * v
        lmbda = _half_log_snr(t)
        if prev is None or not all(map(math.isfinite, (prev[0], lmbda, _half_log_snr(t_next)))):
            x = _ddim_step(x, x1_pred, t, t_next)
        else:
            ratio = (_half_log_snr(t_next) - lmbda) / (lmbda - prev[0])
            x1_extrapolated = x1_pred + ratio / 2 * (x1_pred - prev[1])
            x = _ddim_step(x, x1_extrapolated, t, t_next)
        prev = lmbda, x1_pred
        yield x


def unipc(velocity: StageVelocity, x: Tensor, time_grid: Sequence[float]) -> Iterator[Tensor]:
    """UniPC of order 2, data prediction, B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2).

    The corrector uses the evaluation that the next step needs anyway.
    """
    prev: tuple[float, Tensor] | None = None
    x1_pred = x + (1 - time_grid[0]) * velocity(x, time_grid[0])  # the prediction at x
    for t, t_next in pairwise(time_grid):
        lmbda = _half_log_snr(t)
        h = _half_log_snr(t_next) - lmbda
        finite = math.isfinite(h)  # not at the ends of the path: the step there is of order 1
        first_order = _ddim_step(x, x1_pred, t, t_next)
        D1 = None
        if finite and prev and math.isfinite(prev[0]):
            D1 = (prev[1] - x1_pred) * (h / (prev[0] - lmbda))
        predicted = first_order if D1 is None else first_order - t_next * math.expm1(-h) * 0.5 * D1
        if t_next == time_grid[-1] and not finite:  # no corrector: no further step would use its evaluation
            yield predicted
            return
        x1_pred_next = predicted + (1 - t_next) * velocity(predicted, t_next)
        corrected = first_order
        if finite:
            weights = [0.5] if D1 is None or prev is None else _corrector((prev[0] - lmbda) / h, h)
            differences = [x1_pred_next - x1_pred] if D1 is None else [D1, x1_pred_next - x1_pred]
            for weight, difference in zip(weights, differences, strict=True):
                corrected = corrected - t_next * math.expm1(-h) * weight * difference
        prev, x, x1_pred = (lmbda, x1_pred), corrected, x1_pred_next
        yield x


def _ddim_step(x: Tensor, x1_pred: Tensor, t: float, t_next: float) -> Tensor:
    """The exact solution for a data prediction that stays constant over the step: a straight line towards it."""
    return (1 - t_next) / (1 - t) * x + (t_next - t) / (1 - t) * x1_pred


def _half_log_snr(t: float) -> float:
    """log(alpha / sigma) = log(t / (1 - t)), half of the log signal-to-noise ratio log(alpha^2 / sigma^2)."""
    return -math.inf if t <= 0 else math.inf if t >= 1 else math.log(t / (1 - t))


def _weights(times: list[float], t: float, t_next: float) -> list[float]:
    """Integrals over [t, t_next] of the Lagrange polynomials at `times`."""
    scale = t_next - t
    nodes = (np.array(times) - t) / scale
    moments = [1 / (k + 1) for k in range(len(times))]
    return (scale * np.linalg.solve(np.vander(nodes, increasing=True).T, moments)).tolist()


def _corrector(ratio: float, h: float) -> list[float]:
    """Weights of the corrector for the points lambda - |ratio| h and lambda + h, from its two order conditions."""
    phi_2 = math.expm1(-h) / -h - 1
    phi_3 = phi_2 / -h - 0.5
    matrix = np.array([[1.0, 1.0], [ratio, 1.0]])
    return np.linalg.solve(matrix, np.array([phi_2, 2 * phi_3]) / math.expm1(-h)).tolist()
