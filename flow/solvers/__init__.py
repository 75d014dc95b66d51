"""Solvers of dx/dt = v(x, t) on the linear path: one registry, one function."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from flow.solvers import ancestral, consistency, multistep, runge_kutta, sde, torchdiffeq
from flow.solvers.time_grids import uniform

Velocity = Callable[[Tensor, float, float], Tensor]  # (x, t, t_next); ordinary networks ignore t_next


def _euler(velocity: Velocity, x: Tensor, time_grid: Sequence[float]) -> Iterator[Tensor]:
    for t, t_next in pairwise(time_grid):
        x = x + (t_next - t) * velocity(x, t, t_next)
        yield x


@dataclass(frozen=True)
class Solver:
    """How a method is solved, and what it takes."""

    states: Callable[..., Iterator[Tensor]]  # (velocity, x, time_grid, **options) -> the state at each further time
    options: tuple[str, ...] = ()
    whole_step: bool = False  # it passes where it jumps to as t_next, for flow maps; all others pass t twice
    times: Literal["grid", "even", "own"] = "grid"  # of its steps: those of the grid, as many even ones, or adaptive ones


SOLVERS: dict[str, Solver] = {
    "euler": Solver(_euler, whole_step=True),
    **{name: Solver(partial(runge_kutta.integrate, name)) for name in runge_kutta.TABLEAUX if name != "euler"},
    **{name: Solver(partial(multistep.adams_bashforth, *how)) for name, how in multistep.ADAMS_BASHFORTH.items()},
    "dpmpp_2m": Solver(multistep.dpm_solver_2m),
    "unipc": Solver(multistep.unipc),
    **{
        name: Solver(partial(torchdiffeq.adaptive, name), torchdiffeq.TOLERANCES, times="own")
        for name in torchdiffeq.ADAPTIVE_METHODS
    },
    "explicit_adams": Solver(partial(torchdiffeq.adams, "explicit_adams"), times="even"),
    **{
        name: Solver(partial(torchdiffeq.adams, name), torchdiffeq.TOLERANCES, times="even")
        for name in ("implicit_adams", "fixed_adams")  # two names of one method
    },
    "euler_maruyama": Solver(sde.euler_maruyama, sde.OPTIONS),
    "stochastic_heun": Solver(sde.stochastic_heun, sde.OPTIONS),
    "ddim": Solver(_euler, whole_step=True),  # which on the linear path is Euler's method (flow/solvers/ancestral.py)
    "consistency": Solver(consistency.renoised_jumps, ("noise",), whole_step=True),
    "ancestral": Solver(ancestral.ancestral, ("noise", "eta")),
}

DRY_SHAPE = (2, 3, 2, 2)  # of a dry run: a batch of images; its last axis also serves a solver of points [B, 2]
STOCHASTIC = tuple(name for name, solver in SOLVERS.items() if "noise" in solver.options)
DETERMINISTIC = tuple(name for name in SOLVERS if name not in STOCHASTIC)
HAS_TOLERANCES = tuple(name for name, solver in SOLVERS.items() if "rtol" in solver.options)  # met by a batch as one
ADAPTIVE = tuple(name for name, solver in SOLVERS.items() if solver.times == "own")
FIXED_GRID = tuple(name for name in DETERMINISTIC if SOLVERS[name].times == "grid" and not SOLVERS[name].options)


@dataclass
class Solution:
    x: Tensor  # the state at the end of the time grid, [B, ...]
    nfe: int  # evaluations of the velocity, counted


def check(method: str, **options: Any) -> None:
    """Raises ValueError for a method that is not in the registry and for an option that it does not take."""
    if method not in SOLVERS:
        raise ValueError(f"unknown solver {method!r}; choose from {', '.join(SOLVERS)}")
    allowed = SOLVERS[method].options
    for name in options:
        if name not in allowed:
            raise ValueError(f"{method} has no option {name!r}; it takes {', '.join(allowed) or 'none'}")


def validate_options(method: str, **options: Any) -> None:
    """Raises ValueError, before anything is computed, for what `solve` would refuse, and for noise, which is no setting."""
    if "noise" in options:
        raise ValueError("noise: is drawn from the seed and the index of an image")
    check(method, **options)
    _dry_run(method, 2, **options)


def max_steps_for_nfe(method: str, nfe: int, end: float = 1.0) -> int:
    """The most steps to `end` that take at most `nfe` evaluations, found by counting them.

    Raises ValueError where not even one step does, and for methods with tolerances, which choose their own number.
    """
    check(method)
    if method in HAS_TOLERANCES:
        raise ValueError(f"{method} chooses its own number of evaluations, by rtol and atol")
    steps = bisect_right(range(1, nfe + 1), nfe, key=lambda n: _dry_run(method, n, end=end).nfe)
    if not steps:
        raise ValueError(f"NFE {nfe}: {method} needs at least {_dry_run(method, 1, end=end).nfe}")
    return steps


def nfe(method: str, steps: int, start: float = 0.0, end: float = 1.0) -> int:
    """Velocity evaluations of so many steps of a method without tolerances, from t = start to t = end, in either direction."""
    return _dry_run(method, steps, start, end).nfe


def _dry_run(method: str, steps: int, start: float = 0.0, end: float = 1.0, **options: Any) -> Solution:
    x = torch.zeros(DRY_SHAPE, dtype=torch.float64)
    noise: dict[str, Any] = {"noise": lambda step: torch.zeros_like(x)} if method in STOCHASTIC else {}
    return solve(
        lambda x, t, t_next: x * 0,
        x,
        [start + (end - start) * t for t in uniform(steps)],
        method,
        **options,
        **noise,
    )


def solve(
    velocity: Velocity,
    x: Tensor,
    time_grid: Sequence[float],
    method: str,
    callback: Callable[[Tensor], object] | None = None,
    **options: Any,
) -> Solution:
    """Integrate dx/dt = velocity(x, t, t_next) over the times of `time_grid`, from x [B, ...] at time_grid[0].

    Euler and DDIM pass the end of their step as t_next (forward in time), so that flow maps jump there; `consistency` passes
    the data end, 1; others pass t twice.
    The times lie in [0, 1] and rise or fall; backwards they start before the data end, t = 1, where no method evaluates the
    velocity. Runs in the dtype of x. `options` are those of the method: rtol and atol, or noise, noise_scale and diffusion,
    or noise and eta. `callback` gets the state at each time of the grid after the first. Raises ValueError for what `check`
    refuses, for other times, without the noise of a stochastic method, and where a method with tolerances finds no step that
    meets them.
    """
    check(method, **options)
    if method in STOCHASTIC and options.get("noise") is None:
        raise ValueError(f"{method}: needs noise")
    if min(time_grid) < 0 or max(time_grid) > 1 or time_grid[0] == 1:
        raise ValueError(f"times from {time_grid[0]:g} to {time_grid[-1]:g}: must lie in [0, 1] and start before 1")
    backwards = bool(time_grid[-1] < time_grid[0])  # also of numpy's numbers
    if list(time_grid) != sorted({*time_grid}, reverse=backwards):
        raise ValueError(f"times {', '.join(f'{t:g}' for t in time_grid)}: must rise or fall at each step")
    if method in STOCHASTIC and backwards:
        raise ValueError(f"{method} adds noise, so it cannot be solved backwards; use an ODE solver such as heun")
    whole_step = SOLVERS[method].whole_step and not backwards
    nfe = 0

    def counted(x: Tensor, t: float, t_next: float | None = None) -> Tensor:
        nonlocal nfe
        nfe += 1
        return velocity(x, t, t_next if whole_step and t_next is not None else t)

    if method in ADAPTIVE and not callback:  # no need to interpolate between the ends
        time_grid = [time_grid[0], time_grid[-1]]
    state = x
    for state in SOLVERS[method].states(counted, x, time_grid, **options):
        if callback:
            callback(state)
    return Solution(state, nfe)
