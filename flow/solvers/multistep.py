"""Multistep methods: one evaluation a step, the earlier ones are used again.

Adams-Bashforth extrapolates the velocity, DPM-Solver++ and UniPC the data prediction in lambda = log(t / (1 - t)), half the
log signal-to-noise ratio of the linear path. No method looks at t = 1, where lambda is infinite; where it is (at t = 0 too)
the latter two take an Euler step, which is their own first order there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from flow.solvers.runge_kutta import TABLEAUX, step

Velocity = Callable[[Tensor, float], Tensor]
BOOTSTRAP = {"ab2": (2, "euler"), "ab3": (3, "heun"), "ab4": (4, "heun3")}  # order, and one order less for the first steps


def adams_bashforth(velocity: Velocity, x: Tensor, grid: Sequence[float], method: str) -> Iterator[Tensor]:
    """Explicit Adams methods on any grid (Hairer, Norsett & Wanner 1993, Solving ODEs I, section III.1 and III.5)."""
    order, start = BOOTSTRAP[method]
    past: list[tuple[float, Tensor]] = []
    for i, (t, t_next) in enumerate(pairwise(grid)):
        if i < order - 1:  # Runge-Kutta; its first stage is the velocity here
            stages: list[Tensor] = []

            def recorded(x: Tensor, t: float, stages: list[Tensor] = stages) -> Tensor:
                stages.append(velocity(x, t))
                return stages[-1]

            tableau = TABLEAUX[start]
            x = step(TABLEAUX[tableau.final] if t_next == 1 and tableau.final else tableau, recorded, x, t, t_next - t)
            past.append((t, stages[0]))
        else:
            past = [*past[-(order - 1) :], (t, velocity(x, t))]
            for weight, (_, v) in zip(_weights([time for time, _ in past], t, t_next), past, strict=True):
                x = x + weight * v
        yield x


def dpm_solver_2m(velocity: Velocity, x: Tensor, grid: Sequence[float], method: str) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2)."""
    before: tuple[float, Tensor] | None = None  # lambda and data prediction of the last point
    for t, t_next in pairwise(grid):
        v = velocity(x, t)
        data, here = x + (1 - t) * v, _log_snr(t)
        if before is None or math.inf in (abs(before[0]), abs(here), abs(_log_snr(t_next))):
            x = x + (t_next - t) * v
        else:
            ratio = (_log_snr(t_next) - here) / (here - before[0])
            ahead = data + ratio / 2 * (data - before[1])
            x = _ddim_step(x, ahead, t, t_next)
        before = here, data
        yield x


def unipc(velocity: Velocity, x: Tensor, grid: Sequence[float], method: str) -> Iterator[Tensor]:
    """UniPC of order 2, data prediction, B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2).

    The corrector uses the evaluation that the next step needs anyway.
    """
    before: tuple[float, Tensor] | None = None
    data = x + (1 - grid[0]) * velocity(x, grid[0])  # the prediction at x
    for t, t_next in pairwise(grid):
        here, there = _log_snr(t), _log_snr(t_next)
        h = there - here
        if math.isinf(h):
            predicted = x + (t_next - t) * (data - x) / (1 - t)
            corrected = predicted
            slope = None
        else:
            slope = None if before is None or math.isinf(before[0]) else (before[1] - data) * (h / (before[0] - here))
            predicted = _ddim_step(x, data, t, t_next)
            if slope is not None:
                predicted = predicted - t_next * math.expm1(-h) * 0.5 * slope
        if t_next == 1:
            yield predicted
            return
        new = predicted + (1 - t_next) * velocity(predicted, t_next)
        if not math.isinf(h):
            corrected = _ddim_step(x, data, t, t_next)
            weights = [0.5] if slope is None or before is None else _corrector((before[0] - here) / h, h)
            differences = [new - data] if slope is None else [slope, new - data]
            for weight, difference in zip(weights, differences, strict=True):
                corrected = corrected - t_next * math.expm1(-h) * weight * difference
        before, x, data = (here, data), corrected, new
        yield x


def _ddim_step(x: Tensor, data: Tensor, t: float, t_next: float) -> Tensor:
    """The linear path with this data prediction all the way: exact integration of the first order."""
    return (1 - t_next) / (1 - t) * x + (t_next - t) / (1 - t) * data


def _log_snr(t: float) -> float:
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
