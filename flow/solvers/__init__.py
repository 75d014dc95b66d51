"""Solvers of dx/dt = v(x, t) on the linear path: one registry, one function."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flow.solvers import ddim, multistep, runge_kutta, sde, torchdiffeq
from flow.solvers.time_grids import uniform

Velocity = Callable[[Tensor, float], Tensor]


def _runge_kutta(velocity: Velocity, x: Tensor, grid: Sequence[float], method: str) -> Iterator[Tensor]:
    for t, t_next in pairwise(grid):
        tableau = runge_kutta.TABLEAUX[method]
        if t_next == 1 and tableau.final:
            tableau = runge_kutta.TABLEAUX[tableau.final]
        x = runge_kutta.step(tableau, velocity, x, t, t_next - t)
        yield x


# name -> (function that gives the state at each time of the grid but the first, names of its options)
SOLVERS: dict[str, tuple[Callable[..., Iterator[Tensor]], tuple[str, ...]]] = {
    **dict.fromkeys(runge_kutta.TABLEAUX, (_runge_kutta, ())),
    **dict.fromkeys(multistep.BOOTSTRAP, (multistep.adams_bashforth, ())),
    "dpmpp_2m": (multistep.dpm_solver_2m, ()),
    "unipc": (multistep.unipc, ()),
    **dict.fromkeys(torchdiffeq.ADAPTIVE, (torchdiffeq.adaptive, torchdiffeq.OPTIONS)),
    "explicit_adams": (torchdiffeq.explicit_adams, ()),
    **dict.fromkeys(torchdiffeq.IMPLICIT, (torchdiffeq.implicit_adams, torchdiffeq.OPTIONS)),
    **dict.fromkeys(sde.SDE, (sde.sde, ("noise", "noise_scale", "diffusion"))),
    "ddim": (ddim.ancestral_step, ()),
    "ancestral": (ddim.ancestral_step, ("noise", "eta")),
}

STOCHASTIC = tuple(name for name, (_, options) in SOLVERS.items() if "noise" in options)
DETERMINISTIC = tuple(name for name in SOLVERS if name not in STOCHASTIC)
HAS_TOLERANCES = tuple(name for name, (_, options) in SOLVERS.items() if "rtol" in options)  # met by a batch as one
FIXED_GRID = tuple(name for name in DETERMINISTIC if name not in torchdiffeq.IGNORES_GRID and SOLVERS[name][1] == ())


@dataclass
class Solution:
    x: Tensor  # the state at the end of the grid, [B, ...]
    nfe: int  # evaluations of the velocity, counted


def check(method: str, **options: Any) -> None:
    """Raises ValueError for a method that is not in the registry and for an option that it does not take."""
    if method not in SOLVERS:
        raise ValueError(f"{method!r} is no solver; choose one of {', '.join(SOLVERS)}")
    known = SOLVERS[method][1]
    for name in options:
        if name not in known:
            raise ValueError(f"{method} has no option {name!r}; it takes {', '.join(known) or 'none'}")


def validate_options(method: str, **options: Any) -> None:
    """Raises ValueError, before anything is computed, for what `solve` would refuse."""
    _dry_run(method, 2, **options)


def max_steps_for_nfe(method: str, nfe: int, end: float = 1.0) -> int:
    """The most steps to `end` that take at most `nfe` evaluations, found by counting them.

    Raises ValueError where not even one step does, and for methods with tolerances, which choose their own number.
    """
    check(method)
    if method in HAS_TOLERANCES:
        raise ValueError(f"{method} chooses its own number of evaluations, by rtol and atol")
    steps = bisect_right(range(1, nfe + 1), nfe, key=lambda n: _dry_run(method, n, end).nfe)
    if not steps:
        raise ValueError(f"NFE {nfe}: {method} needs at least {_dry_run(method, 1, end).nfe}")
    return steps


def _dry_run(method: str, steps: int, end: float = 1.0, **options: Any) -> Solution:
    noise: dict[str, Any] = {"noise": lambda step: torch.zeros(1)} if method in STOCHASTIC else {}
    return solve(
        lambda x, t: x * 0, torch.zeros(1, dtype=torch.float64), [end * t for t in uniform(steps)], method, **options, **noise
    )


def solve(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    method: str,
    watch: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> Solution:
    """Integrate dx/dt = velocity(x, t) over the times of `grid`, from x [B, ...] at grid[0].

    The times lie in [0, 1] and rise or fall; backwards they start before the data end, t = 1, where no method evaluates the
    velocity. Runs in the dtype of x. `options` are those of the method: rtol and atol, or noise, noise_scale and diffusion,
    or noise and eta. `watch` is shown the state at each time of the grid after the first. Raises ValueError for what `check`
    refuses, for other times, and where a method with tolerances finds no step that meets them.
    """
    check(method, **options)
    if min(grid) < 0 or max(grid) > 1 or grid[0] == 1:
        raise ValueError(f"times from {grid[0]:g} to {grid[-1]:g}: must lie in [0, 1] and start before 1")
    nfe = 0

    def counted(x: Tensor, t: float) -> Tensor:
        nonlocal nfe
        nfe += 1
        return velocity(x, t)

    if method in torchdiffeq.ADAPTIVE and not watch:  # which would interpolate, and keep, what nobody looks at
        grid = [grid[0], grid[-1]]
    state = x
    for state in SOLVERS[method][0](counted, x, grid, method, **options):
        if watch:
            watch(state)
    return Solution(state, nfe)
