"""Explicit Runge-Kutta methods: Butcher tableaux as data, one stepping function."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

StageVelocity = Callable[[Tensor, float], Tensor]  # (x, t), at one time: no flow map jumps there


@dataclass(frozen=True)
class Tableau:
    """Stage i is evaluated at t + c[i] h and x + h sum_j a[i][j] k_j; the step adds h sum_i b[i] k_i."""

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    final: str | None = None  # method of the last step, where a stage of this one would lie on the data end


# A learned velocity must not be evaluated at t = 1: there x no longer depends on the noise, so the network predicts
# E[x1 - x0 | x1] = x1, and the weight b of that stage leaves b h x0 as noise in the image. A method with a stage there
# (c = 1) therefore ends with an open one; a last step of order p - 1 keeps the global order p.
TABLEAUX = {
    "euler": Tableau(1, (0.0,), ((),), (1.0,)),
    "midpoint": Tableau(2, (0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0)),
    "heun": Tableau(2, (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2), final="euler"),
    # Heun's third-order method (Hairer, Norsett & Wanner 1993, Solving ODEs I, table II.1.1)
    "heun3": Tableau(3, (0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    # "The" Runge-Kutta method (Kutta 1901; Hairer, Norsett & Wanner 1993, table II.1.2)
    "rk4": Tableau(
        4,
        (0.0, 1 / 2, 1 / 2, 1.0),
        ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
        final="heun3",
    ),
}
TABLEAUX["heun2"] = TABLEAUX["heun"]  # torchdiffeq's name


def integrate(method: str, velocity: StageVelocity, x: Tensor, time_grid: Sequence[float]) -> Iterator[Tensor]:
    """x [B, ...] from time_grid[0] on, at each further time."""
    for t, t_next in pairwise(time_grid):
        x = step(method, velocity, x, t, t_next)
        yield x


def step(method: str, velocity: StageVelocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """x [B, ...] at t -> x at t_next."""
    tableau = TABLEAUX[method]
    h = t_next - t
    if t_next == 1 and tableau.final:
        tableau = TABLEAUX[tableau.final]
    stages: list[Tensor] = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        xi = x
        for weight, k in zip(row, stages, strict=True):
            if weight:
                xi = xi + h * weight * k
        stages.append(velocity(xi, t + c * h))
    for weight, k in zip(tableau.b, stages, strict=True):
        if weight:
            x = x + h * weight * k
    return x
