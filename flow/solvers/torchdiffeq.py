"""Methods of torchdiffeq: adaptive ones and Adams methods. None evaluates the velocity outside the times it solves over.

Names that runge_kutta.py has too (euler, midpoint, heun2, heun3, rk4) are solved there, which never evaluates the data end.
"""

import warnings
from collections.abc import Iterator, Sequence

from torch import Tensor

from flow.solvers.runge_kutta import StageVelocity, step
from flow.solvers.time_grids import END_EPS

TOLERANCES = ("rtol", "atol")
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
SCIPY_METHOD = "RK45"  # torchdiffeq's default, LSODA, stores an n x n matrix for a batch of n numbers
# torchdiffeq's default order for Adams-Bashforth, 11, is unstable even on a rotation: 64 steps err by 1e-2, of order 4 by 1e-7.
ADAMS = {"max_order": 5}  # torchdiffeq's way to say 4, and 5 for the implicit methods


def adaptive(
    method: str, velocity: StageVelocity, x: Tensor, time_grid: Sequence[float], rtol: float = 1e-5, atol: float = 1e-5
) -> Iterator[Tensor]:
    """From time_grid[0] to time_grid[-1] with the step sizes of the tolerances; states between are interpolated.

    To the data end, t = 1, the tolerances hold up to 1 - END_EPS. From there one step of an open method of order 3, which
    evaluates the velocity no later than 1 - END_EPS / 3, goes to the end; states inside it are interpolated linearly. Its
    error does not depend on the tolerances: 1e-12 for the flow to a Gaussian of standard deviation 0.5, 3e-8 for 0.01, 2e-6
    for 0.002.

    One step size serves the whole batch, so an image depends on those beside it, by about the error that the tolerances
    leave. Raises ValueError for a tolerance out of range, and where the velocity is not finite or too steep for any step.
    """
    if time_grid[-1] != 1:
        yield from _odeint(method, velocity, x, time_grid, rtol, atol)[1:]
        return
    end = max(1 - END_EPS, time_grid[0])
    states = _odeint(method, velocity, x, [*(t for t in time_grid if t < end), end], rtol, atol)
    yield from states[1:-1]
    last = step("heun3", velocity, states[-1], end, 1.0)
    yield from (states[-1] + (t - end) / (1 - end) * (last - states[-1]) for t in time_grid[1:-1] if t >= end)
    yield last


def adams(
    method: str, velocity: StageVelocity, x: Tensor, time_grid: Sequence[float], rtol: float = 1e-5, atol: float = 1e-5
) -> Iterator[Tensor]:
    """Adams-Bashforth of order 4 after two Runge-Kutta steps and one of order 3, or Adams-Bashforth-Moulton of order 5: at most
    four corrections a step, until they agree within the tolerances over the whole batch.

    As many steps as the time grid has, all of one size, which their coefficients need. The last one, where it ends at the
    data, is one of an open Runge-Kutta method (order 3, which leaves a global order of 4). Raises ValueError for a tolerance
    out of range.
    """
    steps = len(time_grid) - 1
    start = time_grid[0]
    end = time_grid[-1]
    times = [start + (end - start) * i / steps for i in range(steps)]
    states = _odeint(method, velocity, x, times if end == 1 else [*times, end], rtol, atol, ADAMS)
    yield from states[1:]
    if end == 1:
        yield step("heun3", velocity, states[-1], times[-1], end)


def _odeint(
    method: str,
    velocity: StageVelocity,
    x: Tensor,
    times: Sequence[float],
    rtol: float,
    atol: float,
    options: dict | None = None,
) -> Tensor:
    """The states at the times, [T, B, ...]; the velocity is evaluated between the first and the last of them alone."""
    import torch
    from torchdiffeq import odeint  # which takes a second that other methods need not pay

    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value}: must be greater than 0 and less than 1")
    if len(times) == 1:
        return x[None]
    at = torch.tensor(times, dtype=x.dtype, device=x.device)
    low, high = min(times), max(times)

    failure = f"{method}: the velocity is not finite, or too steep to meet the tolerances"

    def within(t: Tensor, x: Tensor) -> Tensor:
        # The trial step by which torchdiffeq chooses its first step size may lead out of the interval.
        v = velocity(x, min(max(float(t), low), high))
        if method == "scipy_solver" and not torch.isfinite(v).all():  # else SciPy would try ever smaller steps without end
            raise ValueError(failure)
        return v

    if method == "scipy_solver":
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{method}: gives no gradient; use dopri5")
        options = {"solver": SCIPY_METHOD}
    elif method in ADAPTIVE_METHODS:  # which would step past the last time and interpolate back
        options = {"step_t": at[-1:]}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following arguments have no effect")  # min_step, which torchdiffeq passes on
            states = odeint(within, x, at, method=method, rtol=rtol, atol=atol, options=options)
    except AssertionError as error:
        raise ValueError(f"{failure} ({error})") from None
    if len(states) != len(times):  # SciPy returns the states before its failure
        raise ValueError(failure)
    return states
