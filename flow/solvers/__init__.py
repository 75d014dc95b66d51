"""Solvers of dx/dt = v(x, t): one registry, one function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from flow.solvers.runge_kutta import TABLEAUX, step

METHODS = tuple(TABLEAUX)


@dataclass
class Solution:
    x: Tensor  # the state at the end of the grid, [B, ...]
    nfe: int  # evaluations of the velocity, counted


def check(method: str) -> None:
    """Raises ValueError for a method that is not in the registry."""
    if method not in METHODS:
        raise ValueError(f"{method!r} is not a solver; choose one of {', '.join(METHODS)}")


def solve(velocity: Callable[[Tensor, float], Tensor], x: Tensor, grid: Sequence[float], method: str) -> Solution:
    """Integrate dx/dt = velocity(x, t) over the times of `grid`, from x [B, ...] at grid[0].

    Runs in the dtype of x. Where the last step ends at the data (t = 1), no stage is evaluated there (see
    runge_kutta.py), so N steps of heun cost 2N - 1 evaluations. Raises ValueError for an unknown method.
    """
    check(method)
    nfe = 0

    def counted(x: Tensor, t: float) -> Tensor:
        nonlocal nfe
        nfe += 1
        return velocity(x, t)

    for t, t_next in pairwise(grid):
        tableau = TABLEAUX[method]
        if t_next == 1 and tableau.final:
            tableau = TABLEAUX[tableau.final]
        x = step(tableau, counted, x, t, t_next - t)
    return Solution(x, nfe)
